// SPDX-License-Identifier: Apache-2.0
// Opens the store, and clears what dead processes left in it.
#include "store.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <memory>

namespace snapshot_file {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kPattern = "XXXXXX";

// .NAME.XXXXXX
bool is_temporary(std::string_view name) {
  const size_t end = kPattern.size() + 1;
  return name.size() > end + 1 && name[0] == '.' && name[name.size() - end] == '.' &&
         check_name("", name.substr(1, name.size() - end - 1)).ok();
}

Result<void> sync_folder(const fs::path& path) {
  const Fd fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd) return system_error().context(path.string());
  return sync(fd.get()).context(path.string());
}

// Ours alone, and durable: a snapshot is not lost with the folder that it lies in.
Result<void> make_folders(const fs::path& path) {
  const fs::path parent = path.parent_path();
  if (::mkdir(path.c_str(), 0700) == 0) return sync_folder(parent);
  if (errno == EEXIST) return {};
  if (errno != ENOENT || parent == path) return system_error().context(path.string());
  CLONE_TRY(make_folders(parent));
  if (::mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) return system_error().context(path.string());
  return sync_folder(parent);
}

bool lock_now(int fd) { return ::flock(fd, LOCK_EX | LOCK_NB) == 0; }

}  // namespace

Store::Lock::~Lock() {
  if (fd_ >= 0) ::flock(fd_, LOCK_UN);
}

Result<Store> Store::open(const std::string& path) {
  OpenedFile folder = CLONE_TRY(open_own(AT_FDCWD, path + "/.", Kind::folder, path));  // through links
  return Store(path, std::move(folder.fd));
}

Result<Store> Store::make(const std::string& path) {
  std::error_code error;
  const fs::path absolute = fs::absolute(path, error);
  if (error) return system_error(error.value()).context(path);
  CLONE_TRY(make_folders(absolute));
  return open(path);
}

Result<std::vector<std::string>> Store::names() const {
  std::vector<std::string> names = CLONE_TRY(names_in(fd()).context(path_));
  std::erase_if(names, [](const std::string& name) { return !check_name("", name).ok(); });
  std::sort(names.begin(), names.end());
  return names;
}

Result<bool> Store::has(const std::string& name) const {
  struct stat status {};
  if (::fstatat(fd(), name.c_str(), &status, AT_SYMLINK_NOFOLLOW) == 0) return true;
  if (errno == ENOENT) return false;
  return system_error().context(path_of(name));
}

Result<Fd> Store::open_folder(const std::string& name) const {
  if (!CLONE_TRY(has(name)))
    return Error{"there is no snapshot '" + name + "' in " + path_, ENOENT, CLONE_ERR_NOT_FOUND};
  return std::move(CLONE_TRY(open_own(fd(), name, Kind::folder, path_of(name))).fd);
}

Result<Fd> Store::lock_folder(const std::string& name) const {
  Fd folder = CLONE_TRY(open_folder(name));
  if (lock_now(folder.get())) return folder;
  if (errno != EWOULDBLOCK) return system_error().context(path_of(name) + ": lock");
  return Error{"snapshot '" + name + "' is being compressed, decompressed or removed by another process", EBUSY,
               CLONE_ERR_BUSY};
}

Result<Store::Lock> Store::lock() const {
  while (::flock(fd(), LOCK_EX) != 0)
    if (errno != EINTR) return system_error().context(path_ + ": lock");
  return Lock(fd());
}

void Store::clear_left_folders() const {
  const auto names = names_in(fd());
  if (!names.ok()) return;
  for (const std::string& name : *names) {
    if (!is_temporary(name)) continue;
    const Fd folder(::openat(fd(), name.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW));
    if (folder && lock_now(folder.get())) clear(folder.get(), name);
  }
}

Result<TemporaryFolder> Store::make_temporary(const std::string& name) const {
  std::string path = "/proc/self/fd/" + std::to_string(fd()) + "/." + name + "." + std::string(kPattern);
  if (!::mkdtemp(path.data())) return system_error().context(path_ + ": a folder for '" + name + "'");
  TemporaryFolder folder{fs::path(path).filename().string(), {}};
  folder.fd = Fd(::openat(fd(), folder.name.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW));
  if (folder.fd && lock_now(folder.fd.get())) return folder;
  const int code = errno;
  ::unlinkat(fd(), folder.name.c_str(), AT_REMOVEDIR);
  return system_error(code).context(path_of(folder.name));
}

void Store::clear(int folder_fd, const std::string& name) const {
  if (const auto files = names_in(folder_fd); files.ok())
    for (const std::string& file : *files)
      if (is_of_snapshot(file)) ::unlinkat(folder_fd, file.c_str(), 0);
  ::unlinkat(fd(), name.c_str(), AT_REMOVEDIR);
}

Result<std::vector<std::string>> names_in(int folder_fd) {
  Fd fd(::openat(folder_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  const std::unique_ptr<DIR, int (*)(DIR*)> stream(fd ? ::fdopendir(fd.get()) : nullptr, ::closedir);
  if (!stream) return system_error();
  fd.release();
  std::vector<std::string> names;
  const dirent* entry = nullptr;
  while (errno = 0, entry = ::readdir(stream.get()))
    if (const std::string_view name = entry->d_name; name != "." && name != "..") names.emplace_back(name);
  if (errno) return system_error();
  return names;
}

}  // namespace snapshot_file
