// SPDX-License-Identifier: Apache-2.0
// The console's socket.
#include "console/console_watchers.hpp"

#include <sys/socket.h>

#include <utility>

#include "util/local_socket.hpp"

namespace vmm {
namespace {
constexpr size_t kHistoryBytes = 128 * 1024;
constexpr size_t kMaxWatchers = 16;
constexpr auto kRetry = std::chrono::milliseconds(20);
}  // namespace

ConsoleWatchers::~ConsoleWatchers() {
  if (socket_) loop_.remove_fd(socket_.get());
  while (!watchers_.empty()) remove(watchers_.begin());
}

Result<void> ConsoleWatchers::listen(Fd socket) {
  socket_ = std::move(socket);
  return loop_.add_fd(socket_.get(), CLONE_READABLE, [this](uint32_t) { accept_watchers(); });
}

void ConsoleWatchers::write(std::string_view bytes) {
  const std::lock_guard lock(mutex_);
  history_ += bytes;
  // Cut seldom: a console prints byte by byte.
  if (history_.size() > 2 * kHistoryBytes) history_.erase(0, history_.size() - kHistoryBytes);
  for (Watcher& watcher : watchers_) watcher.output->write(bytes);
}

void ConsoleWatchers::flush(std::chrono::milliseconds limit) {
  const auto end = std::chrono::steady_clock::now() + limit;
  for (Watcher& watcher : watchers_)
    watcher.output->flush(
        std::chrono::duration_cast<std::chrono::milliseconds>(end - std::chrono::steady_clock::now()));
}

std::string ConsoleWatchers::history() const {
  const std::lock_guard lock(mutex_);
  return history_.size() <= kHistoryBytes ? history_ : history_.substr(history_.size() - kHistoryBytes);
}

std::vector<ConsoleWatchers::Info> ConsoleWatchers::list() const {
  std::vector<Info> infos;
  for (const Watcher& watcher : watchers_) infos.push_back({watcher.pid, types(watcher)});
  return infos;
}

bool ConsoleWatchers::types(const Watcher& watcher) const {
  for (const Watcher& other : watchers_)
    if (!other.only_watches) return &other == &watcher;
  return false;
}

void ConsoleWatchers::accept_watchers() {
  Fd socket = accept_client(socket_.get());
  if (!socket) return;
  const Peer peer = peer_of(socket.get());
  if (!peer.trusted || watchers_.size() >= kMaxWatchers) {
    const std::string why =
        peer.trusted ? std::to_string(kMaxWatchers) + " are attached to this console already" : "not allowed";
    const std::string line = "clone: " + why + "\r\n";
    ::send(socket.get(), line.data(), line.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    return;
  }

  auto output = std::make_unique<OutputStream>(socket.get(), std::chrono::milliseconds(0));
  if (!output->start()) return;
  Entry watcher;
  {
    const std::lock_guard lock(mutex_);
    output->write(history_.size() <= kHistoryBytes ? history_ : history_.substr(history_.size() - kHistoryBytes));
    watchers_.push_back({std::move(socket), peer.pid, false, 0, {}, std::move(output)});
    watcher = std::prev(watchers_.end());
  }
  if (!loop_.add_fd(watcher->socket.get(), CLONE_READABLE,
                    [this, watcher](uint32_t events) { read_from(watcher, events); }))
    remove(watcher);
}

void ConsoleWatchers::read_from(Entry watcher, uint32_t events) {
  // A hangup is told whatever we watch for: what it typed last has no room, and it will not read.
  if (watcher->retry && (events & CLONE_HANGUP)) return remove(watcher);
  char bytes[4096];
  const ssize_t count = ::recv(watcher->socket.get(), bytes, sizeof bytes, MSG_DONTWAIT);
  if (count < 0 && (errno == EAGAIN || errno == EINTR) && !(events & CLONE_HANGUP)) return;
  if (count == 0 && !(events & CLONE_HANGUP)) {
    // It has closed its way in: from now on it only watches.
    watcher->only_watches = true;
    (void)loop_.change_fd(watcher->socket.get(), 0);
    return;
  }
  if (count <= 0) return remove(watcher);
  if (!types(*watcher)) return;
  watcher->typed.assign(bytes, static_cast<size_t>(count));
  pass_on(watcher);
}

// Until the device has room, nothing more is read from this watcher.
void ConsoleWatchers::pass_on(Entry watcher) {
  const bool waited = std::exchange(watcher->retry, 0) != 0;
  if (type_(watcher->typed)) {
    watcher->typed.clear();
    if (waited) (void)loop_.change_fd(watcher->socket.get(), CLONE_READABLE);
    return;
  }
  if (!waited) (void)loop_.change_fd(watcher->socket.get(), 0);
  watcher->retry = loop_.add_timer(kRetry, [this, watcher] { pass_on(watcher); });
}

void ConsoleWatchers::remove(Entry watcher) {
  loop_.cancel_timer(watcher->retry);
  loop_.remove_fd(watcher->socket.get());
  std::list<Watcher> gone;  // its thread ends outside of the lock
  const std::lock_guard lock(mutex_);
  gone.splice(gone.begin(), watchers_, watcher);
}

}  // namespace vmm
