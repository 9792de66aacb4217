// SPDX-License-Identifier: Apache-2.0
// Tar archives into the tree, through libarchive.
#pragma once

#include <functional>
#include <span>
#include <string>

#include "process.hpp"
#include "progress.hpp"
#include "tree.hpp"

namespace rootfs {

// Where an archive's bytes come from. The span is valid until the next call; empty at the end.
using ByteSource = std::function<Result<std::span<const char>>()>;
ByteSource bytes_of(std::span<const char> memory);
// `process` and `fd` have to outlive the source.
ByteSource bytes_of(Process& process);
ByteSource bytes_of(const Fd& fd);

// What to do with an entry before it is put: change it, or leave it out (false).
struct Entry {
  std::string name;
  std::string hard_link;  // empty, or the name that it is linked to
  std::string user, group;
  InodePointer inode;
};
using EntryFilter = std::function<Result<bool>(Entry&)>;

enum class Whiteouts { plain_files, remove };  // OCI image specification, "Whiteouts"

struct ArchiveOptions {
  Whiteouts whiteouts = Whiteouts::plain_files;
  EntryFilter filter;
  // Called with the bytes of contents so far.
  std::function<void(uint64_t)> on_bytes;
};

// Unpacks a tar, compressed or not, into the tree. Names are refused as Tree::put() says.
Result<void> unpack(const ByteSource& source, Tree& tree, Spool& spool, const ArchiveOptions& options = {});

}  // namespace rootfs
