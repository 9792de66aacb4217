// SPDX-License-Identifier: Apache-2.0
// Requests to a virtio block device (virtio 1.2 §5.2.6).
#pragma once

#include "virtio.hpp"

constexpr uint32_t kSectorBytes = 512;
constexpr uint64_t kReadOnlyFeature = 1 << 5, kFlushFeature = 1 << 9, kDiscardFeature = 1 << 13,
                   kWriteZeroesFeature = 1 << 14;
enum class Operation : uint32_t { read = 0, write = 1, flush = 4, identify = 8, discard = 11, write_zeroes = 13 };
enum class Outcome : uint8_t { ok = 0, error = 1, unsupported = 2, none = 0xff };

class Disk {
 public:
  explicit Disk(Device device) : device_(device) {}

  bool start(uint64_t features) { return device_.start(rings_, features); }
  Device& device() { return device_; }
  uint64_t capacity_sectors() const {
    return device_.read(reg::kConfig) | uint64_t{device_.read(reg::kConfig + 4)} << 32;
  }

  Outcome request(Operation operation, uint64_t sector, const Buffer* data, unsigned count) {
    header_ = {static_cast<uint32_t>(operation), 0, sector};
    outcome_ = Outcome::none;
    Buffer buffers[kQueueEntries] = {{&header_, sizeof header_, false}};
    for (unsigned i = 0; i < count; ++i) buffers[1 + i] = data[i];
    buffers[1 + count] = {&outcome_, 1, true};
    device_.request(buffers, count + 2);
    return outcome_;
  }
  Outcome read(uint64_t sector, void* data, uint32_t size_bytes) {
    const Buffer buffer{data, size_bytes, true};
    return request(Operation::read, sector, &buffer, 1);
  }
  Outcome write(uint64_t sector, const void* data, uint32_t size_bytes) {
    const Buffer buffer{data, size_bytes, false};
    return request(Operation::write, sector, &buffer, 1);
  }
  Outcome flush() { return request(Operation::flush, 0, nullptr, 0); }
  // Discard and write zeroes.
  Outcome change(Operation operation, uint64_t sector, uint32_t sectors, uint32_t flags = 0) {
    const struct {
      uint64_t sector;
      uint32_t sectors;
      uint32_t flags;
    } range{sector, sectors, flags};
    const Buffer buffer{&range, sizeof range, false};
    return request(operation, 0, &buffer, 1);
  }

 private:
  struct Header {
    uint32_t operation;
    uint32_t priority;
    uint64_t sector;
  };

  Device device_;
  Rings rings_;
  Header header_;
  volatile Outcome outcome_;
};
