// SPDX-License-Identifier: Apache-2.0
// Guest memory: the split around the hole, refused sizes, checked access, dirty marks.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>

#include "memory/guest_memory.hpp"
#include "memory/pagemap.hpp"

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
  REQUIRE(memory.visit_pages(*memory.contents(), kMiB, visit).ok());
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

TEST_CASE("memory: what a restored one holds anew is known") {
  // On both sides of the hole, mapped as a whole or in parts; pages behind the parts are zeroes.
  constexpr uint64_t high = 3 * kGiB / kPageSize, pages = high + 4096, span = 2000, step = 3;
  const Fd file(::memfd_create("snapshot", MFD_CLOEXEC));
  REQUIRE(::ftruncate(file.get(), static_cast<off_t>(pages * kPageSize)) == 0);
  std::vector<bool> has_data(pages);
  std::vector<uint64_t> used;
  for (uint64_t page = 0; page < span; ++page) used.insert(used.end(), {page * step, high + page * 2});
  for (const uint64_t page : used) {
    REQUIRE(::pwrite(file.get(), &page, sizeof page, static_cast<off_t>(page * kPageSize)) == sizeof page);
    has_data[page] = true;
  }
  for (const bool whole : {true, false}) {
    CAPTURE(whole);
    std::vector<MemoryExtent> extents{{file.get(), 0, 0, pages * kPageSize}};
    if (!whole) {
      extents.clear();
      for (uint64_t page = 0; page < pages; page += 4096)
        extents.push_back({file.get(), page * kPageSize, page * kPageSize, 1024 * kPageSize});
    }
    const auto is_mapped = [&](uint64_t page) { return whole || page % 4096 < 1024; };
    auto memory = GuestMemory::restore({.size_bytes = pages * kPageSize}, extents);
    REQUIRE(memory.ok());
    const auto at = [](uint64_t page) { return GuestAddress{(page < high ? page : page + kGiB / kPageSize) * kPageSize}; };
    const auto original = [&](uint64_t page) { return is_mapped(page) ? page : 0; };
    const auto changed = [&] {
      std::vector<bool> found(pages);
      const auto set = memory->changed_pages();
      REQUIRE(set.ok());
      for (uint64_t page = 0; page < pages;) {
        const auto [first, end] = set->next_run(page, pages);
        std::fill(found.begin() + static_cast<ptrdiff_t>(first), found.begin() + static_cast<ptrdiff_t>(end), true);
        page = end;
      }
      return found;
    };
    CHECK(std::ranges::count(changed(), true) == 0);
    std::mt19937 random(whole);
    std::vector<bool> written(pages);
    for (const uint64_t page : used) {
      CAPTURE(page);
      switch (random() % 8) {
        case 0:
          REQUIRE(memory->store<uint64_t>(at(page), ~page));
          written[page] = true;
          break;
        case 1:  // as the guest does
          *memory->slice(at(page) + 100, 1) = std::byte{7};
          written[page] = true;
          break;
        case 2:
          REQUIRE(memory->discard(at(page), kPageSize));
          written[page] = true;
          break;
        case 3:
        case 4:
          CHECK(*memory->load<uint64_t>(at(page)) == original(page));
          break;
        case 5:
          ::madvise(memory->slice(at(page), kPageSize), kPageSize, MADV_POPULATE_READ);
          break;
        default:
          break;
      }
    }
    std::vector<bool> found = changed();
    uint64_t lost = 0, more = 0;
    std::vector<char> now(kPageSize), before(kPageSize);
    for (const uint64_t page : used) {
      lost += written[page] && !found[page];
      more += is_mapped(page) && !written[page] && found[page];
    }
    for (uint64_t page = 0; page < pages; ++page) more += found[page] && !has_data[page];
    CHECK(lost == 0);
    CHECK(more == 0);
    // Page by page: what is not among them is the file's.
    for (const uint64_t page : used) {
      if (found[page]) continue;
      REQUIRE(memory->read(at(page), now.data(), kPageSize));
      std::ranges::fill(before, 0);
      if (is_mapped(page))
        REQUIRE(::pread(file.get(), before.data(), kPageSize, static_cast<off_t>(page * kPageSize)) ==
                static_cast<ssize_t>(kPageSize));
      lost += now != before;
    }
    CHECK(lost == 0);
    // Kernels that have to be asked page by page tell the same.
    for (const GuestMemory::Region& region : memory->regions()) {
      const auto add_to = [](std::vector<bool>& to) {
        return [&](uint64_t offset, uint64_t size_bytes) {
          std::fill_n(to.begin() + static_cast<ptrdiff_t>(offset / kPageSize), size_bytes / kPageSize, true);
        };
      };
      for (const PagesOf whose : {PagesOf::process, PagesOf::file}) {
        std::vector<bool> all_at_once(region.size_bytes / kPageSize), one_by_one = all_at_once;
        REQUIRE(find_pages({region.host, region.size_bytes}, whose, add_to(all_at_once)).ok());
        REQUIRE(find_pages_one_by_one({region.host, region.size_bytes}, whose, add_to(one_by_one)).ok());
        CHECK(std::ranges::count(one_by_one, true) > 100);
        CHECK((all_at_once == one_by_one));
      }
    }
    // A child process that has it changes nothing; all discarded is all changed.
    const uint64_t count = memory->changed_pages()->count();
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      (void)memory->store<uint64_t>({0}, 5);
      ::_exit(0);
    }
    REQUIRE(::waitpid(child, nullptr, 0) == child);
    CHECK(memory->changed_pages()->count() == count);
    REQUIRE(memory->discard({0}, 3 * kGiB));
    CHECK(memory->changed_pages()->next_run(0, high) == std::pair<uint64_t, uint64_t>{0, high});
  }
  CHECK(!make(64 * kMiB).changed_pages().ok());
}

