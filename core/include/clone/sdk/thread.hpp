// SPDX-License-Identifier: Apache-2.0
// A thread of the plugin's own, started by the host (clone_host_loop.spawn) and joined when the object goes.
#pragma once

#include <utility>

#include "clone/sdk/host.hpp"

namespace clone_sdk {

class Thread {
 public:
  Thread() = default;
  Thread(Thread&& other) noexcept : table_(other.table_), thread_(std::exchange(other.thread_, nullptr)) {}
  Thread& operator=(Thread&& other) noexcept {
    if (this != &other) {
      join();
      table_ = other.table_;
      thread_ = std::exchange(other.thread_, nullptr);
    }
    return *this;
  }
  ~Thread() { join(); }

  // Runs the member function `void run()` of `context`, which must not throw. 15 characters of the name are kept.
  template <auto run, typename T>
  static Result<Thread> start(const Host& host, const char* name, T* context) {
    Thread started;
    started.table_ = CLONE_TRY(host.service<clone_host_loop>(CLONE_HOST_LOOP));
    ErrorBuffer error;
    CLONE_TRY(error.result(started.table_->spawn(
        host.raw(), name, [](void* self) noexcept { (static_cast<T*>(self)->*run)(); }, context, &started.thread_,
        error)));
    return started;
  }
  void join() {
    if (thread_) table_->join(std::exchange(thread_, nullptr));
  }

 private:
  const clone_host_loop* table_ = nullptr;
  clone_thread* thread_ = nullptr;
};

}  // namespace clone_sdk
