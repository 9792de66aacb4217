// SPDX-License-Identifier: Apache-2.0
// Reads the date and time of the RTC (MC146818), in BCD and 24 hours.
#include "guest.hpp"

namespace {

uint8_t cmos(uint8_t index) {
  out8(0x70, index);
  return in8(0x71);
}

unsigned number(uint8_t index) {
  const uint8_t bcd = cmos(index);
  return bcd / 16 * 10u + bcd % 16;
}

}  // namespace

void program() {
  CHECK_EQUAL(cmos(0x0b) & 0x06, 0x02);  // 24 hours, BCD
  CHECK_EQUAL(cmos(0x0d), 0x80);         // the battery is good
  unsigned fields[7];
  do {
    while (cmos(0x0a) & 0x80) pause();  // an update is under way
    unsigned* field = fields;
    for (const uint8_t index : {0x32, 0x09, 0x08, 0x07, 0x04, 0x02, 0x00}) *field++ = number(index);
  } while (number(0x00) != fields[6]);
  print("time", "");
  for (const unsigned field : fields) print(" ", field);
  print("\n");
}
