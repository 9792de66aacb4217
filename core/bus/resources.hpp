// SPDX-License-Identifier: Apache-2.0
// What devices compete for beside bus ranges: interrupt lines, PCI slots, windows of guest physical addresses.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "memory/guest_memory.hpp"
#include "util/result.hpp"

namespace vmm {

// A thing taken from a pool, given back when this goes. Outlived by its pool. Everything here is for one thread.
template <typename Pool>
class Lease {
 public:
  using Value = typename Pool::Value;

  Lease() = default;
  Lease(Pool& pool, Value value) : pool_(&pool), value_(value) {}
  Lease(Lease&& other) noexcept : pool_(std::exchange(other.pool_, nullptr)), value_(other.value_) {}
  Lease& operator=(Lease&& other) noexcept {
    if (this != &other) {
      release();
      pool_ = std::exchange(other.pool_, nullptr);
      value_ = other.value_;
    }
    return *this;
  }
  ~Lease() { release(); }

  explicit operator bool() const { return pool_ != nullptr; }
  Value value() const { return value_; }
  void release() {
    if (pool_) std::exchange(pool_, nullptr)->release(value_);
  }

 private:
  Pool* pool_ = nullptr;
  Value value_{};
};

// Numbers 0 to count - 1, each held by one. Those given to a caller who does not mind which are listed by preference.
class NumberPool {
 public:
  using Value = uint32_t;

  NumberPool(std::string label, uint32_t count, std::vector<uint32_t> preference)
      : label_(std::move(label)), count_(count), preference_(std::move(preference)) {}
  NumberPool(const NumberPool&) = delete;
  NumberPool& operator=(const NumberPool&) = delete;

  Result<Lease<NumberPool>> allocate(const std::string& name, std::optional<uint32_t> wanted = {});
  void release(uint32_t number) { taken_.erase(number); }

 private:
  const std::string label_;
  const uint32_t count_;
  const std::vector<uint32_t> preference_;
  std::map<uint32_t, std::string> taken_;
};

// The lines of the IOAPIC. Given away unasked: what is free on a PC, then what only its disks, parallel port, floppy
// and mouse would use. Never the timer, keyboard, cascade, serial ports, RTC, ACPI and coprocessor.
class GsiPool : public NumberPool {
 public:
  GsiPool() : NumberPool("GSI", 24, {5, 10, 11, 16, 17, 18, 19, 20, 21, 22, 23, 14, 15, 7, 6, 12}) {}
};

// The devices of PCI bus 0. Slot 0 is for a host bridge, which asks for it.
class PciSlotPool : public NumberPool {
 public:
  PciSlotPool();
};

using NumberLease = Lease<NumberPool>;

// Addresses from start to end, handed out first fit.
class WindowPool {
 public:
  using Value = GuestAddress;

  WindowPool(GuestAddress start, GuestAddress end) : start_(start), end_(end) {}
  WindowPool(const WindowPool&) = delete;
  WindowPool& operator=(const WindowPool&) = delete;

  // The alignment is a power of two.
  Result<Lease<WindowPool>> allocate(const std::string& name, uint64_t size_bytes, uint64_t alignment = kPageSize);
  void release(GuestAddress start) { taken_.erase(start); }

 private:
  const GuestAddress start_;
  const GuestAddress end_;
  std::map<GuestAddress, uint64_t> taken_;  // start to size in bytes
};

using WindowLease = Lease<WindowPool>;

}  // namespace vmm
