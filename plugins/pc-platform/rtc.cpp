// SPDX-License-Identifier: Apache-2.0
// rtc: the clock and memory of a PC (Motorola MC146818).
#include "rtc.hpp"

#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>

#include "clone/sdk/options.hpp"

namespace pc_platform {
namespace {

using clone_sdk::Error;
using clone_sdk::Result;

constexpr uint16_t kPort = 0x70;
constexpr uint32_t kIrq = 8;

enum Register : uint8_t {
  seconds = 0,
  seconds_alarm,
  minutes,
  minutes_alarm,
  hours,
  hours_alarm,
  weekday,
  day,
  month,
  year,
  register_a,
  register_b,
  register_c,
  register_d,
  century = 0x32,
};
constexpr uint8_t kTimeRegisters[] = {seconds, minutes, hours, weekday, day, month, year, century};
constexpr uint8_t kAlarmOf[] = {seconds, minutes, hours};

// Register A
constexpr uint8_t kUpdateInProgress = 0x80;
constexpr uint8_t kDivider = 0x70;
constexpr uint8_t kDividerReset = 0x60;  // and 0x70: the clock stands
constexpr uint8_t kInitialA = 0x26;      // 32768 Hz, 1024 Hz periodic
// Register B
constexpr uint8_t kSet = 0x80;  // the guest sets the clock: it stands
constexpr uint8_t kInterruptEnables = 0x70;
constexpr uint8_t kBinary = 0x04;
constexpr uint8_t k24Hours = 0x02;
// Registers B (enable) and C (flag)
constexpr uint8_t kAlarm = 0x20;
constexpr uint8_t kUpdateEnded = 0x10;
constexpr uint8_t kAnyInterrupt = 0x80;
// Register D
constexpr uint8_t kValid = 0x80;

constexpr uint8_t kAfternoon = 0x80;
constexpr uint8_t kEvery = 0xc0;            // an alarm register from here on matches any value
constexpr long kUpdateWarningNs = 244'000;  // UIP is set so long before the registers change

struct SavedState {
  int64_t offset_seconds;
  uint8_t memory[128];
  uint8_t index;
  uint8_t reserved[7];
};
constexpr uint32_t kStateVersion = 1;

bool is_time(uint8_t index) { return std::ranges::find(kTimeRegisters, index) != std::end(kTimeRegisters); }

timespec host_time() {
  timespec time;
  ::clock_gettime(CLOCK_REALTIME, &time);
  return time;
}

constexpr const clone_option* options[] = {nullptr};

}  // namespace

constexpr clone_descriptor Rtc::descriptor = {sizeof(clone_descriptor),
                                              CLONE_CAN_SAVE | CLONE_CAN_MIGRATE,
                                              "rtc",
                                              "The PC's real-time clock, which tells the host's time in UTC.",
                                              options,
                                              ""};

Result<void> Rtc::configure(const clone_sdk::Options&) {
  const auto* loop = CLONE_TRY(host().service<clone_host_loop>(CLONE_HOST_LOOP));
  const auto* acpi = CLONE_TRY(host().service<clone_host_acpi>(CLONE_HOST_ACPI));
  memory_[register_a] = kInitialA;
  memory_[register_b] = k24Hours;
  memory_[register_d] = kValid;
  updated_ = now().tv_sec;

  line_ = CLONE_TRY(clone_sdk::IrqLine::allocate(host(), kIrq));
  timer_ = clone_sdk::Fd(::timerfd_create(CLOCK_REALTIME, TFD_NONBLOCK | TFD_CLOEXEC));
  if (!timer_) return clone_sdk::errno_error("timerfd");
  watch_ = CLONE_TRY(
      clone_sdk::Watch::start<&Rtc::tick>(loop, loop->main_loop(host().raw()), timer_.get(), CLONE_READABLE, this));
  claim_ = CLONE_TRY((host().claim<&Rtc::read, &Rtc::write>(CLONE_BUS_PIO, kPort, 2, this)));
  CLONE_TRY(host().add_acpi_node("PNP0B00", {clone_sdk::acpi_io(kPort, 2), clone_sdk::acpi_irq(line_.gsi())}));
  clone_sdk::ErrorBuffer error;
  return error.result(acpi->set_legacy(host().raw(), CLONE_ACPI_LEGACY_RTC, error));
}

Result<void> Rtc::start() {
  const std::lock_guard lock(mutex_);
  running_ = true;
  update_interrupt();
  arm();
  return {};
}

Result<void> Rtc::quiesce() {
  const std::lock_guard lock(mutex_);
  running_ = false;
  arm();
  return {};
}

Result<void> Rtc::reset_device() {
  const std::lock_guard lock(mutex_);
  memory_[register_b] &= static_cast<uint8_t>(~kInterruptEnables);
  memory_[register_c] = 0;
  index_ = 0;
  line_.forget();
  return {};
}

Result<void> Rtc::save(const clone_sdk::Writer& writer) {
  const std::lock_guard lock(mutex_);
  SavedState state{offset_seconds_, {}, index_, {}};
  std::ranges::copy(memory_, state.memory);
  // What is not state: registers that show the running clock.
  if (!halted())
    for (const uint8_t index : kTimeRegisters) state.memory[index] = 0;
  return writer.put("rtc", kStateVersion, state);
}

Result<void> Rtc::load(const clone_sdk::Reader& reader) {
  const auto state = CLONE_TRY(reader.get<SavedState>("rtc", kStateVersion));
  constexpr int64_t kFarthest = 1'000'000'000'000;  // more than the registers can say
  if (state.index >= kMemoryBytes || state.offset_seconds > kFarthest || state.offset_seconds < -kFarthest)
    return Error{"section rtc holds an impossible time or index", 0, CLONE_ERR_CORRUPT};
  const std::lock_guard lock(mutex_);
  std::ranges::copy(state.memory, memory_.begin());
  memory_[register_a] &= static_cast<uint8_t>(~kUpdateInProgress);
  memory_[register_d] = kValid;
  index_ = state.index;
  offset_seconds_ = state.offset_seconds;
  updated_ = now().tv_sec;
  line_.forget();
  return {};
}

void Rtc::read(uint64_t offset, void* data, uint32_t size_bytes) {
  const std::lock_guard lock(mutex_);
  for (uint32_t i = 0; i < size_bytes; ++i)
    static_cast<uint8_t*>(data)[i] = offset + i == 0 ? 0xff : read_register(index_);  // the index is write only
}

void Rtc::write(uint64_t offset, const void* data, uint32_t size_bytes) {
  const std::lock_guard lock(mutex_);
  for (uint32_t i = 0; i < size_bytes; ++i) {
    const uint8_t value = static_cast<const uint8_t*>(data)[i];
    if (offset + i == 0)
      index_ = value & 0x7f;  // bit 7 masks the NMI, which nothing raises
    else
      write_register(index_, value);
  }
}

uint8_t Rtc::read_register(uint8_t index) {
  if (is_time(index) && !halted()) show_time();
  if (index == register_a) {
    const bool soon = !halted() && now().tv_nsec >= 1'000'000'000 - kUpdateWarningNs;
    return memory_[register_a] | (soon ? kUpdateInProgress : 0);
  }
  if (index == register_c) {
    note_updates(now().tv_sec);
    const uint8_t flags = memory_[register_c];
    memory_[register_c] = 0;
    update_interrupt();
    return flags;
  }
  return memory_[index];
}

void Rtc::write_register(uint8_t index, uint8_t value) {
  if (index == register_c || index == register_d) return;
  if (!is_time(index) && index != register_a && index != register_b) {
    memory_[index] = value;
    return;
  }
  // The registers show the time as it stands, one of them changes, and if the clock goes on it does so from there.
  const bool was_halted = halted();
  if (!was_halted) show_time();
  if (index == register_a) value &= static_cast<uint8_t>(~kUpdateInProgress);
  // Setting the clock turns the update interrupt off (MC146818, register B).
  if (index == register_b && (value & kSet) != 0) value &= static_cast<uint8_t>(~kUpdateEnded);
  memory_[index] = value;
  if (!halted() && (was_halted || is_time(index))) take_time();
  if (index == register_b) {
    update_interrupt();
    arm();
  }
}

bool Rtc::halted() const {
  return (memory_[register_b] & kSet) != 0 || (memory_[register_a] & kDivider) >= kDividerReset;
}

timespec Rtc::now() const {
  timespec time = host_time();
  time.tv_sec += offset_seconds_;
  return time;
}

void Rtc::show_time() {
  const time_t current = now().tv_sec;
  tm parts{};
  ::gmtime_r(&current, &parts);
  const int full_year = parts.tm_year + 1900;
  memory_[seconds] = encode(parts.tm_sec);
  memory_[minutes] = encode(parts.tm_min);
  if ((memory_[register_b] & k24Hours) != 0)
    memory_[hours] = encode(parts.tm_hour);
  else
    memory_[hours] = encode((parts.tm_hour + 11) % 12 + 1) | (parts.tm_hour >= 12 ? kAfternoon : 0);
  memory_[weekday] = encode(parts.tm_wday + 1);
  memory_[day] = encode(parts.tm_mday);
  memory_[month] = encode(parts.tm_mon + 1);
  memory_[year] = encode(full_year % 100);
  memory_[century] = encode(full_year / 100);
}

// Any values are good: timegm() carries what is too large.
void Rtc::take_time() {
  tm parts{};
  parts.tm_sec = decode(memory_[seconds]);
  parts.tm_min = decode(memory_[minutes]);
  if ((memory_[register_b] & k24Hours) != 0) {
    parts.tm_hour = decode(memory_[hours]);
  } else {
    const bool afternoon = (memory_[hours] & kAfternoon) != 0;
    parts.tm_hour = decode(memory_[hours] & ~kAfternoon) % 12 + (afternoon ? 12 : 0);
  }
  parts.tm_mday = decode(memory_[day]);
  parts.tm_mon = decode(memory_[month]) - 1;
  parts.tm_year = decode(memory_[century]) * 100 + decode(memory_[year]) - 1900;
  offset_seconds_ = ::timegm(&parts) - host_time().tv_sec;
  updated_ = now().tv_sec;
}

// Sets in register C what happened since the last look.
void Rtc::note_updates(time_t current) {
  if (halted() || current == updated_) return;
  updated_ = current;
  show_time();
  memory_[register_c] |= kUpdateEnded;
  const bool alarm = std::ranges::all_of(kAlarmOf, [&](uint8_t index) {
    const uint8_t wanted = memory_[index + 1];  // each alarm register follows its time register
    return wanted >= kEvery || wanted == memory_[index];
  });
  if (alarm) memory_[register_c] |= kAlarm;
  update_interrupt();
}

void Rtc::update_interrupt() {
  const bool pending = (memory_[register_b] & memory_[register_c] & kInterruptEnables) != 0;
  memory_[register_c] = static_cast<uint8_t>((memory_[register_c] & ~kAnyInterrupt) | (pending ? kAnyInterrupt : 0));
  line_.set(pending);
}

void Rtc::arm() {
  const bool wanted = running_ && (memory_[register_b] & (kAlarm | kUpdateEnded)) != 0;
  if (wanted == armed_) return;
  armed_ = wanted;
  itimerspec when{};
  if (wanted) {
    when.it_value.tv_sec = host_time().tv_sec + 1;
    when.it_interval.tv_sec = 1;
  }
  ::timerfd_settime(timer_.get(), TFD_TIMER_ABSTIME, &when, nullptr);
}

void Rtc::tick() {
  uint64_t expirations;
  if (::read(timer_.get(), &expirations, sizeof expirations) != sizeof expirations) return;
  const std::lock_guard lock(mutex_);
  note_updates(now().tv_sec);
}

uint8_t Rtc::encode(int value) const {
  return static_cast<uint8_t>((memory_[register_b] & kBinary) != 0 ? value : value / 10 % 10 << 4 | value % 10);
}

int Rtc::decode(uint8_t value) const {
  return (memory_[register_b] & kBinary) != 0 ? value : (value >> 4) * 10 + (value & 15);
}

}  // namespace pc_platform
