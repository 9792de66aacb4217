// SPDX-License-Identifier: Apache-2.0
// What a snapshot has to carry on: a timer that interrupts, a serial line with interrupts, a virtio device with its rings,
// memory that holds what was written. `?` asks for all of it, `.` ends.
#include "virtio.hpp"

namespace {

constexpr uint64_t kTimerEntry = kLocalApic + 0x320, kTimerStart = kLocalApic + 0x380, kTimerDivide = kLocalApic + 0x3e0;
constexpr uint32_t kPeriodic = 1 << 17;
constexpr uint64_t kPatternStart = 16 << 20, kPageBytes = 4096;

volatile unsigned ticks;
Rings rings;
uint64_t random_number;

uint64_t pattern(uint64_t address) { return address * 0x9e3779b97f4a7c15 ^ 0x5bd1e995; }

void tick() { ticks = ticks + 1; }

void answer(Device& device, uint64_t pages) {
  const unsigned before = ticks;
  sleep_until([&] { return ticks >= before + 3; });
  uint64_t damaged = 0;
  for (uint64_t page = 0; page < pages; ++page)
    damaged += at<uint64_t>(kPatternStart + page * kPageBytes) != pattern(page);
  const Buffer buffer{&random_number, sizeof random_number, true};
  const uint32_t got = device.request(&buffer, 1);
  print("ticks ", ticks, " damaged ", damaged, " random ", got);
  print(" ", Hex{random_number}, "\n");
}

}  // namespace

void program() {
  const uint64_t pages = number_argument("mib") << 20 >> 12;
  for (uint64_t page = 0; page < pages; ++page) at<uint64_t>(kPatternStart + page * kPageBytes) = pattern(page);
  Device device = Device::find(kRandomDevice);
  CHECK(device.start(rings));
  device.sleep_while_waiting(0);
  take_commands();
  handle_with(2, tick);
  at<uint32_t>(kTimerDivide) = 0xb;  // by 1
  at<uint32_t>(kTimerEntry) = kPeriodic | (kFirstVector + 2);
  at<uint32_t>(kTimerStart) = 20'000'000;  // KVM's APIC timer counts nanoseconds
  print("ready\n");
  for (;;) {
    const char asked = next_command();
    if (asked == '?') answer(device, pages);
    if (asked == '.') break;
  }
  print("done\n");
}
