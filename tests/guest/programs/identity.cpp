// SPDX-License-Identifier: Apache-2.0
// Reads the identity page (docs/fork.md) and counts the notifications of its change. `?` asks for both, `.` ends.
#include "guest.hpp"

namespace {

constexpr uint16_t kInterruptEnable = kSerialPort + 1, kIdentification = kSerialPort + 2,
                   kFifoControl = kSerialPort + 2, kModemControl = kSerialPort + 4, kLineStatus = kSerialPort + 5;
constexpr uint64_t kPage = 0x6000, kGenerationId = kPage + 16, kGeneration = kPage + 32, kSeed = kPage + 40,
                   kName = kPage + 72;

volatile unsigned notifications;
volatile uint64_t notified_of;  // the id, when the last one came
volatile char command;

void receive() {
  while ((in8(kIdentification) & 1) == 0)
    while (in8(kLineStatus) & 1) command = static_cast<char>(in8(kSerialPort));
}

void take_notification() {
  notifications = notifications + 1;
  notified_of = at<uint64_t>(kGenerationId);
}

bool same(uint64_t address, const char* text, unsigned size_bytes) {
  for (unsigned i = 0; i < size_bytes; ++i)
    if (at<char>(address + i) != text[i]) return false;
  return true;
}

uint64_t find(const char* text, unsigned size_bytes, uint64_t start = 0xe'0000) {
  for (uint64_t address = start; address < 0x10'0000; ++address)
    if (same(address, text, size_bytes)) return address;
  return 0;
}

// The line of the event device's extended interrupt (ACPI 6.5 §6.4.3.6): the first that is an edge after its name.
uint32_t find_line() {
  const uint64_t device = find("ACPI0013", 8);
  CHECK(device != 0);
  const uint64_t interrupt = find("\x89\x06\x00\x03\x01", 5, device);
  CHECK(interrupt != 0 && interrupt < device + 64);
  CHECK(find("_EVT", 4, device) != 0);
  return at<uint32_t>(interrupt + 5);
}

void answer() {
  print("id ", Hex{at<uint64_t>(kGenerationId)}, " ");
  print(Hex{at<uint64_t>(kGenerationId + 8)}, " generation ", at<uint64_t>(kGeneration), " seed ");
  print(Hex{at<uint64_t>(kSeed)}, " notifications ", notifications, " of ");
  print(Hex{notified_of}, " name '");
  for (uint64_t letter = kName; at<char>(letter); ++letter) print(at<char>(letter));
  print("'\n");
}

}  // namespace

void program() {
  CHECK(same(kPage, "CLONEID", 8));
  CHECK_EQUAL(at<uint32_t>(kPage + 8), 1);
  CHECK_EQUAL(at<uint32_t>(kPage + 12), 136);
  // ADDR is a package of two: a word and zero.
  CHECK(find("VM_Gen_Counter", 15) != 0);
  const uint64_t address = find("ADDR\x12", 5);
  if (CHECK(address != 0)) {
    CHECK(same(address + 6, "\x02\x0b", 2));
    CHECK_EQUAL(at<uint16_t>(address + 8), kGenerationId);
    CHECK_EQUAL(at<uint8_t>(address + 10), 0);
  }
  handle_with(0, take_notification);
  route(find_line(), 0);
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
