// SPDX-License-Identifier: Apache-2.0
// Hands out interrupt lines, PCI slots and windows of guest physical addresses.
#include "bus/resources.hpp"

#include <bit>
#include <cstdio>
#include <numeric>

namespace vmm {
namespace {

constexpr uint32_t kPciSlots = 32;

std::vector<uint32_t> slots_after_host_bridge() {
  std::vector<uint32_t> slots(kPciSlots - 1);
  std::iota(slots.begin(), slots.end(), 1);
  return slots;
}

}  // namespace

PciSlotPool::PciSlotPool() : NumberPool("PCI slot", kPciSlots, slots_after_host_bridge()) {}

Result<NumberLease> NumberPool::allocate(const std::string& name, std::optional<uint32_t> wanted) {
  if (!wanted) {
    for (const uint32_t number : preference_) {
      if (taken_.try_emplace(number, name).second) return NumberLease(*this, number);
    }
    return Error{label_ + ": none left for " + name + ", all " + std::to_string(preference_.size()) + " are taken",
                 ENOSPC};
  }
  const std::string text = label_ + " " + std::to_string(*wanted);
  if (*wanted >= count_) {
    return Error{text + ": wanted by " + name + ": 0 to " + std::to_string(count_ - 1) + " are allowed", EINVAL};
  }
  const auto [holder, is_new] = taken_.try_emplace(*wanted, name);
  if (!is_new) return Error{text + ": taken by " + holder->second + ", wanted by " + name, EBUSY};
  return NumberLease(*this, *wanted);
}

Result<WindowLease> WindowPool::allocate(const std::string& name, uint64_t size_bytes, uint64_t alignment) {
  if (size_bytes == 0 || !std::has_single_bit(alignment)) {
    return Error{"MMIO window for " + name + ": " + std::to_string(size_bytes) + " bytes aligned to " +
                     std::to_string(alignment) + ": at least 1 byte and a power of two are allowed",
                 EINVAL};
  }
  // The pool's end is far below 2^64, and a candidate never exceeds an alignment beyond it.
  const auto align = [&](uint64_t address) { return (address + alignment - 1) & ~(alignment - 1); };
  uint64_t candidate = align(start_.value);
  for (const auto& [start, taken_bytes] : taken_) {
    if (candidate <= start.value && size_bytes <= start.value - candidate) break;
    candidate = align(start.value + taken_bytes);
  }
  if (candidate < start_.value || candidate > end_.value || size_bytes > end_.value - candidate) {
    char text[160];
    std::snprintf(text, sizeof text, ": %llu bytes aligned to %#llx: no room left in %#llx-%#llx",
                  static_cast<unsigned long long>(size_bytes), static_cast<unsigned long long>(alignment),
                  static_cast<unsigned long long>(start_.value), static_cast<unsigned long long>(end_.value - 1));
    return Error{"MMIO window for " + name + text, ENOSPC};
  }
  taken_.emplace(GuestAddress{candidate}, size_bytes);
  return WindowLease(*this, GuestAddress{candidate});
}

}  // namespace vmm
