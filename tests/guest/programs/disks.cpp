// SPDX-License-Identifier: Apache-2.0
// Two disks of 1 MiB, the second read-only. What is left on the first is compared by the host.
#include "disk.hpp"

namespace {

uint8_t data[8 * kSectorBytes];
uint8_t again[8 * kSectorBytes];

uint8_t pattern(unsigned position) { return static_cast<uint8_t>(position * 7 + position / kSectorBytes); }

bool all(const uint8_t* start, unsigned size_bytes, uint8_t value) {
  for (unsigned i = 0; i < size_bytes; ++i)
    if (start[i] != value) return false;
  return true;
}

void print_id(const char* name, Disk& disk) {
  char id[21] = {};
  const Buffer buffer{id, 20, true};
  CHECK(disk.request(Operation::identify, 0, &buffer, 1) == Outcome::ok);
  print(name, " ", disk.capacity_sectors());
  print(" sectors, id ", static_cast<const char*>(id));
  print("\n");
}

void use(Disk& disk) {
  CHECK((disk.device().features() & kReadOnlyFeature) == 0);
  CHECK(disk.start(kFlushFeature | kDiscardFeature | kWriteZeroesFeature));
  disk.device().sleep_while_waiting(0);
  print_id("first", disk);

  for (unsigned i = 0; i < sizeof data; ++i) data[i] = pattern(i);
  // Eight sectors from 8 on, in pieces that know no sectors.
  const Buffer pieces[] = {{data, 100, false}, {data + 100, 1, false}, {data + 101, sizeof data - 101, false}};
  CHECK(disk.request(Operation::write, 8, pieces, 3) == Outcome::ok);
  CHECK(disk.flush() == Outcome::ok);
  const Buffer read_pieces[] = {{again, 3, true}, {again + 3, sizeof again - 3, true}};
  CHECK(disk.request(Operation::read, 8, read_pieces, 2) == Outcome::ok);
  for (unsigned i = 0; i < sizeof data; ++i)
    if (!CHECK(again[i] == pattern(i))) break;

  // The host filled the disk with 0xaa: discarded and zeroed sectors read as zeros, their neighbours stay.
  CHECK(disk.change(Operation::discard, 64, 16) == Outcome::ok);
  CHECK(disk.change(Operation::write_zeroes, 129, 2) == Outcome::ok);
  CHECK(disk.read(63, again, 2 * kSectorBytes) == Outcome::ok);
  CHECK(all(again, kSectorBytes, 0xaa) && all(again + kSectorBytes, kSectorBytes, 0));
  CHECK(disk.read(128, again, 4 * kSectorBytes) == Outcome::ok);
  CHECK(all(again, kSectorBytes, 0xaa) && all(again + kSectorBytes, 2 * kSectorBytes, 0));
  CHECK(all(again + 3 * kSectorBytes, kSectorBytes, 0xaa));

  const uint64_t end = disk.capacity_sectors();
  CHECK(disk.read(end - 1, again, kSectorBytes) == Outcome::ok);
  CHECK(disk.read(end - 1, again, 2 * kSectorBytes) == Outcome::error);
  CHECK(disk.read(end, again, kSectorBytes) == Outcome::error);
  CHECK(disk.write(~0ull, data, kSectorBytes) == Outcome::error);
  CHECK(disk.write(~0ull / kSectorBytes, data, kSectorBytes) == Outcome::error);
  CHECK(disk.write(end - 1, data, 2 * kSectorBytes) == Outcome::error);
  CHECK(disk.write(0, data, 100) == Outcome::error);
  CHECK(disk.read(0, again, kSectorBytes + 1) == Outcome::error);
  CHECK(disk.change(Operation::discard, end - 1, 2) == Outcome::error);
  CHECK(disk.change(Operation::discard, ~0ull, 2) == Outcome::error);
  CHECK(disk.change(Operation::discard, 0, ~0u) == Outcome::error);
  CHECK(disk.change(Operation::discard, 0, 1, 1) == Outcome::unsupported);
  CHECK(disk.change(Operation::write_zeroes, end, 1) == Outcome::error);
  CHECK(disk.change(Operation::write_zeroes, 0, 1, 2) == Outcome::unsupported);
  CHECK(disk.request(static_cast<Operation>(99), 0, nullptr, 0) == Outcome::unsupported);
}

void look_at(Disk& disk) {
  CHECK((disk.device().features() & kReadOnlyFeature) != 0);
  CHECK((disk.device().features() & (kDiscardFeature | kWriteZeroesFeature)) == 0);
  CHECK(disk.start(kReadOnlyFeature | kFlushFeature));
  disk.device().sleep_while_waiting(1);
  print_id("second", disk);
  CHECK(disk.read(2047, again, kSectorBytes) == Outcome::ok);
  CHECK(all(again, kSectorBytes, 0xbb));
  CHECK(disk.write(0, data, kSectorBytes) == Outcome::error);
  CHECK(disk.change(Operation::discard, 0, 8) == Outcome::unsupported);
  CHECK(disk.change(Operation::write_zeroes, 0, 8) == Outcome::error);
  CHECK(disk.flush() == Outcome::ok);
}

}  // namespace

void program() {
  Disk first(Device::find(kBlockDevice, 0));
  Disk second(Device::find(kBlockDevice, 1));
  use(first);
  look_at(second);
  // Both at work, each with its own interrupt.
  CHECK(first.read(8, again, kSectorBytes) == Outcome::ok);
  CHECK_EQUAL(again[1], pattern(1));
}
