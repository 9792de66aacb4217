// SPDX-License-Identifier: Apache-2.0
// What no driver should do, done to virtio-rng and to a disk. After each misdeed the device is still there: reset, it
// serves a request as it should.
#include "disk.hpp"

namespace {

constexpr uint64_t kMemoryEnd = 64 << 20;

Device device;
bool is_disk;
uint16_t available_index;  // of a bad chain: a device looks at its ring as soon as it is started, so this comes last
Rings rings;
alignas(4096) uint8_t arena[64 * 1024];  // where a fuzzed device may write
struct {
  uint32_t operation = 0;
  uint32_t priority = 0;
  uint64_t sector = 0;
} header;
uint8_t buffer[kSectorBytes];
volatile uint8_t outcome;

uint64_t address_of(const volatile void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

// A request that the device must answer: 512 random bytes, or the disk's first sector.
const Buffer kRequest[] = {{&header, sizeof header, false}, {buffer, sizeof buffer, true}, {&outcome, 1, true}};
const Buffer* request_buffers() { return is_disk ? kRequest : kRequest + 1; }
unsigned request_count() { return is_disk ? 3 : 1; }

void check_alive(const char* after) {
  if (argument("verbose")) print("after ", after, "\n");
  memset(buffer, 0, sizeof buffer);
  outcome = 0xff;
  if (!CHECK(device.start(rings))) return print("FAILED no start after: ", after, "\n");
  device.offer(0, request_buffers(), request_count());
  device.notify();
  if (!CHECK(poll_until([] { return device.returned(); }))) return print("FAILED no answer after: ", after, "\n");
  CHECK_EQUAL(device.take(), is_disk ? 513 : 512);
  if (is_disk) CHECK_EQUAL(outcome, 0);
  unsigned zeros = 0;
  for (const uint8_t byte : buffer) zeros += byte == 0;
  CHECK(zeros < 64);
  device.reset();
  CHECK_EQUAL(device.status(), 0);
}

void notify_too_early() {
  device.reset();
  for (const uint32_t queue : {0u, 1u, 2u, 1000u, ~0u}) device.write(reg::kQueueNotify, queue);
  CHECK(device.negotiate());
  device.notify();
  memset(&rings, 0, sizeof rings);
  CHECK(device.set_queue(0, rings));
  device.notify();
  CHECK_EQUAL(rings.used.index, 0);
  check_alive("notifications before DRIVER_OK");
}

void statuses_out_of_order() {
  device.reset();
  device.write(reg::kStatus, kDriverOk);
  CHECK((device.status() & kDriverOk) == 0);
  device.reset();
  device.write(reg::kStatus, kFeaturesOk);
  CHECK((device.status() & kFeaturesOk) == 0);
  // Features that are not offered, and none at all.
  CHECK(!device.negotiate(1ull << 60));
  device.reset();
  device.write(reg::kStatus, kAcknowledge | kDriver);
  device.write_features(0);
  device.add_status(kFeaturesOk);
  CHECK((device.status() & kFeaturesOk) == 0);
  // No queue, although the device needs one.
  CHECK(device.negotiate());
  device.add_status(kDriverOk);
  if (!is_disk) CHECK((device.status() & kNeedsReset) != 0);
  device.notify();
  // From a queue to a failed driver and on.
  CHECK(device.start(rings));
  device.add_status(kFailed);
  device.write(reg::kStatus, ~0u);
  device.write(reg::kStatus, kAcknowledge);
  check_alive("statuses out of order");
}

void impossible_queues() {
  const uint64_t good = address_of(&rings);
  const uint64_t descriptors = address_of(rings.descriptors), driver = address_of(&rings.available),
                 used = address_of(&rings.used);
  CHECK(device.negotiate());
  const uint32_t most = device.read(reg::kQueueSizeMax);
  CHECK(most >= 16);
  for (const uint32_t entries : {0u, 3u, 17u, most + 1, 2 * most, 0x8000u, 0x10000u, 0x1'0010u, 0x8000'0000u, ~0u})
    CHECK(!device.set_queue(0, entries, descriptors, driver, used));
  for (const uint64_t bad : {kMemoryEnd, kMemoryEnd - 16, uint64_t{0xa000'0000}, kFirstWindow, uint64_t{0xfee0'0000},
                             uint64_t{1} << 32, uint64_t{1} << 52, ~uint64_t{15}, ~uint64_t{255}, good + 1}) {
    CHECK(!device.set_queue(0, kQueueEntries, bad, driver, used));
    CHECK(!device.set_queue(0, kQueueEntries, descriptors, bad, used));
    CHECK(!device.set_queue(0, kQueueEntries, descriptors, driver, bad));
  }
  // Queues that there are not.
  for (const uint32_t queue : {1u, 64u, 0xffffu, ~0u}) {
    CHECK(!device.set_queue(queue, kQueueEntries, descriptors, driver, used));
    CHECK_EQUAL(device.read(reg::kQueueSizeMax), 0);
  }
  // Of a ready queue nothing changes.
  CHECK(device.set_queue(0, rings));
  device.write(reg::kQueueSize, 0);
  device.write64(reg::kQueueDescriptor, ~0ull);
  device.add_status(kDriverOk);
  CHECK_EQUAL(device.read(reg::kQueueReady), 1);
  device.write(reg::kQueueReady, 0);
  CHECK_EQUAL(device.read(reg::kQueueReady), 1);
  check_alive("impossible queues");
}

// Fills the rings by hand; the device must ask for a reset, and write nothing behind the driver's back.
template <typename Misdeed>
void bad_chain(const char* name, Misdeed misdeed) {
  CHECK(device.start(rings));
  available_index = 1;
  misdeed();
  full_fence();
  at<uint16_t>(address_of(&rings.available.index)) = available_index;
  full_fence();
  device.notify();
  if (!CHECK(poll_until([] { return (device.status() & kNeedsReset) != 0; }))) print("FAILED still well: ", name, "\n");
  CHECK_EQUAL(rings.used.index, 0);
  // Before the reset no request is served any more.
  device.notify();
  CHECK_EQUAL(device.status() & kDriverOk, kDriverOk);
  check_alive(name);
}

void bad_chains() {
  Descriptor* const d = rings.descriptors;
  const uint64_t good = address_of(arena);
  bad_chain("a descriptor that is its own next", [&] { d[0] = {good, 16, kNext | kWrite, 0}; });
  bad_chain("a loop of two", [&] {
    d[0] = {good, 16, kNext | kWrite, 1};
    d[1] = {good, 16, kNext | kWrite, 0};
  });
  bad_chain("a loop of all", [&] {
    for (uint16_t i = 0; i < kQueueEntries; ++i)
      d[i] = {good, 16, kNext, static_cast<uint16_t>((i + 1) % kQueueEntries)};
  });
  bad_chain("a next beyond the table", [&] { d[0] = {good, 16, kNext | kWrite, kQueueEntries}; });
  bad_chain("a next far beyond the table", [&] { d[0] = {good, 16, kNext | kWrite, 0xffff}; });
  bad_chain("a head beyond the table", [&] { rings.available.ring[0] = 0xffff; });
  bad_chain("a buffer at the end of memory", [&] { d[0] = {kMemoryEnd - 8, 16, kWrite, 0}; });
  bad_chain("a buffer outside memory", [&] { d[0] = {0xa000'0000, 16, kWrite, 0}; });
  bad_chain("a buffer in the device's own registers", [&] { d[0] = {kFirstWindow, 16, kWrite, 0}; });
  bad_chain("an address that wraps", [&] { d[0] = {~0ull - 7, 16, kWrite, 0}; });
  bad_chain("a length that wraps", [&] { d[0] = {good, ~0u, kWrite, 0}; });
  bad_chain("lengths whose sum wraps", [&] {
    d[0] = {good, 16, kNext | kWrite, 1};
    d[1] = {good + 16, 0xffff'fff0, kWrite, 0};
  });
  bad_chain("a readable buffer after a writable one", [&] {
    d[0] = {good, 16, kNext | kWrite, 1};
    d[1] = {good, 16, 0, 0};
  });
  bad_chain("an indirect table without the feature", [&] { d[0] = {good, 16, 4, 0}; });
  bad_chain("an index that jumps", [&] { available_index = kQueueEntries + 1; });
  bad_chain("an index that goes back", [&] { available_index = 0xffff; });
}

// Chains that the ring's rules allow and that are no requests: given back, and the device goes on.
void useless_chains() {
  CHECK(device.start(rings));
  const Buffer nothing[] = {{arena, 0, true}};
  const Buffer nothing_writable[] = {{arena, 64, false}};
  const Buffer short_header[] = {{&header, 15, false}, {arena, 512, true}};
  const Buffer no_status[] = {{&header, sizeof header, false}};
  const Buffer odd_length[] = {{&header, sizeof header, false}, {arena, 511, true}, {&outcome, 1, true}};
  const struct {
    const Buffer* buffers;
    unsigned count;
  } chains[] = {{nothing, 1}, {nothing_writable, 1}, {short_header, 2}, {no_status, 1}, {odd_length, 3}};
  for (const auto& chain : chains) {
    device.offer(0, chain.buffers, chain.count);
    device.notify();
    if (!CHECK(poll_until([] { return device.returned(); }))) return;
    device.take();
  }
  CHECK((device.status() & kNeedsReset) == 0);
  check_alive("useless chains");
}

// After a reset the device writes nothing any more.
void reset_while_busy() {
  for (unsigned round = 0; round < 50; ++round) {
    if (!CHECK(device.start(rings))) return;
    for (unsigned i = 0; i < kQueueEntries / request_count(); ++i) {
      device.offer(static_cast<uint16_t>(i * request_count()), request_buffers(), request_count());
      if (i % 2 == round % 2) device.notify();
    }
    for (unsigned i = 0; i < round * 20; ++i) pause();
    device.reset();
    CHECK_EQUAL(device.status(), 0);
    full_fence();
    const uint16_t used = at<uint16_t>(address_of(&rings.used.index));
    for (unsigned i = 0; i < 100; ++i) pause();
    CHECK_EQUAL(at<uint16_t>(address_of(&rings.used.index)), used);
    CHECK_EQUAL(device.read(reg::kQueueReady), 0);
  }
  check_alive("resets while busy");
}

template <typename T>
void touch(uint32_t offset) {
  [[maybe_unused]] const T value = at<T>(device.base() + offset);
  at<T>(device.base() + offset) = static_cast<T>(0x5a5a'5a5a'5a5a'5a5a);
}

// Every size at every offset, also across the window's end where the next device begins.
void odd_accesses() {
  device.reset();
  for (uint32_t offset = 0; offset < kWindowBytes; ++offset) {
    const bool is_register = offset < reg::kConfig && offset % 4 == 0;
    touch<uint8_t>(offset);
    if (offset + 2 <= kWindowBytes) touch<uint16_t>(offset);
    if (offset + 4 <= kWindowBytes && !is_register) touch<uint32_t>(offset);
    if (offset + 8 <= kWindowBytes) touch<uint64_t>(offset);
  }
  // Of a register only four aligned bytes are one.
  CHECK_EQUAL(at<uint16_t>(device.base() + reg::kMagic), 0);
  CHECK_EQUAL(at<uint64_t>(device.base() + reg::kMagic) & 0xffff'ffff, 0);
  CHECK_EQUAL(at<uint32_t>(device.base() + reg::kMagic + 2), 0);
  CHECK_EQUAL(device.status(), 0);
  // The configuration space takes any, and ends in zeros.
  if (is_disk) {
    CHECK_EQUAL(at<uint8_t>(device.base() + reg::kConfig + 1), device.read(reg::kConfig) >> 8 & 0xff);
    CHECK_EQUAL(at<uint64_t>(device.base() + reg::kConfig), 2048);
  }
  CHECK_EQUAL(at<uint64_t>(device.base() + kWindowBytes - 8), 0);
  check_alive("odd accesses");
}

// A value that a register may take seriously, half of the time.
uint32_t fuzzed_value(Random& random) {
  const uint32_t in_arena = static_cast<uint32_t>(address_of(arena)) + (random.below(sizeof arena) & ~15u);
  const uint32_t interesting[] = {0, 0, 0,  1,  2,    4,   8,        16,       64,       256,
                                  3, 7, 11, 15, 0x80, ~0u, in_arena, in_arena, in_arena, in_arena};
  const uint32_t choice = random.below(2 * sizeof interesting / sizeof interesting[0]);
  if (choice < sizeof interesting / sizeof interesting[0]) return interesting[choice];
  // As an address of this guest's it is in the arena or nowhere.
  return random.next() | static_cast<uint32_t>(kMemoryEnd);
}

void fuzz(uint64_t seed) {
  Random random(seed);
  memset(arena, 0, sizeof arena);
  device.reset();
  for (unsigned i = 0; i < 3000; ++i) {
    uint32_t offset = random.below(kWindowBytes / 4) * 4;
    if (random.below(4)) offset = random.below(0xb0 / 4) * 4;
    // Now and then a step on the right way, so that the rest finds a device at work.
    if (random.below(100) == 0) (void)device.negotiate();
    if (random.below(40) == 0)
      (void)device.set_queue(0, kQueueEntries, address_of(arena), address_of(arena) + 0x1000,
                             address_of(arena) + 0x2000);
    if (random.below(40) == 0) device.add_status(kDriverOk);
    if (random.below(3) == 0)
      (void)device.read(offset);
    else
      device.write(offset, fuzzed_value(random));
  }
  device.reset();
  check_alive("random accesses to registers");
}

void attack(Device target) {
  device = target;
  is_disk = device.read(reg::kDeviceId) == kBlockDevice;
  check_alive("nothing");
  notify_too_early();
  statuses_out_of_order();
  impossible_queues();
  bad_chains();
  useless_chains();
  reset_while_busy();
  odd_accesses();
  fuzz(is_disk ? 1 : 2);
  print(is_disk ? "disk" : "random", " survived\n");
}

}  // namespace

void program() {
  attack(Device::find(kRandomDevice));
  attack(Device::find(kBlockDevice));
}
