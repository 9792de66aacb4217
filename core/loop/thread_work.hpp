// SPDX-License-Identifier: Apache-2.0
// Work on a thread of its own, whose end is told on a loop.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>

#include "loop/event_loop.hpp"
#include "loop/thread.hpp"
#include "util/result.hpp"

namespace vmm {

// On the loop's thread, all of it.
class ThreadWork {
 public:
  // `cancelled` is looked at often: the work may end then, with whatever result.
  using Work = std::function<Result<void>(const std::atomic<bool>& cancelled)>;
  // Called once, unless this object goes before; it may go in this call.
  using Done = std::function<void(Result<void>)>;

  static Result<std::unique_ptr<ThreadWork>> start(EventLoop& loop, const std::string& name, Work work, Done done);
  ThreadWork(const ThreadWork&) = delete;
  ThreadWork& operator=(const ThreadWork&) = delete;
  // Cancels, and waits until the work has ended.
  ~ThreadWork();

 private:
  ThreadWork() = default;

  // What the call on the loop still finds when this object is gone.
  struct Shared {
    std::atomic<bool> cancelled{false};
    Result<void> result;
    Done done;
  };
  std::shared_ptr<Shared> shared_ = std::make_shared<Shared>();
  Thread thread_;
};

}  // namespace vmm
