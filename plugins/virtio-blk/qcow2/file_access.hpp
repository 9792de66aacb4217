// SPDX-License-Identifier: Apache-2.0
// Reading and writing a file at an offset, whole or not at all; the metadata of an image goes this way.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <span>

#include "../system_error.hpp"

namespace virtio_blk::qcow2 {

using clone_sdk::Error;
using clone_sdk::Result;

using virtio_blk::system_error;

inline Result<void> read_at(int fd, uint64_t offset, std::span<std::byte> into) {
  while (!into.empty()) {
    const ssize_t count = ::pread(fd, into.data(), into.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return count ? system_error(errno) : Error{"the file ends too early", EIO, CLONE_ERR_SYSTEM};
    into = into.subspan(static_cast<size_t>(count));
    offset += static_cast<uint64_t>(count);
  }
  return {};
}

inline Result<void> write_at(int fd, uint64_t offset, std::span<const std::byte> from) {
  while (!from.empty()) {
    const ssize_t count = ::pwrite(fd, from.data(), from.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return system_error(count ? errno : ENOSPC);
    from = from.subspan(static_cast<size_t>(count));
    offset += static_cast<uint64_t>(count);
  }
  return {};
}

}  // namespace virtio_blk::qcow2
