// SPDX-License-Identifier: Apache-2.0
// virtio-rng: randomness from the host's kernel (virtio 1.2 §5.4).
#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>

#include <algorithm>

#include "clone/sdk/fd.hpp"
#include "clone/sdk/plugin.hpp"

namespace {

using clone_sdk::Activation;
using clone_sdk::Chain;
using clone_sdk::Error;
using clone_sdk::Fd;
using clone_sdk::Options;
using clone_sdk::Queue;
using clone_sdk::Result;
using clone_sdk::Watch;

constexpr uint32_t kDeviceType = 4;
constexpr uint32_t kQueueSize = 64;
// What one wake-up may cost the main loop; the rest waits for the next round.
constexpr uint32_t kBytesPerRound = 64 << 10;
constexpr uint32_t kChainsPerRound = kQueueSize;

class VirtioRng final : public clone_sdk::VirtioDeviceOf<kDeviceType> {
 public:
  using VirtioDeviceOf::VirtioDeviceOf;
  static const clone_descriptor descriptor;

  Result<void> configure(const Options& options) override {
    loop_ = CLONE_TRY(host().service<clone_host_loop>(CLONE_HOST_LOOP));
    const auto source = options.text("source");
    if (!source) return {};
    const std::string path(*source);
    source_ = Fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    struct stat status {};
    if (!source_ || ::fstat(source_.get(), &status) != 0) return clone_sdk::errno_error("source=" + path);
    if (!S_ISCHR(status.st_mode)) return Error{"source=" + path + " is not a character device"};
    return {};
  }

  uint64_t features() const override { return 0; }
  uint32_t queue_count() const override { return 1; }
  uint32_t queue_max_size(uint32_t) const override { return kQueueSize; }

  Result<void> activate(Activation activation) override {
    if (!activation.queues[0]) return Error{"the driver did not enable the request queue"};
    queue_ = activation.queues[0];
    port_ = activation.port;
    broken_ = false;
    return watch();
  }
  void reset_queues() override {
    watch_.stop();
    queue_ = {};
    port_ = nullptr;
  }

  Result<void> quiesce() override {
    watch_.stop();
    return {};
  }
  Result<void> resume() override { return queue_ ? watch() : Result<void>(); }

  // Randomness has no state; the queue's is the transport's.
  Result<void> save(const clone_sdk::Writer&) override { return {}; }
  Result<void> load(const clone_sdk::Reader&) override { return {}; }

 private:
  Result<void> watch() {
    watch_ = CLONE_TRY(
        Watch::start<&VirtioRng::serve>(loop_, loop_->main_loop(host().raw()), queue_.kick_fd(), CLONE_READABLE, this));
    return {};
  }

  // On the main loop.
  void serve() {
    queue_.clear_kick();
    if (broken_) return;
    uint32_t budget_bytes = kBytesPerRound;
    for (uint32_t chains = 0; chains < kChainsPerRound && budget_bytes; ++chains) {
      const Queue::Pop popped = queue_.pop(chain_);
      if (popped == Queue::Pop::broken) {
        broken_ = true;
        port_->needs_reset(port_->context);
      }
      if (popped != Queue::Pop::chain) {
        queue_.signal();
        return;
      }
      const uint32_t written_bytes = fill(std::min(chain_.writable_bytes(), budget_bytes));
      budget_bytes -= written_bytes;
      queue_.push(chain_, written_bytes);
    }
    queue_.signal();
    queue_.kick();
  }

  // The chain's writable part, from its start; less than its whole is allowed (virtio 1.2 §5.4.6.1).
  uint32_t fill(uint32_t wanted_bytes) {
    uint32_t filled_bytes = 0;
    for (const clone_segment& segment : chain_.writable()) {
      auto* start = static_cast<std::byte*>(segment.host_address);
      const uint32_t part_bytes = std::min(segment.size_bytes, wanted_bytes - filled_bytes);
      for (uint32_t done_bytes = 0; done_bytes < part_bytes;) {
        const ssize_t got = read_some(start + done_bytes, part_bytes - done_bytes);
        if (got <= 0) return filled_bytes + done_bytes;
        done_bytes += static_cast<uint32_t>(got);
      }
      filled_bytes += part_bytes;
    }
    return filled_bytes;
  }

  // What the source has no bytes for at the moment comes from the kernel: the guest never waits.
  ssize_t read_some(std::byte* into, size_t size_bytes) {
    if (source_)
      if (const ssize_t got = ::read(source_.get(), into, size_bytes); got > 0) return got;
    ssize_t got;
    do got = ::getrandom(into, size_bytes, 0);
    while (got < 0 && errno == EINTR);
    return got;
  }

  const clone_host_loop* loop_ = nullptr;
  Fd source_;
  Queue queue_;
  const clone_virtio_port* port_ = nullptr;
  bool broken_ = false;
  Chain chain_;
  Watch watch_;
};

constexpr clone_option source =
    clone_sdk::path_option("source", nullptr, "A character device to read from; unset: the kernel's getrandom(2).");
constexpr const clone_option* options[] = {&source, nullptr};

constexpr clone_descriptor VirtioRng::descriptor = {sizeof(clone_descriptor),
                                                    CLONE_CAN_SAVE | CLONE_CAN_MIGRATE,
                                                    "virtio-rng",
                                                    "A source of randomness for the guest.",
                                                    options,
                                                    "virtio_rng"};

}  // namespace

CLONE_SDK_PLUGIN("virtio-rng", "1.0.0", "clone", "Apache-2.0", "Randomness for the guest.",
                 CLONE_PROVIDES("device", "virtio-rng", "default"))
CLONE_SDK_DEVICES(VirtioRng)
