// SPDX-License-Identifier: Apache-2.0
// Looks at who could have written a file, and reads and writes without stopping halfway.
#include "files.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

namespace snapshot_file {
namespace {

constexpr uint64_t kBufferBytes = 1 << 20;

// Calls visit(offset, bytes) for the content of [start, end).
template <typename Visit>
Result<void> read_range(int fd, uint64_t start, uint64_t end, std::vector<std::byte>& buffer, Visit&& visit) {
  buffer.resize(kBufferBytes);
  for (uint64_t at = start; at < end;) {
    const std::span<std::byte> part = std::span(buffer).first(std::min(end - at, kBufferBytes));
    CLONE_TRY(read_at(fd, at, part));
    visit(at, std::span<const std::byte>(part));
    at += part.size();
  }
  return {};
}

// The start of the next data or hole at or after `offset`; `end` where there is none before it.
Result<uint64_t> seek(int fd, uint64_t offset, int whence, uint64_t end) {
  const off_t found = ::lseek(fd, static_cast<off_t>(offset), whence);
  if (found < 0 && errno == ENXIO) return end;
  if (found < 0) return system_error();
  return std::min(static_cast<uint64_t>(found), end);
}

}  // namespace

Result<OpenedFile> open_own(int folder_fd, const std::string& name, Kind kind, const std::string& path) {
  // O_NONBLOCK: a FIFO in a file's place does not hold us up.
  const int flags = O_RDONLY | O_CLOEXEC | O_NOFOLLOW | (kind == Kind::folder ? O_DIRECTORY : O_NONBLOCK);
  OpenedFile file{Fd(::openat(folder_fd, name.c_str(), flags))};
  struct stat status {};
  if (!file.fd || ::fstat(file.fd.get(), &status) != 0) return system_error().context(path);
  if (kind == Kind::file && !S_ISREG(status.st_mode)) return Error{path + ": is not a regular file"};
  if (status.st_uid != 0 && status.st_uid != ::geteuid())
    return Error{path + ": refused: belongs to user " + std::to_string(status.st_uid) + "; allowed is " +
                 (::geteuid() == 0 ? "root" : "user " + std::to_string(::geteuid()) + " or root")};
  if (status.st_mode & (S_IWGRP | S_IWOTH))
    return Error{path + ": refused: others than its owner can write to it; chmod go-w it if you trust what it holds"};
  file.size_bytes = static_cast<uint64_t>(status.st_size);
  file.stored_bytes = static_cast<uint64_t>(status.st_blocks) * 512;
  return file;
}

Result<Fd> create_file(int folder_fd, const char* name) {
  Fd fd(::openat(folder_fd, name, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (!fd) return system_error();
  return fd;
}

Result<void> write_at(int fd, uint64_t offset, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t count = ::pwrite(fd, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return system_error(count ? errno : ENOSPC);
    offset += static_cast<uint64_t>(count);
    bytes = bytes.subspan(static_cast<size_t>(count));
  }
  return {};
}

Result<void> read_at(int fd, uint64_t offset, std::span<std::byte> into) {
  while (!into.empty()) {
    const ssize_t count = ::pread(fd, into.data(), into.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return system_error();
    if (count == 0) return Error{"ends at " + std::to_string(offset), 0, CLONE_ERR_CORRUPT};
    offset += static_cast<uint64_t>(count);
    into = into.subspan(static_cast<size_t>(count));
  }
  return {};
}

Result<void> sync(int fd) {
  if (::fsync(fd) != 0) return system_error();
  return {};
}

Result<Digest> digest_of(int fd, std::span<const Extent> extents) {
  Sha256 sum;
  std::vector<std::byte> buffer;
  for (const Extent& extent : extents)
    CLONE_TRY(read_range(fd, extent.offset, extent.end(), buffer,
                         [&](uint64_t, std::span<const std::byte> bytes) { sum.update(bytes); }));
  return sum.finish();
}

Result<uint64_t> find_data_outside(int fd, std::span<const Extent> extents, uint64_t size_bytes) {
  uint64_t found = size_bytes;
  std::vector<std::byte> buffer;
  const auto look = [&](uint64_t at, std::span<const std::byte> bytes) {
    const auto other = std::find_if(bytes.begin(), bytes.end(), [](std::byte byte) { return byte != std::byte{0}; });
    if (other != bytes.end()) found = std::min(found, at + static_cast<uint64_t>(other - bytes.begin()));
  };
  uint64_t start = 0;
  for (size_t i = 0; i <= extents.size(); ++i) {
    const uint64_t end = i < extents.size() ? extents[i].offset : size_bytes;
    for (uint64_t at = start; at < end;) {
      const uint64_t data = CLONE_TRY(seek(fd, at, SEEK_DATA, end));
      at = data < end ? CLONE_TRY(seek(fd, data, SEEK_HOLE, end)) : end;
      CLONE_TRY(read_range(fd, data, at, buffer, look));
    }
    if (i < extents.size()) start = extents[i].end();
  }
  return found;
}

}  // namespace snapshot_file
