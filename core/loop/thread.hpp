// SPDX-License-Identifier: Apache-2.0
// Threads that bear a name and leave signals to the main thread.
#pragma once

#include <functional>
#include <initializer_list>
#include <string>
#include <thread>
#include <utility>

#include "util/result.hpp"

namespace vmm {

// A thread that is joined when it goes.
class Thread {
 public:
  Thread() = default;
  explicit Thread(std::thread thread) : thread_(std::move(thread)) {}
  Thread(Thread&&) noexcept = default;
  Thread& operator=(Thread&& other) noexcept {
    join();
    thread_ = std::move(other.thread_);
    return *this;
  }
  ~Thread() { join(); }

  void join() {
    if (thread_.joinable()) thread_.join();
  }
  bool joinable() const { return thread_.joinable(); }
  std::thread::id id() const { return thread_.get_id(); }
  pthread_t native_handle() { return thread_.native_handle(); }

 private:
  std::thread thread_;
};

// Starts `run` in a thread called `name` (the first 15 bytes are kept). Every signal is blocked in it from its first
// instruction on, but `open_signals` and those that a fault raises in the thread itself.
Result<Thread> spawn_thread(const std::string& name, std::function<void()> run,
                            std::initializer_list<int> open_signals = {});

}  // namespace vmm
