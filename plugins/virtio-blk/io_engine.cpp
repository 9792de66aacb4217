// SPDX-License-Identifier: Apache-2.0
// What both engines share: operations done at once, and waking.
#include "io_engine.hpp"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>

#include <cerrno>
#include <chrono>

namespace virtio_blk {

namespace {

constexpr uint64_t kLargestAtOnceBytes = 128 << 10;

// No page cache is slower than this; a disk is.
constexpr std::chrono::nanoseconds slow_after(uint64_t size_bytes) {
  return std::chrono::nanoseconds(100'000 + 2 * size_bytes);
}

}  // namespace

int64_t IoEngine::execute(const ImageFile& file, const FileOperation& operation, int flags) {
  const auto offset = static_cast<off_t>(operation.offset);
  const auto size = static_cast<off_t>(operation.size_bytes);
  const auto count = static_cast<int>(operation.vectors.size());
  int64_t result = -1;
  switch (operation.kind) {
    case FileOperation::Kind::read:
      result = ::preadv2(file.fd, operation.vectors.data(), count, offset, flags);
      break;
    case FileOperation::Kind::write:
      result =
          ::pwritev2(file.fd, operation.vectors.data(), count, offset, flags | (operation.durable ? RWF_DSYNC : 0));
      break;
    case FileOperation::Kind::sync:
      result = ::fdatasync(file.fd);
      break;
    case FileOperation::Kind::punch_hole:
      result = ::fallocate(file.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size);
      break;
    case FileOperation::Kind::zero_range:
      result = ::fallocate(file.fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, size);
      break;
    case FileOperation::Kind::discard: {
      const uint64_t range[2] = {operation.offset, operation.size_bytes};
      result = ::ioctl(file.fd, BLKDISCARD, range);
      break;
    }
  }
  return result < 0 ? -errno : result;
}

bool IoEngine::try_at_once(FileOperation& operation) {
  const ImageFile& target = file(operation);
  if (target.direct) return false;
  const bool read = operation.kind == FileOperation::Kind::read;
  const bool transfer = read || operation.kind == FileOperation::Kind::write;
  if (transfer && operation.size_bytes > kLargestAtOnceBytes) return false;
  if (operation.durable) return false;

  if (read && target.nowait_reads) {
    if (!try_cached_reads_) return false;
    const int64_t result = execute(target, operation, RWF_NOWAIT);
    if (result <= 0) return false;
    operation.finished(*this, result);
    return true;
  }

  QuickPath& quick = quick_[static_cast<size_t>(operation.kind)];
  if (!quick.open()) return false;
  const auto start_time = std::chrono::steady_clock::now();
  const int64_t result = execute(target, operation);
  const auto taken = std::chrono::steady_clock::now() - start_time;
  quick.measured(taken > slow_after(transfer ? operation.size_bytes : 0));
  operation.finished(*this, result);
  return true;
}

void IoEngine::wake() {
  // The counter only grows: both engines watch for the signal, not for a value.
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = ::write(wake_fd_.get(), &one, sizeof one);
}

void IoEngine::post(FileOperation& operation) {
  // Waking under the lock: once it is free, the operation may be finished and the engine gone.
  std::lock_guard lock(posted_mutex_);
  operation.next_ = posted_.load(std::memory_order_relaxed);
  posted_.store(&operation, std::memory_order_relaxed);
  wake();
}

void IoEngine::finish_posted() {
  if (!posted_.load(std::memory_order_relaxed)) return;
  FileOperation* operation = nullptr;
  {
    std::lock_guard lock(posted_mutex_);
    operation = posted_.exchange(nullptr, std::memory_order_relaxed);
  }
  while (operation) {
    FileOperation* next = operation->next_;
    operation->finished(*this, 0);
    operation = next;
  }
}

Result<void> IoEngine::create_wake_fd() {
  wake_fd_ = Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake_fd_) return clone_sdk::errno_error("eventfd");
  return {};
}

}  // namespace virtio_blk
