// SPDX-License-Identifier: Apache-2.0
// Trees of files into a guest and out of it.
#include "agent/copy.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <memory>
#include <optional>
#include <vector>

#include "util/log.hpp"

namespace vmm {
namespace {

using namespace agent_protocol;

constexpr size_t kMostPathBytes = 4095;  // as the kernel has it
constexpr size_t kMostLevels = 256;      // of directories in each other: one descriptor each when they are read
constexpr uint32_t kMostIdleFrames = 1000;
constexpr uint64_t kMostWarnings = 20;  // of what is left out of one copy

class Outgoing {
 public:
  Outgoing(AgentSession& session, const CopyOptions& options) : session_(session), options_(options) {}

  Result<void> run(const std::string& source, const std::string& target) {
    struct stat status {};
    // The root may be a link to what is meant; one that leads nowhere is meant itself.
    const bool follow = ::stat(source.c_str(), &status) == 0;
    if (!follow && ::lstat(source.c_str(), &status) != 0) return errno_error(source);
    if (!S_ISREG(status.st_mode) && !S_ISDIR(status.st_mode) && !S_ISLNK(status.st_mode))
      return Error{source + ": only files, directories and symbolic links can be copied"};
    source_ = source;
    session_.queue(make_frame(Type::copy_in, [&](Writer& writer) {
      writer.u32(options_.owners ? kCopyPreserveOwners : 0u);
      put_text(writer, target);
      put_text(writer, last_part(source));
    }));
    TRY(session_.greet(options_.answer));
    TRY(give(AT_FDCWD, source.c_str(), status, follow, 0));
    session_.queue(make_frame(Type::copy_end, [](Writer&) {}));
    for (uint32_t idle = 0; idle < kMostIdleFrames; ++idle) {
      const Frame frame = TRY(session_.receive(limit()));
      if (frame.type == Type::done) return {};
      if (frame.type == Type::error) return agent_error(frame);
    }
    return Error{"the agent sends frames without end and without meaning"};
  }

 private:
  AgentSession::Milliseconds limit() const { return std::max(options_.answer, options_.silence); }
  std::string name() const { return path_.empty() ? source_ : source_ + "/" + path_; }

  Result<void> tell(const struct stat& status, std::string_view link) {
    if (path_.size() > kMostPathBytes) return Error{name() + ": the path is too long"};
    session_.queue(make_frame(Type::entry, [&](Writer& writer) {
      writer.u32(status.st_mode);
      writer.u32(status.st_uid);
      writer.u32(status.st_gid);
      writer.u64(static_cast<uint64_t>(status.st_mtim.tv_sec));
      writer.u32(static_cast<uint32_t>(status.st_mtim.tv_nsec));
      writer.u64(S_ISREG(status.st_mode) ? static_cast<uint64_t>(status.st_size) : 0);
      put_text(writer, path_);
      put_text(writer, link);
    }));
    return session_.send(limit());
  }

  Result<void> give(int directory, const char* base, struct stat status, bool follow, size_t level) {
    if (S_ISLNK(status.st_mode)) {
      char link[kMostPathBytes];
      const ssize_t size = ::readlinkat(directory, base, link, sizeof link);
      if (size < 0) return errno_error(name());
      return tell(status, {link, static_cast<size_t>(size)});
    }
    if (!S_ISREG(status.st_mode) && !S_ISDIR(status.st_mode)) {
      log_warning(name() + ": left out: it is no file, directory or symbolic link");
      return {};
    }
    const Fd fd(::openat(directory, base,
                         O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | (follow ? 0 : O_NOFOLLOW) |
                             (S_ISDIR(status.st_mode) ? O_DIRECTORY : 0)));
    if (!fd || ::fstat(fd.get(), &status) != 0) return errno_error(name());
    return S_ISDIR(status.st_mode) ? give_directory(fd.get(), status, level) : give_file(fd.get(), status);
  }

  Result<void> give_directory(int fd, const struct stat& status, size_t level) {
    if (level == kMostLevels) return Error{name() + ": more than " + std::to_string(kMostLevels) + " levels"};
    TRY(tell(status, ""));
    const std::unique_ptr<DIR, int (*)(DIR*)> entries(::fdopendir(::fcntl(fd, F_DUPFD_CLOEXEC, 0)), ::closedir);
    if (!entries) return errno_error(name());
    while (const dirent* entry = ::readdir(entries.get())) {
      const std::string_view base = entry->d_name;
      struct stat child {};
      if (base == "." || base == ".." || ::fstatat(fd, entry->d_name, &child, AT_SYMLINK_NOFOLLOW) != 0) continue;
      const size_t above_bytes = path_.size();
      path_ += (path_.empty() ? "" : "/") + std::string(base);
      TRY(give(fd, entry->d_name, child, false, level + 1));
      path_.resize(above_bytes);
    }
    return {};
  }

