// SPDX-License-Identifier: Apache-2.0
// The driver's side of a virtqueue in a GuestMemory, well-behaved, with raw access for tests that are not.
//
//   FakeDriver driver(memory, {.packed = true, .size = 8, .features = kRingFeatures});
//   driver.add({{0x10000, 512, false}, {0x11000, 1, true}});    // a chain
//   if (driver.publish()) signal_event(kick_fd);                // visible to the device; true: it wants to be told
//   auto used = driver.take_used();                             // what came back
#pragma once

#include <atomic>
#include <map>
#include <optional>
#include <stdexcept>
#include <vector>

#include "virtqueue/virtqueue.hpp"

namespace vmm::test {

struct FakeDriverConfig {
  bool packed = false;
  uint32_t size = 8;
  uint64_t features = 0;  // ring features; kFeaturePackedRing is added when packed
  uint64_t base = 0x10000;
  uint64_t start = 0;  // how many entries went through the ring before
};

class FakeDriver {
 public:
  struct Buffer {
    uint64_t address;
    uint32_t size_bytes;
    bool writable;
    bool operator==(const Buffer&) const = default;
  };
  struct Used {
    uint16_t id;
    uint32_t written_bytes;
  };
  struct [[gnu::packed]] Descriptor {
    uint64_t address;
    uint32_t size_bytes;
    uint16_t third;   // split: flags; packed: id
    uint16_t fourth;  // split: next; packed: flags
  };
  static constexpr uint16_t kNext = 1, kWrite = 2, kIndirect = 4, kAvailable = 0x80, kUsed = 0x8000;

  FakeDriver(GuestMemory& memory, const FakeDriverConfig& config) : memory_(memory), config_(config) {
    if (config.packed) config_.features |= kFeaturePackedRing;
    descriptor_address = config.base;
    driver_address = descriptor_address + 16ull * config.size;
    device_address = (driver_address + 6 + 2ull * config.size + 3) & ~3ull;
    indirect_address = (device_address + 6 + 8ull * config.size + 15) & ~15ull;
    const uint64_t end = indirect_address + 16ull * config.size * config.size;
    std::byte* all = memory.slice({config.base}, end - config.base);
    if (!all) throw std::runtime_error("the rings do not fit into memory");
    std::memset(all, 0, end - config.base);
    for (uint32_t i = 0; i < config.size; ++i) free_.push_back(static_cast<uint16_t>(config.size - 1 - i));
    available_ = published_ = used_ = config.start;
    if (config.packed) {
      for (uint32_t i = 0; i < config.size; ++i) {
        const bool used_this_lap = i < config.start % config.size;
        descriptor(i)->fourth = wrap(config.start) == used_this_lap ? kAvailable | kUsed : 0;
      }
    } else {
      *at<uint16_t>(driver_address + 2) = static_cast<uint16_t>(config.start);
      *at<uint16_t>(device_address + 2) = static_cast<uint16_t>(config.start);
    }
  }

  clone_virtqueue_config queue_config() const {
    clone_virtqueue_config config{};
    config.size = sizeof config;
    config.layout = {sizeof config.layout, config_.size,   config_.features,
                     descriptor_address,   driver_address, device_address};
    config.kick_fd = config.call_fd = -1;
    return config;
  }
  clone_virtqueue_position start_position() const {
    return {sizeof(clone_virtqueue_position), position(config_.start), position(config_.start)};
  }
  uint16_t position(uint64_t count) const {
    if (!config_.packed) return static_cast<uint16_t>(count);
    return static_cast<uint16_t>(count % config_.size | (wrap(count) ? 0x8000 : 0));
  }

  // The chain's id, or nothing when the ring has no room. Not seen by the device before publish().
  std::optional<uint16_t> add(const std::vector<Buffer>& buffers, bool indirect = false) {
    const size_t entries = indirect ? 1 : buffers.size();
    if (entries > free_entries() || free_.empty()) return std::nullopt;
    return config_.packed ? add_packed(buffers, indirect) : add_split(buffers, indirect);
  }

