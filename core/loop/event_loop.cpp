// SPDX-License-Identifier: Apache-2.0
// An event loop over epoll.
#include "loop/event_loop.hpp"

#include <sys/epoll.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <climits>
#include <string>

namespace vmm {
namespace {

constexpr uint64_t kWakeTag = UINT64_MAX;  // no descriptor has the number -1

uint32_t to_epoll(uint32_t events) {
  return ((events & CLONE_READABLE) ? EPOLLIN : 0u) | ((events & CLONE_WRITABLE) ? EPOLLOUT : 0u);
}

uint32_t from_epoll(uint32_t events) {
  return ((events & EPOLLIN) ? CLONE_READABLE : 0u) | ((events & EPOLLOUT) ? CLONE_WRITABLE : 0u) |
         ((events & (EPOLLHUP | EPOLLERR)) ? CLONE_HANGUP : 0u);
}

// The watch's id tells an event of a removed descriptor from one of its successor with the same number.
uint64_t tag(int fd, uint64_t id) { return id << 32 | static_cast<uint32_t>(fd); }

}  // namespace

Result<std::pair<Fd, Fd>> EventLoop::open_descriptors() {
  Fd epoll(::epoll_create1(EPOLL_CLOEXEC));
  if (!epoll) return errno_error("event loop: epoll");
  Fd wake(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake) return errno_error("event loop: eventfd");
  epoll_event event{EPOLLIN, {.u64 = kWakeTag}};
  if (::epoll_ctl(epoll.get(), EPOLL_CTL_ADD, wake.get(), &event) != 0) return errno_error("event loop: epoll");
  return std::pair(std::move(epoll), std::move(wake));
}

Result<std::unique_ptr<EventLoop>> EventLoop::create() {
  auto [epoll, wake] = TRY(open_descriptors());
  return std::unique_ptr<EventLoop>(new EventLoop(std::move(epoll), std::move(wake)));
}

void EventLoop::run() {
  Lock lock(mutex_);
  thread_ = std::this_thread::get_id();
  while (!stopping_) {
    const int timeout_ms = wait_ms();
    lock.unlock();
    epoll_event events[64];
    const int count = ::epoll_wait(epoll_.get(), events, std::size(events), timeout_ms);
    lock.lock();
    for (int i = 0; i < count && !stopping_; ++i) {
      const uint64_t event_tag = events[i].data.u64;
      if (event_tag == kWakeTag) {
        eventfd_t ignored;
        ::eventfd_read(wake_.get(), &ignored);
      } else {
        run_ready(lock, event_tag, events[i].events);
      }
    }
    if (!stopping_) run_due_timers(lock);
    run_posted(lock);
  }
  run_posted(lock);
  stopping_ = false;
  thread_ = {};
}

void EventLoop::stop() {
  const std::lock_guard lock(mutex_);
  stopping_ = true;
  wake();
}

Result<void> EventLoop::add_fd(int fd, uint32_t events, std::function<void(uint32_t)> ready) {
  const std::lock_guard lock(mutex_);
  const uint64_t id = next_id_++;
  epoll_event event{to_epoll(events), {.u64 = tag(fd, id)}};
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0)
    return errno_error("event loop: watch descriptor " + std::to_string(fd));
  watches_[fd] = std::make_shared<Watch>(Watch{id, std::move(ready)});
  return {};
}

Result<void> EventLoop::change_fd(int fd, uint32_t events) {
  const std::lock_guard lock(mutex_);
  const auto found = watches_.find(fd);
  if (found == watches_.end())
    return Error{"event loop: descriptor " + std::to_string(fd) + " is not watched", ENOENT, CLONE_ERR_NOT_FOUND};
  epoll_event event{to_epoll(events), {.u64 = tag(fd, found->second->id)}};
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, fd, &event) != 0)
    return errno_error("event loop: change descriptor " + std::to_string(fd));
  return {};
}

