// SPDX-License-Identifier: Apache-2.0
// Prepared slots (plugins/transport-mmio/README.md): counts how often it is told of new devices. `?` asks which slots
// are taken, and for the first 20 bytes of each disk; these are then written to its second sector. `.` ends.
#include "disk.hpp"

namespace {

constexpr uint16_t kInterruptEnable = kSerialPort + 1, kIdentification = kSerialPort + 2,
                   kFifoControl = kSerialPort + 2, kModemControl = kSerialPort + 4, kLineStatus = kSerialPort + 5;
constexpr uint16_t kTakenPort = 0x680;

volatile unsigned events;
volatile char command;
char text[kSectorBytes];

void receive() {
  while ((in8(kIdentification) & 1) == 0)
    while (in8(kLineStatus) & 1) command = static_cast<char>(in8(kSerialPort));
}
void take_event() { events = events + 1; }

bool same(uint64_t address, const char* wanted, unsigned size_bytes) {
  for (unsigned i = 0; i < size_bytes; ++i)
    if (at<char>(address + i) != wanted[i]) return false;
  return true;
}
uint64_t find(const char* wanted, unsigned size_bytes, uint64_t start = 0xe'0000) {
  for (uint64_t address = start; address < 0x10'0000; ++address)
    if (same(address, wanted, size_bytes)) return address;
  return 0;
}

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
  const uint64_t interrupt = find("\x89\x06\x00\x03\x01", 5, device);
  CHECK(interrupt != 0 && interrupt < device + 64);
  handle_with(0, take_event);
  route(at<uint32_t>(interrupt + 5), 0);
  handle_with(1, receive);
  route(4, 1);
  out8(kFifoControl, 0x07);
  out8(kModemControl, 0x0b);  // DTR, RTS, OUT2
  out8(kInterruptEnable, 1);
  print("ready\n");
  for (;;) {
    sleep_until([] { return command != 0; });
    const char asked = command;
    command = 0;
    if (asked == '?') answer();
    if (asked == '.') break;
  }
  print("done\n");
}
