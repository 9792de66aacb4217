// SPDX-License-Identifier: Apache-2.0
// A disk whose queue is never empty: as soon as a write is done, the next one is there. `?` tells how many are done,
// `.` reads all of them.
#include "disk.hpp"

namespace {

constexpr uint16_t kSlots = 5, kDescriptors = 3;  // of each slot

struct Slot {
  struct {
    uint32_t operation, priority;
    uint64_t sector;
  } header;
  uint64_t data[kSectorBytes / sizeof(uint64_t)];
  volatile Outcome outcome;
};

Rings rings;
Slot slots[kSlots];
uint64_t begun, done;

uint64_t content(uint64_t sector, uint64_t word) { return (sector << 16 | word) * 0x9e3779b97f4a7c15; }

void request(Device& device, uint16_t number, Operation operation, uint64_t sector) {
  Slot& slot = slots[number];
  slot.header = {static_cast<uint32_t>(operation), 0, sector};
  slot.outcome = Outcome::none;
  const Buffer buffers[kDescriptors] = {{&slot.header, sizeof slot.header, false},
                                        {slot.data, sizeof slot.data, operation == Operation::read},
                                        {&slot.outcome, 1, true}};
  device.offer(number * kDescriptors, buffers, kDescriptors);
  device.notify();
}

// Of the slot that came back.
uint16_t take(Device& device) {
  static uint16_t taken;
  sleep_until([&] { return device.returned() || command != 0; });
  if (!device.returned()) return kSlots;
  const auto number = static_cast<uint16_t>(rings.used.ring[taken++ % kQueueEntries].id / kDescriptors);
  device.take();
  if (!CHECK(number < kSlots)) power_off();
  CHECK(slots[number].outcome == Outcome::ok);
  return number;
}

void write_next(Device& device, uint16_t number) {
  for (uint64_t word = 0; word < kSectorBytes / sizeof(uint64_t); ++word)
    slots[number].data[word] = content(begun, word);
  request(device, number, Operation::write, begun++);
}

}  // namespace

void program() {
  Device device = Device::find(kBlockDevice);
  CHECK(device.start(rings));
  const uint64_t sectors = Disk(device).capacity_sectors();
  device.sleep_while_waiting(0);
  take_commands();
  for (uint16_t number = 0; number < kSlots; ++number) write_next(device, number);
  print("ready\n");
  for (bool ended = false; !ended || done < begun;) {
    if (command == '.') ended = true;
    if (command == '?') print("writes ", done, "\n");
    command = 0;
    const uint16_t number = take(device);
    if (number == kSlots) continue;
    ++done;
    if (begun == sectors) ended = true;
    if (!ended) write_next(device, number);
  }
  uint64_t damaged = 0;
  for (uint64_t sector = 0; sector < done; ++sector) {
    memset(slots[0].data, 0, sizeof slots[0].data);
    request(device, 0, Operation::read, sector);
    while (take(device) == kSlots) command = 0;
    for (uint64_t word = 0; word < kSectorBytes / sizeof(uint64_t); ++word)
      damaged += at<uint64_t>(reinterpret_cast<uint64_t>(&slots[0].data[word])) != content(sector, word);
  }
  print("writes ", done, " damaged ", damaged, "\n");
}
