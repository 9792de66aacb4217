// SPDX-License-Identifier: Apache-2.0
// The folder of all snapshots: who may have written it, what is in it, what is half made, one change at a time.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "files.hpp"

namespace snapshot_file {

// Of a snapshot's files there is `state`, and one of the others.
inline constexpr const char* kMemoryName = "memory";
inline constexpr const char* kCompressedName = "memory.zst";
inline constexpr const char* kStateName = "state";
inline constexpr std::string_view kNotePrefix = "note-";

// Whether a file of that name is a snapshot's.
inline bool is_of_snapshot(std::string_view name) {
  return name == kMemoryName || name == kCompressedName || name == kStateName || name.starts_with(kNotePrefix);
}

// A folder of the store with a name that begins with '.': being made, or being removed. As long as this object holds
// its lock, nobody clears it.
struct TemporaryFolder {
  std::string name;
  Fd fd;
};

// Reads never wait; changes are made under a lock that ends with the process.
class Store {
 public:
  class Lock {
   public:
    explicit Lock(int fd) : fd_(fd) {}
    Lock(Lock&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    ~Lock();

   private:
    int fd_;
  };

  // One that is missing is an error with the code ENOENT.
  static Result<Store> open(const std::string& path);
  // Made when it is missing, with the folders above it.
  static Result<Store> make(const std::string& path);

  int fd() const { return fd_.get(); }
  const std::string& path() const { return path_; }
  std::string path_of(const std::string& name) const { return path_ + "/" + name; }
  // What may be a snapshot, by its name, sorted.
  Result<std::vector<std::string>> names() const;
  Result<bool> has(const std::string& name) const;
  // A snapshot's folder, judged.
  Result<Fd> open_folder(const std::string& name) const;

  // A snapshot's folder for one who changes what is in it, or takes it away; busy while there is another.
  Result<Fd> lock_folder(const std::string& name) const;

  Result<Lock> lock() const;
  // Under the lock:
  void clear_left_folders() const;
  Result<TemporaryFolder> make_temporary(const std::string& name) const;

  // A snapshot's files and the folder, which is named so now.
  void clear(int folder_fd, const std::string& name) const;

 private:
  Store(std::string path, Fd fd) : path_(std::move(path)), fd_(std::move(fd)) {}

  std::string path_;
  Fd fd_;
};

// The names in a folder.
Result<std::vector<std::string>> names_in(int folder_fd);

}  // namespace snapshot_file
