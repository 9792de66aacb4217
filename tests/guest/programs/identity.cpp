// SPDX-License-Identifier: Apache-2.0
// Reads the identity page (docs/fork.md) and counts the notifications of its change. `?` asks for both, `.` ends.
#include "guest.hpp"

namespace {

constexpr uint64_t kPage = 0x6000, kGenerationId = kPage + 16, kGeneration = kPage + 32, kSeed = kPage + 40,
                   kName = kPage + 72;

volatile unsigned notifications;
volatile uint64_t notified_of;  // the id, when the last one came

void take_notification() {
  notifications = notifications + 1;
  notified_of = at<uint64_t>(kGenerationId);
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
  const uint64_t device = find("ACPI0013", 8);
  CHECK(device != 0);
  CHECK(find("_EVT", 4, device) != 0);
  handle_with(0, take_notification);
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
