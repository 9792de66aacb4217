// SPDX-License-Identifier: Apache-2.0
// Windows and lines that the guest is told of before there are devices in them, and how it learns that there are.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "slot.hpp"

namespace transport_mmio {

// As many as a machine has free lines for.
constexpr uint32_t kMostPreparedSlots = 15;
// 32 bits: bit n is 1 while there is a device in slot n.
constexpr uint16_t kTakenPort = 0x680;

// Each slot is a device in the ACPI namespace whose _STA reads its bit, below a container. An interrupt has the guest
// look at the container's devices anew ("bus check", ACPI 6.5 §5.6.6): Linux does that for containers only.
class PreparedSlots {
 public:
  static Result<std::unique_ptr<PreparedSlots>> create(const clone_sdk::Host& host, uint32_t count);

  // The next one. The guest does not run.
  Result<Place> take();
  // The guest runs, or is about to: it looks for what was taken since it was described the slots.
  void tell() const;

 private:
  explicit PreparedSlots(const clone_sdk::Host& host) : host_(host) {}
  Result<void> set_up(uint32_t count);
  void read(uint64_t offset, void* data, uint32_t size_bytes);
  void write(uint64_t, const void*, uint32_t) {}

  const clone_sdk::Host host_;
  const clone_host_irq* irq_ = nullptr;
  std::vector<Place> places_;
  uint32_t taken_ = 0;  // the first so many
  uint32_t event_gsi_ = 0;
  clone_sdk::Claim claim_;
};

}  // namespace transport_mmio
