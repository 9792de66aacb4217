// SPDX-License-Identifier: Apache-2.0
// A buffered way out to one descriptor.
#include "console/output_stream.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

namespace vmm {
namespace {
constexpr auto kPause = std::chrono::milliseconds(1);       // between two writes of a stream of bytes
constexpr size_t kBatchBytes = 4096;                        // worth a write before the pause is over
constexpr auto kPatience = std::chrono::milliseconds(250);  // with a full pipe, before output is dropped
}  // namespace

Fd reopen_nonblocking(int fd, int access_mode) {
  struct stat status;
  if (::fstat(fd, &status) != 0 || !(S_ISFIFO(status.st_mode) || S_ISCHR(status.st_mode))) return {};
  const std::string path = "/proc/self/fd/" + std::to_string(fd);
  return Fd(::open(path.c_str(), access_mode | O_NONBLOCK | O_NOCTTY | O_CLOEXEC));
}

OutputStream::OutputStream(int fd) : OutputStream(fd, ::isatty(fd) ? 0 * kPatience : kPatience) {}

OutputStream::OutputStream(int fd, std::chrono::milliseconds patience)
    : fd_(fd), kind_(Kind::other), patience_(patience) {
  struct stat status;
  if (::fstat(fd, &status) != 0) {
    broken_ = true;
  } else if (S_ISREG(status.st_mode)) {
    kind_ = Kind::file;
  } else if (S_ISSOCK(status.st_mode)) {
    kind_ = Kind::socket;
  } else {
    nonblocking_ = reopen_nonblocking(fd, O_WRONLY);
  }
}

OutputStream::~OutputStream() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  ::eventfd_write(stop_event_.get(), 1);
  thread_.join();
}

Result<void> OutputStream::start() {
  stop_event_ = Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!stop_event_) return errno_error("console: eventfd");
  thread_ = TRY(spawn_thread("console-out", [this] { run(); }));
  return {};
}

void OutputStream::write(std::string_view bytes) {
  std::unique_lock lock(mutex_);
  if (broken_ || bytes.empty()) return;
  const auto has_room = [&] { return broken_ || pending_.size() + bytes.size() <= kBufferBytes; };
  if (!has_room() && !stuck_) stuck_ = !written_.wait_for(lock, patience_, has_room);
  if (!has_room()) {
    lost_bytes_ += bytes.size();
    return;
  }
  const size_t before = pending_.size();
  if (lost_bytes_ != 0)
    pending_ += "\r\n[" + std::to_string(std::exchange(lost_bytes_, 0)) + " bytes of console output were lost]\r\n";
  pending_ += bytes;
  const bool tell = before == 0 || (before < kBatchBytes && pending_.size() >= kBatchBytes);
  lock.unlock();
  if (tell) changed_.notify_one();
}

bool OutputStream::flush(std::chrono::milliseconds limit) {
  std::unique_lock lock(mutex_);
  urgent_ = true;
  changed_.notify_one();
  const bool done = written_.wait_for(lock, limit, [&] { return broken_ || (pending_.empty() && !writing_); });
  urgent_ = false;
  return done;
}

void OutputStream::run() {
  std::unique_lock lock(mutex_);
  Clock::time_point last_write{};
  while (true) {
    changed_.wait(lock, [&] { return stopping_ || !pending_.empty(); });
    changed_.wait_until(lock, last_write + kPause,
                        [&] { return stopping_ || urgent_ || pending_.size() >= kBatchBytes; });
    if (stopping_) return;
    const std::string bytes = std::exchange(pending_, {});
    writing_ = true;
    stuck_ = false;
    written_.notify_all();  // there is room
    lock.unlock();
    write_out(bytes);
    last_write = Clock::now();
    lock.lock();
    writing_ = false;
    if (broken_) pending_.clear();
    written_.notify_all();
  }
}

void OutputStream::write_out(std::string_view bytes) {
  const int fd = nonblocking_ ? nonblocking_.get() : fd_;
  while (!bytes.empty()) {
    if (kind_ != Kind::file) {
      pollfd wanted[] = {{stop_event_.get(), POLLIN, 0}, {fd, POLLOUT, 0}};
      ::poll(wanted, std::size(wanted), -1);
      if (wanted[0].revents != 0) return;
    }
    // A pipe or terminal that could not be opened again takes this much without waiting, once poll() let it pass.
    const size_t size = kind_ == Kind::other && !nonblocking_ ? std::min(bytes.size(), kBatchBytes) : bytes.size();
    // SIGPIPE is blocked in this thread.
    const ssize_t count = kind_ == Kind::socket ? ::send(fd, bytes.data(), size, MSG_DONTWAIT | MSG_NOSIGNAL)
                                                : ::write(fd, bytes.data(), size);
    if (count >= 0) {
      bytes.remove_prefix(static_cast<size_t>(count));
    } else if (errno != EAGAIN && errno != EINTR) {
      const std::lock_guard lock(mutex_);
      broken_ = true;
      return;
    }
  }
}

}  // namespace vmm
