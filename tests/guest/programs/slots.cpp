// SPDX-License-Identifier: Apache-2.0
// Prepared slots (plugins/transport-mmio/README.md): counts how often it is told of new devices. `?` asks which slots
// are taken, and for the first 20 bytes of each disk; these are then written to its second sector. `.` ends.
#include "disk.hpp"

namespace {

constexpr uint16_t kTakenPort = 0x680;

volatile unsigned events;
char text[kSectorBytes];

void take_event() { events = events + 1; }

void answer() {
  const uint32_t taken = in32(kTakenPort);
  print("slots ", Hex{taken}, " events ", events);
  for (unsigned slot = 0; taken >> slot; ++slot) {
    const Device device(slot);
    if (device.read(reg::kDeviceId) != kBlockDevice) continue;
    CHECK_EQUAL(device.status(), 0);
    Disk disk(device);
    CHECK(disk.start(0));
    CHECK(disk.read(0, text, sizeof text) == Outcome::ok);
    CHECK(disk.write(1, text, sizeof text) == Outcome::ok);
    text[20] = '\0';
    print(" disk ", slot, " ");
    print(static_cast<const char*>(text));
    device.reset();
  }
  print(".\n");
}

}  // namespace

void program() {
  // The event's line is that of the interrupt in the event device, behind the slots'.
  const uint64_t device = find("SLTE", 4);
  CHECK(device != 0);
  handle_with(0, take_event);
  route(event_line(device), 0);
  take_commands();
  print("ready\n");
  for (;;) {
    const char asked = next_command();
    if (asked == '?') answer();
    if (asked == '.') break;
  }
  print("done\n");
}
