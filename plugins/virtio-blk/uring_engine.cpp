// SPDX-License-Identifier: Apache-2.0
// An engine over io_uring: the kick eventfd is watched in the same ring, so that one system call begins a batch of
// operations and waits for whatever comes first.
#include <fcntl.h>
#include <liburing.h>
#include <poll.h>

#include <algorithm>
#include <cerrno>

#include "io_engine.hpp"

namespace virtio_blk {

namespace {

// In user_data; every other value is the address of a FileOperation.
constexpr uint64_t kKickTag = 1;
constexpr uint64_t kWakeTag = 2;

class Ring {
 public:
  Ring() = default;
  Ring(const Ring&) = delete;
  ~Ring() {
    if (open_) io_uring_queue_exit(&ring_);
  }
  // Created disabled: the thread that enables it becomes its only user. Newer kernels spare interrupting that thread
  // for each completion (6.1: DEFER_TASKRUN, 5.19: COOP_TASKRUN).
  Result<void> create(uint32_t submissions, uint32_t completions) {
    int result = 0;
    for (const uint32_t flags :
         {IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN, IORING_SETUP_COOP_TASKRUN, 0u}) {
      io_uring_params params{};
      params.flags = flags | IORING_SETUP_R_DISABLED | IORING_SETUP_CQSIZE;
      params.cq_entries = completions;
      result = io_uring_queue_init_params(submissions, &ring_, &params);
      if (result == 0) {
        open_ = true;
        // 5.13 brought this one and polls that stay armed.
        if (!(params.features & IORING_FEAT_RSRC_TAGS)) return clone_sdk::errno_error("io_uring", ENOSYS);
        return {};
      }
      if (result != -EINVAL) break;
    }
    return clone_sdk::errno_error("io_uring", -result);
  }
  io_uring* get() { return &ring_; }

 private:
  io_uring ring_{};
  bool open_ = false;
};

class UringEngine final : public IoEngine {
 public:
  using IoEngine::IoEngine;

  Result<void> create(uint32_t queue_size) {
    CLONE_TRY(create_wake_fd());
    return ring_.create(std::min(queue_size, 128u), queue_size * 2);
  }

  Result<void> attach() override {
    if (const int result = io_uring_enable_rings(ring_.get()); result < 0)
      return clone_sdk::errno_error("io_uring", -result);
    std::vector<int> fds;
    for (const ImageFile& file : files_) fds.push_back(file.fd);
    fixed_files_ = io_uring_register_files(ring_.get(), fds.data(), static_cast<unsigned>(fds.size())) == 0;
    io_uring_register_ring_fd(ring_.get());
    watch(kick_fd_, kKickTag);
    watch(wake_fd_.get(), kWakeTag);
    return {};
  }

  void poll(bool wait, std::chrono::nanoseconds longest_wait) override {
    finish_posted();
    // An interrupted or refused call is made again by the next round.
    if (io_uring_cq_ready(ring_.get()) == 0 && wait)
      submit_and_wait(longest_wait);
    else if (io_uring_sq_ready(ring_.get()) > 0)
      io_uring_submit_and_get_events(ring_.get());

    unsigned head;
    unsigned seen = 0;
    io_uring_cqe* completion;
    io_uring_for_each_cqe(ring_.get(), head, completion) {
      ++seen;
      const uint64_t tag = completion->user_data;
      if (tag != kKickTag && tag != kWakeTag)
        reinterpret_cast<FileOperation*>(tag)->finished(*this, completion->res);
      else if (!(completion->flags & IORING_CQE_F_MORE))
        watch(tag == kKickTag ? kick_fd_ : wake_fd_.get(), tag);
    }
    io_uring_cq_advance(ring_.get(), seen);
    finish_posted();
  }

 private:
  void submit_and_wait(std::chrono::nanoseconds longest) {
    if (longest == kForever) {
      io_uring_submit_and_wait(ring_.get(), 1);
      return;
    }
    __kernel_timespec timeout{longest.count() / 1'000'000'000, longest.count() % 1'000'000'000};
    io_uring_cqe* first;
    io_uring_submit_and_wait_timeout(ring_.get(), &first, 1, &timeout, nullptr);
  }
  io_uring_sqe* next_entry() {
    io_uring_sqe* entry = io_uring_get_sqe(ring_.get());
    while (!entry) {
      io_uring_submit(ring_.get());
      entry = io_uring_get_sqe(ring_.get());
    }
    return entry;
  }
  // Reports every signal of an eventfd without anybody reading its counter.
  void watch(int fd, uint64_t tag) {
    io_uring_sqe* entry = next_entry();
    io_uring_prep_poll_multishot(entry, fd, POLLIN);
    io_uring_sqe_set_data64(entry, tag);
  }

  void start(FileOperation& operation) override {
    const ImageFile& target = file(operation);
    // Needs a kernel of 6.12 through the ring; a disk's discards are few.
    if (operation.kind == FileOperation::Kind::discard) return operation.finished(*this, execute(target, operation));

    io_uring_sqe* entry = next_entry();
    const int fd = fixed_files_ ? operation.file : target.fd;
    const auto& vectors = operation.vectors;
    const bool single = vectors.size() == 1;
    const auto single_size = static_cast<unsigned>(single ? vectors[0].iov_len : 0);
    const auto count = static_cast<unsigned>(vectors.size());
    switch (operation.kind) {
      case FileOperation::Kind::read:
        if (single)
          io_uring_prep_read(entry, fd, vectors[0].iov_base, single_size, operation.offset);
        else
          io_uring_prep_readv(entry, fd, vectors.data(), count, operation.offset);
        break;
      case FileOperation::Kind::write:
        if (single)
          io_uring_prep_write(entry, fd, vectors[0].iov_base, single_size, operation.offset);
        else
          io_uring_prep_writev(entry, fd, vectors.data(), count, operation.offset);
        entry->rw_flags = operation.durable ? RWF_DSYNC : 0;
        break;
      case FileOperation::Kind::sync:
        io_uring_prep_fsync(entry, fd, IORING_FSYNC_DATASYNC);
        break;
      case FileOperation::Kind::punch_hole:
      case FileOperation::Kind::zero_range:
        io_uring_prep_fallocate(
            entry, fd,
            FALLOC_FL_KEEP_SIZE |
                (operation.kind == FileOperation::Kind::punch_hole ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE),
            static_cast<off_t>(operation.offset), static_cast<off_t>(operation.size_bytes));
        break;
      case FileOperation::Kind::discard:
        break;
    }
    if (fixed_files_) entry->flags |= IOSQE_FIXED_FILE;
    io_uring_sqe_set_data(entry, &operation);
  }

  Ring ring_;
  bool fixed_files_ = false;
};

}  // namespace

Result<void> check_uring() { return Ring().create(1, 2); }

Result<std::unique_ptr<IoEngine>> create_uring_engine(std::span<const ImageFile> files, int kick_fd,
                                                      uint32_t queue_size) {
  auto engine = std::make_unique<UringEngine>(files, kick_fd);
  CLONE_TRY(engine->create(queue_size));
  return std::unique_ptr<IoEngine>(std::move(engine));
}

}  // namespace virtio_blk
