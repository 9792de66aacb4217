// SPDX-License-Identifier: Apache-2.0
// Makes, finds and judges the files of overlays.
#include "overlay.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <utility>

#include "file_lock.hpp"
#include "qcow2/format.hpp"
#include "system_error.hpp"

namespace virtio_blk {

namespace fs = std::filesystem;

namespace {

// overlay-0123456789abcdef.qcow2
constexpr std::string_view kNameStart = "overlay-";
constexpr std::string_view kNameEnd = ".qcow2";
constexpr size_t kRandomDigits = 16;
constexpr std::string_view kDigits = "0123456789abcdef";

Result<std::string> random_name() {
  unsigned char random[kRandomDigits];
  if (::getrandom(random, sizeof random, 0) != ssize_t{sizeof random}) return system_error();
  std::string name(kNameStart);
  for (const unsigned char byte : random) name += kDigits[byte % kDigits.size()];
  return name.append(kNameEnd);
}

bool is_our_name(std::string_view name) {
  if (name.size() != kNameStart.size() + kRandomDigits + kNameEnd.size()) return false;
  if (!name.starts_with(kNameStart) || !name.ends_with(kNameEnd)) return false;
  return name.substr(kNameStart.size(), kRandomDigits).find_first_not_of(kDigits) == std::string_view::npos;
}

// A new file that nobody else finds by chance: without a name where the file system has such files.
// The name it has elsewhere goes with this object.
class NewFile {
 public:
  static Result<NewFile> create_in(int folder_fd);
  NewFile(NewFile&& other) noexcept
      : folder_fd_(other.folder_fd_), name_(std::exchange(other.name_, {})), fd_(std::move(other.fd_)) {}
  ~NewFile() {
    if (!name_.empty()) ::unlinkat(folder_fd_, name_.c_str(), 0);
  }

  int fd() const { return fd_.get(); }
  Fd take_fd() { return std::move(fd_); }
  // For linkat(): relative to the folder, or not.
  std::string link_source() const { return name_.empty() ? "/proc/self/fd/" + std::to_string(fd()) : name_; }

 private:
  NewFile(int folder_fd, std::string name, Fd fd) : folder_fd_(folder_fd), name_(std::move(name)), fd_(std::move(fd)) {}

