// SPDX-License-Identifier: Apache-2.0
// File I/O for one queue: operations are begun, and finish on the thread that polls the engine.
#pragma once

#include <sys/uio.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "clone/sdk/fd.hpp"
#include "clone/sdk/host.hpp"

namespace virtio_blk {

using clone_sdk::Error;
using clone_sdk::Fd;
using clone_sdk::Result;

class IoEngine;

constexpr uint32_t kMostRetries = 16;  // of what a signal interrupted

// A file that an image consists of.
struct ImageFile {
  int fd = -1;
  bool direct = false;  // O_DIRECT: no page cache in between
  bool block_device = false;
  bool nowait_reads = false;  // the kernel can read it without waiting for the disk (RWF_NOWAIT)
};

// One operation on one file. It belongs to the engine from begin() until finished() is called.
class FileOperation {
 public:
  enum class Kind : uint8_t { read, write, sync, punch_hole, zero_range, discard };
  static constexpr size_t kKinds = 6;

  Kind kind = Kind::read;
  uint8_t file = 0;          // index into the image's files
  bool durable = false;      // write: on stable storage when finished
  std::span<iovec> vectors;  // read, write: size_bytes in all
  uint64_t offset = 0;
  uint64_t size_bytes = 0;
  uint32_t retries = 0;

  // On the engine's thread. `result` is a count of bytes (read, write), 0, or a negative errno value. May begin other
  // operations, this one again too.
  virtual void finished(IoEngine& engine, int64_t result) = 0;
  virtual ~FileOperation() = default;

 private:
  friend class IoEngine;
  friend class ThreadEngine;
  friend class ThreadPool;
  FileOperation* next_ = nullptr;
  IoEngine* engine_ = nullptr;
  int64_t result_ = 0;
};

// What is at hand in the page cache is quicker done at once than handed to another thread: measured on ext4, a 4 KiB
// write takes 3.7 µs by pwrite and 14.7 µs through io_uring. An operation that does wait for a disk would hold up the
// queue, though. So a kind of operation is done at once as long as that turns out to be quick.
class QuickPath {
 public:
  bool open() {
    if (closed_for_ == 0) return true;
    --closed_for_;
    return false;
  }
  // A few slow ones among many are the scheduler's; three in a row are the disk's.
  void measured(bool slow) {
    if (!slow) {
      score_ -= score_ > 0;
    } else if ((score_ += 8) >= 24) {
      score_ = 16;
      closed_for_ = 256;
    }
  }

 private:
  uint32_t score_ = 0;
  uint32_t closed_for_ = 0;
};

class IoEngine {
 public:
  static constexpr std::chrono::nanoseconds kForever = std::chrono::nanoseconds::max();

  IoEngine(std::span<const ImageFile> files, int kick_fd) : files_(files), kick_fd_(kick_fd) {}
  IoEngine(const IoEngine&) = delete;
  IoEngine& operator=(const IoEngine&) = delete;
  virtual ~IoEngine() = default;

  // First call on the thread that begins and polls from then on.
  virtual Result<void> attach() = 0;
  // May finish the operation before it returns.
  void begin(FileOperation& operation) {
    if (!try_at_once(operation)) start(operation);
  }
  // Calls finished() of what is done. With `wait`, and nothing done yet, sleeps until an operation is done, the queue's
  // kick eventfd or wake() is signalled, or for `longest_wait`; it may return for no reason.
  virtual void poll(bool wait, std::chrono::nanoseconds longest_wait = kForever) = 0;
  // Any thread.
  void wake();
  // Any thread. Calls operation.finished(0) on the thread that polls.
  void post(FileOperation& operation);

  const ImageFile& file(const FileOperation& operation) const { return files_[operation.file]; }
  // The operation by ordinary system calls, here and now.
  static int64_t execute(const ImageFile& file, const FileOperation& operation, int flags = 0);

 protected:
  virtual void start(FileOperation& operation) = 0;
  Result<void> create_wake_fd();
  // Of every poll(), first and after it waited.
  void finish_posted();

  std::span<const ImageFile> files_;
  int kick_fd_;
  Fd wake_fd_;
  // Whether start() costs so much that reads are tried with RWF_NOWAIT before.
  bool try_cached_reads_ = false;

 private:
  bool try_at_once(FileOperation& operation);

  std::array<QuickPath, FileOperation::kKinds> quick_;
  std::mutex posted_mutex_;                      // for changes of posted_
  std::atomic<FileOperation*> posted_{nullptr};  // a list
};

// CLONE_ERR_SYSTEM with ENOSYS, EPERM, … when this kernel, or a system call filter, does not allow io_uring.
Result<void> check_uring();
Result<std::unique_ptr<IoEngine>> create_uring_engine(std::span<const ImageFile> files, int kick_fd,
                                                      uint32_t queue_size);

// Threads that wait in the place of the queues' own where there is no io_uring; shared by all queues of a device.
class ThreadPool;
struct ThreadPoolDeleter {
  void operator()(ThreadPool* pool) const;
};
using ThreadPoolPointer = std::unique_ptr<ThreadPool, ThreadPoolDeleter>;
Result<ThreadPoolPointer> create_thread_pool(const clone_sdk::Host& host, uint32_t thread_count);
Result<std::unique_ptr<IoEngine>> create_thread_engine(ThreadPool& pool, std::span<const ImageFile> files, int kick_fd);

}  // namespace virtio_blk
