// SPDX-License-Identifier: Apache-2.0
// acpi-pm: the fixed hardware of ACPI 6.5 §4.8.
#include "acpi_pm.hpp"

#include <time.h>

#include <cstring>

#include "clone/sdk/options.hpp"

namespace pc_platform {
namespace {

using clone_sdk::Error;
using clone_sdk::ErrorBuffer;
using clone_sdk::Result;

// One block of ports. The reset register is not at the traditional 0xcf9, which lies within PCI's 0xcf8 to 0xcff.
constexpr uint16_t kPort = 0x600;
constexpr uint32_t kStatus = 0;
constexpr uint32_t kEnable = 2;
constexpr uint32_t kControl = 4;
constexpr uint32_t kTimer = 8;
constexpr uint32_t kReset = 12;
constexpr uint32_t kBlockBytes = 16;

constexpr uint32_t kSciGsi = 9;
constexpr uint8_t kResetValue = 0x06;
constexpr uint8_t kSleepTypeSoftOff = 5;

// §4.8.3.1: of status and enable. The timer's overflow (bit 0) does not interrupt: no driver of a 32-bit timer asks.
constexpr uint16_t kGlobalLock = 1 << 5;
constexpr uint16_t kPowerButton = 1 << 8;
constexpr uint16_t kSleepButton = 1 << 9;
constexpr uint16_t kRtcAlarm = 1 << 10;
constexpr uint16_t kEvents = kGlobalLock | kPowerButton | kSleepButton | kRtcAlarm;
// §4.8.3.2.1. SCI_EN is always set: there is no other mode to switch from.
constexpr uint16_t kSciEnabled = 1 << 0;
constexpr uint16_t kBusMasterReload = 1 << 1;
constexpr unsigned kSleepTypeShift = 10;
constexpr uint16_t kSleepType = 7 << kSleepTypeShift;
constexpr uint16_t kSleepEnable = 1 << 13;

constexpr uint64_t kTimerHz = 3'579'545;

struct SavedState {
  uint16_t status;
  uint16_t enabled;
  uint16_t control;
  uint16_t reserved;
  uint32_t timer;
};
constexpr uint32_t kStateVersion = 1;

uint32_t host_ticks() {
  timespec now;
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  const auto seconds = static_cast<uint64_t>(now.tv_sec);
  return static_cast<uint32_t>(seconds * kTimerHz + static_cast<uint64_t>(now.tv_nsec) * kTimerHz / 1'000'000'000);
}

constexpr const clone_option* options[] = {nullptr};

}  // namespace

constexpr clone_descriptor AcpiPm::descriptor = {sizeof(clone_descriptor),
                                                 CLONE_CAN_SAVE | CLONE_CAN_MIGRATE,
                                                 "acpi-pm",
                                                 "ACPI power management: power-off, reset, power button, PM timer.",
                                                 options,
                                                 "button evdev"};

Result<void> AcpiPm::configure(const clone_sdk::Options&) {
  machine_ = CLONE_TRY(host().service<clone_host_machine>(CLONE_HOST_MACHINE));
  const auto* acpi = CLONE_TRY(host().service<clone_host_acpi>(CLONE_HOST_ACPI));
  sci_ = CLONE_TRY(clone_sdk::IrqLine::allocate(host(), kSciGsi));
  claim_ = CLONE_TRY((host().claim<&AcpiPm::read, &AcpiPm::write>(CLONE_BUS_PIO, kPort, kBlockBytes, this)));

  clone_acpi_power power{};
  power.size = sizeof power;
  power.sci_gsi = sci_.gsi();
  power.event_port = kPort + kStatus;
  power.control_port = kPort + kControl;
  power.timer_port = kPort + kTimer;
  power.reset_port = kPort + kReset;
  power.reset_value = kResetValue;
  power.sleep_type_s5 = kSleepTypeSoftOff;
  ErrorBuffer error;
  CLONE_TRY(error.result(acpi->set_power(host().raw(), &power, error)));
  return error.result(machine_->on_power_button(
      host().raw(), [](void* self) noexcept { return static_cast<AcpiPm*>(self)->press_power_button(); }, this, error));
}

Result<void> AcpiPm::start() {
  const std::lock_guard lock(mutex_);
  update_interrupt();
  return {};
}

Result<void> AcpiPm::quiesce() {
  const std::lock_guard lock(mutex_);
  saved_timer_ = timer();
  return {};
}

Result<void> AcpiPm::reset_device() {
  const std::lock_guard lock(mutex_);
  status_ = enabled_ = control_ = 0;
  sci_.forget();
  return {};
}

Result<void> AcpiPm::save(const clone_sdk::Writer& writer) {
  const SavedState state = {status_, enabled_, control_, 0, saved_timer_};
  return writer.put("pm", kStateVersion, state);
}

Result<void> AcpiPm::load(const clone_sdk::Reader& reader) {
  const auto state = CLONE_TRY(reader.get<SavedState>("pm", kStateVersion));
  if ((state.status & ~kEvents) != 0 || (state.enabled & ~kEvents) != 0 ||
      (state.control & ~(kBusMasterReload | kSleepType)) != 0)
    return Error{"section pm holds impossible registers", 0, CLONE_ERR_CORRUPT};
  const std::lock_guard lock(mutex_);
  status_ = state.status;
  enabled_ = state.enabled;
  control_ = state.control;
  saved_timer_ = state.timer;
  timer_offset_ = state.timer - host_ticks();
  sci_.forget();
  return {};
}

void AcpiPm::read(uint64_t offset, void* data, uint32_t size_bytes) {
  uint8_t block[kBlockBytes] = {};
  {
    const std::lock_guard lock(mutex_);
    const uint16_t control = control_ | kSciEnabled;
    const uint32_t ticks = timer();
    std::memcpy(block + kStatus, &status_, sizeof status_);
    std::memcpy(block + kEnable, &enabled_, sizeof enabled_);
    std::memcpy(block + kControl, &control, sizeof control);
    std::memcpy(block + kTimer, &ticks, sizeof ticks);
  }
  std::memcpy(data, block + offset, size_bytes);
}

void AcpiPm::write(uint64_t offset, const void* data, uint32_t size_bytes) {
  const std::lock_guard lock(mutex_);
  for (uint32_t i = 0; i < size_bytes; ++i) write_byte(offset + i, static_cast<const uint8_t*>(data)[i]);
  update_interrupt();
}

void AcpiPm::write_byte(uint64_t offset, uint8_t value) {
  const bool high = (offset & 1) != 0;
  const uint16_t bits = static_cast<uint16_t>(high ? value << 8 : value);
  const uint16_t other_half = high ? 0x00ff : 0xff00;
  switch (offset & ~1ull) {
    case kStatus:  // a one clears
      status_ &= static_cast<uint16_t>(~bits);
      break;
    case kEnable:
      enabled_ = static_cast<uint16_t>((enabled_ & other_half) | (bits & kEvents));
      break;
    case kControl:
      control_ = static_cast<uint16_t>((control_ & other_half) | (bits & (kBusMasterReload | kSleepType)));
      if ((bits & kSleepEnable) != 0 && (bits & kSleepType) >> kSleepTypeShift == kSleepTypeSoftOff)
        machine_->request(host().raw(), CLONE_MACHINE_POWER_OFF);
      break;
    case kReset:
      if (!high && value == kResetValue) machine_->request(host().raw(), CLONE_MACHINE_RESET);
      break;
    default:  // the timer is read only
      break;
  }
}

clone_status AcpiPm::press_power_button() {
  const std::lock_guard lock(mutex_);
  status_ |= kPowerButton;  // stays for a guest that has not enabled it yet
  update_interrupt();
  return (enabled_ & kPowerButton) != 0 ? CLONE_OK : CLONE_EMPTY;
}

void AcpiPm::update_interrupt() { sci_.set((status_ & enabled_) != 0); }

uint32_t AcpiPm::timer() const { return host_ticks() + timer_offset_; }

}  // namespace pc_platform
