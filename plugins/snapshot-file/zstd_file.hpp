// SPDX-License-Identifier: Apache-2.0
// A snapshot's memory as one zstd frame: the bytes of its extents, one behind the other.
#pragma once

#include <span>

#include "files.hpp"

namespace snapshot_file {

// Both files at the offsets of the extents, or from their beginnings on: the compressed one.
Result<void> compress(int memory_fd, std::span<const Extent> extents, int into_fd);
// What is read may be anything: as much comes out as the extents have, or it is an error. Pages of zeroes become holes.
Result<void> decompress(int compressed_fd, std::span<const Extent> extents, int into_fd);

}  // namespace snapshot_file
