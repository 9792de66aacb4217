// SPDX-License-Identifier: Apache-2.0
// A small driver for virtio devices on MMIO (virtio 1.2 §4.2), split rings, one chain at a time or several.
#pragma once

#include "guest.hpp"

// The n-th virtio device of a machine has the n-th window of 0x200 bytes from 0xc0000000 on and the n-th of these GSIs.
// They come in the order of the command line, then the devices that every machine has. (A kernel reads it in the DSDT;
// this is what the allocators in core/bus/resources.hpp give when nobody else asks.)
constexpr uint64_t kFirstWindow = 0xc000'0000;
constexpr uint64_t kWindowBytes = 0x200;
constexpr uint32_t kGsis[] = {5, 10, 11, 16, 17, 18, 19, 20};

namespace reg {
constexpr uint32_t kMagic = 0x000, kVersion = 0x004, kDeviceId = 0x008, kVendorId = 0x00c, kDeviceFeatures = 0x010,
                   kDeviceFeaturesSelect = 0x014, kDriverFeatures = 0x020, kDriverFeaturesSelect = 0x024,
                   kQueueSelect = 0x030, kQueueSizeMax = 0x034, kQueueSize = 0x038, kQueueReady = 0x044,
                   kQueueNotify = 0x050, kInterruptStatus = 0x060, kInterruptAck = 0x064, kStatus = 0x070,
                   kQueueDescriptor = 0x080, kQueueDriver = 0x090, kQueueDevice = 0x0a0, kConfigGeneration = 0x0fc,
                   kConfig = 0x100;
}

constexpr uint32_t kBlockDevice = 2;
constexpr uint32_t kRandomDevice = 4;

constexpr uint32_t kAcknowledge = 1, kDriver = 2, kDriverOk = 4, kFeaturesOk = 8, kNeedsReset = 64, kFailed = 128;
constexpr uint64_t kVersion1 = 1ull << 32;

constexpr uint16_t kNext = 1, kWrite = 2;

// Of a size that both sides always agree on.
constexpr uint16_t kQueueEntries = 16;
struct Descriptor {
  uint64_t address;
  uint32_t size_bytes;
  uint16_t flags;
  uint16_t next;
};
struct Rings {
  alignas(16) Descriptor descriptors[kQueueEntries];
  alignas(2) struct {
    uint16_t flags;
    uint16_t index;
    uint16_t ring[kQueueEntries];
    uint16_t used_event;
  } available;
  alignas(4) struct {
    uint16_t flags;
    uint16_t index;
    struct {
      uint32_t id;
      uint32_t size_bytes;
    } ring[kQueueEntries];
    uint16_t available_event;
  } used;
};

struct Buffer {
  const volatile void* start;
  uint32_t size_bytes;
  bool writable;
};

class Device {
 public:
  Device() = default;
  explicit Device(unsigned index) : base_(kFirstWindow + index * kWindowBytes), gsi_(kGsis[index]) {}
  // The n-th of its kind; one that is not there ends the program.
  static Device find(uint32_t device_id, unsigned nth = 0);

  uint32_t gsi() const { return gsi_; }
  uint64_t base() const { return base_; }
  uint32_t read(uint32_t offset) const { return at<uint32_t>(base_ + offset); }
  void write(uint32_t offset, uint32_t value) const { at<uint32_t>(base_ + offset) = value; }
  void write64(uint32_t offset, uint64_t value) const;
  uint64_t features() const;
  void write_features(uint64_t value) const;
  uint32_t status() const { return read(reg::kStatus); }
  void add_status(uint32_t bits) const { write(reg::kStatus, status() | bits); }
  void reset() const { write(reg::kStatus, 0); }

  // The whole way of virtio 1.2 §3.1.1 with queue 0; false when the device does not go along.
  bool start(Rings& rings, uint64_t features = 0);
  // The parts of it.
  bool negotiate(uint64_t features = 0) const;
  bool set_queue(uint32_t queue, uint32_t entries, uint64_t descriptors, uint64_t driver, uint64_t device) const;
  bool set_queue(uint32_t queue, Rings& rings) const;

  // Puts a chain at descriptors `first` and up and makes it available; notify() tells the device.
  void offer(uint16_t first, const Buffer* buffers, unsigned count);
  void notify() const { write(reg::kQueueNotify, 0); }
  // A chain was given back since the last take().
  bool returned() const { return at<uint16_t>(reinterpret_cast<uint64_t>(&rings_->used.index)) != taken_; }
  // The number of bytes that the device says it wrote.
  uint32_t take();
  // Offers, notifies, waits: asleep if the device's interrupt is routed.
  uint32_t request(const Buffer* buffers, unsigned count);
  void sleep_while_waiting(unsigned interrupt_number);

 private:
  uint64_t base_ = 0;
  uint32_t gsi_ = 0;
  Rings* rings_ = nullptr;
  uint16_t taken_ = 0;
  bool asleep_ = false;
};

// Ends when it holds, or after a time that no healthy device takes.
template <typename Condition>
bool poll_until(Condition condition) {
  const uint32_t start = in32(kPmTimer);
  for (unsigned i = 1; !condition(); ++i) {
    if (i % 64 == 0 && in32(kPmTimer) - start > 5 * kPmTimerHz) return false;
    pause();
  }
  return true;
}
