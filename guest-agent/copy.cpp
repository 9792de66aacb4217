// SPDX-License-Identifier: Apache-2.0
// Trees of files into the guest and out of it.
#include <asm/errno.h>
#include <linux/fcntl.h>
#include <linux/stat.h>

#include "conversation.hpp"
#include "files.hpp"
#include "requests.hpp"

using namespace agent_protocol;

namespace {

using LongPath = Text<kPathBytes>;

CopyRequest request;
Entry entry;

constexpr int open_folder = O_PATH | O_DIRECTORY | O_CLOEXEC;  // to reach what is in it

long set_times(int fd, const char* path, uint64_t mtime_s, uint32_t mtime_ns, int flags) {
  const __kernel_timespec time{static_cast<long>(mtime_s), mtime_ns};
  const __kernel_timespec times[2] = {time, time};
  return sys::call(__NR_utimensat, fd, sys::word(path), sys::word(times), flags);
}

void append(LongPath& path, const char* text, size_t size_bytes) {
  for (size_t i = 0; i < size_bytes; ++i) {
    const char letter[2] = {text[i], 0};
    path << letter;
  }
}

// Builds what is copied in. Each step returns 0, or -errno with message() saying what it is about.
// The target may lie where others than root write: no symbolic link is followed there but the target's own path, and
// what is made is reached only through the descriptor of the directory that it is in.
class Incoming {
 public:
  explicit Incoming(const CopyRequest& from) : preserve_owners_(from.flags & kCopyPreserveOwners) {
    temporary_ << ".clone-copy-" << static_cast<unsigned long>(sys::getpid());
    root_folder_ = sys::openat(AT_FDCWD, from.path, open_folder);
    if (root_folder_ >= 0) {
      base_ << from.path;
      if (*from.name != 0) base_ << (equal(from.path, "/") ? "" : "/") << from.name;
      is_root_there_ = *from.name == 0;
      return;
    }
    size_t end = length(from.path);
    while (end > 1 && from.path[end - 1] == '/') --end;
    must_be_directory_ = from.path[end] != 0;
    append(base_, from.path, end);
    while (from.path[end - 1] != '/') --end;
    LongPath folder;
    append(folder, from.path, end);
    root_folder_ = sys::openat(AT_FDCWD, folder.c_str(), open_folder);
  }

  ~Incoming() {
    if (file_ >= 0) {
      sys::close(file_);
      sys::unlinkat(folder_, temporary_.c_str(), 0);
    }
    while (depth_ > 0) sys::close(directories_[--depth_].fd);
    if (root_folder_ >= 0) sys::close(root_folder_);
  }

  const Message& message() const { return message_; }

  long enter(const Entry& what) {
    if (left_bytes_ > 0) return fail(-EINVAL, "the file before is not complete");
    if (!has_root_ && *what.path != 0) return fail(-EINVAL, "the first entry is not the root");
    if (has_root_ && *what.path == 0) return fail(-EINVAL, "there are two roots");
    has_root_ = true;
    while (depth_ > 0 && !is_within_last(what.path)) leave_directory();
    path_ = base_;
    if (*what.path != 0) path_ << (equal(base_.c_str(), "/") ? "" : "/") << what.path;
    if (path_.full()) return fail(-ENAMETOOLONG, path_.c_str());
    if (const long result = find_folder(what); result < 0) return fail(result, path_.c_str());
    switch (what.mode & S_IFMT) {
      case S_IFDIR:
        return fail(make_directory(what), path_.c_str());
      case S_IFREG:
        return fail(begin_file(what), path_.c_str());
      case S_IFLNK:
        return fail(make_link(what), path_.c_str());
      default:
        return fail(-EINVAL, "only files, directories and symbolic links can be copied");
    }
  }

  long add(const uint8_t* data, size_t size_bytes) {
    if (size_bytes > left_bytes_) return fail(-EINVAL, "more data than the file's size");
    left_bytes_ -= size_bytes;
    while (size_bytes > 0) {
      const long count = sys::write(file_, data, size_bytes);
      if (count <= 0) return fail(count < 0 ? count : -EIO, path_.c_str());
      data += count;
      size_bytes -= static_cast<size_t>(count);
    }
    return left_bytes_ == 0 && file_ >= 0 ? fail(end_file(), path_.c_str()) : 0;
  }

  long end() {
    if (left_bytes_ > 0) return fail(-EINVAL, "the last file is not complete");
    if (!has_root_) return fail(-EINVAL, "nothing was copied");
    while (depth_ > 0) leave_directory();
    return 0;
  }

