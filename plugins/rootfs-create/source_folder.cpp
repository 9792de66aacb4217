// SPDX-License-Identifier: Apache-2.0
// A folder of the host as it is: owners, links, devices, attributes. Other file systems mounted in it are not entered.
#include <fcntl.h>
#include <fts.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <memory>

#include "sources.hpp"

namespace rootfs {
namespace {

Result<void> read_attributes(const char* path, Inode& inode) {
  ssize_t size_bytes = ::llistxattr(path, nullptr, 0);
  if (size_bytes < 0 && errno == ENOTSUP) return {};
  if (size_bytes < 0) return errno_error(path);
  std::string names(static_cast<size_t>(size_bytes), '\0');
  size_bytes = ::llistxattr(path, names.data(), names.size());
  if (size_bytes < 0) return errno_error(path);
  for (const char* name = names.data(); name < names.data() + size_bytes; name += std::strlen(name) + 1) {
    // Of the system's own names only access lists belong to the file; others are made up by the file system it is on.
    if (std::strncmp(name, "system.", 7) == 0 && std::strncmp(name, "system.posix_acl_", 17) != 0) continue;
    std::string value(65536, '\0');
    const ssize_t count = ::lgetxattr(path, name, value.data(), value.size());
    if (count < 0) return errno_error(std::string(path) + ": attribute " + name);
    value.resize(static_cast<size_t>(count));
    inode.attributes[name] = std::move(value);
  }
  return {};
}

// A file that takes less space than its size is sparse, or compressed by its file system.
Result<uint64_t> count_holes(const char* path, const struct stat& status) {
  if (status.st_blocks * 512 >= status.st_size) return uint64_t{0};
  const Fd fd(::open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  if (!fd) return errno_error(path);
  off_t holes = 0;
  for (off_t end = 0; end < status.st_size;) {
    off_t data = ::lseek(fd.get(), end, SEEK_DATA);
    if (data < 0 && errno != ENXIO) break;
    if (data < 0) data = status.st_size;
    holes += data - end;
    end = data < status.st_size ? ::lseek(fd.get(), data, SEEK_HOLE) : data;
    if (end < 0) break;
  }
  return static_cast<uint64_t>(holes);
}

InodePointer inode_of(const struct stat& status) {
  auto inode = std::make_shared<Inode>();
  inode->mode = status.st_mode;
  inode->uid = status.st_uid;
  inode->gid = status.st_gid;
  inode->mtime_s = status.st_mtim.tv_sec;
  inode->mtime_ns = static_cast<uint32_t>(status.st_mtim.tv_nsec);
  inode->device = status.st_rdev;
  return inode;
}

}  // namespace

Result<void> take_folder(const Context& context, const std::string& folder, const struct stat& left_out) {
  const auto root = std::make_shared<const Fd>(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!*root) return errno_error(folder);
  std::string path = folder;
  while (path.size() > 1 && path.ends_with('/')) path.pop_back();
  char* paths[] = {path.data(), nullptr};
  const std::unique_ptr<FTS, decltype(&::fts_close)> walk(
      ::fts_open(paths, FTS_PHYSICAL | FTS_COMFOLLOW | FTS_XDEV | FTS_NOCHDIR, nullptr), ::fts_close);
  if (!walk) return errno_error(folder);
  std::map<std::pair<dev_t, ino_t>, std::string> several_names;
  uint64_t bytes = 0;
  errno = 0;
  while (FTSENT* entry = ::fts_read(walk.get())) {
    TRY(interrupted());
    const struct stat& status = *entry->fts_statp;
    if (entry->fts_info == FTS_DP) continue;
    if (entry->fts_info == FTS_DNR || entry->fts_info == FTS_ERR || entry->fts_info == FTS_NS)
      return errno_error(entry->fts_path, entry->fts_errno);
    if (status.st_dev == left_out.st_dev && status.st_ino == left_out.st_ino) continue;
    const std::string name =
        entry->fts_level == 0 ? "." : std::string(entry->fts_path).substr(path == "/" ? 1 : path.size() + 1);
    const auto identity = std::pair(status.st_dev, status.st_ino);
    if (!S_ISDIR(status.st_mode) && status.st_nlink > 1) {
      const auto [known, first] = several_names.emplace(identity, name);
      if (!first) {
        TRY(context.tree.link(name, known->second));
        continue;
      }
    }
    const InodePointer inode = inode_of(status);
    TRY(read_attributes(entry->fts_accpath, *inode));
    if (inode->is_symlink()) {
      inode->target.resize(4096);
      const ssize_t length = ::readlink(entry->fts_accpath, inode->target.data(), inode->target.size());
      if (length < 0) return errno_error(entry->fts_path);
      inode->target.resize(static_cast<size_t>(length));
    }
    if (inode->is_regular()) {
      if (::faccessat(AT_FDCWD, entry->fts_accpath, R_OK, AT_EACCESS) != 0) return errno_error(entry->fts_path);
      inode->content = Content{.file = root,
                               .path = name,
                               .size_bytes = static_cast<uint64_t>(status.st_size),
                               .hole_bytes = TRY(count_holes(entry->fts_accpath, status)),
                               .device = status.st_dev,
                               .inode = status.st_ino};
      bytes += inode->content.size_bytes;
      context.progress.bytes(bytes, 0);
    }
    TRY(context.tree.put(name, inode));
    errno = 0;
  }
  if (errno != 0) return errno_error(folder);
  return {};
}

}  // namespace rootfs
