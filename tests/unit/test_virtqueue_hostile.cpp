// SPDX-License-Identifier: Apache-2.0
// Drivers that break the rules: each queue says which rule, stays broken, and touches nothing outside memory.
#include <doctest/doctest.h>

#include <functional>
#include <random>

#include "fake_driver.hpp"

using namespace vmm;
using namespace vmm::test;

namespace {

constexpr uint64_t kMemoryBytes = 1 << 20;
using Descriptor = FakeDriver::Descriptor;

GuestMemory make_memory(uint64_t size_bytes = kMemoryBytes) {
  MemoryConfig config;
  config.size_bytes = size_bytes;
  return std::move(GuestMemory::create(config)).value();
}

struct Bench {
  explicit Bench(bool packed, uint64_t features = kFeatureIndirectDescriptors, uint64_t memory_bytes = kMemoryBytes)
      : memory(make_memory(memory_bytes)),
        driver(memory, {packed, 8, features, 0x1000, 0}),
        queue(std::move(Virtqueue::create(memory, driver.queue_config())).value()),
        segments(8) {
    chain.size = sizeof chain;
    chain.capacity = 8;
    chain.segments = segments.data();
  }

  // Makes available what stands in descriptor 0, whatever it is.
  void offer() {
    if (driver.config().packed)
      driver.descriptor(0)->fourth |= FakeDriver::kAvailable;
    else
      driver.offer_head(0);
  }
  // Descriptor `index` of the ring (or of a table) in either format.
  Descriptor make(uint64_t address, uint32_t size_bytes, uint16_t flags, uint16_t link = 0) const {
    return driver.config().packed ? Descriptor{address, size_bytes, link, flags}
                                  : Descriptor{address, size_bytes, flags, link};
  }
  // The reason why the queue broke at the next pop; "" when it did not.
  std::string pop() {
    const clone_status status = queue->pop(chain);
    if (status != CLONE_ERR_GUEST) return status == CLONE_OK ? "" : "status " + std::to_string(status);
    const std::string reason = queue->broken();
    // Broken for good: no more chains, no way back for those that are out, nothing written to the rings.
    const uint16_t used_index = *driver.at<uint16_t>(driver.device_address + 2);
    const Descriptor first = *driver.descriptor(0);
    CHECK(queue->pop(chain) == CLONE_ERR_GUEST);
    chain.descriptors = 1;
    CHECK(queue->push(chain, 0) == CLONE_ERR_GUEST);
    queue->signal();
    queue->disable_kick();
    CHECK(!queue->enable_kick());
    CHECK(*driver.at<uint16_t>(driver.device_address + 2) == used_index);
    CHECK(std::memcmp(&first, driver.descriptor(0), sizeof first) == 0);
    return reason;
  }

  GuestMemory memory;
  FakeDriver driver;
  std::unique_ptr<Virtqueue> queue;
  std::vector<clone_segment> segments;
  clone_chain chain{};
};

constexpr uint16_t kNext = FakeDriver::kNext, kWrite = FakeDriver::kWrite, kIndirect = FakeDriver::kIndirect;

}  // namespace

