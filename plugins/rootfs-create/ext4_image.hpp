// SPDX-License-Identifier: Apache-2.0
// Writes a tree as an ext4 file system into a file, through libext2fs; no mount, no loop device, no privilege.
#pragma once

#include <string>

#include "progress.hpp"
#include "tree.hpp"

namespace rootfs {

struct TreeSize {
  uint64_t inodes = 0;
  uint64_t content_bytes = 0;
  uint64_t blocks = 0;  // of 4 KiB, what contents, directories, links and attributes take at most
};
TreeSize measure(const Tree& tree);

// The size that an image of such a tree gets where the user names none: room for a third more and 256 MiB, but at least
// 4 GiB; the file is sparse.
uint64_t default_image_size(const TreeSize& tree);

constexpr uint64_t kSmallestImageBytes = uint64_t{16} << 20;

// `path` is an empty file. An image that is too small is one line that says how much is needed.
Result<void> write_ext4(const std::string& path, uint64_t size_bytes, const Tree& tree, Progress& progress);

}  // namespace rootfs