 private:
  // They get their times and modes when all is in them: a stack of those that are still open. An entry that does not
  // lie below the last ends it.
  struct Directory {
    int fd;
    size_t path_bytes;  // of current_
    bool is_new;
    uint32_t mode, uid, gid, mtime_ns;
    uint64_t mtime_s;
  };
  static constexpr size_t most_directories = 256;

  long fail(long result, const char* what) {
    if (result < 0) message_ << what << ": " << result;
    return result;
  }

  // Where the entry goes, and under which name there.
  long find_folder(const Entry& what) {
    if (*what.path == 0) {
      if (root_folder_ < 0) return root_folder_;
      if (must_be_directory_ && !S_ISDIR(what.mode)) return -ENOENT;
      folder_ = root_folder_;
    } else if (depth_ > 0) {
      folder_ = directories_[depth_ - 1].fd;
    } else {
      return -ENOTDIR;  // the root
    }
    name_ = path_.c_str() + path_.size();
    while (name_[-1] != '/') --name_;
    if (*what.path == 0) {
      if (is_root_there_) name_ = ".";
      return 0;
    }
    // Directly in the last directory: each has an entry of its own before those in it.
    const size_t above_bytes = directories_[depth_ - 1].path_bytes;
    return above_bytes + (above_bytes > 0 ? 1 : 0) + length(name_) == length(what.path) ? 0 : -ENOENT;
  }

  bool is_within_last(const char* path) const {
    const size_t size_bytes = directories_[depth_ - 1].path_bytes;
    if (size_bytes == 0) return true;
    for (size_t i = 0; i < size_bytes; ++i)
      if (path[i] != current_[i]) return false;
    return path[size_bytes] == '/';
  }

  void leave_directory() {
    const Directory& last = directories_[--depth_];
    if (last.is_new) {
      if (preserve_owners_) sys::call(__NR_fchown, last.fd, last.uid, last.gid);
      sys::call(__NR_fchmod, last.fd, last.mode & 07777);
      set_times(last.fd, nullptr, last.mtime_s, last.mtime_ns, 0);
    }
    sys::close(last.fd);
  }

  // One that is there stays as it is but for what comes into it.
  long make_directory(const Entry& what) {
    if (depth_ == most_directories) return -ELOOP;
    const long result = sys::call(__NR_mkdirat, folder_, sys::word(name_), 0700);
    if (result < 0 && result != -EEXIST) return result;
    const int how = result == 0 ? open_read | O_DIRECTORY : open_folder;
    const int fd = sys::openat(folder_, name_, how | O_NOFOLLOW);
    if (fd < 0) return fd;
    const size_t path_bytes = length(what.path);
    __builtin_memcpy(current_, what.path, path_bytes);
    directories_[depth_++] = {fd, path_bytes, result == 0, what.mode, what.uid, what.gid, what.mtime_ns, what.mtime_s};
    return 0;
  }

  // What is there may be replaced if it is a file or a link. Its owner remains that of the file.
  long check_replaced(uint32_t& uid, uint32_t& gid) {
    struct stat status;
    if (sys::fstatat(folder_, name_, &status, AT_SYMLINK_NOFOLLOW) < 0) return 0;
    if (S_ISDIR(status.st_mode)) return -EISDIR;
    if (!S_ISREG(status.st_mode) && !S_ISLNK(status.st_mode)) return -EEXIST;
    uid = status.st_uid;
    gid = status.st_gid;
    return 0;
  }

  long begin_file(const Entry& what) {
    mode_ = what.mode & 07777;
    uid_ = gid_ = ~0u;  // as they are
    const long result = check_replaced(uid_, gid_);
    if (result < 0) return result;
    if (preserve_owners_) {
      uid_ = what.uid;
      gid_ = what.gid;
    }
    mtime_s_ = what.mtime_s;
    mtime_ns_ = what.mtime_ns;
    sys::unlinkat(folder_, temporary_.c_str(), 0);
    constexpr int how = O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC;
    file_ = static_cast<int>(sys::call(__NR_openat, folder_, sys::word(temporary_.c_str()), how, 0600));
    if (file_ < 0) return file_;
    left_bytes_ = what.size_bytes;
    return left_bytes_ == 0 ? end_file() : 0;
  }

