// SPDX-License-Identifier: Apache-2.0
// Small files and directories, without a C library.
#pragma once

#include <asm/errno.h>
#include <linux/fcntl.h>

#include "syscalls.hpp"
#include "text.hpp"

constexpr int open_read = O_RDONLY | O_CLOEXEC;

// The whole of a small file, NUL-terminated, without a final newline; -errno, or -EFBIG where it does not fit.
static inline long read_file(int directory, const char* path, char* buffer, size_t capacity) {
  const int fd = sys::openat(directory, path, open_read);
  if (fd < 0) return fd;
  size_t used = 0;
  long count = 0;
  while (used < capacity && (count = sys::read(fd, buffer + used, capacity - used)) > 0)
    used += static_cast<size_t>(count);
  sys::close(fd);
  if (count < 0) return count;
  if (used == capacity) return -EFBIG;
  if (used > 0 && buffer[used - 1] == '\n') --used;
  buffer[used] = 0;
  return static_cast<long>(used);
}

// Calls `visit(name)` for each entry of a directory but "." and ".." until it returns true. Returns whether it did.
template <typename Visit>
bool any_entry(int directory, Visit visit) {
  struct Entry {  // struct linux_dirent64, getdents64(2)
    unsigned long inode;
    long offset;
    unsigned short size_bytes;
    unsigned char type;
    char name[];
  };
  alignas(Entry) char buffer[2048];
  for (long count; (count = sys::getdents64(directory, buffer, sizeof buffer)) > 0;) {
    for (long at = 0; at < count;) {
      const auto* entry = reinterpret_cast<const Entry*>(buffer + at);
      at += entry->size_bytes;
      if (equal(entry->name, ".") || equal(entry->name, "..")) continue;
      if (visit(entry->name)) return true;
    }
  }
  return false;
}
