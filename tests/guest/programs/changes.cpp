// SPDX-License-Identifier: Apache-2.0
// Memory that changes in known pages at each step, by the guest and by a device. `+` is a step, `?` looks at all of it,
// `.` ends.
#include "virtio.hpp"

namespace {

constexpr uint64_t kStart = 16 << 20, kPageBytes = 4096;
constexpr uint64_t kStride = 7;  // of the pages that a step changes

Rings rings;
struct alignas(kPageBytes) Drawn {
  uint64_t number;
  uint8_t rest[kPageBytes - sizeof(uint64_t)];
} drawn;  // nobody but the device writes to this page
uint64_t expected_number;

// What step `step` writes to a page: every fifth page becomes zeroes.
uint64_t content(uint64_t page, uint64_t step) {
  return (page + step) % 5 == 0 ? 0 : (page << 8 | step) * 0x9e3779b97f4a7c15;
}
// The last step up to `step` that changed it; 0 is the beginning.
uint64_t last_change(uint64_t page, uint64_t step) {
  const uint64_t ago = (step + kStride - page % kStride) % kStride;
  return ago < step ? step - ago : 0;
}

}  // namespace

void program() {
  const uint64_t pages = number_argument("mib") << 20 >> 12;
  const auto word = [](uint64_t page) -> volatile uint64_t& { return at<uint64_t>(kStart + page * kPageBytes); };
  for (uint64_t page = 0; page < pages; ++page) word(page) = content(page, 0);
  Device device = Device::find(kRandomDevice);
  CHECK(device.start(rings));
  device.sleep_while_waiting(0);
  take_commands();
  print("ready\n");
  for (uint64_t step = 0;;) {
    const char asked = next_command();
    if (asked == '.') break;
    if (asked == '+') {
      ++step;
      for (uint64_t page = step % kStride; page < pages; page += kStride) word(page) = content(page, step);
      const Buffer buffer{&drawn, sizeof drawn.number, true};
      CHECK_EQUAL(device.request(&buffer, 1), sizeof drawn.number);
      expected_number = at<uint64_t>(reinterpret_cast<uint64_t>(&drawn));
    }
    uint64_t damaged = at<uint64_t>(reinterpret_cast<uint64_t>(&drawn)) != expected_number;
    for (uint64_t page = 0; page < pages; ++page) damaged += word(page) != content(page, last_change(page, step));
    print("step ", step, " damaged ", damaged);
    print("\n");
  }
  print("done\n");
}
