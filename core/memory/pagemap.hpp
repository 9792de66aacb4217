// SPDX-License-Identifier: Apache-2.0
// What the kernel tells of this process's pages.
#pragma once

#include <cstddef>
#include <functional>
#include <span>

#include "util/result.hpp"

namespace vmm {

// Pages in use are this process's own (written to where a file is mapped MAP_PRIVATE, touched where nothing is), or a
// file's that it has mapped.
enum class PagesOf { process, file };

// Calls found(offset, size_bytes), whole pages in ascending order, for those of `memory`, which is whole pages.
using FoundPages = std::function<void(uint64_t offset, uint64_t size_bytes)>;
Result<void> find_pages(std::span<const std::byte> memory, PagesOf whose, const FoundPages& found);
// The same on kernels before 6.7: it takes time for each page, there or not.
Result<void> find_pages_one_by_one(std::span<const std::byte> memory, PagesOf whose, const FoundPages& found);

}  // namespace vmm
