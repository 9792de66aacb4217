// SPDX-License-Identifier: Apache-2.0
// Guest memory: the split around the hole, refused sizes, checked access, dirty marks.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <cstring>
#include <fstream>
#include <iterator>

#include "memory/guest_memory.hpp"

using namespace vmm;

namespace {
constexpr uint64_t kMiB = 1ull << 20;
constexpr uint64_t kGiB = 1ull << 30;

GuestMemory make(uint64_t size_bytes, MemoryBacking backing = MemoryBacking::anonymous) {
  auto memory = GuestMemory::create({.size_bytes = size_bytes, .backing = backing});
  REQUIRE(memory.ok());
  return std::move(*memory);
}

std::string refusal(MemoryConfig config) {
  auto memory = GuestMemory::create(config);
  REQUIRE_FALSE(memory.ok());
  return memory.error().message;
}

uint64_t count(const std::vector<uint64_t>& words) {
  uint64_t bits = 0;
  for (uint64_t word : words) bits += static_cast<uint64_t>(std::popcount(word));
  return bits;
}
}  // namespace

TEST_CASE("memory: one region up to 3 GiB, two above") {
  CHECK(make(kPageSize).regions().size() == 1);
  CHECK(make(3 * kGiB).regions().size() == 1);
  GuestMemory memory = make(3 * kGiB + kPageSize);
  REQUIRE(memory.regions().size() == 2);
  CHECK(memory.regions()[0].start.value == 0);
  CHECK(memory.regions()[0].size_bytes == 3 * kGiB);
  CHECK(memory.regions()[1].start.value == 4 * kGiB);
  CHECK(memory.regions()[1].size_bytes == kPageSize);
  CHECK(memory.size_bytes() == 3 * kGiB + kPageSize);
  CHECK(memory.low_end().value == 3 * kGiB);
  CHECK(memory.memfd() == -1);

  GuestMemory large = make(100 * kGiB);
  CHECK(large.regions()[1].size_bytes == 97 * kGiB);
  CHECK(large.store(GuestAddress{101 * kGiB - 8}, uint64_t{7}));
  CHECK(large.load<uint64_t>(GuestAddress{101 * kGiB - 8}) == 7);
  for (const auto& region : large.regions()) CHECK(reinterpret_cast<uintptr_t>(region.host) % (2 * kMiB) == 0);
}

TEST_CASE("memory: sizes that cannot be are refused by name") {
  CHECK(refusal({.size_bytes = 0}) == "memory: 0 bytes: the size has to be a multiple of 4096 bytes, and more than 0");
  CHECK(refusal({.size_bytes = 4097}).find("4097 bytes: the size has to be a multiple of 4096") != std::string::npos);
  CHECK(refusal({.size_bytes = 99999999 * kMiB}) ==
        "memory: 99999999 MiB: the host cannot map that much (at most 4194304 MiB in one guest)");
  CHECK(refusal({.size_bytes = ~uint64_t{0} - 4095}).find("the host cannot map that much") != std::string::npos);
  CHECK(refusal({.size_bytes = 3 * kMiB, .huge_pages = HugePages::reserved_2m}).find("multiple of 2 MiB") !=
        std::string::npos);
  // No host has a pool of huge pages for this one.
  const std::string huge = refusal({.size_bytes = 2ull << 40, .huge_pages = HugePages::reserved_2m});
  CHECK(huge.find("memory: 2097152 MiB: the host cannot map that much (") == 0);
}

