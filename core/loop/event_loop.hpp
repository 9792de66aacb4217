// SPDX-License-Identifier: Apache-2.0
// An event loop over epoll: descriptors, posted calls, one-shot timers; and a loop with a thread of its own.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include "clone/abi/loop.h"
#include "loop/thread.hpp"
#include "util/fd.hpp"
#include "util/result.hpp"

namespace vmm {

// Callbacks run on the thread that is in run(), one at a time; they must not throw. Everything else is [any].
class EventLoop {
 public:
  using TimerId = uint64_t;  // never 0

  static Result<std::unique_ptr<EventLoop>> create();
  EventLoop(const EventLoop&) = delete;
  EventLoop& operator=(const EventLoop&) = delete;
  ~EventLoop() = default;

  // Serves until stop(). What was posted before stop() still runs. Can be called again.
  void run();
  // Of a loop that does not run: its next run() returns at once.
  void stop();

  // Level-triggered; `events` are CLONE_READABLE and CLONE_WRITABLE, CLONE_HANGUP is reported always. The descriptor
  // stays the caller's and is open until remove_fd(). Regular files are refused (EPERM), as epoll does.
  Result<void> add_fd(int fd, uint32_t events, std::function<void(uint32_t events)> ready);
  Result<void> change_fd(int fd, uint32_t events);
  // On return the callback does not run and will not run again (except when called from it: after it).
  void remove_fd(int fd);

  // Runs the calls on the loop's thread, in order.
  void post(std::function<void()> call);

  TimerId add_timer(std::chrono::milliseconds after, std::function<void()> expired);
  // As remove_fd(). Harmless for a timer that has expired, and for 0.
  void cancel_timer(TimerId timer);

  bool in_loop_thread() const;

 protected:
  EventLoop(Fd epoll, Fd wake) : epoll_(std::move(epoll)), wake_(std::move(wake)) {}
  static Result<std::pair<Fd, Fd>> open_descriptors();

 private:
  using Clock = std::chrono::steady_clock;
  using Lock = std::unique_lock<std::mutex>;

  struct Watch {
    uint64_t id;
    std::function<void(uint32_t)> ready;
  };
  struct Timer {
    uint64_t id;
    std::function<void()> expired;
  };

  int wait_ms() const;
  void run_ready(Lock& lock, uint64_t event_tag, uint32_t events);
  void run_due_timers(Lock& lock);
  void run_posted(Lock& lock);
  template <typename Entry, typename Call>
  void invoke(Lock& lock, std::shared_ptr<Entry> entry, Call&& call);
  void wait_until_not_running(Lock& lock, uint64_t id);
  void wake();

  Fd epoll_;
  Fd wake_;
  mutable std::mutex mutex_;
  std::condition_variable idle_;
  std::unordered_map<int, std::shared_ptr<Watch>> watches_;
  std::multimap<Clock::time_point, std::shared_ptr<Timer>> timers_;
  std::vector<std::function<void()>> posted_;
  std::thread::id thread_;  // in run(), or none
  uint64_t next_id_ = 1;    // of watches and timers together
  uint64_t running_ = 0;    // the watch or timer whose callback runs
  bool stopping_ = false;
};

// A loop that runs in a thread of its own. Going away, it ends after the callback that may be running.
class LoopThread final : public EventLoop {
 public:
  static Result<std::unique_ptr<LoopThread>> create(const std::string& name);
  ~LoopThread();

 private:
  using EventLoop::EventLoop;

  Thread thread_;
};

}  // namespace vmm
