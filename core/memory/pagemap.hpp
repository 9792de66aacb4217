// SPDX-License-Identifier: Apache-2.0
// What the kernel tells of this process's pages.
#pragma once

#include <cstddef>
#include <functional>
#include <span>

#include "util/result.hpp"

namespace vmm {

// Calls found(offset, size_bytes), whole pages in ascending order, for those of `memory` that are this process's own:
// written to where a file is mapped MAP_PRIVATE, touched where nothing is. `memory` is whole pages.
using FoundPages = std::function<void(uint64_t offset, uint64_t size_bytes)>;
Result<void> find_own_pages(std::span<const std::byte> memory, const FoundPages& found);
// The same on kernels before 6.7: it takes time for each page, there or not.
Result<void> find_own_pages_one_by_one(std::span<const std::byte> memory, const FoundPages& found);

}  // namespace vmm
