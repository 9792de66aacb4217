// SPDX-License-Identifier: Apache-2.0
// The result reaches the loop as a posted call; whoever has cancelled is not told.
#include "loop/thread_work.hpp"

namespace vmm {

Result<std::unique_ptr<ThreadWork>> ThreadWork::start(EventLoop& loop, const std::string& name, Work work, Done done) {
  std::unique_ptr<ThreadWork> running(new ThreadWork);
  running->shared_->done = std::move(done);
  running->thread_ = TRY(spawn_thread(name, [&loop, shared = running->shared_, work = std::move(work)] {
    shared->result = work(shared->cancelled);
    loop.post([shared] {
      if (!shared->cancelled) std::exchange(shared->done, nullptr)(std::move(shared->result));
    });
  }));
  return running;
}

ThreadWork::~ThreadWork() {
  shared_->cancelled = true;
  thread_.join();
}

}  // namespace vmm
