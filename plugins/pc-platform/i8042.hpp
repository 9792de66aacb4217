// SPDX-License-Identifier: Apache-2.0
// i8042: a keyboard controller with nothing connected, for the reset that many guests ask of it.
#pragma once

#include <mutex>

#include "clone/sdk/device.hpp"

namespace pc_platform {

// Answers the commands of a driver's probe at once, so that none waits for a time-out. The guest is not told of it in
// the FADT: Linux then does not probe at all.
class I8042 final : public clone_sdk::Device {
 public:
  static const clone_descriptor descriptor;

  using Device::Device;

  clone_sdk::Result<void> configure(const clone_sdk::Options& options) override;
  clone_sdk::Result<void> quiesce() override { return {}; }
  clone_sdk::Result<void> resume() override { return {}; }
  clone_sdk::Result<void> reset_device() override;
  clone_sdk::Result<void> save(const clone_sdk::Writer& writer) override;
  clone_sdk::Result<void> load(const clone_sdk::Reader& reader) override;

  void read_data(uint64_t offset, void* data, uint32_t size_bytes);
  void write_data(uint64_t offset, const void* data, uint32_t size_bytes);
  void read_status(uint64_t offset, void* data, uint32_t size_bytes);
  void write_command(uint64_t offset, const void* data, uint32_t size_bytes);

 private:
  // Every byte of it is state, as it is saved.
  struct State {
    uint8_t command_byte = 0x34;  // system flag set, both ports disabled
    uint8_t output = 0;           // what port 0x60 gives
    uint8_t output_full = 0;
    uint8_t command = 0;  // that waits for its parameter; 0: none
  };

  void answer(uint8_t value);

  std::mutex mutex_;
  State state_;
  const clone_host_machine* machine_ = nullptr;
  clone_sdk::Claim data_claim_;
  clone_sdk::Claim command_claim_;
};

}  // namespace pc_platform