TEST_CASE("memory: only whole ranges inside one region are memory") {
  GuestMemory memory = make(3 * kGiB + kMiB);
  CHECK(memory.slice({0}, 3 * kGiB) == memory.regions()[0].host);
  CHECK(memory.slice({kHoleStart - 1}, 1) != nullptr);
  CHECK(memory.slice({kHoleStart - 1}, 0) != nullptr);
  CHECK(memory.slice({kHoleStart}, 0) == nullptr);
  CHECK(memory.slice({kHoleStart - 1}, 2) == nullptr);
  CHECK(memory.slice({kHoleEnd - 1}, 2) == nullptr);
  CHECK(memory.slice({kHoleEnd}, kMiB) == memory.regions()[1].host);
  CHECK(memory.slice({kHoleEnd}, kMiB + 1) == nullptr);
  CHECK(memory.slice({kHoleEnd + kMiB}, 1) == nullptr);
  CHECK(memory.slice({~uint64_t{0}}, 1) == nullptr);
  CHECK(memory.slice({1}, ~uint64_t{0}) == nullptr);
  CHECK(memory.slice({kHoleEnd + 1}, ~uint64_t{0} - kHoleEnd) == nullptr);

  uint64_t value = 5;
  CHECK_FALSE(memory.read({kHoleStart - 4}, &value, 8));
  CHECK(value == 5);
  CHECK_FALSE(memory.write({kHoleStart - 4}, &value, 8));
  CHECK(memory.load<uint32_t>({kHoleStart - 4}) == 0);
  CHECK_FALSE(memory.load<uint32_t>({kHoleStart - 3}).has_value());
}

TEST_CASE("memory: a memfd holds both regions, sealed against a change of size") {
  GuestMemory memory = make(3 * kGiB + kMiB, MemoryBacking::memfd);
  struct stat status {};
  REQUIRE(::fstat(memory.memfd(), &status) == 0);
  CHECK(static_cast<uint64_t>(status.st_size) == 3 * kGiB + kMiB);
  REQUIRE(memory.store({kHoleEnd + 16}, uint32_t{0xabcd}));
  REQUIRE(memory.store({16}, uint32_t{0x1234}));
  uint32_t seen = 0;
  CHECK(::pread(memory.memfd(), &seen, 4, 3 * kGiB + 16) == 4);
  CHECK(seen == 0xabcd);
  CHECK(::pread(memory.memfd(), &seen, 4, 16) == 4);
  CHECK(seen == 0x1234);
  CHECK(::ftruncate(memory.memfd(), 4096) == -1);
}

TEST_CASE("memory: a memfd is handed on, what is written afterwards stays here") {
  GuestMemory memory = make(3 * kGiB + kMiB, MemoryBacking::memfd);
  memory.prefer_huge_pages({kMiB}, kMiB);  // splits the mapping, where the host has such pages
  REQUIRE(memory.store({16}, uint32_t{1}));
  REQUIRE(memory.store({kHoleEnd + 16}, uint32_t{2}));
  const Fd file(::fcntl(memory.memfd(), F_DUPFD_CLOEXEC, 0));
  auto before = memory.make_private();
  REQUIRE(before.ok());
  CHECK(memory.memfd() == -1);
  CHECK(memory.load<uint32_t>({16}) == 1);
  CHECK(memory.load<uint32_t>({kHoleEnd + 16}) == 2);
  REQUIRE(memory.store({16}, uint32_t{3}));
  uint32_t seen = 0;
  CHECK(::pread(file.get(), &seen, 4, 16) == 4);
  CHECK(seen == 1);
  // Moved and not dropped, all of it; writing is over when it is gone.
  REQUIRE(before->size() == 2);
  std::memcpy(&seen, (*before)[1].data() + 16, 4);
  CHECK(seen == 2);
  CHECK(::fcntl(file.get(), F_ADD_SEALS, F_SEAL_WRITE) == -1);
  before->clear();
  CHECK(::fcntl(file.get(), F_ADD_SEALS, F_SEAL_WRITE) == 0);
}

