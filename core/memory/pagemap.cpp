// SPDX-License-Identifier: Apache-2.0
// Reads /proc/self/pagemap (Linux Documentation/admin-guide/mm/pagemap.rst).
#include "memory/pagemap.hpp"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "util/fd.hpp"

namespace vmm {
namespace {

constexpr uint64_t kPageBytes = 4096;

// PAGEMAP_SCAN, since Linux 6.7: not in the headers of all systems that this is built on.
struct ScanArguments {
  uint64_t size, flags, start, end, walk_end, regions, region_count, most_pages;
  uint64_t category_inverted, category_mask, category_any_of_mask, return_mask;
};
struct ScanRegion {
  uint64_t start, end, categories;
};
constexpr unsigned long kScan = _IOWR('f', 16, ScanArguments);
constexpr uint64_t kIsFile = 1 << 2, kIsPresent = 1 << 3, kIsSwapped = 1 << 4;

Result<Fd> open_pagemap() {
  Fd pagemap(::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  if (!pagemap) return errno_error("/proc/self/pagemap");
  return pagemap;
}

}  // namespace

Result<void> find_pages(std::span<const std::byte> memory, PagesOf whose, const FoundPages& found) {
  const Fd pagemap = TRY(open_pagemap());
  std::vector<ScanRegion> regions(512);
  const auto begin = reinterpret_cast<uintptr_t>(memory.data());
  for (uint64_t at = begin; at < begin + memory.size();) {
    ScanArguments scan{};
    scan.size = sizeof scan;
    scan.start = at;
    scan.end = begin + memory.size();
    scan.regions = reinterpret_cast<uintptr_t>(regions.data());
    scan.region_count = regions.size();
    scan.category_mask = kIsFile;
    scan.category_inverted = whose == PagesOf::process ? kIsFile : 0;
    scan.category_any_of_mask = scan.return_mask = kIsPresent | kIsSwapped;
    const int count = ::ioctl(pagemap.get(), kScan, &scan);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && errno == ENOTTY && at == begin) return find_pages_one_by_one(memory, whose, found);
    if (count < 0) return errno_error("PAGEMAP_SCAN");
    if (scan.walk_end <= at) return Error{"PAGEMAP_SCAN does not go on"};
    for (const ScanRegion& region : std::span(regions).first(static_cast<size_t>(count)))
      found(region.start - begin, region.end - region.start);
    at = scan.walk_end;
  }
  return {};
}

Result<void> find_pages_one_by_one(std::span<const std::byte> memory, PagesOf whose, const FoundPages& found) {
  constexpr uint64_t in_use = 3ull << 62, of_file = 1ull << 61;  // in use: present, or swapped out
  const Fd pagemap = TRY(open_pagemap());
  std::vector<uint64_t> entries(16384);
  const uint64_t first = reinterpret_cast<uintptr_t>(memory.data()) / kPageBytes, pages = memory.size() / kPageBytes;
  for (uint64_t done = 0; done < pages;) {
    const uint64_t count = std::min<uint64_t>(entries.size(), pages - done);
    if (::pread(pagemap.get(), entries.data(), count * 8, static_cast<off_t>((first + done) * 8)) !=
        static_cast<ssize_t>(count * 8))
      return errno_error("/proc/self/pagemap");
    const auto is_wanted = [&](uint64_t page) {
      return (entries[page] & in_use) && !(entries[page] & of_file) == (whose == PagesOf::process);
    };
    for (uint64_t page = 0; page < count; ++page) {
      const uint64_t start = page;
      while (page < count && is_wanted(page)) ++page;
      if (start < page) found((done + start) * kPageBytes, (page - start) * kPageBytes);
    }
    done += count;
  }
  return {};
}

}  // namespace vmm
