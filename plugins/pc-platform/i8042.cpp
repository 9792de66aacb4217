// SPDX-License-Identifier: Apache-2.0
// i8042: a keyboard controller with nothing connected.
#include "i8042.hpp"

#include "clone/sdk/options.hpp"

namespace pc_platform {
namespace {

using clone_sdk::Error;
using clone_sdk::Result;

constexpr uint16_t kDataPort = 0x60;
constexpr uint16_t kCommandPort = 0x64;

// Commands
constexpr uint8_t kReadCommandByte = 0x20;
constexpr uint8_t kWriteCommandByte = 0x60;
constexpr uint8_t kTestMousePort = 0xa9;
constexpr uint8_t kSelfTest = 0xaa;
constexpr uint8_t kTestKeyboardPort = 0xab;
constexpr uint8_t kReadOutputPort = 0xd0;
constexpr uint8_t kWriteOutputPort = 0xd1;
constexpr uint8_t kEchoKeyboard = 0xd2;
constexpr uint8_t kEchoMouse = 0xd3;
constexpr uint8_t kWriteMouse = 0xd4;
constexpr uint8_t kPulseOutputs = 0xf0;  // to 0xff: the lines whose bits are zero
// Answers
constexpr uint8_t kSelfTestPassed = 0x55;
constexpr uint8_t kClockStuckLow = 0x01;  // a port with nothing behind it
// Status
constexpr uint8_t kOutputFull = 0x01;
constexpr uint8_t kSystemFlag = 0x04;
constexpr uint8_t kNotLocked = 0x10;
// Output port
constexpr uint8_t kNotReset = 0x01;
constexpr uint8_t kA20 = 0x02;

constexpr uint32_t kStateVersion = 1;

constexpr const clone_option* options[] = {nullptr};

}  // namespace

constexpr clone_descriptor I8042::descriptor = {
    sizeof(clone_descriptor),
    CLONE_CAN_SAVE | CLONE_CAN_MIGRATE,
    "i8042",
    "A keyboard controller without keyboard, through which a guest can reset.",
    options,
    ""};

Result<void> I8042::configure(const clone_sdk::Options&) {
  machine_ = CLONE_TRY(host().service<clone_host_machine>(CLONE_HOST_MACHINE));
  data_claim_ = CLONE_TRY((host().claim<&I8042::read_data, &I8042::write_data>(CLONE_BUS_PIO, kDataPort, 1, this)));
  command_claim_ =
      CLONE_TRY((host().claim<&I8042::read_status, &I8042::write_command>(CLONE_BUS_PIO, kCommandPort, 1, this)));
  return {};
}

Result<void> I8042::reset_device() {
  state_ = {};
  return {};
}

Result<void> I8042::save(const clone_sdk::Writer& writer) { return writer.put("i8042", kStateVersion, state_); }

Result<void> I8042::load(const clone_sdk::Reader& reader) {
  const auto state = CLONE_TRY(reader.get<State>("i8042", kStateVersion));
  if (state.output_full > 1) return Error{"section i8042 holds impossible registers", 0, CLONE_ERR_CORRUPT};
  state_ = state;
  return {};
}

void I8042::read_data(uint64_t, void* data, uint32_t) {
  const std::lock_guard lock(mutex_);
  *static_cast<uint8_t*>(data) = state_.output;
  state_.output_full = 0;
}

void I8042::read_status(uint64_t, void* data, uint32_t) {
  const std::lock_guard lock(mutex_);
  *static_cast<uint8_t*>(data) = kSystemFlag | kNotLocked | (state_.output_full != 0 ? kOutputFull : 0);
}

void I8042::write_command(uint64_t, const void* data, uint32_t) {
  const std::lock_guard lock(mutex_);
  const uint8_t command = *static_cast<const uint8_t*>(data);
  state_.command = 0;
  switch (command) {
    case kReadCommandByte:
      return answer(state_.command_byte);
    case kSelfTest:
      return answer(kSelfTestPassed);
    case kTestKeyboardPort:
    case kTestMousePort:
      return answer(kClockStuckLow);
    case kReadOutputPort:
      return answer(kNotReset | kA20);
    case kWriteCommandByte:
    case kWriteOutputPort:
    case kEchoKeyboard:
    case kEchoMouse:
    case kWriteMouse:
      state_.command = command;
      return;
    default:
      if (command >= kPulseOutputs && (command & kNotReset) == 0) machine_->request(host().raw(), CLONE_MACHINE_RESET);
  }
}

void I8042::write_data(uint64_t, const void* data, uint32_t) {
  const std::lock_guard lock(mutex_);
  const uint8_t value = *static_cast<const uint8_t*>(data);
  switch (std::exchange(state_.command, 0)) {
    case kWriteCommandByte:
      state_.command_byte = value;
      return;
    case kWriteOutputPort:
      if ((value & kNotReset) == 0) machine_->request(host().raw(), CLONE_MACHINE_RESET);
      return;
    case kEchoKeyboard:
    case kEchoMouse:  // without the status bit that says "from the mouse": there is none
      return answer(value);
    default:  // for a keyboard or mouse that is not there
      return;
  }
}

void I8042::answer(uint8_t value) {
  state_.output = value;
  state_.output_full = 1;
}

}  // namespace pc_platform
