// SPDX-License-Identifier: Apache-2.0
// The power button: `button=ignore` never enables it, `enable` enables it and spins, `poll` and `interrupt` obey.
#include "guest.hpp"

namespace {

volatile bool pressed;

void serve_sci() {
  if (!(in16(kPmStatus) & kPowerButton)) return;
  out16(kPmStatus, kPowerButton);  // a one clears
  pressed = true;
}

}  // namespace

void program() {
  if (!argument_is("button", "ignore")) out16(kPmEnable, kPowerButton);
  if (argument_is("button", "interrupt")) {
    handle_with(0, serve_sci);
    route(9, 0, Trigger::level);
    print("ready\n");
    sleep_until([] { return pressed; });
    CHECK_EQUAL(in16(kPmStatus), 0);
  } else {
    print("ready\n");
    do pause();
    while (!argument_is("button", "poll") || !(in16(kPmStatus) & kPowerButton));
  }
  print("pressed\n");
}
