// SPDX-License-Identifier: Apache-2.0
// CPUID as a guest sees it: topology, features, the paravirtual leaves.
#include <doctest/doctest.h>

#include <asm/kvm_para.h>

#include <algorithm>
#include <cstring>

#include "kvm/cpuid.hpp"

using namespace vmm;

namespace {

kvm_cpuid_entry2 leaf(uint32_t function, uint32_t index, uint32_t eax, uint32_t ebx, uint32_t ecx, uint32_t edx) {
  kvm_cpuid_entry2 entry{};
  entry.function = function;
  entry.index = index;
  entry.eax = eax;
  entry.ebx = ebx;
  entry.ecx = ecx;
  entry.edx = edx;
  return entry;
}

kvm_cpuid_entry2 vendor(uint32_t max_leaf, const char* name) {
  kvm_cpuid_entry2 entry = leaf(0, 0, max_leaf, 0, 0, 0);
  std::memcpy(&entry.ebx, name, 4);
  std::memcpy(&entry.edx, name + 4, 4);
  std::memcpy(&entry.ecx, name + 8, 4);
  return entry;
}

std::vector<kvm_cpuid_entry2> intel() {
  return {vendor(0x1f, "GenuineIntel"),
          leaf(1, 0, 0x50657, 0x0700'0800, 1u << 3 | 1u << 5 | 1u << 21, 0x078b'fbff),
          leaf(4, 0, 0x1c00'4121, 0x01c0'003f, 0x3f, 0),    // L1 data
          leaf(4, 1, 0x1c00'4122, 0x01c0'003f, 0x3f, 0),    // L1 instructions
          leaf(4, 2, 0x1c00'4143, 0x03c0'003f, 0x3ff, 0),   // L2
          leaf(4, 3, 0x1c03'c163, 0x02c0'003f, 0x3fff, 4),  // L3
          leaf(4, 4, 0, 0, 0, 0),
          leaf(5, 0, 0x40, 0x40, 3, 0),
          leaf(0xb, 0, 0, 0, 0, 0),
          leaf(0x1f, 0, 0, 0, 0, 0),
          leaf(KVM_CPUID_SIGNATURE, 0, KVM_CPUID_FEATURES, 0x4b4d564b, 0x564b4d56, 0x4d),
          leaf(KVM_CPUID_FEATURES, 0, 0x0103'fefb, 0, 0, 0),
          leaf(0x8000'0001, 0, 0, 0, 0x121, 0x2c10'0800),
          leaf(0x8000'0007, 0, 0, 0, 0, 0x100),
          leaf(0x8000'0008, 0, 0x302e, 0, 0, 0)};
}

std::vector<kvm_cpuid_entry2> amd() {
  return {vendor(0x10, "AuthenticAMD"),
          leaf(1, 0, 0xa00f11, 0x0002'0800, 0x8120'2008, 0x078b'fbff),
          leaf(4, 0, 0, 0, 0, 0),
          leaf(0x8000'0001, 0, 0xa00f11, 0, 0x0040'0397, 0x23d3'fbff),
          leaf(0x8000'0008, 0, 0x3030, 0, 0x7001, 0),
          leaf(0x8000'001d, 0, 0x4121, 0x01c0'003f, 0x3f, 0),
          leaf(0x8000'001d, 2, 0x4143, 0x01c0'003f, 0x3ff, 2),
          leaf(0x8000'001d, 3, 0x3c163, 0x03c0'003f, 0x7fff, 1),
          leaf(0x8000'001d, 4, 0, 0, 0, 0),
          leaf(0x8000'001e, 0, 7, 0x107, 1, 0)};
}

const kvm_cpuid_entry2& at(const std::vector<kvm_cpuid_entry2>& table, uint32_t function, uint32_t index = 0) {
  const auto found = std::ranges::find_if(
      table, [=](const auto& entry) { return entry.function == function && entry.index == index; });
  REQUIRE(found != table.end());
  return *found;
}

uint32_t bits(uint32_t value, uint32_t high, uint32_t low) { return value >> low & ((2u << (high - low)) - 1); }

}  // namespace

TEST_CASE("topology of several vCPUs, Intel") {
  const auto table = build_cpuid(intel(), {.vcpus = 6}, 5);
  CHECK(bits(at(table, 1).ebx, 31, 24) == 5);
  CHECK(bits(at(table, 1).ebx, 23, 16) == 8);
  CHECK(bits(at(table, 1).ebx, 15, 8) == 8);  // CLFLUSH line size is the host's
  CHECK(bits(at(table, 1).edx, 28, 28) == 1);
  for (uint32_t index : {0, 1, 2}) {
    CHECK(bits(at(table, 4, index).eax, 31, 26) == 7);
    CHECK(bits(at(table, 4, index).eax, 25, 14) == 0);
  }
  CHECK(bits(at(table, 4, 3).eax, 25, 14) == 7);
  CHECK(at(table, 4, 4).eax == 0);
  for (uint32_t function : {0xb, 0x1f}) {
    CHECK(at(table, function, 0).eax == 0);
    CHECK(at(table, function, 0).ebx == 1);
    CHECK(at(table, function, 0).ecx == 0x100);
    CHECK(at(table, function, 1).eax == 3);
    CHECK(at(table, function, 1).ebx == 6);
    CHECK(at(table, function, 1).ecx == 0x201);
    CHECK(at(table, function, 2).ecx == 2);
    for (uint32_t index : {0, 1, 2}) {
      CHECK(at(table, function, index).edx == 5);
      CHECK(at(table, function, index).flags == KVM_CPUID_FLAG_SIGNIFCANT_INDEX);
    }
  }
  CHECK(at(table, 0x8000'0008).ecx == 0);  // AMD's count is not for Intel
}

TEST_CASE("topology of one vCPU") {
  const auto table = build_cpuid(intel(), {.vcpus = 1}, 0);
  CHECK(bits(at(table, 1).ebx, 31, 16) == 1);
  CHECK(bits(at(table, 1).edx, 28, 28) == 0);
  CHECK(bits(at(table, 4, 3).eax, 31, 14) == 0);
  CHECK(at(table, 0xb, 1).eax == 0);
  CHECK(at(table, 0xb, 1).ebx == 1);
}

TEST_CASE("topology of several vCPUs, AMD") {
  const auto table = build_cpuid(amd(), {.vcpus = 32}, 31);
  CHECK(at(table, 0).eax == 0x10);
  CHECK(bits(at(table, 0x8000'0001).ecx, 1, 1) == 1);
  CHECK(at(table, 0x8000'0008).ecx == 0x501f);
  CHECK(bits(at(table, 0x8000'001d, 0).eax, 25, 14) == 0);
  CHECK(bits(at(table, 0x8000'001d, 3).eax, 25, 14) == 31);
  CHECK(at(table, 0x8000'001d, 4).eax == 0);
  CHECK(at(table, 0x8000'001e).eax == 31);
  CHECK(at(table, 0x8000'001e).ebx == 31);
  CHECK(at(table, 0x8000'001e).ecx == 0);
  CHECK(at(table, 0xb, 1).eax == 5);
  CHECK(std::ranges::none_of(table, [](const auto& entry) { return entry.function == 0x1f; }));
}

TEST_CASE("an old CPU's highest leaf grows to the extended topology") {
  auto old = amd();
  old[0].eax = 7;
  CHECK(at(build_cpuid(old, {.vcpus = 2}, 0), 0).eax == 0xb);
}

TEST_CASE("features: hypervisor, no MONITOR, timers, nesting by choice") {
  const auto plain = build_cpuid(intel(), {.tsc_deadline_timer = true}, 0);
  CHECK(bits(at(plain, 1).ecx, 31, 31) == 1);
  CHECK(bits(at(plain, 1).ecx, 24, 24) == 1);
  CHECK(bits(at(plain, 1).ecx, 21, 21) == 1);  // x2APIC, as KVM has it
  CHECK(bits(at(plain, 1).ecx, 5, 3) == 0);
  CHECK(at(plain, 5).ecx == 0);
  CHECK(at(plain, 0x8000'0007).edx == 0x100);  // invariant TSC
  CHECK(bits(at(build_cpuid(intel(), {}, 0), 1).ecx, 24, 24) == 0);
  CHECK(bits(at(build_cpuid(intel(), {.nested_virtualization = true}, 0), 1).ecx, 5, 5) == 1);
  CHECK(bits(at(build_cpuid(amd(), {}, 0), 0x8000'0001).ecx, 2, 2) == 0);
  CHECK(bits(at(build_cpuid(amd(), {.nested_virtualization = true}, 0), 0x8000'0001).ecx, 2, 2) == 1);
}

TEST_CASE("paravirtual leaves") {
  const auto table = build_cpuid(intel(), {.tsc_khz = 2'450'000}, 0);
  CHECK(at(table, KVM_CPUID_SIGNATURE).eax == 0x4000'0010);
  CHECK(at(table, KVM_CPUID_SIGNATURE).ebx == 0x4b4d564b);
  CHECK(at(table, KVM_CPUID_FEATURES).eax == 0x0100'7efb);
  CHECK(at(table, 0x4000'0010).eax == 2'450'000);
  CHECK(at(table, 0x4000'0010).ebx == 1'000'000);
  const auto unknown = build_cpuid(intel(), {.tsc_khz = 0}, 0);
  CHECK(at(unknown, KVM_CPUID_SIGNATURE).eax == KVM_CPUID_FEATURES);
  CHECK(std::ranges::none_of(unknown, [](const auto& entry) { return entry.function == 0x4000'0010; }));
}