TEST_CASE("memory: of a memfd only what holds data is visited, and its holes stay") {
  GuestMemory memory = make(16 * kMiB, MemoryBacking::memfd);
  for (const uint64_t page : {3, 4, 4095}) REQUIRE(memory.store({page * kPageSize}, page));
  const auto stored_bytes = [&] {
    struct stat status {};
    REQUIRE(::fstat(memory.memfd(), &status) == 0);
    return static_cast<uint64_t>(status.st_blocks) * 512;
  };
  const uint64_t stored_before = stored_bytes();
  uint64_t visited_bytes = 0, found = 0;
  const auto visit = [&](uint64_t offset, std::span<const std::byte> bytes) -> Result<void> {
    visited_bytes += bytes.size();
    for (const uint64_t page : {3, 4, 4095})
      found += page * kPageSize >= offset && page * kPageSize < offset + bytes.size();
    return {};
  };
  REQUIRE(memory.visit_contents(kMiB, visit).ok());
  CHECK(found == 3);
  CHECK(visited_bytes == stored_before);
  CHECK(stored_bytes() == stored_before);
}

TEST_CASE("memory: prefaulted pages are present, and no others") {
  GuestMemory memory = make(16 * kMiB);
  ::madvise(memory.regions()[0].host, 16 * kMiB, MADV_NOHUGEPAGE);
  memory.prefault({5 * kPageSize + 1}, kPageSize);
  memory.prefault({16 * kMiB}, 1);
  std::vector<unsigned char> present(16 * kMiB / kPageSize);
  REQUIRE(::mincore(memory.regions()[0].host, 16 * kMiB, present.data()) == 0);
  CHECK(present[4] == 0);
  CHECK(present[5] == 1);
  CHECK(present[6] == 1);
  CHECK(present[7] == 0);
}

TEST_CASE("memory: dirty marks") {
  GuestMemory memory = make(3 * kGiB + kMiB);
  const std::byte data[3 * kPageSize]{};
  REQUIRE(memory.write({0}, data, 1));
  CHECK(memory.take_dirty(0).empty());

  memory.enable_dirty_tracking(true);
  CHECK(count(memory.take_dirty(0)) == 0);
  REQUIRE(memory.write({kPageSize - 1}, data, 2));               // pages 0 and 1
  REQUIRE(memory.write({63 * kPageSize}, data, 2 * kPageSize));  // 63 and 64, over the end of a word
  REQUIRE(memory.write({kHoleEnd + kMiB - 1}, data, 1));         // the last page of the second region
  REQUIRE(memory.write({5 * kPageSize}, data, 0));               // nothing
  memory.mark_dirty({128 * kPageSize}, 200 * kPageSize);         // words 2 to 5, the last one in part
  memory.mark_dirty({kHoleStart - 1}, 2);                        // not memory
  const auto low = memory.take_dirty(0);
  REQUIRE(low.size() == 3 * kGiB / kPageSize / 64);
  CHECK(low[0] == ((1ull << 63) | 3));
  CHECK(low[1] == 1);
  CHECK(low[2] == ~0ull);
  CHECK(low[5] == 0xff);
  CHECK(count(low) == 4 + 200);
  CHECK(memory.take_dirty(1)[3] == 1ull << 63);
  CHECK(count(memory.take_dirty(0)) == 0);

  memory.mark_dirty({0}, 1);
  memory.enable_dirty_tracking(false);
  memory.mark_dirty({kPageSize}, 1);
  CHECK(memory.take_dirty(0)[0] == 1);
  memory.mark_dirty({0}, 1);
  memory.enable_dirty_tracking(true);
  CHECK(count(memory.take_dirty(0)) == 0);

  GuestMemory moved = std::move(memory);
  REQUIRE(moved.store({8 * kPageSize}, 1));
  CHECK(moved.take_dirty(0)[0] == 1ull << 8);
}

