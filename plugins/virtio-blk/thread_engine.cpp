// SPDX-License-Identifier: Apache-2.0
// An engine over ordinary system calls, made by a pool of threads, for hosts without io_uring.
#include <poll.h>
#include <sys/epoll.h>

#include <cerrno>
#include <condition_variable>
#include <mutex>

#include "clone/sdk/thread.hpp"
#include "io_engine.hpp"

namespace virtio_blk {

class ThreadEngine final : public IoEngine {
 public:
  ThreadEngine(ThreadPool& pool, std::span<const ImageFile> files, int kick_fd)
      : IoEngine(files, kick_fd), pool_(pool) {
    try_cached_reads_ = true;
  }

  Result<void> create();
  Result<void> attach() override { return {}; }
  void poll(bool wait, std::chrono::nanoseconds longest_wait) override;
  // Any thread.
  void executed(FileOperation& operation);

 private:
  void start(FileOperation& operation) override;
  FileOperation* take_done() {
    std::lock_guard lock(mutex_);
    return std::exchange(done_, nullptr);
  }

  ThreadPool& pool_;
  Fd epoll_;
  std::mutex mutex_;
  FileOperation* done_ = nullptr;
};

class ThreadPool {
 public:
  ~ThreadPool() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    waiting_.notify_all();
  }

  Result<void> create(const clone_sdk::Host& host, uint32_t thread_count) {
    for (uint32_t i = 0; i < thread_count; ++i)
      threads_.push_back(CLONE_TRY(clone_sdk::Thread::start<&ThreadPool::run>(host, "blk-io", this)));
    return {};
  }
  void add(FileOperation& operation) {
    {
      std::lock_guard lock(mutex_);
      operation.next_ = nullptr;
      *(last_ ? &last_->next_ : &first_) = &operation;
      last_ = &operation;
    }
    waiting_.notify_one();
  }

 private:
  void run() {
    std::unique_lock lock(mutex_);
    while (true) {
      waiting_.wait(lock, [this] { return first_ || stopping_; });
      if (!first_) return;
      FileOperation& operation = *first_;
      first_ = operation.next_;
      if (!first_) last_ = nullptr;
      lock.unlock();
      auto& engine = static_cast<ThreadEngine&>(*operation.engine_);
      operation.result_ = IoEngine::execute(engine.file(operation), operation);
      engine.executed(operation);
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable waiting_;
  FileOperation* first_ = nullptr;
  FileOperation* last_ = nullptr;
  bool stopping_ = false;
  std::vector<clone_sdk::Thread> threads_;  // last: joined before the rest goes
};

Result<void> ThreadEngine::create() {
  CLONE_TRY(create_wake_fd());
  epoll_ = Fd(::epoll_create1(EPOLL_CLOEXEC));
  if (!epoll_) return clone_sdk::errno_error("epoll_create1");
  for (const int fd : {kick_fd_, wake_fd_.get()}) {
    // Edge-triggered: every signal is reported without anybody reading the counter.
    epoll_event event{};
    event.events = EPOLLIN | EPOLLET;
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) return clone_sdk::errno_error("epoll_ctl");
  }
  return {};
}

void ThreadEngine::poll(bool wait, std::chrono::nanoseconds longest_wait) {
  finish_posted();
  FileOperation* operation = take_done();
  if (!operation && wait) {
    epoll_event events[2];
    if (longest_wait != kForever) {
      // epoll_wait() counts in milliseconds, and epoll_pwait2() is not allowed everywhere.
      pollfd any{epoll_.get(), POLLIN, 0};
      const timespec longest{longest_wait.count() / 1'000'000'000, longest_wait.count() % 1'000'000'000};
      ::ppoll(&any, 1, &longest, nullptr);
    }
    ::epoll_wait(epoll_.get(), events, 2, longest_wait == kForever ? -1 : 0);
    finish_posted();
    operation = take_done();
  }
  while (operation) {
    FileOperation* next = operation->next_;
    operation->finished(*this, operation->result_);
    operation = next;
  }
}

void ThreadEngine::start(FileOperation& operation) {
  operation.engine_ = this;
  pool_.add(operation);
}

void ThreadEngine::executed(FileOperation& operation) {
  // Waking under the lock: once it is free, the operation may be finished and the engine gone.
  std::lock_guard lock(mutex_);
  operation.next_ = done_;
  done_ = &operation;
  if (!operation.next_) wake();
}

void ThreadPoolDeleter::operator()(ThreadPool* pool) const { delete pool; }

Result<ThreadPoolPointer> create_thread_pool(const clone_sdk::Host& host, uint32_t thread_count) {
  ThreadPoolPointer pool(new ThreadPool);
  CLONE_TRY(pool->create(host, thread_count));
  return pool;
}

Result<std::unique_ptr<IoEngine>> create_thread_engine(ThreadPool& pool, std::span<const ImageFile> files,
                                                       int kick_fd) {
  auto engine = std::make_unique<ThreadEngine>(pool, files, kick_fd);
  CLONE_TRY(engine->create());
  return std::unique_ptr<IoEngine>(std::move(engine));
}

}  // namespace virtio_blk
