// SPDX-License-Identifier: Apache-2.0
// rtc: the clock and memory of a PC (Motorola MC146818) at ports 0x70 and 0x71.
#pragma once

#include <array>
#include <ctime>
#include <mutex>

#include "clone/sdk/device.hpp"
#include "clone/sdk/fd.hpp"

namespace pc_platform {

// Its time is the host's, in UTC, plus what the guest set it apart by.
class Rtc final : public clone_sdk::Device {
 public:
  static const clone_descriptor descriptor;

  using Device::Device;

  clone_sdk::Result<void> configure(const clone_sdk::Options& options) override;
  clone_sdk::Result<void> start() override;
  clone_sdk::Result<void> quiesce() override;
  clone_sdk::Result<void> resume() override { return start(); }
  // The battery keeps time and memory over a reset.
  clone_sdk::Result<void> reset_device() override;
  clone_sdk::Result<void> save(const clone_sdk::Writer& writer) override;
  clone_sdk::Result<void> load(const clone_sdk::Reader& reader) override;

  void read(uint64_t offset, void* data, uint32_t size_bytes);
  void write(uint64_t offset, const void* data, uint32_t size_bytes);

 private:
  static constexpr size_t kMemoryBytes = 128;

  uint8_t read_register(uint8_t index);
  void write_register(uint8_t index, uint8_t value);
  bool halted() const;
  timespec now() const;
  void show_time();
  void take_time();
  void note_updates(time_t seconds);
  void update_interrupt();
  void arm();
  void tick();
  uint8_t encode(int value) const;
  int decode(uint8_t value) const;

  std::mutex mutex_;
  std::array<uint8_t, kMemoryBytes> memory_{};
  uint8_t index_ = 0;
  int64_t offset_seconds_ = 0;
  time_t updated_ = 0;  // the second whose update has been noted in register C

  clone_sdk::IrqLine line_;
  clone_sdk::Fd timer_;  // fires at the next second while update or alarm interrupts are enabled
  bool armed_ = false;
  bool running_ = false;
  clone_sdk::Watch watch_;
  clone_sdk::Claim claim_;
};

}  // namespace pc_platform