  long end_file() {
    long result = 0;
    if (uid_ != ~0u) result = sys::call(__NR_fchown, file_, uid_, gid_);
    if (result == -EPERM && !preserve_owners_) result = 0;
    if (result >= 0) result = sys::call(__NR_fchmod, file_, mode_);  // after the owner, which clears set-user-id
    if (result >= 0) result = set_times(file_, nullptr, mtime_s_, mtime_ns_, 0);
    const long closed = sys::close(file_);
    file_ = -1;
    if (result >= 0) result = closed;
    return rename(result);
  }

  long make_link(const Entry& what) {
    uint32_t uid = ~0u, gid = ~0u;
    long result = check_replaced(uid, gid);
    if (result < 0) return result;
    sys::unlinkat(folder_, temporary_.c_str(), 0);
    result = sys::call(__NR_symlinkat, sys::word(what.link_target), folder_, sys::word(temporary_.c_str()));
    if (result < 0) return result;
    if (preserve_owners_) result = own_link(what.uid, what.gid);
    if (result >= 0) result = set_times(folder_, temporary_.c_str(), what.mtime_s, what.mtime_ns, AT_SYMLINK_NOFOLLOW);
    return rename(result);
  }

  // Only a link: by its name it could be another file by now.
  long own_link(uint32_t uid, uint32_t gid) {
    const int link = sys::openat(folder_, temporary_.c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (link < 0) return link;
    struct stat status;
    long result = sys::fstat(link, &status);
    if (result >= 0 && !S_ISLNK(status.st_mode)) result = -EEXIST;
    if (result >= 0) result = sys::call(__NR_fchownat, link, sys::word(""), uid, gid, AT_EMPTY_PATH);
    sys::close(link);
    return result;
  }

  long rename(long result) {
    const char* const from = temporary_.c_str();
    if (result >= 0) result = sys::call(__NR_renameat, folder_, sys::word(from), folder_, sys::word(name_));
    if (result < 0) sys::unlinkat(folder_, from, 0);
    return result < 0 ? result : 0;
  }

  const bool preserve_owners_;
  LongPath base_, path_;        // for messages
  Text<64> temporary_;          // what is made gets its name when it is complete
  int root_folder_ = -1;        // that the root goes into, or -errno
  bool is_root_there_ = false;  // it is root_folder_ itself
  bool must_be_directory_ = false;
  int folder_ = -1;  // of the last entry, and its name there
  const char* name_ = "";
  Message message_;
  bool has_root_ = false;
  int file_ = -1;
  uint64_t left_bytes_ = 0;
  uint32_t mode_ = 0, uid_ = 0, gid_ = 0, mtime_ns_ = 0;
  uint64_t mtime_s_ = 0;
  char current_[kPathBytes];  // the last directory; those above are beginnings of it
  Directory directories_[most_directories];
  size_t depth_ = 0;
};

// Tells the host of a tree. False when it is over: the host is gone, or was told an error.
class Outgoing {
 public:
  explicit Outgoing(Connection& connection) : connection_(connection) {}

  bool run(const char* source) {
    struct stat status;
    // The root may be a link to what is meant; one that leads nowhere is meant itself.
    long result = sys::fstatat(AT_FDCWD, source, &status, 0);
    bool follow = true;
    if (result == -ENOENT && sys::fstatat(AT_FDCWD, source, &status, AT_SYMLINK_NOFOLLOW) == 0) {
      result = 0;
      follow = false;
    }
    source_ = source;
    if (result < 0) return fail(result);
    if (!S_ISREG(status.st_mode) && !S_ISDIR(status.st_mode) && !S_ISLNK(status.st_mode)) {
      connection_.error(-EINVAL, Type::copy_out, "only files, directories and symbolic links can be copied");
      return false;
    }
    return give(AT_FDCWD, source, status, follow, 0) && connection_.send(Type::copy_end, nullptr, 0);
  }

 private:
  static constexpr int most_levels = 256;  // one descriptor each

  bool fail(long result) {
    Message message;
    message << source_ << (path_.empty() ? "" : "/") << path_.c_str() << ": " << result;
    connection_.error(result, Type::copy_out, message.c_str());
    return false;
  }

  bool tell(const struct stat& status, const char* target) {
    uint8_t buffer[2 * kPathBytes + 64];
    Writer writer(buffer, sizeof buffer);
    writer.u32(status.st_mode);
    writer.u32(status.st_uid);
    writer.u32(status.st_gid);
    writer.u64(status.st_mtime);
    writer.u32(static_cast<uint32_t>(status.st_mtime_nsec));
    writer.u64(S_ISREG(status.st_mode) ? static_cast<uint64_t>(status.st_size) : 0);
    writer.text(path_.c_str(), path_.size());
    writer.text(target, length(target));
    return connection_.send(Type::entry, writer.data(), writer.size_bytes());
  }

