// SPDX-License-Identifier: Apache-2.0
// Files and folders that nobody but their owner could have written, read and written whole.
#pragma once

#include <cerrno>
#include <cstring>
#include <span>
#include <string>

#include "clone/sdk/fd.hpp"
#include "format.hpp"

namespace snapshot_file {

using clone_sdk::Fd;

// In the kernel's words alone; whoever passes it on says what it was about.
inline Error system_error(int code = errno) { return {std::strerror(code), code, CLONE_ERR_SYSTEM}; }

enum class Kind { folder, file };
struct OpenedFile {
  Fd fd;
  uint64_t size_bytes = 0;
  uint64_t stored_bytes = 0;  // on the disk, holes apart
};
// For reading. What belongs to another user (but root), or what others can write to, is refused by `path`; so
// is a link.
Result<OpenedFile> open_own(int folder_fd, const std::string& name, Kind kind, const std::string& path);

// For reading and writing, ours alone; one that is there is an error.
Result<Fd> create_file(int folder_fd, const char* name);
Result<void> write_at(int fd, uint64_t offset, std::span<const std::byte> bytes);
// A file that ends before is an error.
Result<void> read_at(int fd, uint64_t offset, std::span<std::byte> into);
Result<void> sync(int fd);

// Of the bytes of all extents, in their order.
Result<Digest> digest_of(int fd, std::span<const Extent> extents);
// The offset of a byte before `size_bytes` and outside of the extents that is not zero; size_bytes when all are.
Result<uint64_t> find_data_outside(int fd, std::span<const Extent> extents, uint64_t size_bytes);

}  // namespace snapshot_file