  // Exactly as many bytes as were told: a file that became shorter ends in zeroes, of one that grew the rest is left.
  Result<void> give_file(int fd, const struct stat& status) {
    TRY(tell(status, ""));
    char bytes[kMaxPayloadBytes];
    for (auto left_bytes = static_cast<uint64_t>(status.st_size); left_bytes;) {
      const size_t part_bytes = std::min<uint64_t>(left_bytes, sizeof bytes);
      ssize_t got = ::read(fd, bytes, part_bytes);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return errno_error(name());
      if (got == 0) {
        std::fill_n(bytes, part_bytes, '\0');
        got = static_cast<ssize_t>(part_bytes);
      }
      session_.queue(make_frame(Type::data, [&](Writer& writer) { writer.bytes(bytes, static_cast<size_t>(got)); }));
      TRY(session_.send(limit()));
      left_bytes -= static_cast<uint64_t>(got);
    }
    return {};
  }

  AgentSession& session_;
  const CopyOptions& options_;
  std::string source_;
  std::string path_;  // below it
};

struct Entry {
  uint32_t mode, uid, gid;
  timespec mtime;
  uint64_t size_bytes;
  std::string path, link;
};

Result<Entry> read_entry(const Frame& frame) {
  Reader reader = frame.reader();
  Entry entry{};
  entry.mode = reader.u32();
  entry.uid = reader.u32();
  entry.gid = reader.u32();
  entry.mtime.tv_sec = static_cast<time_t>(reader.u64());
  entry.mtime.tv_nsec = reader.u32();
  entry.size_bytes = reader.u64();
  const Reader::Text path = reader.text();
  const Reader::Text link = reader.text();
  entry.path.assign(path.data, path.size_bytes);
  entry.link.assign(link.data, link.size_bytes);
  const auto unfit = [](const std::string& text) {
    return text.size() > kMostPathBytes || text.find('\0') != std::string::npos;
  };
  if (reader.failed() || entry.mtime.tv_nsec > 999'999'999 || unfit(entry.path) || unfit(entry.link))
    return Error{"the agent sent a malformed entry"};
  // Every part a name: nothing empty, ".", or ".." leads out of the tree.
  for (size_t start = 0; !entry.path.empty() && start <= entry.path.size();) {
    const size_t end = std::min(entry.path.find('/', start), entry.path.size());
    const std::string part = entry.path.substr(start, end - start);
    if (part.empty() || part == "." || part == "..")
      return Error{"the agent sent an entry outside of the tree: " + printable({path.data, path.size_bytes})};
    start = end + 1;
  }
  return entry;
}

// What gets its name when it is complete. Until then it has another one in the same directory, and what bears the name
// stays; what is there is replaced, never written to: it could be a link.
class Unfinished {
 public:
  Unfinished(Fd parent, std::string base) : parent_(std::move(parent)), base_(std::move(base)) {}
  Unfinished(Unfinished&&) = default;
  ~Unfinished() {
    if (parent_ && !temporary_.empty()) ::unlinkat(parent_.get(), temporary_.c_str(), 0);
  }

  // `create(parent, temporary)` fails with EEXIST where the name is taken. As all here: false with errno.
  template <typename Create>
  bool make(Create create) {
    for (int i = 0; i < 100; ++i) {
      std::string name = ".clone-copy-" + std::to_string(::getpid()) + "-" + std::to_string(i);
      if (create(parent_.get(), name.c_str())) {
        temporary_ = std::move(name);
        return true;
      }
      if (errno != EEXIST) break;
    }
    return false;
  }
  bool finish() {
    if (::renameat(parent_.get(), temporary_.c_str(), parent_.get(), base_.c_str()) != 0) return false;
    temporary_.clear();
    return true;
  }

  int parent() const { return parent_.get(); }
  const char* temporary() const { return temporary_.c_str(); }

 private:
  Fd parent_;
  std::string base_;
  std::string temporary_;  // "" when there is nothing to be removed
};

// Everything is made below one descriptor, and no symbolic link is followed there.
class Incoming {
 public:
  Incoming(AgentSession& session, const CopyOptions& options) : session_(session), options_(options) {}

