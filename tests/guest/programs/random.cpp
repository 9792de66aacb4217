// SPDX-License-Identifier: Apache-2.0
// virtio-rng (virtio 1.2 §5.4): two requests, waited for asleep, give different bytes.
#include "virtio.hpp"

namespace {

Rings rings;
uint8_t bytes[2][64];

}  // namespace

void program() {
  Device device = Device::find(kRandomDevice);
  CHECK_EQUAL(device.read(reg::kQueueSizeMax), 64);
  CHECK(device.start(rings));
  device.sleep_while_waiting(0);
  for (auto& half : bytes) {
    // In two parts, and not a byte more.
    const Buffer buffers[] = {{half, 16, true}, {half + 16, 40, true}};
    CHECK_EQUAL(device.request(buffers, 2), 56);
  }
  // The last interrupt may come after what it tells of.
  CHECK(poll_until([&] { return device.read(reg::kInterruptStatus) == 0; }));
  unsigned same = 0, zeros = 0;
  for (unsigned i = 0; i < 56; ++i) {
    same += bytes[0][i] == bytes[1][i];
    zeros += bytes[0][i] == 0;
  }
  CHECK(same < 8);  // one time in 10^12
  CHECK(zeros < 8);
  for (unsigned i = 56; i < 64; ++i) CHECK_EQUAL(bytes[0][i] | bytes[1][i], 0);
  print("random ");
  for (unsigned i = 0; i < 4; ++i) print(Hex{bytes[0][i]}, " ");
  print("\n");
}
