// SPDX-License-Identifier: Apache-2.0
// A file tree in memory: names and metadata are here, contents stay in files of the host. Archives are unpacked into
// it, so that nothing hostile in them ever names a path of the host, and owners, devices and attributes need no
// privilege.
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "util/fd.hpp"
#include "util/result.hpp"

namespace rootfs {

using vmm::errno_error;
using vmm::Error;
using vmm::Fd;
using vmm::Result;

// Where the bytes of a regular file are: a range of a file that is open already (`file`), or a file below a folder that
// is opened when it is needed (`path`, relative to `file`), and then has to be the one that was seen.
struct Content {
  std::shared_ptr<const Fd> file;
  std::string path;
  uint64_t offset = 0;
  uint64_t size_bytes = 0;
  uint64_t hole_bytes = 0;  // of them, those that are known to be holes of a sparse file
  dev_t device = 0;
  ino_t inode = 0;
};

// An Inode under two names is a hard link.
struct Inode {
  mode_t mode = 0;  // type and permissions
  uid_t uid = 0;
  gid_t gid = 0;
  int64_t mtime_s = 0;
  uint32_t mtime_ns = 0;
  dev_t device = 0;                               // of block and character devices
  std::string target;                             // of a symbolic link
  Content content;                                // of a regular file
  std::map<std::string, std::string> attributes;  // extended attributes by full name
  std::map<std::string, std::shared_ptr<Inode>> children;
  unsigned layer = 0;  // of a container image: the one that brought it

  bool is_directory() const { return S_ISDIR(mode); }
  bool is_symlink() const { return S_ISLNK(mode); }
  bool is_regular() const { return S_ISREG(mode); }
};
using InodePointer = std::shared_ptr<Inode>;

class Tree {
 public:
  Tree();

  Inode& root() { return *root_; }
  const Inode& root() const { return *root_; }
  void set_layer(unsigned layer) { layer_ = layer; }

  // What a path names, symbolic links followed as a process whose root this is would; null if there is nothing.
  enum class LastLink { follow, keep };
  InodePointer find(std::string_view path, LastLink last = LastLink::follow) const;

  // Puts an inode at a path; missing parents are made. A directory over a directory keeps its children. Refuses "..",
  // absolute and too long names, and parents that are no directories.
  Result<void> put(std::string_view path, InodePointer inode);
  // A second name for what `target` names.
  Result<void> link(std::string_view path, std::string_view target);
  // Removes a name and all below it; nothing happens if it is not there.
  Result<void> remove(std::string_view path);
  // Removes from a directory all that layers before the current one brought.
  Result<void> hide_lower_layers(std::string_view path);

  // Files that we bring ourselves: owned by root, parents made, symbolic links in the parents followed.
  Result<void> put_directory(std::string_view path, mode_t permissions);
  Result<void> put_symlink(std::string_view path, std::string target);

 private:
  struct Place {
    InodePointer parent;
    std::string name;
  };
  Result<Place> place(std::string_view path, bool make_parents);
  InodePointer make_directory(mode_t permissions) const;

  InodePointer root_;
  unsigned layer_ = 0;
};

// "/etc/x", "./etc/x" and "etc/x" are the same place in a tree; archives must not begin with "/", see checked_name().
std::vector<std::string_view> components(std::string_view path);

// The name of an archive's entry, or why it is refused.
Result<void> check_entry_name(std::string_view name);

// A file that was never linked into a folder holds the contents of archives until the image is written.
class Spool {
 public:
  static Result<Spool> make(const std::string& folder);
  // Appends; the parts of one file follow each other between begin() and end().
  void begin() { start_ = end_; }
  Result<void> write(const void* data, size_t size_bytes);
  // A gap that reads as zeros.
  void skip(uint64_t size_bytes) { end_ += size_bytes; }
  Result<Content> end();
  Result<InodePointer> file(std::string_view text, mode_t permissions);
  uint64_t size_bytes() const { return end_; }

 private:
  std::shared_ptr<const Fd> file_;
  uint64_t start_ = 0;
  uint64_t end_ = 0;
};

// The whole of a small file.
Result<std::string> read_text(const Content& content, size_t limit_bytes);

// Sizes for people: "1.2 GiB".
std::string human_size(uint64_t bytes);

}  // namespace rootfs
