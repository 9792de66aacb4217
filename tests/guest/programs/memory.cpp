// SPDX-License-Identifier: Apache-2.0
// Memory below the hole at 3 GiB and above 4 GiB, with page tables of the guest's own; and the hole itself.
#include "guest.hpp"

namespace {

constexpr uint64_t kGiB = 1ull << 30;
constexpr uint64_t kHole = 3 * kGiB;
constexpr uint64_t kHigh = 4 * kGiB;
constexpr unsigned kMappedGiB = 8;

alignas(4096) uint64_t top[512];
alignas(4096) uint64_t directory_pointers[512];
alignas(4096) uint64_t directories[kMappedGiB][512];

void map_memory() {
  constexpr uint64_t present_writable = 3, large = 0x80;
  top[0] = reinterpret_cast<uint64_t>(directory_pointers) | present_writable;
  for (unsigned i = 0; i < kMappedGiB; ++i) {
    directory_pointers[i] = reinterpret_cast<uint64_t>(directories[i]) | present_writable;
    for (unsigned j = 0; j < 512; ++j) directories[i][j] = i * kGiB + (uint64_t{j} << 21) + large + present_writable;
  }
  asm volatile("mov %0, %%cr3" ::"r"(top) : "memory");
}

// The end of memory above 4 GiB, from the E820 map of boot_params; checks what it says below.
uint64_t high_end() {
  uint64_t end = 0, low_end = 0;
  for (unsigned i = 0; i < at<uint8_t>(kBootInfo + 0x1e8); ++i) {
    const uint64_t entry = kBootInfo + 0x2d0 + i * 20;
    const uint64_t start = at<uint64_t>(entry), size = at<uint64_t>(entry + 8);
    if (at<uint32_t>(entry + 16) != 1) continue;
    if (start >= kHigh) {
      CHECK_EQUAL(start, kHigh);
      end = start + size;
    } else if (start + size > low_end) {
      low_end = start + size;
    }
  }
  CHECK_EQUAL(low_end, kHole);
  return end;
}

uint64_t pattern(uint64_t address) { return address * 0x9e3779b97f4a7c15; }

}  // namespace

void program() {
  map_memory();
  const uint64_t end = high_end();
  print("high memory ends at ", end >> 20, " MiB\n");
  const uint64_t addresses[] = {
      16 << 20,  kGiB - 8, kGiB,         2 * kGiB,     2 * kGiB + 0x12345678,     kHole - 4096,
      kHole - 8, kHigh,    kHigh + 4088, kHigh + kGiB, kHigh + kGiB + 0x12345678, end - 4096,
      end - 8};
  for (const uint64_t address : addresses) {
    CHECK_EQUAL(at<uint64_t>(address), 0);
    at<uint64_t>(address) = pattern(address);
  }
  // All at the end: none is another's alias.
  for (const uint64_t address : addresses) CHECK_EQUAL(at<uint64_t>(address), pattern(address));
  // Where nothing is, reads give ones and writes are lost.
  for (const uint64_t address : {kHole + 0x800'0000, kHole + 0x1000'0000, kHigh - 0x2000'0000, end, end + kGiB}) {
    CHECK_EQUAL(at<uint64_t>(address), ~0ull);
    at<uint64_t>(address) = 0;
    CHECK_EQUAL(at<uint64_t>(address), ~0ull);
    CHECK_EQUAL(at<uint8_t>(address + 1), 0xff);
    CHECK_EQUAL(at<uint16_t>(address + 2), 0xffff);
    CHECK_EQUAL(at<uint32_t>(address + 4), 0xffff'ffff);
  }
  for (const uint64_t address : addresses) CHECK_EQUAL(at<uint64_t>(address), pattern(address));
}