TEST_CASE("hostile driver: buffers that are not memory") {
  for (const bool packed : {false, true}) {
    CAPTURE(packed);
    const std::pair<uint64_t, uint32_t> outside[] = {{kMemoryBytes, 1}, {kMemoryBytes - 1, 2},   {kMemoryBytes, 0},
                                                     {~0ull, 1},        {~0ull - 0xfff, 0x2000}, {0, 0xffff'ffff},
                                                     {0xc000'0000, 16}, {1ull << 63, 16}};
    for (const auto& [address, size_bytes] : outside) {
      CAPTURE(address);
      Bench bench(packed);
      *bench.driver.descriptor(0) = bench.make(address, size_bytes, 0);
      bench.offer();
      CHECK(bench.pop() == "a buffer is not in guest memory");
    }
    Bench bench(packed);
    *bench.driver.descriptor(0) = bench.make(kMemoryBytes - 1, 1, 0);
    bench.offer();
    CHECK(bench.pop() == "");
  }
}

TEST_CASE("hostile driver: a buffer that crosses from one memory region into the next") {
  for (const bool packed : {false, true}) {
    CAPTURE(packed);
    Bench bench(packed, 0, kHoleStart + (1 << 20));
    *bench.driver.descriptor(0) = bench.make(kHoleStart - 16, 32, kWrite);
    bench.offer();
    CHECK(bench.pop() == "a buffer is not in guest memory");
    Bench above(packed, 0, kHoleStart + (1 << 20));
    *above.driver.descriptor(0) = above.make(kHoleEnd + (1 << 20) - 16, 16, kWrite);
    above.offer();
    CHECK(above.pop() == "");
    CHECK(above.segments[0].host_address == above.memory.slice({kHoleEnd + (1 << 20) - 16}, 16));
  }
}

TEST_CASE("hostile driver: chains that are too long, loop, or point beyond the table") {
  Bench self_loop(false);
  *self_loop.driver.descriptor(0) = self_loop.make(0x8000, 1, kNext, 0);
  self_loop.offer();
  CHECK(self_loop.pop() == "a chain is longer than the queue");

  Bench loop(false);
  *loop.driver.descriptor(0) = loop.make(0x8000, 1, kNext, 5);
  *loop.driver.descriptor(5) = loop.make(0x8000, 1, kNext, 3);
  *loop.driver.descriptor(3) = loop.make(0x8000, 1, kNext, 5);
  loop.offer();
  CHECK(loop.pop() == "a chain is longer than the queue");

  for (const uint16_t next : {8, 9, 0xffff}) {
    Bench beyond(false);
    *beyond.driver.descriptor(0) = beyond.make(0x8000, 1, kNext, next);
    beyond.offer();
    CHECK(beyond.pop() == "a descriptor's number is beyond the table");
    Bench head(false);
    head.driver.offer_head(next);
    CHECK(head.pop() == "a descriptor's number is beyond the table");
  }

  // A packed ring where every descriptor says that another one follows.
  Bench packed(true);
  for (uint32_t i = 0; i < 8; ++i) *packed.driver.descriptor(i) = packed.make(0x8000, 1, kNext);
  packed.offer();
  CHECK(packed.pop() == "more descriptors are available than the queue holds");
}

TEST_CASE("hostile driver: readable after writable, and more than 4 GiB") {
  for (const bool packed : {false, true}) {
    CAPTURE(packed);
    Bench order(packed);
    *order.driver.descriptor(0) = order.make(0x8000, 1, kWrite | kNext, 1);
    *order.driver.descriptor(1) = order.make(0x8000, 1, 0);
    order.offer();
    CHECK(order.pop() == "a readable buffer follows a writable one");

    for (const uint32_t last_bytes : {0x3fff'ffffu, 0x4000'0000u}) {
      Bench big(packed, 0, kHoleStart);
      for (uint16_t i = 0; i < 3; ++i)
        *big.driver.descriptor(i) = big.make(0x1000, 0x4000'0000, kNext, static_cast<uint16_t>(i + 1));
      *big.driver.descriptor(3) = big.make(0x1000, last_bytes, kWrite);
      big.offer();
      CHECK(big.pop() == (last_bytes == 0x3fff'ffff ? "" : "a chain has 4 GiB or more"));
    }
  }
}

TEST_CASE("hostile driver: zero-length buffers are taken as they are") {
  for (const bool packed : {false, true}) {
    CAPTURE(packed);
    Bench bench(packed);
    *bench.driver.descriptor(0) = bench.make(0x8000, 0, kNext, 1);
    *bench.driver.descriptor(1) = bench.make(0x8000, 0, kWrite);
    bench.offer();
    REQUIRE(bench.pop() == "");
    CHECK(bench.chain.readable_count == 1);
    CHECK(bench.chain.writable_count == 1);
    CHECK(bench.chain.readable_bytes + bench.chain.writable_bytes == 0);
    CHECK(bench.queue->push(bench.chain, 0) == CLONE_OK);
  }
}

TEST_CASE("hostile driver: indirect tables") {
  for (const bool packed : {false, true}) {
    CAPTURE(packed);
    const auto with_table = [&](
                                uint64_t address, uint32_t size_bytes, uint16_t flags = kIndirect,
                                uint64_t features = kFeatureIndirectDescriptors,
                                const std::function<void(Bench&)>& prepare = [](Bench&) {}) {
      Bench bench(packed, features, 4 << 20);
      *bench.driver.descriptor(0) = bench.make(address, size_bytes, flags, 1);
      *bench.driver.descriptor(1) = bench.make(0x8000, 16, 0);
      *bench.driver.at<Descriptor>(0x9000) = bench.make(0x8000, 16, 0);
      prepare(bench);
      bench.offer();
      return bench.pop();
    };
    CHECK(with_table(0x9000, 16) == "");
    CHECK(with_table(0x9000, 16, kIndirect | kWrite) == "");  // the write flag is to be ignored
    CHECK(with_table(0x9000, 0) == "an indirect table's size is not a multiple of 16");
    CHECK(with_table(0x9000, 15) == "an indirect table's size is not a multiple of 16");
    CHECK(with_table(0x9000, 24) == "an indirect table's size is not a multiple of 16");
    CHECK(with_table(0x9000, 65537 * 16) == "an indirect table is too long");
    CHECK(with_table(0x9000, 0xffff'fff0) == "an indirect table is too long");
    CHECK(with_table((4 << 20) - 16, 32) == "an indirect table is not in guest memory");
    CHECK(with_table(~0ull - 15, 32) == "an indirect table is not in guest memory");
    CHECK(with_table(0x9000, 16, kIndirect | kNext) == "an indirect table in the middle of a chain");
    CHECK(with_table(0x9000, 16, kIndirect, 0) == "an indirect table without that feature");
    CHECK(with_table(0x9000, 16, kIndirect, kFeatureIndirectDescriptors, [](Bench& bench) {
            *bench.driver.at<Descriptor>(0x9000) = bench.make(0x9000, 16, kIndirect);
          }) == "an indirect table in an indirect table");
    CHECK(with_table(0x9003, 16, kIndirect, kFeatureIndirectDescriptors, [](Bench& bench) {
            *bench.driver.at<Descriptor>(0x9003) = bench.make(0x8000, 16, 0);
          }) == "");  // tables need no alignment
    // A table as long as allowed, with a chain longer than the queue in it.
    CHECK(with_table(0x100000, 65536 * 16, kIndirect, kFeatureIndirectDescriptors, [](Bench& bench) {
            for (uint32_t i = 0; i < 65536; ++i)
              *bench.driver.at<Descriptor>(0x100000 + 16 * i) =
                  bench.make(0x8000, 1, kNext, static_cast<uint16_t>(i + 1));
          }) == "a chain is longer than the queue");
  }
  // Split tables are linked: out of the table, and in a circle.
  for (const uint16_t next : {0, 2, 0xffff}) {
    Bench bench(false);
    *bench.driver.descriptor(0) = bench.make(0x9000, 32, kIndirect);
    *bench.driver.at<Descriptor>(0x9000) = bench.make(0x8000, 1, kNext, next);
    bench.offer();
    CHECK(bench.pop() ==
          (next == 0 ? "a chain is longer than the queue" : "a descriptor's number is beyond the table"));
  }
  // A chain may end in a table.
  Bench mixed(false);
  *mixed.driver.descriptor(0) = mixed.make(0x8000, 7, kNext, 1);
  *mixed.driver.descriptor(1) = mixed.make(0x9000, 16, kIndirect);
  *mixed.driver.at<Descriptor>(0x9000) = mixed.make(0xa000, 9, kWrite);
  mixed.offer();
  REQUIRE(mixed.pop() == "");
  CHECK(mixed.chain.readable_bytes == 7);
  CHECK(mixed.chain.writable_bytes == 9);
}

TEST_CASE("hostile driver: an available index that jumps, and chains offered again while they are out") {
  for (const uint16_t index : {9, 0x8000, 0xffff}) {
    Bench bench(false);
    *bench.driver.at<uint16_t>(bench.driver.driver_address + 2) = index;
    CHECK(bench.pop() == "the available index jumped further than the queue is long");
  }
  Bench full(false);
  *full.driver.descriptor(0) = full.make(0x8000, 1, 0);
  for (int i = 0; i < 8; ++i) full.offer();
  for (int i = 0; i < 8; ++i) CHECK(full.pop() == "");
  full.offer();
  CHECK(full.pop() == "more chains are available than the queue holds");

  // Packed: the ring is full of chains that are out, and the next lap is offered already.
  Bench packed(true);
  for (uint32_t i = 0; i < 8; ++i) *packed.driver.descriptor(i) = packed.make(0x8000, 1, FakeDriver::kAvailable);
  for (int i = 0; i < 8; ++i) CHECK(packed.pop() == "");
  packed.driver.descriptor(0)->fourth = FakeDriver::kUsed;
  CHECK(packed.pop() == "more descriptors are available than the queue holds");
}

TEST_CASE("hostile driver: queues that cannot be") {
  GuestMemory memory = make_memory();
  const auto refused = [&](bool packed, uint32_t size, uint64_t descriptors, uint64_t driver_area,
                           uint64_t device_area) {
    clone_virtqueue_config config{};
    config.size = sizeof config;
    config.layout = {sizeof config.layout, size,        packed ? kFeaturePackedRing : 0,
                     descriptors,          driver_area, device_area};
    config.kick_fd = config.call_fd = -1;
    const auto queue = Virtqueue::create(memory, config);
    if (!queue.ok()) CHECK(queue.error().status == CLONE_ERR_GUEST);
    return !queue.ok();
  };
  for (const bool packed : {false, true}) {
    CAPTURE(packed);
    CHECK(!refused(packed, 8, 0x1000, 0x2000, 0x3000));
    for (const uint32_t size : {0u, 32769u, 65536u, 0xffff'ffffu}) CHECK(refused(packed, size, 0x1000, 0x2000, 0x3000));
    CHECK(refused(packed, 12, 0x1000, 0x2000, 0x3000) == !packed);
    CHECK(!refused(packed, 32768, 0, 0x80000, 0xa0000));
    CHECK(refused(packed, 8, 0x1008, 0x2000, 0x3000));
    CHECK(refused(packed, 8, 0x1000, 0x2001, 0x3000));
    CHECK(refused(packed, 8, 0x1000, 0x2002, 0x3000) == packed);
    CHECK(refused(packed, 8, 0x1000, 0x2000, 0x3002));
    CHECK(refused(packed, 8, kMemoryBytes - 112, 0x2000, 0x3000));
    CHECK(!refused(packed, 8, kMemoryBytes - 128, 0x2000, 0x3000));
    for (const uint64_t outside : {kMemoryBytes, 0xc000'0000ul, 1ul << 40, ~0ul - 0xf}) {
      CHECK(refused(packed, 8, outside, 0x2000, 0x3000));
      CHECK(refused(packed, 8, 0x1000, outside, 0x3000));
      CHECK(refused(packed, 8, 0x1000, 0x2000, outside));
    }
  }
  // Split: the areas' last bytes, the event indices, must be memory as well.
  CHECK(!refused(false, 8, 0x1000, kMemoryBytes - 22, 0x3000));
  CHECK(refused(false, 8, 0x1000, kMemoryBytes - 20, 0x3000));
  CHECK(!refused(false, 8, 0x1000, 0x2000, kMemoryBytes - 72));
  CHECK(refused(false, 8, 0x1000, 0x2000, kMemoryBytes - 68));
}

TEST_CASE("hostile driver: random bytes in the rings never lead outside memory") {
  std::mt19937_64 random(7);
  int broken = 0, chains = 0;
  for (int round = 0; round < 3000; ++round) {
    Bench bench(round % 2, kFeatureIndirectDescriptors | (round % 4 < 2 ? kFeatureEventIndex : 0));
    // Mostly plausible: small addresses and lengths, so that walks get deep.
    for (uint64_t at = 0x1000; at < 0x1100; at += 16) {
      const Descriptor noise = bench.make(random() % 8 ? random() % 0x10000 : random(),
                                          static_cast<uint32_t>(random() % 4 ? random() % 16 * 16 : random()),
                                          static_cast<uint16_t>(random() & (random() % 2 ? 0x8087 : 0x83)),
                                          static_cast<uint16_t>(random() % 9));
      *bench.driver.at<Descriptor>(at) = noise;
      *bench.driver.at<Descriptor>(random() % 0x1000 * 16) = noise;
    }
    if (round % 2 == 0) *bench.driver.at<uint16_t>(bench.driver.driver_address + 2) = random() % 9;
    for (int i = 0; i < 10; ++i) {
      const clone_status status = bench.queue->pop(bench.chain);
      if (status == CLONE_ERR_GUEST) ++broken;
      if (status != CLONE_OK) break;
      ++chains;
      REQUIRE(bench.chain.readable_count + bench.chain.writable_count <= 8);
      for (uint32_t s = 0; s < bench.chain.readable_count + bench.chain.writable_count; ++s)
        REQUIRE(bench.segments[s].host_address ==
                bench.memory.slice({bench.segments[s].guest_address}, bench.segments[s].size_bytes));
      if (random() % 2) bench.queue->push(bench.chain, static_cast<uint32_t>(random()));
      bench.queue->signal();
    }
  }
  CHECK(broken > 500);
  CHECK(chains > 500);
}
