// SPDX-License-Identifier: Apache-2.0
// Says hello and ends as `end=…` says.
#include "guest.hpp"

void program() {
  print("hello\n");
  if (argument_is("end", "reset")) {
    out8(kPmReset, 0x06);
    halt_forever();
  }
  if (argument_is("end", "keyboard")) {
    out8(kKeyboardCommand, 0xfe);
    halt_forever();
  }
  if (argument_is("end", "triple-fault")) {
    const struct [[gnu::packed]] {
      uint16_t limit = 0;
      uint64_t base = 0;
    } none;
    asm volatile("lidt %0; ud2" ::"m"(none));
  }
  if (argument_is("end", "emulation")) asm volatile("fldl (%0)" ::"r"(0xd000'0000ull));
}
