// SPDX-License-Identifier: Apache-2.0
// A file or block device that an image consists of: opened, locked, and read and written through an engine.
#pragma once

#include <sys/stat.h>

#include <memory>
#include <optional>
#include <string>

#include "io_engine.hpp"

namespace virtio_blk {

enum class Cache { writeback, none, unsafe };  // the order of the option's choices
enum class Access { read_write, read_only };

class Storage {
 public:
  // What an error says does not name the file. A regular file may be empty.
  static Result<Storage> open(const std::string& path, Access access, Cache cache, const clone_sdk::Host& host);
  // The same for a file that is open already, whatever has become of its name.
  static Result<Storage> open(Fd fd, Access access, Cache cache, const clone_sdk::Host& host);

  // For system calls of the caller's own; through the page cache.
  int fd() const { return cached_fd_.get(); }
  Access access() const { return access_; }
  bool block_device() const { return block_device_; }
  uint64_t size_bytes() const;  // now
  uint32_t logical_block_bytes() const { return logical_block_bytes_; }
  uint32_t physical_block_bytes() const { return physical_block_bytes_; }
  // Whether the name leads to this very file.
  bool is_at(const std::string& path) const;

  // From now on everything goes through the page cache.
  void stay_in_page_cache() {
    direct_fd_.reset();
    direct_align_ = 0;
  }

  // Adds its files to an image's; operations on it carry their number from then on.
  void add_to(std::vector<ImageFile>& files);
  uint8_t file() const { return cached_file_; }

  // Reads or writes what `operation` says, without the page cache where that is wanted and its alignment allows.
  void transfer(IoEngine& engine, FileOperation& operation) const;
  // After a step of it: the outcome, 0 or an errno value, or nothing when the rest was begun.
  std::optional<int> continue_transfer(IoEngine& engine, FileOperation& operation, int64_t result) const;

 private:
  Result<void> open_direct();
  int64_t bounce(const FileOperation& operation) const;

  Access access_ = Access::read_only;
  Fd lock_fd_;
  Fd cached_fd_;
  Fd direct_fd_;
  bool block_device_ = false;
  bool nowait_reads_ = false;
  uint64_t device_ = 0;
  uint64_t inode_ = 0;
  uint32_t logical_block_bytes_ = 512;
  uint32_t physical_block_bytes_ = 4096;
  uint64_t direct_align_ = 0;         // of offsets and sizes; 0: everything goes through the page cache
  uint64_t direct_memory_align_ = 0;  // of addresses
  uint8_t cached_file_ = 0;
  uint8_t direct_file_ = 0;
};

// Moves the first `count` bytes into `taken`, whatever that was before.
void take(std::span<iovec>& vectors, uint64_t count, std::vector<iovec>& taken);
// Drops the first `count` bytes.
void advance(std::span<iovec>& vectors, uint64_t count);
// As many zeroes as can be written at once, at most `size_bytes`: their number is returned.
uint64_t zero_vectors(std::vector<iovec>& vectors, uint64_t size_bytes);

}  // namespace virtio_blk
