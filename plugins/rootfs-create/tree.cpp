// SPDX-License-Identifier: Apache-2.0
// The file tree that images are made from.
#include "tree.hpp"

#include <fcntl.h>
#include <limits.h>
#include <unistd.h>

#include <cstdio>
#include <ctime>

namespace rootfs {
namespace {

constexpr int kMostLinks = 40;  // as path_resolution(7)
constexpr size_t kLongestName = 255;

}  // namespace

std::vector<std::string_view> components(std::string_view path) {
  std::vector<std::string_view> parts;
  while (!path.empty()) {
    const size_t end = path.find('/');
    const std::string_view part = path.substr(0, end);
    if (!part.empty() && part != ".") parts.push_back(part);
    path.remove_prefix(end == std::string_view::npos ? path.size() : end + 1);
  }
  return parts;
}

Result<void> check_entry_name(std::string_view name) {
  const std::string shown = "entry '" + std::string(name.substr(0, 200)) + "'";
  if (name.empty()) return Error{"an entry without a name"};
  if (name.size() > PATH_MAX) return Error{shown + "…: its name is longer than " + std::to_string(PATH_MAX) + " bytes"};
  if (name.front() == '/') return Error{shown + ": an absolute name"};
  if (name.find('\0') != name.npos) return Error{shown + ": its name holds a NUL"};
  for (std::string_view part : components(name)) {
    if (part == "..") return Error{shown + ": '..' in a name"};
    if (part.size() > kLongestName) return Error{shown + ": a part of its name is longer than 255 bytes"};
  }
  return {};
}

Tree::Tree() : root_(make_directory(0755)) {}

InodePointer Tree::make_directory(mode_t permissions) const {
  auto inode = std::make_shared<Inode>();
  inode->mode = S_IFDIR | permissions;
  inode->mtime_s = std::time(nullptr);
  inode->layer = layer_;
  return inode;
}

InodePointer Tree::find(std::string_view path, LastLink last) const {
  // The directories from the root to where we are; what is left to walk, in reverse.
  std::vector<InodePointer> way = {root_};
  std::vector<std::string> left;
  const auto push = [&left](std::string_view text) {
    const auto parts = components(text);
    left.insert(left.end(), parts.rbegin(), parts.rend());
  };
  push(path);
  int links = 0;
  while (!left.empty()) {
    const std::string name = std::move(left.back());
    left.pop_back();
    if (name == "..") {
      if (way.size() > 1) way.pop_back();
      continue;
    }
    if (!way.back()->is_directory()) return nullptr;
    const auto child = way.back()->children.find(name);
    if (child == way.back()->children.end()) return nullptr;
    const InodePointer inode = child->second;
    if (inode->is_symlink() && (!left.empty() || last == LastLink::follow)) {
      if (++links > kMostLinks || inode->target.size() > PATH_MAX) return nullptr;
      if (inode->target.starts_with('/')) way.resize(1);
      push(inode->target);
    } else {
      way.push_back(inode);
    }
  }
  return way.back();
}

Result<Tree::Place> Tree::place(std::string_view path, bool make_parents) {
  const auto parts = components(path);
  if (parts.empty()) return Error{"'" + std::string(path) + "' names the root"};
  InodePointer parent = root_;
  std::string so_far;
  for (size_t i = 0; i + 1 < parts.size(); ++i) {
    so_far += "/" + std::string(parts[i]);
    const auto child = parent->children.find(std::string(parts[i]));
    InodePointer next = child == parent->children.end() ? nullptr : child->second;
    // A link is followed by the rules of the guest, for which this tree is all there is.
    if (next && next->is_symlink()) {
      next = find(so_far);
      if (!next) return Error{"'" + std::string(path) + "': " + so_far + " is a symbolic link that leads nowhere"};
    }
    if (next && !next->is_directory()) return Error{"'" + std::string(path) + "': " + so_far + " is not a directory"};
    if (!next) {
      if (!make_parents) return Place{nullptr, {}};
      next = make_directory(0755);
      parent->children[std::string(parts[i])] = next;
    }
    parent = next;
  }
  return Place{parent, std::string(parts.back())};
}

Result<void> Tree::put(std::string_view path, InodePointer inode) {
  TRY(check_entry_name(path));
  inode->layer = layer_;
  if (components(path).empty()) {
    if (!inode->is_directory()) return Error{"the root is to be a directory"};
    inode->children = std::move(root_->children);
    *root_ = std::move(*inode);
    return {};
  }
  const Place where = TRY(place(path, true));
  InodePointer& slot = where.parent->children[where.name];
  if (slot && slot->is_directory() && inode->is_directory()) inode->children = std::move(slot->children);
  slot = std::move(inode);
  return {};
}

Result<void> Tree::link(std::string_view path, std::string_view target) {
  TRY(check_entry_name(path));
  TRY(check_entry_name(target));
  const InodePointer inode = find(target, LastLink::keep);
  if (!inode)
    return Error{"'" + std::string(path) + "': a hard link to '" + std::string(target) + "', which is not there"};
  if (inode->is_directory()) return Error{"'" + std::string(path) + "': a hard link to a directory"};
  const Place where = TRY(place(path, true));
  where.parent->children[where.name] = inode;
  return {};
}

Result<void> Tree::remove(std::string_view path) {
  TRY(check_entry_name(path));
  const Place where = TRY(place(path, false));
  if (where.parent) where.parent->children.erase(where.name);
  return {};
}

namespace {

// Whether anything of the current layer is left.
bool hide(Inode& directory, unsigned layer) {
  std::erase_if(directory.children, [layer](auto& child) {
    Inode& inode = *child.second;
    if (inode.is_directory()) return !hide(inode, layer) && inode.layer < layer;
    return inode.layer < layer;
  });
  return !directory.children.empty();
}

}  // namespace

Result<void> Tree::hide_lower_layers(std::string_view path) {
  const InodePointer directory = find(path);
  if (directory && directory->is_directory()) hide(*directory, layer_);
  return {};
}

Result<void> Tree::put_directory(std::string_view path, mode_t permissions) {
  const InodePointer there = find(path);
  if (there && there->is_directory()) return {};
  return put(path, make_directory(permissions));
}

Result<void> Tree::put_symlink(std::string_view path, std::string target) {
  auto inode = std::make_shared<Inode>();
  inode->mode = S_IFLNK | 0777;
  inode->mtime_s = std::time(nullptr);
  inode->target = std::move(target);
  return put(path, std::move(inode));
}

Result<Spool> Spool::make(const std::string& folder) {
  std::string path = folder + "/contents";
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd < 0) return errno_error(path);
  ::unlink(path.c_str());
  Spool spool;
  spool.file_ = std::make_shared<const Fd>(fd);
  return spool;
}

