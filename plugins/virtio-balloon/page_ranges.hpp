// SPDX-License-Identifier: Apache-2.0
// Page numbers of a guest, sorted into as few ranges of memory as they make up.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

namespace virtio_balloon {

constexpr uint64_t kPageBytes = 4096;  // of a page number, whatever the guest's own pages are (virtio 1.2 §5.5.6)

struct Range {
  uint64_t start = 0;
  uint64_t size_bytes = 0;
  bool operator==(const Range&) const = default;
};

// Sorts `pages` and calls `visit` with each run of adjacent ones; a number that is there twice counts once. What lies
// outside `memory` (whole pages) is left out: how many numbers did is the answer.
template <typename Visit>
uint64_t visit_ranges(std::span<uint32_t> pages, std::span<const Range> memory, Visit&& visit) {
  uint64_t outside = 0;
  Range run;
  std::sort(pages.begin(), pages.end());
  for (const uint32_t page : pages) {
    const uint64_t address = page * kPageBytes;
    const bool inside = std::any_of(memory.begin(), memory.end(), [&](const Range& region) {
      return address >= region.start && address - region.start < region.size_bytes;
    });
    if (!inside) {
      ++outside;
    } else if (run.size_bytes && address + kPageBytes == run.start + run.size_bytes) {
      continue;  // the same once more
    } else if (run.size_bytes && address == run.start + run.size_bytes) {
      run.size_bytes += kPageBytes;
    } else {
      if (run.size_bytes) visit(run);
      run = {address, kPageBytes};
    }
  }
  if (run.size_bytes) visit(run);
  return outside;
}

}  // namespace virtio_balloon