  Result<void> run(const std::string& source, std::string target) {
    struct stat status {};
    if (target.size() > 1 && target.ends_with('/') && ::stat(target.c_str(), &status) != 0) return errno_error(target);
    if (::stat(target.c_str(), &status) == 0 && S_ISDIR(status.st_mode)) {
      parent_ = Fd(::open(target.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
      root_ = last_part(source);
      merge_ = root_.empty();  // of the guest's "/": into the directory itself
    } else {
      const size_t slash = target.rfind('/');
      const std::string parent = slash == std::string::npos ? "." : target.substr(0, slash + 1);
      root_ = slash == std::string::npos ? target : target.substr(slash + 1);
      if (root_.empty() || root_ == "." || root_ == "..") return Error{target + ": there is no such directory"};
      parent_ = Fd(::open(parent.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
      if (!parent_) return errno_error(parent);
    }
    if (!parent_) return errno_error(target);
    target_ = target;

    session_.queue(make_frame(Type::copy_out, [&](Writer& writer) {
      writer.u32(options_.owners ? kCopyPreserveOwners : 0u);
      put_text(writer, source);
    }));
    auto limit = options_.answer;
    for (uint32_t idle = 0; idle < kMostIdleFrames;) {
      const Frame frame = TRY(session_.receive(limit));
      limit = std::max(options_.answer, options_.silence);
      switch (frame.type) {
        case Type::entry: {
          const Entry entry = TRY(read_entry(frame));
          TRY(enter(entry));
          break;
        }
        case Type::data:
          if (frame.length_bytes == 0) ++idle;
          TRY(add(bytes_of(frame)));
          break;
        case Type::copy_end:
          if (left_bytes_) return Error{"the agent ended in the middle of a file"};
          if (!has_root_) return Error{"the agent sent nothing"};
          while (!open_.empty()) TRY(leave());
          if (left_out_ > kMostWarnings)
            log_warning(target_ + ": left out: " + std::to_string(left_out_ - kMostWarnings) + " more of them");
          return {};
        case Type::error:
          return agent_error(frame);
        default:
          ++idle;
      }
    }
    return Error{"the agent sends frames without end and without meaning"};
  }

 private:
  // A directory that gets its mode and time when all is in it.
  struct Directory {
    std::string path;
    Entry entry;
    bool made;
  };

  // For a person: the path is the agent's.
  std::string name(const std::string& path) const {
    return path.empty() ? target_ : target_ + ": " + printable({path.data(), path.size()});
  }

  // Of the parent directory of `path`, whose last part goes to `base`.
  Result<Fd> parent_of(const std::string& path, std::string& base) {
    if (path.empty()) {
      base = merge_ ? "." : root_;
      return Fd(::fcntl(parent_.get(), F_DUPFD_CLOEXEC, 0));
    }
    const size_t slash = path.rfind('/');
    base = slash == std::string::npos ? path : path.substr(slash + 1);
    std::string way = merge_ ? "." : root_;
    if (slash != std::string::npos) way += "/" + path.substr(0, slash);
    open_how how{};
    how.flags = O_PATH | O_DIRECTORY | O_CLOEXEC;
    how.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS;
    Fd fd(static_cast<int>(::syscall(SYS_openat2, parent_.get(), way.c_str(), &how, sizeof how)));
    if (!fd) return errno_error(name(path));
    return fd;
  }

  Result<void> enter(const Entry& entry) {
    if (left_bytes_) return Error{"the agent began an entry in the middle of a file"};
    if (has_root_ == entry.path.empty()) return Error{"the agent sent a tree without a root, or with two"};
    has_root_ = true;
    while (!open_.empty() && !open_.back().path.empty() && !entry.path.starts_with(open_.back().path + "/"))
      TRY(leave());
    std::string base;
    Fd parent = TRY(parent_of(entry.path, base));
    if (S_ISDIR(entry.mode)) return make_directory(parent.get(), base, entry);
    if (!S_ISREG(entry.mode) && !S_ISLNK(entry.mode)) {
      if (++left_out_ <= kMostWarnings)
        log_warning(name(entry.path) + ": left out: it is no file, directory or symbolic link");
      return {};
    }
    if (merge_ && entry.path.empty()) return Error{"the agent sent something else than a directory"};
    struct stat status {};
    if (::fstatat(parent.get(), base.c_str(), &status, AT_SYMLINK_NOFOLLOW) == 0 && S_ISDIR(status.st_mode))
      return errno_error(name(entry.path), EISDIR);
    Unfinished made(std::move(parent), std::move(base));
    return S_ISREG(entry.mode) ? make_file(std::move(made), entry) : make_link(std::move(made), entry);
  }

  Result<void> make_directory(int parent, const std::string& base, const Entry& entry) {
    const bool made = ::mkdirat(parent, base.c_str(), 0700) == 0;
    if (!made) {
      struct stat status {};
      if (errno != EEXIST) return errno_error(name(entry.path));
      if (::fstatat(parent, base.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0 || !S_ISDIR(status.st_mode))
        return Error{name(entry.path) + ": is there and is no directory"};
    }
    if (open_.size() == kMostLevels) return Error{name(entry.path) + ": too many levels of directories"};
    open_.push_back({entry.path, entry, made});
    return {};
  }

  Result<void> leave() {
    const Directory directory = std::move(open_.back());
    open_.pop_back();
    if (!directory.made) return {};
    std::string base;
    const Fd parent = TRY(parent_of(directory.path, base));
    const Fd fd(::openat(parent.get(), base.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
    if (!fd) return errno_error(name(directory.path));
    return describe(fd.get(), directory.entry);
  }

  Result<void> make_file(Unfinished made, const Entry& entry) {
    const bool ok = made.make([&](int parent, const char* temporary) {
      file_ = Fd(::openat(parent, temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
      return file_.get() >= 0;
    });
    if (!ok) return errno_error(name(entry.path));
    unfinished_.emplace(std::move(made));
    file_entry_ = entry;
    left_bytes_ = entry.size_bytes;
    return left_bytes_ ? Result<void>() : end_file();
  }

  Result<void> make_link(Unfinished made, const Entry& entry) {
    if (entry.link.empty()) return Error{"the agent sent a malformed entry"};
    const timespec times[2] = {entry.mtime, entry.mtime};
    bool ok = made.make(
        [&](int parent, const char* temporary) { return ::symlinkat(entry.link.c_str(), parent, temporary) == 0; });
    if (ok && options_.owners)
      ok = ::fchownat(made.parent(), made.temporary(), entry.uid, entry.gid, AT_SYMLINK_NOFOLLOW) == 0;
    ok = ok && ::utimensat(made.parent(), made.temporary(), times, AT_SYMLINK_NOFOLLOW) == 0 && made.finish();
    return ok ? Result<void>() : errno_error(name(entry.path));
  }

  Result<void> add(std::string_view bytes) {
    if (bytes.size() > left_bytes_) return Error{"the agent sent more data than a file's size"};
    if (bytes.empty()) return {};
    left_bytes_ -= bytes.size();
    while (!bytes.empty()) {
      const ssize_t written = ::write(file_.get(), bytes.data(), bytes.size());
      if (written < 0 && errno != EINTR) return errno_error(name(file_entry_.path));
      if (written > 0) bytes.remove_prefix(static_cast<size_t>(written));
    }
    return left_bytes_ ? Result<void>() : end_file();
  }

  Result<void> end_file() {
    const Fd file = std::move(file_);
    Unfinished made = std::move(*unfinished_);
    unfinished_.reset();
    TRY(describe(file.get(), file_entry_));
    return made.finish() ? Result<void>() : errno_error(name(file_entry_.path));
  }

  Result<void> describe(int fd, const Entry& entry) {
    const timespec times[2] = {entry.mtime, entry.mtime};
    if (options_.owners && ::fchown(fd, entry.uid, entry.gid) != 0) return errno_error(name(entry.path));
    const mode_t allowed = S_ISDIR(entry.mode) ? 01777 : 0777;
    if (::fchmod(fd, entry.mode & allowed) != 0 || ::futimens(fd, times) != 0) return errno_error(name(entry.path));
    return {};
  }

  AgentSession& session_;
  const CopyOptions& options_;
  std::string target_;
  Fd parent_;
  std::string root_;
  bool merge_ = false;  // the root is parent_ itself
  bool has_root_ = false;
  uint64_t left_out_ = 0;
  std::vector<Directory> open_;
  std::optional<Unfinished> unfinished_;  // the file's
  Fd file_;
  Entry file_entry_{};
  uint64_t left_bytes_ = 0;  // of it
};

}  // namespace

std::string last_part(std::string path) {
  while (path.ends_with('/')) path.pop_back();
  path.erase(0, path.rfind('/') + 1);
  return path == "." || path == ".." ? std::string() : path;
}

Result<void> copy_into_guest(AgentSession& session, const std::string& source, const std::string& target,
                             const CopyOptions& options) {
  return Outgoing(session, options).run(source, target);
}

Result<void> copy_out_of_guest(AgentSession& session, const std::string& source, const std::string& target,
                               const CopyOptions& options) {
  return Incoming(session, options).run(source, target);
}

}  // namespace vmm