Result<void> Spool::write(const void* data, size_t size_bytes) {
  const char* next = static_cast<const char*>(data);
  while (size_bytes > 0) {
    const ssize_t count = ::pwrite(file_->get(), next, size_bytes, static_cast<off_t>(end_));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return errno_error("the temporary file of contents");
    next += count;
    size_bytes -= static_cast<size_t>(count);
    end_ += static_cast<uint64_t>(count);
  }
  return {};
}

Result<Content> Spool::end() {
  // A gap at the end has to be part of the file, or reading it would end early.
  struct stat status {};
  if (::fstat(file_->get(), &status) != 0) return errno_error("the temporary file of contents");
  if (static_cast<uint64_t>(status.st_size) < end_ && ::ftruncate(file_->get(), static_cast<off_t>(end_)) != 0)
    return errno_error("the temporary file of contents");
  return Content{file_, {}, start_, end_ - start_};
}

Result<InodePointer> Spool::file(std::string_view text, mode_t permissions) {
  begin();
  TRY(write(text.data(), text.size()));
  auto inode = std::make_shared<Inode>();
  inode->mode = S_IFREG | permissions;
  inode->mtime_s = std::time(nullptr);
  inode->content = TRY(end());
  return inode;
}

Result<std::string> read_text(const Content& content, size_t limit_bytes) {
  if (content.size_bytes > limit_bytes)
    return Error{"a file of " + std::to_string(content.size_bytes) + " bytes, where at most " +
                 std::to_string(limit_bytes) + " were expected"};
  std::string text(content.size_bytes, '\0');
  Fd opened;
  int fd = content.file->get();
  if (!content.path.empty()) {
    opened = Fd(::openat(fd, content.path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
    if (!opened) return errno_error(content.path);
    fd = opened.get();
  }
  for (size_t at = 0; at < text.size();) {
    const ssize_t count = ::pread(fd, text.data() + at, text.size() - at, static_cast<off_t>(content.offset + at));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return errno_error(content.path.empty() ? "the temporary file of contents" : content.path);
    if (count == 0) return Error{content.path + ": it became shorter while it was read"};
    at += static_cast<size_t>(count);
  }
  return text;
}

std::string human_size(uint64_t bytes) {
  static constexpr const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(units)) value /= 1024, ++unit;
  char text[32];
  std::snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.1f %s", value, units[unit]);
  return text;
}

}  // namespace rootfs