  // Makes everything added visible; true when the device asked to be notified of it.
  bool publish() {
    const uint64_t before = published_;
    published_ = available_;
    if (config_.packed) {
      if (first_flags_.empty()) return false;
      // The first descriptor of the whole batch is made available last.
      for (size_t i = first_flags_.size(); i-- > 0;)
        __atomic_store_n(at<uint16_t>(descriptor_address + 16 * first_flags_[i].first + 14), first_flags_[i].second,
                         __ATOMIC_RELEASE);
      first_flags_.clear();
    } else {
      __atomic_store_n(at<uint16_t>(driver_address + 2), static_cast<uint16_t>(published_), __ATOMIC_RELEASE);
    }
    if (published_ == before) return false;
    fence();
    if (config_.packed) {
      const uint32_t event = __atomic_load_n(at<uint32_t>(device_address), __ATOMIC_RELAXED);
      if (event >> 16 != 2) return event >> 16 == 0;
      return passes(event & 0xffff, before, published_);
    }
    if (!(config_.features & kFeatureEventIndex))
      return !(__atomic_load_n(at<uint16_t>(device_address), __ATOMIC_RELAXED) & 1);
    return passes(__atomic_load_n(at<uint16_t>(device_address + 4 + 8 * config_.size), __ATOMIC_RELAXED), before,
                  published_);
  }

  std::optional<Used> take_used() {
    Used used{};
    if (config_.packed) {
      const Descriptor* entry = descriptor(used_ % config_.size);
      const uint16_t flags =
          __atomic_load_n(at<uint16_t>(descriptor_address + 16 * (used_ % config_.size) + 14), __ATOMIC_ACQUIRE);
      if (!!(flags & kAvailable) != wrap(used_) || !!(flags & kUsed) != wrap(used_)) return std::nullopt;
      used = {entry->third, entry->size_bytes};
    } else {
      if (__atomic_load_n(at<uint16_t>(device_address + 2), __ATOMIC_ACQUIRE) == static_cast<uint16_t>(used_))
        return std::nullopt;
      const uint64_t entry = device_address + 4 + 8 * (used_ % config_.size);
      const uint32_t id = *at<uint32_t>(entry);
      if (id > 0xffff) throw std::runtime_error("an id that was never given out came back");
      used = {static_cast<uint16_t>(id), *at<uint32_t>(entry + 4)};
    }
    const auto found = chains_.find(used.id);
    if (found == chains_.end()) throw std::runtime_error("a chain came back that was not out");
    used_ += config_.packed ? found->second.size() : 1;
    free_.insert(free_.end(), found->second.begin(), found->second.end());
    chains_.erase(found);
    return used;
  }

  // Interrupt on the entry that follows `count` entries since the ring's beginning (event index).
  void set_interrupt_event(uint64_t count) {
    if (config_.packed)
      __atomic_store_n(at<uint32_t>(driver_address), 2u << 16 | position(count), __ATOMIC_RELAXED);
    else
      __atomic_store_n(at<uint16_t>(driver_address + 4 + 2 * config_.size), position(count), __ATOMIC_RELAXED);
    fence();
  }
  // Before waiting: interrupts on, with or without event index; true when something is there already.
  bool enable_interrupts() {
    if (config_.features & kFeatureEventIndex)
      set_interrupt_event(used_);
    else
      set_interrupts(true);
    fence();
    return used_pending();
  }
  void set_interrupts(bool wanted) {
    if (config_.packed)
      __atomic_store_n(at<uint32_t>(driver_address), wanted ? 0 : 1u << 16, __ATOMIC_RELAXED);
    else
      __atomic_store_n(at<uint16_t>(driver_address), static_cast<uint16_t>(!wanted), __ATOMIC_RELAXED);
    fence();
  }
  bool used_pending() const {
    if (!config_.packed)
      return __atomic_load_n(at<uint16_t>(device_address + 2), __ATOMIC_ACQUIRE) != static_cast<uint16_t>(used_);
    const uint16_t flags =
        __atomic_load_n(at<uint16_t>(descriptor_address + 16 * (used_ % config_.size) + 14), __ATOMIC_ACQUIRE);
    return !!(flags & kAvailable) == wrap(used_) && !!(flags & kUsed) == wrap(used_);
  }

  size_t free_entries() const { return config_.packed ? config_.size - (available_ - used_) : free_.size(); }
  uint64_t available_count() const { return available_; }
  uint64_t used_count() const { return used_; }
  const FakeDriverConfig& config() const { return config_; }

  template <typename T>
  T* at(uint64_t address) const {
    std::byte* host = memory_.slice({address}, sizeof(T));
    if (!host) throw std::runtime_error("the driver missed memory");
    return reinterpret_cast<T*>(host);
  }
  Descriptor* descriptor(uint64_t index) const { return at<Descriptor>(descriptor_address + 16 * index); }

