// SPDX-License-Identifier: Apache-2.0
// A virtio device as a class, its queues, and chains as spans. A device written with it knows no transport.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <span>
#include <utility>
#include <vector>

#include "clone/abi/virtio.h"
#include "clone/sdk/device.hpp"

namespace clone_sdk {

// One descriptor chain, taken from a queue and to be given back to it. The segments lie in guest memory, which the
// guest may change at any time: copy what is to be checked. Storage is kept when a chain object is used again.
class Chain {
 public:
  Chain() = default;
  Chain(Chain&& other) noexcept
      : raw_(other.raw_), segments_(std::move(other.segments_)), live_(std::exchange(other.live_, false)) {}
  Chain& operator=(Chain&& other) noexcept {
    assert(!live_ && "a chain was overwritten before it was given back");
    raw_ = other.raw_;
    segments_ = std::move(other.segments_);
    live_ = std::exchange(other.live_, false);
    return *this;
  }
  ~Chain() { assert(!live_ && "a chain was lost: push() or abandon() it"); }

  std::span<const clone_segment> readable() const { return {segments_.data(), raw_.readable_count}; }
  std::span<const clone_segment> writable() const {
    return {segments_.data() + raw_.readable_count, raw_.writable_count};
  }
  uint32_t readable_bytes() const { return raw_.readable_bytes; }
  uint32_t writable_bytes() const { return raw_.writable_bytes; }

  // Copies from the readable part, starting `offset` bytes in; false when it is too short.
  [[nodiscard]] bool read(uint64_t offset, void* into, size_t size_bytes) const {
    auto* to = static_cast<std::byte*>(into);
    return walk(readable(), offset, size_bytes, [&](std::byte* at, size_t n) {
      std::memcpy(to, at, n);
      to += n;
    });
  }
  // Copies into the writable part; false when it is too short.
  [[nodiscard]] bool write(uint64_t offset, const void* from, size_t size_bytes) const {
    auto* source = static_cast<const std::byte*>(from);
    return walk(writable(), offset, size_bytes, [&](std::byte* at, size_t n) {
      std::memcpy(at, source, n);
      source += n;
    });
  }

  // Takes another's chain over, with room for its segments only: many can then be in flight in little memory, while one
  // chain object with room for the longest is used for every pop().
  void take(Chain& other) {
    assert(!live_ && other.live_);
    raw_ = other.raw_;
    segments_.assign(other.segments_.begin(), other.segments_.begin() + (raw_.readable_count + raw_.writable_count));
    raw_.segments = segments_.data();
    raw_.capacity = static_cast<uint32_t>(segments_.size());
    live_ = std::exchange(other.live_, false);
  }

  // The queue it came from was reset: it needs not be given back.
  void abandon() { live_ = false; }

 private:
  friend class Queue;

  template <typename Copy>
  static bool walk(std::span<const clone_segment> segments, uint64_t offset, size_t size_bytes, Copy&& copy) {
    for (const clone_segment& segment : segments) {
      if (size_bytes == 0) break;
      if (offset >= segment.size_bytes) {
        offset -= segment.size_bytes;
        continue;
      }
      const size_t n = std::min<uint64_t>(size_bytes, segment.size_bytes - offset);
      copy(static_cast<std::byte*>(segment.host_address) + offset, n);
      offset = 0;
      size_bytes -= n;
    }
    return size_bytes == 0;
  }

  clone_chain raw_{};
  std::vector<clone_segment> segments_;
  bool live_ = false;
};

// A queue that the transport handed over; valid from activate() until reset_queues() returned. One thread at a time.
class Queue {
 public:
  enum class Pop { chain, empty, broken };

  Queue() = default;
  Queue(const clone_host_virtqueue* table, clone_virtqueue* queue)
      : table_(table), queue_(queue), size_(queue ? table->queue_size(queue) : 0) {}

  explicit operator bool() const { return queue_ != nullptr; }
  int kick_fd() const { return table_->kick_fd(queue_); }
  // Empties kick_fd, before looking for chains.
  void clear_kick() const {
    uint64_t count;
    [[maybe_unused]] const ssize_t size_bytes = ::read(kick_fd(), &count, sizeof count);
  }
  // Signals kick_fd: come back later, after whatever else the loop has to do.
  void kick() const {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t size_bytes = ::write(kick_fd(), &one, sizeof one);
  }
  uint32_t size() const { return size_; }
  clone_virtqueue* raw() const { return queue_; }
  const clone_host_virtqueue* table() const { return table_; }

