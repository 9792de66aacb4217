// SPDX-License-Identifier: Apache-2.0
// A mutex that is had in the order of asking, by numbered tickets: a thread that takes it again and again keeps nobody
// out.
#pragma once

#include <atomic>

namespace virtio_vsock {

class FairMutex {
 public:
  void lock() {
    const unsigned ticket = next_.fetch_add(1);
    for (unsigned serving; (serving = serving_.load()) != ticket;) serving_.wait(serving);
  }
  void unlock() {
    serving_.fetch_add(1);
    serving_.notify_all();
  }
  // By who holds it: whether others wait.
  bool contended() const { return next_.load() - serving_.load() > 1; }

 private:
  std::atomic<unsigned> next_{0};
  std::atomic<unsigned> serving_{0};
};

}  // namespace virtio_vsock
