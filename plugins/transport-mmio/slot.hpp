// SPDX-License-Identifier: Apache-2.0
// One virtio device behind a window of virtio-mmio registers (virtio 1.2 §4.2).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "clone/abi/transport.h"
#include "clone/sdk/fd.hpp"
#include "clone/sdk/host.hpp"
#include "clone/sdk/state.hpp"

namespace transport_mmio {

using clone_sdk::Result;

constexpr uint64_t kWindowBytes = 0x200;
constexpr uint32_t kConfigOffset = 0x100;  // of the device's configuration space in the window

// A window of registers, and an interrupt line.
struct Place {
  uint64_t base = 0;
  uint32_t gsi = 0;
};
Result<Place> claim_place(const clone_sdk::Host& host);

// A driver's misuse is ignored, as hardware would: the register keeps its value.
//
// mutex_ is held wherever registers other than the interrupt's are read or written, and around the device's activate()
// and reset(). What a device calls back (interrupts, config_changed, needs_reset) takes no lock, so that a device may
// wait for its own threads in reset().
class Slot {
 public:
  // `prepared`: where the guest was told that a device may be. Without it the slot claims a place and describes it to
  // the guest. `ring_features`: at most these are offered.
  static Result<std::unique_ptr<Slot>> create(const clone_virtio_attachment& attachment, uint64_t ring_features,
                                              std::optional<Place> prepared = {});
  Slot(const Slot&) = delete;
  ~Slot();

  // Back to before the driver came.
  void reset();
  // Signals every queue and repeats the interrupt: notifications may have been lost while the VM was away.
  void wake();
  Result<void> save(const clone_sdk::Writer& writer);
  Result<void> load(const clone_sdk::Reader& reader);

 private:
  struct Queue {
    uint32_t size_max = 0;
    clone_sdk::Fd kick;
    bool notified_by_kernel = false;  // an ioeventfd stands on QueueNotify
    // Set by the driver.
    uint32_t size = 0;
    uint64_t descriptor_address = 0;
    uint64_t driver_address = 0;
    uint64_t device_address = 0;
    clone_virtqueue* queue = nullptr;  // there while QueueReady is 1
  };

  Slot(const clone_virtio_attachment& attachment, const clone_host* host);
  Result<void> set_up(uint64_t ring_features, std::optional<Place> prepared);

  void read(uint64_t offset, void* data, uint32_t size_bytes);
  void write(uint64_t offset, const void* data, uint32_t size_bytes);
  uint32_t read_register(uint64_t offset);
  void write_register(uint64_t offset, uint32_t value);

  // With mutex_ held.
  void write_status(uint32_t value);
  void write_driver_features(uint32_t value);
  void write_queue(uint64_t offset, uint32_t value);
  Result<void> make_ready(Queue& queue, uint32_t index);
  void drop(Queue& queue);
  Result<void> activate();
  void reset_locked();
  Queue* selected() { return queue_select_ < queues_.size() ? &queues_[queue_select_] : nullptr; }

  // Without.
  void raise(uint32_t interrupt);
  void needs_reset();
  const char* name() const { return attachment_.name; }

  const clone_virtio_attachment attachment_;
  const clone_virtio_device& device_;
  const clone_sdk::Host host_;
  const clone_host_bus* bus_ = nullptr;
  const clone_host_irq* irq_ = nullptr;
  const clone_host_virtqueue* virtqueue_ = nullptr;
  const clone_virtio_port port_;
  uint64_t offered_features_ = 0;
  uint32_t config_bytes_ = 0;

  Place place_;
  clone_sdk::Fd call_;
  bool call_wired_ = false;
  clone_sdk::Claim claim_;

  std::atomic<uint32_t> status_{0};
  std::atomic<uint32_t> interrupt_status_{0};
  std::atomic<uint32_t> config_generation_{0};
  std::atomic<bool> interrupts_from_elsewhere_{false};  // a kernel backend took call_: the reason is not known here

  std::mutex mutex_;
  bool active_ = false;  // between the device's activate() and reset()
  bool warned_ = false;
  bool unknown_features_ = false;  // the driver asked for a bit beyond the 64 that there are
  uint64_t driver_features_ = 0;
  uint32_t device_features_select_ = 0;
  uint32_t driver_features_select_ = 0;
  uint32_t queue_select_ = 0;
  std::vector<Queue> queues_;
};

}  // namespace transport_mmio