  // broken: the driver broke a rule; ask the port for needs_reset().
  Pop pop(Chain& chain) const {
    assert(!chain.live_);
    if (chain.segments_.size() < size_) chain.segments_.resize(size_);
    chain.raw_ = {};
    chain.raw_.size = sizeof(clone_chain);
    chain.raw_.capacity = static_cast<uint32_t>(chain.segments_.size());
    chain.raw_.segments = chain.segments_.data();
    const clone_status status = table_->pop(queue_, &chain.raw_, nullptr);
    if (status == CLONE_EMPTY) return Pop::empty;
    if (status != CLONE_OK) return Pop::broken;
    chain.live_ = true;
    return Pop::chain;
  }
  void push(Chain& chain, uint32_t written_bytes) const {
    chain.live_ = false;
    table_->push(queue_, &chain.raw_, written_bytes);
  }
  void signal() const { table_->signal(queue_); }
  void disable_kick() const { table_->disable_kick(queue_); }
  bool enable_kick() const { return table_->enable_kick(queue_) != 0; }

 private:
  const clone_host_virtqueue* table_ = nullptr;
  clone_virtqueue* queue_ = nullptr;
  uint32_t size_ = 0;
};

struct Activation {
  uint64_t features = 0;
  std::vector<Queue> queues;  // one for each of queue_count(); empty where the driver enabled none
  const clone_virtio_port* port = nullptr;
};

// The functions and their threads are those of clone_virtio_device (clone/abi/virtio.h).
class VirtioDevice : public Device {
 public:
  using Device::Device;

  virtual uint64_t features() const = 0;
  virtual uint64_t ring_features(uint64_t offered) const { return offered; }
  virtual uint32_t queue_count() const = 0;
  virtual uint32_t queue_max_size(uint32_t index) const = 0;
  virtual uint32_t config_size() const { return 0; }
  virtual void read_config(uint32_t, void*, uint32_t) {}
  virtual void write_config(uint32_t, const void*, uint32_t) {}
  virtual Result<void> activate(Activation activation) = 0;
  virtual void reset_queues() = 0;

  // The transport, which is reset with the machine, resets the queues.
  Result<void> reset_device() override { return {}; }
};

// VirtioDevice with the virtio device type (virtio 1.2 §5) that it is.
template <uint32_t type>
class VirtioDeviceOf : public VirtioDevice {
 public:
  using VirtioDevice::VirtioDevice;

  const void* extension(std::string_view id) override {
    static constexpr clone_virtio_device table = {
        sizeof(clone_virtio_device),
        type,
        [](void* device) noexcept { return self(device).features(); },
        [](void* device) noexcept { return self(device).queue_count(); },
        [](void* device, uint32_t index) noexcept { return self(device).queue_max_size(index); },
        [](void* device) noexcept { return self(device).config_size(); },
        [](void* device, uint32_t offset, void* data, uint32_t size_bytes) noexcept {
          self(device).read_config(offset, data, size_bytes);
        },
        [](void* device, uint32_t offset, const void* data, uint32_t size_bytes) noexcept {
          self(device).write_config(offset, data, size_bytes);
        },
        activate_thunk,
        [](void* device) noexcept { self(device).reset_queues(); },
        [](void* device, uint64_t offered) noexcept { return self(device).ring_features(offered); }};
    return id == CLONE_VIRTIO_DEVICE ? &table : nullptr;
  }

 private:
  static VirtioDevice& self(void* device) { return *static_cast<VirtioDevice*>(static_cast<Device*>(device)); }

  static clone_status activate_thunk(void* device, const clone_virtio_activation* raw, clone_err* err) noexcept {
    return guarded(err, [&]() -> Result<void> {
      const auto* table = CLONE_TRY(self(device).host().template service<clone_host_virtqueue>(CLONE_VIRTQUEUE));
      Activation activation{raw->features, {}, raw->port};
      for (uint32_t i = 0; i < raw->queue_count; ++i) activation.queues.emplace_back(table, raw->queues[i]);
      return self(device).activate(std::move(activation));
    });
  }
};

// Copies a part of a configuration structure, as read_config() is asked to.
template <typename Config>
void copy_config(const Config& config, uint32_t offset, void* data, uint32_t size_bytes) {
  if (offset > sizeof config || size_bytes > sizeof config - offset) {
    std::memset(data, 0, size_bytes);
    return;
  }
  std::memcpy(data, reinterpret_cast<const std::byte*>(&config) + offset, size_bytes);
}

}  // namespace clone_sdk
