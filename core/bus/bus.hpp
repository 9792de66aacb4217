// SPDX-License-Identifier: Apache-2.0
// Who answers at which port or guest physical address: ranges are claimed by name, vCPUs find them without a lock.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "util/result.hpp"

namespace vmm {

enum class BusSpace : uint32_t { pio = 0, mmio = 1 };

// Called by many vCPUs at once; the offset counts from the start of the claim, the size is 1, 2, 4 or 8 and the whole
// access lies in the claim. Plain function pointers, so that a plugin's are called with nothing in between.
struct BusHandler {
  void (*read)(void* context, uint64_t offset, void* data, uint32_t size_bytes) = nullptr;
  void (*write)(void* context, uint64_t offset, const void* data, uint32_t size_bytes) = nullptr;
  void* context = nullptr;
};

class Bus {
 public:
  class Claim;
  class View;

  explicit Bus(BusSpace space) : space_(space) {}
  Bus(const Bus&) = delete;
  Bus& operator=(const Bus&) = delete;

  // Refused when empty, outside the space, or overlapping another claim (named in the error). [any]
  Result<Claim> claim(uint64_t start, uint64_t size_bytes, std::string name, BusHandler handler);

 private:
  struct Entry;
  using Table = std::vector<std::shared_ptr<Entry>>;  // ascending, without overlaps, never changed once published

  void release(const std::shared_ptr<Entry>& entry);
  void publish(std::shared_ptr<const Table> table);
  void log_unclaimed(const char* what, uint64_t address, uint32_t size_bytes);

  const BusSpace space_;
  std::mutex mutex_;  // guards table_, which views copy when generation_ has moved
  std::shared_ptr<const Table> table_ = std::make_shared<const Table>();
  std::atomic<uint64_t> generation_{0};
  std::atomic<uint64_t> unclaimed_accesses_{0};
};

// A claimed range, given back when this goes. Outlived by its bus.
class Bus::Claim {
 public:
  Claim() = default;
  Claim(Claim&& other) noexcept = default;
  Claim& operator=(Claim&& other) noexcept {
    if (this != &other) {
      release();
      bus_ = other.bus_;
      entry_ = std::move(other.entry_);
    }
    return *this;
  }
  ~Claim() { release(); }

  explicit operator bool() const { return entry_ != nullptr; }
  // On return no handler of the claim runs any more, so it must not be called from inside one. [any]
  void release() {
    if (entry_) bus_->release(std::exchange(entry_, nullptr));
  }

 private:
  friend class Bus;
  Claim(Bus& bus, std::shared_ptr<Entry> entry) : bus_(&bus), entry_(std::move(entry)) {}

  Bus* bus_ = nullptr;
  std::shared_ptr<Entry> entry_;
};

// One thread's way onto the bus. It keeps the table it saw last; an access costs one load to learn that it still holds,
// and two atomic additions to the claim, by which release() knows when the last handler has returned.
class Bus::View {
 public:
  explicit View(Bus& bus) : bus_(bus) {}

  // What nobody claimed (as a whole, in a size of 1, 2, 4 or 8) reads as all ones, and writes to it do nothing.
  void read(uint64_t address, void* data, uint32_t size_bytes);
  void write(uint64_t address, const void* data, uint32_t size_bytes);

 private:
  Entry* enter(uint64_t address, uint32_t size_bytes);

  Bus& bus_;
  std::shared_ptr<const Table> table_;
  uint64_t generation_ = UINT64_MAX;
};

}  // namespace vmm
