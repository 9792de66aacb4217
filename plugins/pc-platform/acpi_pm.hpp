// SPDX-License-Identifier: Apache-2.0
// acpi-pm: the fixed hardware of ACPI 6.5 §4.8: power-off, power button, PM timer, reset register.
#pragma once

#include <mutex>

#include "clone/sdk/device.hpp"

namespace pc_platform {

class AcpiPm final : public clone_sdk::Device {
 public:
  static const clone_descriptor descriptor;

  using Device::Device;

  clone_sdk::Result<void> configure(const clone_sdk::Options& options) override;
  clone_sdk::Result<void> start() override;
  clone_sdk::Result<void> quiesce() override;
  clone_sdk::Result<void> resume() override { return start(); }
  clone_sdk::Result<void> reset_device() override;
  clone_sdk::Result<void> save(const clone_sdk::Writer& writer) override;
  clone_sdk::Result<void> load(const clone_sdk::Reader& reader) override;

  void read(uint64_t offset, void* data, uint32_t size_bytes);
  void write(uint64_t offset, const void* data, uint32_t size_bytes);

 private:
  clone_status press_power_button();
  void write_byte(uint64_t offset, uint8_t value);
  void update_interrupt();
  uint32_t timer() const;

  std::mutex mutex_;
  uint16_t status_ = 0;
  uint16_t enabled_ = 0;
  uint16_t control_ = 0;
  uint32_t timer_offset_ = 0;  // added to the ticks of the host's clock
  uint32_t saved_timer_ = 0;   // when it was quiesced or loaded: one moment, however often it is saved

  const clone_host_machine* machine_ = nullptr;
  clone_sdk::IrqLine sci_;
  clone_sdk::Claim claim_;
};

}  // namespace pc_platform
