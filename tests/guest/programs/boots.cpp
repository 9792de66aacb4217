// SPDX-License-Identifier: Apache-2.0
// Counts its boots in the first byte of its disk, and restarts until there were as many as `boots=N`.
#include "disk.hpp"

void program() {
  uint8_t sector[kSectorBytes];
  Disk disk(Device::find(kBlockDevice));
  CHECK(disk.start(kFlushFeature));
  CHECK(disk.read(0, sector, sizeof sector) == Outcome::ok);
  const unsigned boot = ++sector[0];
  CHECK(disk.write(0, sector, sizeof sector) == Outcome::ok);
  CHECK(disk.flush() == Outcome::ok);
  print("boot ", boot, "\n");
  if (boot >= number_argument("boots")) return;
  if (boot % 2)
    out8(kPmReset, 0x06);
  else
    out8(kKeyboardCommand, 0xfe);
  halt_forever();
}