  int folder_fd_;
  std::string name_;  // "" without
  Fd fd_;
};

Result<NewFile> NewFile::create_in(int folder_fd) {
  Fd nameless(::openat(folder_fd, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  if (nameless) return NewFile(folder_fd, {}, std::move(nameless));
  if (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL) return system_error();
  const std::string name = CLONE_TRY(random_name());
  Fd fd(::openat(folder_fd, name.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600));
  if (!fd) return system_error();
  return NewFile(folder_fd, name, std::move(fd));
}

// The base as the overlay's header names it, and what the header says of it.
struct Base {
  std::string path;    // absolute, no link in it: what the user's name leads to now
  std::string format;  // as the header says it
  uint64_t size_bytes = 0;
};

// An image by its name: whether two are the same.
struct Identity {
  dev_t device;
  ino_t inode;
  bool operator==(const Identity&) const = default;
};

Result<Identity> identity_of(const std::string& path) {
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) return system_error();
  // A block device is the same by every node that leads to it.
  if (S_ISBLK(status.st_mode)) return Identity{~dev_t{0}, status.st_rdev};
  return Identity{status.st_dev, status.st_ino};
}

Result<void> write_empty_overlay(int fd, const Base& base) {
  CLONE_TRY(qcow2::create(
      fd,
      {.size_bytes = base.size_bytes, .extended_l2 = true, .backing_name = base.path, .backing_format = base.format}));
  if (::fsync(fd) != 0) return system_error();
  return {};
}

Result<Fd> open_folder_of(const std::string& path) {
  const std::string parent = fs::path(path).parent_path().string();
  const std::string folder = parent.empty() ? "." : parent;
  Fd fd(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd) return system_error().context("its folder " + folder);
  return fd;
}

// The name appears when the file is whole and on the disk. One that another start made meanwhile is left as it is.
Result<void> make_overlay(const std::string& path, const Base& base) {
  const Fd folder = CLONE_TRY(open_folder_of(path));
  const NewFile file = CLONE_TRY(NewFile::create_in(folder.get()));
  CLONE_TRY(write_empty_overlay(file.fd(), base));
  const std::string name = fs::path(path).filename().string();
  if (::linkat(folder.get(), file.link_source().c_str(), folder.get(), name.c_str(), AT_SYMLINK_FOLLOW) != 0 &&
      errno != EEXIST)
    return system_error();
  if (::fsync(folder.get()) != 0 && errno != EINVAL) return system_error();
  return {};
}

// Only the base that the user named is opened through the overlay, and only as what it is.
Result<void> check_base(const Storage& storage, const std::string& path, const Base& base, const std::string& given) {
  const auto read = [&storage](uint64_t offset, std::span<std::byte> into) {
    return ::pread(storage.fd(), into.data(), into.size(), static_cast<off_t>(offset)) ==
           static_cast<ssize_t>(into.size());
  };
  const qcow2::Header header = CLONE_TRY(qcow2::read_header(read, storage.size_bytes()));
  if (header.backing_name.empty())
    return Error{"has no base, and so is no overlay of " + given + "; allowed is one that was made over it"};
  // Relative names start from the file that holds them.
  const std::string named = (fs::path(path).parent_path() / header.backing_name).string();
  auto recorded = identity_of(named);
  const Identity wanted = CLONE_TRY(identity_of(base.path).context("path=" + given));
  if (!recorded.ok() || !(*recorded == wanted))
    return Error{"is an overlay of " + qcow2::printable(named) +
                 (recorded.ok() ? "" : " (" + recorded.error().message + ")") + ", not of " + given +
                 "; allowed is its own base"};
  if (header.backing_format.empty())
    return Error{"does not say which format its base has; `qemu-img rebase -u` records it"};
  if (header.backing_format != base.format)
    return Error{"was made over " + qcow2::printable(named) + " as a " + header.backing_format + " image, not as a " +
                 base.format + " one; format=" + header.backing_format + " says so"};
  return {};
}

Result<Storage> open_named(const std::string& path, const Base& base, const std::string& given, Cache cache,
                           const clone_sdk::Host& host) {
  auto identity = identity_of(path);
  if (!identity.ok() && identity.error().code == ENOENT) {
    CLONE_TRY(make_overlay(path, base));
  } else if (!identity.ok()) {
    return std::move(identity).error();
  } else if (*identity == CLONE_TRY(identity_of(base.path))) {
    return Error{"is the base itself; allowed is another file, or a name that is not there yet"};
  }
  Fd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK));
  if (!fd) return system_error();
  Storage storage = CLONE_TRY(Storage::open(std::move(fd), Access::read_write, cache, host));
  CLONE_TRY(check_base(storage, path, base, given));
  return storage;
}

// A folder that only this user writes to, made when it is missing.
Result<Fd> private_folder(int parent_fd, const char* name, const std::string& shown) {
  if (::mkdirat(parent_fd, name, 0700) != 0 && errno != EEXIST) return system_error().context(shown);
  Fd folder(::openat(parent_fd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!folder) return system_error().context(shown);
  struct stat status {};
  if (::fstat(folder.get(), &status) != 0) return system_error().context(shown);
  if (status.st_uid != ::geteuid())
    return Error{shown + ": belongs to user " + std::to_string(status.st_uid) + ", not to " +
                 std::to_string(::geteuid()) + " who runs this"};
  if (status.st_mode & (S_IWGRP | S_IWOTH)) return Error{shown + ": others can write to it; chmod go-w it"};
  return folder;
}

// What starts that were killed left behind: of our files those that nobody holds open.
void remove_left_overlays(int folder_fd) {
  const int listed_fd = ::openat(folder_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  DIR* const listed = listed_fd < 0 ? nullptr : ::fdopendir(listed_fd);
  if (!listed) {
    if (listed_fd >= 0) ::close(listed_fd);
    return;
  }
  while (const dirent* entry = ::readdir(listed)) {
    if (!is_our_name(entry->d_name)) continue;
    const Fd fd(::openat(folder_fd, entry->d_name, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
    // A start that has not locked its file yet does not need the name either.
    if (fd && !is_locked(fd.get())) ::unlinkat(folder_fd, entry->d_name, 0);
  }
  ::closedir(listed);
}

Result<Storage> open_temporary(const Base& base, Cache cache, const clone_sdk::Host& host) {
  const char* home = std::getenv("HOME");
  if (!home || *home != '/')
    return Error{"HOME is not set to an absolute path; temporary overlays are kept in ~/.clone/overlays"};
  const Fd home_fd(::open(home, O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!home_fd) return system_error().context(home);
  const std::string ours = std::string(home) + "/.clone";
  const Fd ours_fd = CLONE_TRY(private_folder(home_fd.get(), ".clone", ours));
  const Fd folder = CLONE_TRY(private_folder(ours_fd.get(), "overlays", ours + "/overlays"));
  remove_left_overlays(folder.get());
  NewFile file = CLONE_TRY(NewFile::create_in(folder.get()).context(ours + "/overlays"));
  CLONE_TRY(write_empty_overlay(file.fd(), base).context(ours + "/overlays"));
  return Storage::open(file.take_fd(), Access::read_write, cache, host);  // locked, and then the name goes
}

}  // namespace

Result<Overlay> choose_overlay(std::string_view value, bool root, bool read_only) {
  if (value == "off") return Overlay{};
  const std::string given = "overlay=" + std::string(value);
  if (!root) return Error{given + ": allowed with root=on only: a disk that is not the root has none"};
  if (read_only) return Error{given + ": allowed without readonly=on only: the image is opened for reading anyway"};
  if (value == "on" || value == "tmpfs") return Overlay{OverlayKind::guest_memory, {}};
  if (value == "auto") return Overlay{OverlayKind::temporary, {}};
  if (value.empty() || value.ends_with('/'))
    return Error{given + ": allowed are off, on, tmpfs, auto and the path of a file"};
  return Overlay{OverlayKind::file, std::string(value)};
}

Result<std::unique_ptr<Image>> open_overlay(const Overlay& overlay, ImageConfig base, const clone_sdk::Host& host) {
  // Open and locked until the overlay has it open itself: it does not change in between.
  base.read_only = true;
  const std::unique_ptr<Image> opened = CLONE_TRY(open_image(base, host));
  std::error_code error;
  const Base found = {fs::canonical(base.path, error).string(), format_of(base) == Format::qcow2 ? "qcow2" : "raw",
                      opened->size_bytes()};
  if (error) return system_error(error.value()).context("path=" + base.path);

  const bool temporary = overlay.kind == OverlayKind::temporary;
  const std::string shown = "overlay=" + (temporary ? "auto" : overlay.path);
  if (found.path.size() > qcow2::kLongestBackingName)
    return Error{shown + ": the base's path has " + std::to_string(found.path.size()) + " bytes; allowed are " +
                 std::to_string(qcow2::kLongestBackingName)};
  ImageConfig config = base;
  config.path = overlay.path;
  config.format = Format::qcow2;
  config.backing = Backing::allowed;
  config.read_only = false;
  // Nothing of it outlives the process, so nothing has to be durable.
  if (temporary && config.cache == Cache::writeback) config.cache = Cache::unsafe;
  auto open = [&]() -> Result<std::unique_ptr<Image>> {
    Storage storage = temporary ? CLONE_TRY(open_temporary(found, config.cache, host))
                                : CLONE_TRY(open_named(overlay.path, found, base.path, config.cache, host));
    return open_qcow2_image(std::move(storage), config, host);
  };
  return open().context(shown);
}

}  // namespace virtio_blk