  // Hostile use: the next available entry of a split ring names `head`, and the index moves on.
  void offer_head(uint16_t head) {
    *at<uint16_t>(driver_address + 4 + 2 * (available_ % config_.size)) = head;
    published_ = ++available_;
    __atomic_store_n(at<uint16_t>(driver_address + 2), static_cast<uint16_t>(available_), __ATOMIC_RELEASE);
  }

  uint64_t descriptor_address, driver_address, device_address, indirect_address;

 private:
  static void fence() {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wtsan"
    std::atomic_thread_fence(std::memory_order_seq_cst);
#pragma GCC diagnostic pop
  }
  bool wrap(uint64_t count) const { return count / config_.size % 2 == 0; }
  // Is the position `event` the one of an entry in [before, after)?
  bool passes(uint32_t event, uint64_t before, uint64_t after) const {
    for (uint64_t count = before; count < after; ++count)
      if (position(count) == event) return true;
    return false;
  }

  uint64_t write_table(uint16_t id, const std::vector<Buffer>& buffers) {
    const uint64_t table = indirect_address + 16ull * config_.size * id;
    for (size_t i = 0; i < buffers.size(); ++i) {
      const bool last = i + 1 == buffers.size();
      const auto write = static_cast<uint16_t>(buffers[i].writable ? kWrite : 0);
      *at<Descriptor>(table + 16 * i) = config_.packed ? Descriptor{buffers[i].address, buffers[i].size_bytes, 0, write}
                                                       : Descriptor{buffers[i].address, buffers[i].size_bytes,
                                                                    static_cast<uint16_t>(write | (last ? 0 : kNext)),
                                                                    static_cast<uint16_t>(last ? 0 : i + 1)};
    }
    return table;
  }

  std::optional<uint16_t> add_split(const std::vector<Buffer>& buffers, bool indirect) {
    std::vector<uint16_t> taken;
    for (size_t i = 0; i < (indirect ? 1 : buffers.size()); ++i) {
      // From the middle: chains that jump about in the table.
      const size_t pick = (free_.size() * 5 / 7) % free_.size();
      taken.push_back(free_[pick]);
      free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(pick));
    }
    if (indirect) {
      *descriptor(taken[0]) = {write_table(taken[0], buffers), static_cast<uint32_t>(16 * buffers.size()), kIndirect,
                               0};
    } else {
      for (size_t i = 0; i < taken.size(); ++i) {
        const bool last = i + 1 == taken.size();
        *descriptor(taken[i]) = {buffers[i].address, buffers[i].size_bytes,
                                 static_cast<uint16_t>((buffers[i].writable ? kWrite : 0) | (last ? 0 : kNext)),
                                 static_cast<uint16_t>(last ? 0xffff : taken[i + 1])};
      }
    }
    *at<uint16_t>(driver_address + 4 + 2 * (available_ % config_.size)) = taken[0];
    ++available_;
    return chains_.emplace(taken[0], taken).first->first;
  }

  std::optional<uint16_t> add_packed(const std::vector<Buffer>& buffers, bool indirect) {
    const size_t entries = indirect ? 1 : buffers.size();
    std::vector<uint16_t> taken(free_.end() - static_cast<std::ptrdiff_t>(entries), free_.end());
    free_.resize(free_.size() - entries);
    const uint16_t id = taken[0];
    for (size_t i = 0; i < entries; ++i) {
      const uint64_t place = (available_ + i) % config_.size;
      uint16_t flags = wrap(available_ + i) ? kAvailable : kUsed;
      Descriptor* entry = descriptor(place);
      if (indirect) {
        entry->address = write_table(id, buffers);
        entry->size_bytes = static_cast<uint32_t>(16 * buffers.size());
        flags |= kIndirect;
      } else {
        entry->address = buffers[i].address;
        entry->size_bytes = buffers[i].size_bytes;
        flags |= (buffers[i].writable ? kWrite : 0) | (i + 1 == entries ? 0 : kNext);
      }
      entry->third = id;
      if (i == 0)
        first_flags_.emplace_back(place, flags);
      else
        entry->fourth = flags;
    }
    available_ += entries;
    return chains_.emplace(id, taken).first->first;
  }

  GuestMemory& memory_;
  FakeDriverConfig config_;
  std::vector<uint16_t> free_;
  std::map<uint16_t, std::vector<uint16_t>> chains_;  // by id: the ids or descriptors that it holds
  std::vector<std::pair<uint64_t, uint16_t>> first_flags_;
  // Entries since the ring's beginning, never wrapping.
  uint64_t available_ = 0, published_ = 0, used_ = 0;
};

}  // namespace vmm::test
