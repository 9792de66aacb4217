// SPDX-License-Identifier: Apache-2.0
// Compares page by page.
#include "snapshot/parent_memory.hpp"

#include <algorithm>
#include <cstring>

#include "snapshot/backend.hpp"

namespace vmm {

// What no extent covers is zeroes.
Result<void> ParentMemory::read(uint64_t offset, std::span<std::byte> into) const {
  std::ranges::fill(into, std::byte{0});
  const uint64_t end = offset + into.size();
  auto extent = std::ranges::upper_bound(extents_, offset, {}, [](const MemoryExtent& one) {
    return one.memory_offset + one.size_bytes;
  });
  for (; extent != extents_.end() && extent->memory_offset < end; ++extent) {
    const uint64_t start = std::max(offset, extent->memory_offset);
    const uint64_t stop = std::min(end, extent->memory_offset + extent->size_bytes);
    TRY(read_snapshot_memory(extent->fd, extent->fd_offset + (start - extent->memory_offset),
                             into.subspan(start - offset, stop - start)));
  }
  return {};
}

Result<void> ParentMemory::write_difference(SnapshotImage& image, uint64_t offset, std::span<const std::byte> bytes) {
  const uint64_t first = offset / kPageSize, count = bytes.size() / kPageSize;
  if ((offset | bytes.size()) % kPageSize != 0 || first > is_written_.size() || count > is_written_.size() - first)
    return Error{"the machine's memory: pages that it does not have"};
  buffer_.resize(bytes.size());
  TRY(read(offset, buffer_));
  const auto differs = [&](uint64_t page) {
    return is_written_[first + page] ||
           std::memcmp(bytes.data() + page * kPageSize, buffer_.data() + page * kPageSize, kPageSize) != 0;
  };
  for (uint64_t page = 0; page < count; ++page) {
    const uint64_t start = page;
    while (page < count && differs(page)) is_written_[first + page++] = true;
    if (start < page)
      TRY(image.write_memory(offset + start * kPageSize, bytes.subspan(start * kPageSize, (page - start) * kPageSize)));
  }
  return {};
}

}  // namespace vmm