void EventLoop::remove_fd(int fd) {
  std::shared_ptr<Watch> watch;  // goes after the lock: what a callback holds may call back when it is destroyed
  Lock lock(mutex_);
  const auto found = watches_.find(fd);
  if (found == watches_.end()) return;
  watch = std::move(found->second);
  watches_.erase(found);
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
  wait_until_not_running(lock, watch->id);
}

void EventLoop::post(std::function<void()> call) {
  const std::lock_guard lock(mutex_);
  posted_.push_back(std::move(call));
  if (posted_.size() == 1) wake();
}

EventLoop::TimerId EventLoop::add_timer(std::chrono::milliseconds after, std::function<void()> expired) {
  const std::lock_guard lock(mutex_);
  const TimerId id = next_id_++;
  const auto place = timers_.emplace(Clock::now() + after, std::make_shared<Timer>(Timer{id, std::move(expired)}));
  if (place == timers_.begin()) wake();
  return id;
}

void EventLoop::cancel_timer(TimerId timer) {
  if (timer == 0) return;
  std::shared_ptr<Timer> pending;  // goes after the lock
  Lock lock(mutex_);
  const auto found = std::ranges::find_if(timers_, [&](const auto& entry) { return entry.second->id == timer; });
  if (found == timers_.end()) return wait_until_not_running(lock, timer);
  pending = std::move(found->second);
  timers_.erase(found);
}

bool EventLoop::in_loop_thread() const {
  const std::lock_guard lock(mutex_);
  return thread_ == std::this_thread::get_id();
}

int EventLoop::wait_ms() const {
  if (!posted_.empty()) return 0;
  if (timers_.empty()) return -1;
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(timers_.begin()->first - Clock::now()).count();
  return static_cast<int>(std::clamp<int64_t>(left, 0, INT_MAX));
}

// Runs the call without the lock, and tells whoever waits for its end.
template <typename Entry, typename Call>
void EventLoop::invoke(Lock& lock, std::shared_ptr<Entry> entry, Call&& call) {
  running_ = entry->id;
  lock.unlock();
  call(*entry);
  entry.reset();
  lock.lock();
  running_ = 0;
  idle_.notify_all();
}

void EventLoop::wait_until_not_running(Lock& lock, uint64_t id) {
  if (thread_ == std::this_thread::get_id()) return;
  idle_.wait(lock, [&] { return running_ != id; });
}

void EventLoop::run_ready(Lock& lock, uint64_t event_tag, uint32_t events) {
  const int fd = static_cast<int>(event_tag & UINT32_MAX);
  const auto found = watches_.find(fd);
  if (found == watches_.end() || tag(fd, found->second->id) != event_tag) return;
  invoke(lock, found->second, [&](const Watch& watch) { watch.ready(from_epoll(events)); });
}

void EventLoop::run_due_timers(Lock& lock) {
  if (timers_.empty()) return;
  // Timers that callbacks set meanwhile wait for the next round, so that a timer of 0 ms cannot keep the loop here.
  const auto now = Clock::now();
  while (!timers_.empty() && timers_.begin()->first <= now && !stopping_) {
    std::shared_ptr<Timer> timer = std::move(timers_.begin()->second);
    timers_.erase(timers_.begin());
    invoke(lock, std::move(timer), [](const Timer& due) { due.expired(); });
  }
}

void EventLoop::run_posted(Lock& lock) {
  if (posted_.empty()) return;
  std::vector<std::function<void()>> calls = std::exchange(posted_, {});
  lock.unlock();
  for (const auto& call : calls) call();
  calls.clear();
  lock.lock();
}

void EventLoop::wake() { ::eventfd_write(wake_.get(), 1); }

Result<std::unique_ptr<LoopThread>> LoopThread::create(const std::string& name) {
  auto [epoll, wake] = TRY(open_descriptors());
  std::unique_ptr<LoopThread> loop(new LoopThread(std::move(epoll), std::move(wake)));
  loop->thread_ = TRY(spawn_thread(name, [self = loop.get()] { self->run(); }));
  return loop;
}

LoopThread::~LoopThread() {
  if (!thread_.joinable()) return;
  stop();
  thread_.join();
}

}  // namespace vmm
