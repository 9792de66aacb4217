// SPDX-License-Identifier: Apache-2.0
// The device's side of a virtqueue, split or packed (virtio 1.2 §2.6 to §2.8), over guest memory that may be hostile.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "clone/abi/virtqueue.h"
#include "memory/guest_memory.hpp"
#include "util/fd.hpp"
#include "util/result.hpp"

namespace vmm {

// virtio 1.2 §6
constexpr uint64_t kFeatureIndirectDescriptors = 1ull << 28;
constexpr uint64_t kFeatureEventIndex = 1ull << 29;
constexpr uint64_t kFeaturePackedRing = 1ull << 34;
constexpr uint64_t kRingFeatures = kFeatureIndirectDescriptors | kFeatureEventIndex | kFeaturePackedRing;

constexpr uint32_t kQueueSizeMax = 32768;

// One thread at a time, except for call_fd_taken(). What a function means is said at clone_host_virtqueue.
//
// Every field in guest memory is read once, into a local, and judged there. What breaks a rule of the specification
// breaks the queue: pop() and push() answer CLONE_ERR_GUEST from then on, and nothing is written to the rings.
class Virtqueue {
 public:
  // `memory` outlives the queue. CLONE_ERR_GUEST when the layout cannot be.
  static Result<std::unique_ptr<Virtqueue>> create(GuestMemory& memory, const clone_virtqueue_config& config);
  Virtqueue(const Virtqueue&) = delete;
  Virtqueue& operator=(const Virtqueue&) = delete;

  int kick_fd() const { return kick_fd_.get(); }
  uint32_t size() const { return size_; }
  clone_status pop(clone_chain& chain) { return packed_ ? pop_packed(chain) : pop_split(chain); }
  clone_status push(const clone_chain& chain, uint32_t written_bytes);
  void signal();
  void disable_kick();
  bool enable_kick();
  // What the driver did wrong; nullptr while it did nothing wrong.
  const char* broken() const { return broken_; }

  const clone_virtqueue_layout& layout() const { return layout_; }
  int take_call_fd() {
    call_fd_taken_.store(true, std::memory_order_relaxed);
    return call_fd_.get();
  }
  bool call_fd_taken() const { return call_fd_taken_.load(std::memory_order_relaxed); }

  clone_virtqueue_position position() const;
  Result<void> set_position(const clone_virtqueue_position& position);

 private:
  // A descriptor of either ring: `link` is next (split) or the buffer id (packed).
  struct Descriptor {
    uint64_t address;
    uint32_t size_bytes;
    uint16_t flags;
    uint16_t link;
  };
  struct Table {
    const std::byte* start = nullptr;
    uint32_t entries = 0;
  };

  Virtqueue(GuestMemory& memory, const clone_virtqueue_config& config);

  clone_status pop_split(clone_chain& chain);
  clone_status pop_packed(clone_chain& chain);
  void push_split(const clone_chain& chain, uint32_t written_bytes);
  void push_packed(const clone_chain& chain, uint32_t written_bytes);

  static Descriptor read_split(const std::byte* table, uint32_t index);
  static Descriptor read_packed(const std::byte* table, uint32_t index);
  bool append(clone_chain& chain, const Descriptor& descriptor);
  bool open_indirect(const Descriptor& descriptor, Table& table);
  bool begin(clone_chain& chain);
  std::byte* translate(uint64_t address, uint64_t size_bytes) const;
  bool fail(const char* reason);

  bool available() const;
  // Asks the driver for a notification of the next chain, then looks once more whether one is there.
  bool arm_and_look();
  bool driver_wants_interrupt() const;
  void mark_device_area(uint64_t offset, uint64_t size_bytes) {
    memory_.mark_dirty({layout_.device_address + offset}, size_bytes);
  }

  GuestMemory& memory_;
  // Resolved once: the areas do not move while the queue lives.
  std::byte* descriptors_ = nullptr;
  std::byte* driver_area_ = nullptr;
  std::byte* device_area_ = nullptr;
  const char* broken_ = nullptr;

  uint32_t size_;
  const bool packed_;
  const bool event_index_;
  const bool indirect_;
  bool kick_wanted_ = true;

  // Split: free-running counters. Packed: a place in the ring, and the wrap counter beside it.
  uint16_t next_available_ = 0;
  uint16_t next_used_ = 0;
  bool available_wrap_ = true;
  bool used_wrap_ = true;
  uint16_t seen_available_ = 0;  // split: the driver's index when last read
  uint32_t in_flight_ = 0;       // ring entries popped and not pushed; more than the ring has is the driver's lie
  uint32_t pushed_ = 0;          // ring entries pushed since the last signal()
  uint32_t armed_at_ = ~0u;      // where the event index last stood, ~0: nowhere

  clone_virtqueue_layout layout_;
  uint32_t index_;
  Fd kick_fd_;
  Fd call_fd_;
  std::atomic<bool> call_fd_taken_{false};
  void (*interrupt_)(void* context, uint32_t index);
  void* interrupt_context_;
};

}  // namespace vmm
