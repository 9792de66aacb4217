// SPDX-License-Identifier: Apache-2.0
// One queue and the thread that serves it (virtio 1.2 §5.2.6).
#pragma once

#include <linux/virtio_blk.h>

#include <array>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

#include "clone/sdk/thread.hpp"
#include "clone/sdk/virtio.hpp"
#include "image.hpp"
#include "rate_limit.hpp"

namespace virtio_blk {

// What all queues of a disk share; constant while one is served, except for its size, which may grow.
struct Disk {
  std::unique_ptr<Image> image;
  bool read_only = false;
  bool discards = false;
  std::array<char, VIRTIO_BLK_ID_BYTES> serial{};  // padded with NULs
  std::atomic<uint64_t> capacity_sectors{0};
  uint32_t max_discard_sectors = 0;
  uint32_t max_write_zeroes_sectors = 0;
  std::unique_ptr<RateLimiter> limiter;  // none: there is no limit
  mutable std::atomic<uint32_t> error_count{0};
};

class QueueWorker {
 public:
  enum class Mode { parked, running, stopping };

  QueueWorker(const clone_sdk::Host& host, const Disk& disk, clone_sdk::Queue queue, const clone_virtio_port* port,
              bool write_through, std::unique_ptr<IoEngine> engine);
  QueueWorker(const QueueWorker&) = delete;
  // Stops, after the I/O that was begun.
  ~QueueWorker();

  clone_sdk::Result<void> start(const char* thread_name, Mode mode);
  // Any thread but the worker's. Parked and stopped are reached when all I/O that was begun is done.
  void set_mode(Mode mode);
  void wait_parked();

 private:
  struct Request;

  void run();
  bool take_requests();
  bool may_take();
  void take_no_more();
  bool tell_driver();
  void begin(Request& request);
  void transfer(Request& request, const virtio_blk_outhdr& header, ImageRequest::Type type);
  void change_range(Request& request, ImageRequest::Type type, uint32_t max_sectors);
  void identify(Request& request);
  void complete(Request& request, uint8_t status);
  void failed(const Request& request, int error) const;
  bool within_disk(uint64_t sector, uint64_t sectors) const {
    const uint64_t capacity = disk_.capacity_sectors.load(std::memory_order_relaxed);
    return sector <= capacity && sectors <= capacity - sector;
  }
  Request* free_request();

  const clone_sdk::Host& host_;
  const Disk& disk_;
  const clone_sdk::Queue queue_;
  const clone_virtio_port* port_;
  const bool write_through_;
  std::unique_ptr<IoEngine> engine_;

  // The worker's own.
  clone_sdk::Chain popped_;
  std::vector<std::unique_ptr<Request>> requests_;  // grows to what was in flight at most
  Request* free_ = nullptr;
  uint32_t in_flight_ = 0;
  RateLimiter::Customer customer_;
  std::chrono::nanoseconds throttled_for_{0};  // since take_requests(): how long the limiter lets this queue wait
  bool unsignalled_ = false;
  bool broken_ = false;

  std::atomic<Mode> mode_{Mode::parked};
  std::mutex mutex_;
  std::condition_variable parked_changed_;
  // Guarded by mutex_, as are changes of mode_.
  bool parked_ = false;
  bool ended_ = false;  // before it began: the engine failed
  clone_sdk::Thread thread_;
};

}  // namespace virtio_blk
