// SPDX-License-Identifier: Apache-2.0
// The memory of a snapshot that another one is a difference to: pages that were written, but are as they were there, are
// no difference.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "memory/guest_memory.hpp"
#include "util/result.hpp"

namespace vmm {

class SnapshotImage;

class ParentMemory {
 public:
  // Ascending, and whole pages; their descriptors last as long as this.
  ParentMemory(std::vector<MemoryExtent> extents, uint64_t memory_bytes)
      : extents_(std::move(extents)), is_written_(memory_bytes / kPageSize) {}

  // Writes those pages to `image` that differ, or that were written to it before.
  Result<void> write_difference(SnapshotImage& image, uint64_t offset, std::span<const std::byte> bytes);

 private:
  Result<void> read(uint64_t offset, std::span<std::byte> into) const;

  const std::vector<MemoryExtent> extents_;
  std::vector<bool> is_written_;
  std::vector<std::byte> buffer_;
};

}  // namespace vmm