  bool give(int directory, const char* name, struct stat status, bool follow, int level) {
    if (S_ISLNK(status.st_mode)) {
      char target[kPathBytes];
      const long size = sys::call(__NR_readlinkat, directory, sys::word(name), sys::word(target), sizeof target - 1);
      if (size == -ENOENT) return true;
      if (size < 0) return fail(size);
      target[size] = 0;
      return tell(status, target);
    }
    if (!S_ISREG(status.st_mode) && !S_ISDIR(status.st_mode)) return tell(status, "");
    int flags = open_read | O_NONBLOCK | (follow ? 0 : O_NOFOLLOW);
    if (S_ISDIR(status.st_mode)) flags |= O_DIRECTORY;
    const int fd = sys::openat(directory, name, flags);
    if (fd == -ENOENT && level > 0) return true;  // gone since
    if (fd < 0) return fail(fd);
    sys::fstat(fd, &status);
    const bool ok = S_ISDIR(status.st_mode) ? give_directory(fd, status, level) : give_file(fd, status);
    sys::close(fd);
    return ok;
  }

  bool give_directory(int fd, const struct stat& status, int level) {
    if (level == most_levels) return fail(-ELOOP);
    if (!tell(status, "")) return false;
    return !any_entry(fd, [&](const char* name) {
      const LongPath above = path_;
      path_ << (path_.empty() ? "" : "/") << name;
      struct stat child;
      bool ok = true;
      if (path_.full()) {
        ok = fail(-ENAMETOOLONG);
      } else if (sys::fstatat(fd, name, &child, AT_SYMLINK_NOFOLLOW) == 0) {
        ok = give(fd, name, child, false, level + 1);
      }
      path_ = above;
      return !ok;
    });
  }

  // Exactly as many bytes as were told: a file that became shorter ends in zeroes, of one that grew the rest is left.
  bool give_file(int fd, const struct stat& status) {
    if (!tell(status, "")) return false;
    for (auto left = static_cast<uint64_t>(status.st_size); left > 0;) {
      const uint64_t part = left < kMaxPayloadBytes ? left : kMaxPayloadBytes;
      uint8_t* const payload = connection_.begin_frame();
      long count = sys::read(fd, payload, part);
      if (count < 0) return fail(count);
      if (count == 0) {
        __builtin_memset(payload, 0, part);
        count = static_cast<long>(part);
      }
      connection_.end_frame(Type::data, static_cast<size_t>(count));
      if (!connection_.wait_until_sent()) return false;
      left -= static_cast<uint64_t>(count);
    }
    return true;
  }

  Connection& connection_;
  const char* source_ = "";
  LongPath path_;
};

}  // namespace

void take_copy(Conversation& conversation, const Connection::Frame& first) {
  Connection& connection = conversation.connection;
  if (!request.parse(first.reader())) {
    connection.error(-EINVAL, Type::copy_in, "a malformed request: the target has to be an absolute path");
    return;
  }
  Incoming incoming(request);
  Connection::Frame frame;
  // What still comes after a failure is passed over (Conversation::answer).
  const auto check = [&](long result) {
    if (result < 0) connection.error(result, Type::copy_in, incoming.message().c_str());
    return result >= 0;
  };
  while (connection.wait_for_frame(frame)) {
    switch (frame.type) {
      case Type::entry:
        if (!entry.parse(frame.reader())) {
          connection.error(-EINVAL, Type::copy_in,
                           "a malformed entry, or one whose path does not stay below the target");
          return;
        }
        if (!check(incoming.enter(entry))) return;
        break;
      case Type::data:
        if (!check(incoming.add(frame.payload, frame.length_bytes))) return;
        break;
      case Type::copy_end:
        if (check(incoming.end())) connection.done();
        return;
      default:
        connection.error(-ENOSYS, frame.type, "not within a copy");
    }
  }
  conversation.end();
}

void give_copy(Conversation& conversation, const Connection::Frame& frame) {
  if (!request.parse(frame.reader())) {
    conversation.connection.error(-EINVAL, Type::copy_out,
                                  "a malformed request: the source has to be an absolute path");
    return;
  }
  Outgoing(conversation.connection).run(request.path);
}