TEST_CASE("memory: a set of pages is visited in runs, in pieces, region by region") {
  PageSet pages;
  pages.add(0, std::vector<uint64_t>{1ull << 63, 1});                            // 63 and 64
  pages.add(3 * kGiB / kPageSize - 64, std::vector<uint64_t>{1ull << 63});       // the last of the first region
  pages.add(3 * kGiB / kPageSize, std::vector<uint64_t>{~0ull, 0, ~0ull >> 1});  // 64, and 63 further on
  pages.add(0, std::vector<uint64_t>{1ull << 63 | 1});
  CHECK(pages.count() == 3 + 1 + 64 + 63);
  const GuestMemory memory = make(3 * kGiB + 200 * kPageSize);
  std::vector<std::pair<uint64_t, uint64_t>> seen;
  const auto visit = [&](uint64_t offset, std::span<const std::byte> bytes) -> Result<void> {
    const uint64_t address = offset < 3 * kGiB ? offset : offset + 1 * kGiB;
    CHECK(bytes.data() == memory.slice({address}, bytes.size()));
    seen.emplace_back(offset / kPageSize, bytes.size() / kPageSize);
    return {};
  };
  REQUIRE(memory.visit_pages(pages, 40 * kPageSize, visit).ok());
  constexpr uint64_t high = 3 * kGiB / kPageSize;
  const std::vector<std::pair<uint64_t, uint64_t>> expected{
      {0, 1}, {63, 2}, {high - 1, 1}, {high, 40}, {high + 40, 24}, {high + 128, 40}, {high + 168, 23}};
  CHECK((seen == expected));
  // What lies behind the memory is nobody's; an error ends it.
  pages.add(high + 192, std::vector<uint64_t>{~0ull});
  seen.clear();
  REQUIRE(memory.visit_pages(pages, 1 * kGiB, visit).ok());
  CHECK(seen.back() == std::pair<uint64_t, uint64_t>{high + 192, 8});
  CHECK(!memory.visit_pages(pages, kPageSize, [](auto, auto) -> Result<void> { return Error{"no"}; }).ok());
  pages.clear();
  CHECK(pages.count() == 0);
}

TEST_CASE("memory: more extents than the kernel has mappings for are restored, the largest as mappings") {
  constexpr uint64_t pages = 140'000;
  const Fd file(::memfd_create("snapshot", MFD_CLOEXEC));
  REQUIRE(::ftruncate(file.get(), static_cast<off_t>(pages * kPageSize)) == 0);
  for (uint64_t page = 0; page < pages; ++page)
    REQUIRE(::pwrite(file.get(), &page, sizeof page, static_cast<off_t>(page * kPageSize)) == sizeof page);
  // Every other page, from the file's end on backwards; a large one in the middle.
  std::vector<MemoryExtent> extents;
  for (uint64_t page = 0; page < pages; page += 2) {
    const bool large = page == pages / 2;
    extents.push_back({file.get(), (pages - page - 10) * kPageSize, page * kPageSize, (large ? 5 : 1) * kPageSize});
    if (large) page += 4;
    if (page + 12 > pages) break;
  }
  const auto count_mappings = [] {
    std::ifstream maps("/proc/self/maps");
    return static_cast<uint64_t>(std::count(std::istreambuf_iterator<char>(maps), {}, '\n'));
  };
  const uint64_t before = count_mappings();
  const auto memory = GuestMemory::restore({.size_bytes = pages * kPageSize, .mergeable = false}, extents);
  REQUIRE(memory.ok());
  CHECK(count_mappings() - before < 10);
  uint64_t damaged = 0, next = 0;
  const auto value = [&](uint64_t page) { return *memory->load<uint64_t>({page * kPageSize}); };
  for (const MemoryExtent& extent : extents) {
    for (; next < extent.memory_offset / kPageSize; ++next) damaged += value(next) != 0;
    for (uint64_t i = 0; i < extent.size_bytes / kPageSize; ++i)
      damaged += value(next++) != extent.fd_offset / kPageSize + i;
  }
  CHECK(damaged == 0);
  // It is the machine's own: the file does not change with it.
  auto* const page = memory->slice({0}, kPageSize);
  *page = ~*page;
  std::byte original{};
  REQUIRE(::pread(file.get(), &original, 1, static_cast<off_t>(extents.front().fd_offset)) == 1);
  CHECK(original != *page);

  REQUIRE(::ftruncate(file.get(), static_cast<off_t>(kPageSize)) == 0);
  const auto cut = GuestMemory::restore({.size_bytes = pages * kPageSize}, extents);
  REQUIRE(!cut.ok());
  CHECK(cut.error().message.find("ends too early") != std::string::npos);
}