TEST_CASE("memory: what of a restored one was read, written or given back is told, and mapped ahead") {
  constexpr uint64_t pages = 256;
  const Fd file(::memfd_create("snapshot", MFD_CLOEXEC));
  REQUIRE(::ftruncate(file.get(), static_cast<off_t>(pages * kPageSize)) == 0);
  for (uint64_t page = 0; page < pages; ++page)
    REQUIRE(::pwrite(file.get(), &page, sizeof page, static_cast<off_t>(page * kPageSize)) == sizeof page);
  const MemoryExtent whole{file.get(), 0, 0, pages * kPageSize};
  const auto restore = [&] {
    auto memory = GuestMemory::restore({.size_bytes = pages * kPageSize, .mergeable = false}, {&whole, 1});
    REQUIRE(memory.ok());
    return std::move(*memory);
  };
  const auto has = [](const std::vector<PageRun>& runs, uint64_t page) {
    return std::any_of(runs.begin(), runs.end(),
                       [&](const PageRun& run) { return page >= run.first && page < run.first + run.count; });
  };
  GuestMemory memory = restore();
  auto touched = memory.touched();
  REQUIRE(touched.ok());
  CHECK(touched->read.empty());
  CHECK(touched->written.empty());
  CHECK(*memory.load<uint64_t>({3 * kPageSize}) == 3);
  REQUIRE(memory.store<uint64_t>({100 * kPageSize}, 1));
  REQUIRE(memory.store<uint64_t>({101 * kPageSize}, 1));
  REQUIRE(memory.store<uint64_t>({200 * kPageSize}, 1));
  REQUIRE(memory.discard({200 * kPageSize}, kPageSize));
  touched = memory.touched();
  REQUIRE(touched.ok());
  CHECK(has(touched->read, 3));
  REQUIRE(touched->written.size() == 1);
  CHECK(touched->written.front().first == 100);
  CHECK(touched->written.front().count == 2);

  GuestMemory warm = restore();
  REQUIRE(warm.discard({11 * kPageSize}, kPageSize));
  if (!warm.populate({10, 4}, GuestMemory::Use::write)) {
    MESSAGE("this host's kernel is older than Linux 5.14: the rest is not tested");
    return;
  }
  CHECK(warm.populate({20, 2}, GuestMemory::Use::read));
  CHECK(warm.populate({pages - 1, 7}, GuestMemory::Use::write));
  CHECK(warm.populate({pages + 5, ~uint64_t{0}}, GuestMemory::Use::write));
  touched = warm.touched();
  REQUIRE(touched.ok());
  for (const uint64_t page : {10, 12, 13, 255}) {
    CHECK(has(touched->written, page));
    CHECK(*warm.load<uint64_t>({page * kPageSize}) == page);
  }
  for (const uint64_t page : {20, 21}) CHECK(has(touched->read, page));
  uint64_t written = 0;
  for (const PageRun& run : touched->written) written += run.count;
  CHECK(written == 4);
  CHECK(*warm.load<uint64_t>({11 * kPageSize}) == 0);
  // Memory that is not restored has none of it.
  GuestMemory plain = make(kMiB);
  REQUIRE(plain.store<uint64_t>({0}, 1));
  CHECK(plain.populate({0, 4}, GuestMemory::Use::write));
  CHECK(plain.touched()->written.empty());
}
