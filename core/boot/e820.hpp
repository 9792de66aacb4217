// SPDX-License-Identifier: Apache-2.0
// The map of guest physical memory that the kernel is given.
#pragma once

#include <span>
#include <vector>

#include "memory/guest_memory.hpp"

namespace vmm {

// The numbers are those of E820, which PVH's memory map uses as well.
enum class MemoryKind : uint32_t { usable = 1, reserved = 2, acpi = 3 };

struct MemoryRange {
  GuestAddress start;
  uint64_t size_bytes = 0;
  MemoryKind kind = MemoryKind::reserved;
};

// The guest's memory less what the core keeps of it (the identity page, the BIOS area with the ACPI tables) and less
// `reserved`, with these as entries of their own. Ascending, without overlaps.
std::vector<MemoryRange> memory_map(const GuestMemory& memory, std::span<const MemoryRange> reserved);

}  // namespace vmm
