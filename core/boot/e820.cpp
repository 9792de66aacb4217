// SPDX-License-Identifier: Apache-2.0
// Cuts the reserved ranges out of the guest's memory.
#include "boot/e820.hpp"

#include <algorithm>

#include "boot/layout.hpp"

namespace vmm {

std::vector<MemoryRange> memory_map(const GuestMemory& memory, std::span<const MemoryRange> reserved) {
  const auto between = [](GuestAddress start, GuestAddress end) {
    return MemoryRange{start, end.value - start.value, MemoryKind::reserved};
  };
  std::vector<MemoryRange> kept(reserved.begin(), reserved.end());
  kept.push_back({layout::kIdentityPage, kPageSize, MemoryKind::reserved});
  kept.push_back(between(layout::kLowMemoryEnd, {0xa0000}));
  kept.push_back(between(layout::kAcpiTables, layout::kAcpiTablesEnd));
  const auto by_start = [](const MemoryRange& a, const MemoryRange& b) { return a.start < b.start; };
  std::sort(kept.begin(), kept.end(), by_start);

  std::vector<MemoryRange> map;
  // What is left of one stretch of memory once every kept range is cut out.
  const auto add_usable = [&](uint64_t start, uint64_t end) {
    for (const MemoryRange& range : kept) {
      const uint64_t range_end = range.start.value + range.size_bytes;
      if (range_end <= start || range.start.value >= end) continue;
      if (range.start.value > start) map.push_back({{start}, range.start.value - start, MemoryKind::usable});
      start = range_end;
      if (start >= end) return;
    }
    if (start < end) map.push_back({{start}, end - start, MemoryKind::usable});
  };
  for (const GuestMemory::Region& region : memory.regions()) {
    const uint64_t start = region.start.value;
    const uint64_t end = start + region.size_bytes;
    if (start == 0) {
      // Video memory and option ROMs of a PC: not memory, whatever lies there.
      add_usable(0, std::min(end, uint64_t{0xa0000}));
      add_usable(layout::kKernelFloor.value, end);
    } else {
      add_usable(start, end);
    }
  }

  // Of two kept ranges that overlap, the second begins where the first ends.
  uint64_t covered = 0;
  for (const MemoryRange& range : kept) {
    const uint64_t start = std::max(range.start.value, covered);
    const uint64_t end = range.start.value + range.size_bytes;
    if (start < end) map.push_back({{start}, end - start, range.kind});
    covered = std::max(covered, end);
  }
  std::sort(map.begin(), map.end(), by_start);
  return map;
}

}  // namespace vmm
