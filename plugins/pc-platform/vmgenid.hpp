// SPDX-License-Identifier: Apache-2.0
// vmgenid: tells a guest that it goes on as another machine: a generation id (ACPI), and the identity page.
#pragma once

#include "clone/sdk/device.hpp"

namespace pc_platform {

// Microsoft's "Virtual Machine Generation ID". The id is of one run: it is made anew by a boot and by a load, and told
// by an interrupt after a load.
class Vmgenid final : public clone_sdk::Device {
 public:
  static const clone_descriptor descriptor;

  using Device::Device;

  clone_sdk::Result<void> configure(const clone_sdk::Options& options) override;
  // Before the guest's first instruction, when memory and interrupts are as they were saved.
  clone_sdk::Result<void> start() override;
  clone_sdk::Result<void> quiesce() override { return {}; }
  clone_sdk::Result<void> resume() override { return start(); }
  clone_sdk::Result<void> reset_device() override;
  clone_sdk::Result<void> save(const clone_sdk::Writer& writer) override;
  clone_sdk::Result<void> load(const clone_sdk::Reader& reader) override;

 private:
  clone_sdk::Result<void> write_page();

  uint64_t generation_ = 0;  // how many runs there were, from the boot on
  bool begun_ = false;       // the current one

  const clone_host_memory* memory_ = nullptr;
  const clone_host_machine* machine_ = nullptr;
  const clone_host_irq* irq_ = nullptr;
};

}  // namespace pc_platform
