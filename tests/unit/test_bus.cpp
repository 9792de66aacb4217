// SPDX-License-Identifier: Apache-2.0
// Claims on a bus and the dispatch of accesses to them.
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "bus/bus.hpp"

using namespace vmm;

namespace {

// Remembers its last access; reads give the offset.
struct Recorder {
  uint64_t last_offset = 0;
  uint64_t last_value = 0;
  uint32_t last_size_bytes = 0;
  int calls = 0;

  BusHandler handler() {
    return {[](void* context, uint64_t offset, void* data, uint32_t size_bytes) {
              auto& self = *static_cast<Recorder*>(context);
              ++self.calls;
              std::memcpy(data, &offset, size_bytes);
            },
            [](void* context, uint64_t offset, const void* data, uint32_t size_bytes) {
              auto& self = *static_cast<Recorder*>(context);
              ++self.calls;
              self.last_offset = offset;
              self.last_size_bytes = size_bytes;
              self.last_value = 0;
              std::memcpy(&self.last_value, data, size_bytes);
            },
            this};
  }
};

uint64_t read(Bus::View& view, uint64_t address, uint32_t size_bytes) {
  uint64_t value = 0;
  view.read(address, &value, size_bytes);
  return value;
}

}  // namespace

TEST_CASE("an access reaches the claim that holds it, with its offset") {
  Bus bus(BusSpace::mmio);
  Bus::View view(bus);
  Recorder low, high;
  auto claim_high = bus.claim(0x2000, 0x100, "high", high.handler());
  auto claim_low = bus.claim(0x1000, 0x10, "low", low.handler());
  REQUIRE(claim_low.ok());
  REQUIRE(claim_high.ok());

  CHECK(read(view, 0x1008, 8) == 8);
  CHECK(read(view, 0x20ff, 1) == 0xff);
  const uint32_t value = 0x12345678;
  view.write(0x2010, &value, 4);
  CHECK(high.last_offset == 0x10);
  CHECK(high.last_value == 0x12345678);
  CHECK(high.last_size_bytes == 4);
  CHECK(low.calls == 1);
}

TEST_CASE("what nobody claimed reads as ones and swallows writes") {
  Bus bus(BusSpace::pio);
  Bus::View view(bus);
  Recorder recorder;
  auto claim = bus.claim(0x60, 4, "keyboard", recorder.handler());
  REQUIRE(claim.ok());

  CHECK(read(view, 0x5f, 1) == 0xff);
  CHECK(read(view, 0x64, 4) == 0xffffffff);
  CHECK(read(view, 0x5f, 2) == 0xffff);      // begins before the claim
  CHECK(read(view, 0x62, 4) == 0xffffffff);  // ends after it
  CHECK(read(view, 0x60, 3) == 0xffffff);    // no size of the bus
  const uint32_t value = 0;
  view.write(0x63, &value, 2);
  view.write(0x1000, &value, 4);
  CHECK(recorder.calls == 0);
  CHECK(read(view, 0x60, 4) == 0);
  CHECK(recorder.calls == 1);
}

TEST_CASE("overlapping claims are refused by both names") {
  Bus bus(BusSpace::pio);
  auto serial = bus.claim(0x3f8, 8, "serial", {});
  REQUIRE(serial.ok());
  auto inside = bus.claim(0x3f8, 8, "foo", {});
  REQUIRE(!inside.ok());
  CHECK(inside.error().message == "pio 0x3f8-0x3ff: claimed by serial, wanted by foo (0x3f8-0x3ff)");
  CHECK(!bus.claim(0x3f0, 9, "head", {}).ok());
  CHECK(!bus.claim(0x3ff, 1, "tail", {}).ok());
  CHECK(!bus.claim(0x300, 0x200, "around", {}).ok());
  CHECK(bus.claim(0x3f0, 8, "before", {}).ok());
  CHECK(bus.claim(0x400, 1, "after", {}).ok());
}

TEST_CASE("claims outside the space or empty are refused") {
  Bus pio(BusSpace::pio);
  CHECK(pio.claim(0xffff, 1, "last", {}).ok());
  CHECK(!pio.claim(0xffff, 2, "beyond", {}).ok());
  CHECK(!pio.claim(0x10000, 1, "beyond", {}).ok());
  CHECK(!pio.claim(0x10, 0, "empty", {}).ok());
  Bus mmio(BusSpace::mmio);
  CHECK(!mmio.claim(UINT64_MAX - 1, 3, "wraps", {}).ok());
  Recorder recorder;
  auto top = mmio.claim(UINT64_MAX - 7, 8, "top", recorder.handler());
  REQUIRE(top.ok());
  Bus::View view(mmio);
  CHECK(read(view, UINT64_MAX - 7, 8) == 0);
  CHECK(read(view, UINT64_MAX - 3, 8) == UINT64_MAX);
}

TEST_CASE("a claim is given back when it goes, and its view notices") {
  Bus bus(BusSpace::mmio);
  Bus::View view(bus);
  Recorder recorder;
  {
    auto claim = bus.claim(0x1000, 4, "device", recorder.handler());
    REQUIRE(claim.ok());
    CHECK(read(view, 0x1000, 4) == 0);
  }
  CHECK(read(view, 0x1000, 4) == 0xffffffff);
  auto moved = bus.claim(0x2000, 4, "device", recorder.handler());
  REQUIRE(moved.ok());
  CHECK(read(view, 0x2000, 4) == 0);
  Bus::Claim kept = std::move(*moved);
  CHECK(read(view, 0x2000, 4) == 0);
  kept.release();
  kept.release();
  CHECK(read(view, 0x2000, 4) == 0xffffffff);
}

TEST_CASE("a handler's claims may come and go, and a handler may be absent") {
  Bus bus(BusSpace::mmio);
  Bus::View view(bus);
  struct Mover {
    Bus& bus;
    Recorder target;
    Bus::Claim claim;
  } mover{bus, {}, {}};
  // As a PCI function moves a BAR when its configuration space is written.
  auto config = bus.claim(0x100, 8, "config",
                          {nullptr,
                           [](void* context, uint64_t, const void* data, uint32_t) {
                             auto& self = *static_cast<Mover*>(context);
                             uint32_t address;
                             std::memcpy(&address, data, 4);
                             self.claim.release();
                             if (auto claim = self.bus.claim(address, 16, "bar", self.target.handler())) {
                               self.claim = std::move(*claim);
                             }
                           },
                           &mover});
  REQUIRE(config.ok());
  for (uint32_t address : {0x1000u, 0x4000u, 0x50u}) {
    view.write(0x100, &address, 4);
    CHECK(read(view, address + 8, 4) == 8);
  }
  CHECK(read(view, 0x4000, 4) == 0xffffffff);
  CHECK(read(view, 0x100, 4) == 0xffffffff);  // no read handler
}

TEST_CASE("release waits for a handler that runs, and none runs afterwards") {
  Bus bus(BusSpace::mmio);
  struct Slow {
    std::atomic<bool> entered{false};
    std::atomic<bool> leave{false};
    std::atomic<bool> gone{false};
    std::atomic<bool> called_after{false};
  } slow;
  auto claim = bus.claim(0x1000, 4, "slow",
                         {[](void* context, uint64_t, void*, uint32_t) {
                            auto& self = *static_cast<Slow*>(context);
                            if (self.gone) self.called_after = true;
                            self.entered = true;
                            while (!self.leave) std::this_thread::yield();
                          },
                          nullptr, &slow});
  REQUIRE(claim.ok());
  std::thread vcpu([&] {
    Bus::View view(bus);
    for (int i = 0; i < 1000; ++i) read(view, 0x1000, 4);
  });
  while (!slow.entered) std::this_thread::yield();
  std::atomic<bool> released{false};
  std::thread control([&] {
    claim->release();
    slow.gone = true;
    released = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(!released);
  slow.leave = true;
  control.join();
  vcpu.join();
  CHECK(released);
  CHECK(!slow.called_after);
}

TEST_CASE("many threads read while claims change") {
  Bus bus(BusSpace::mmio);
  Recorder unused;
  static constexpr BusHandler seven{
      [](void*, uint64_t, void* data, uint32_t size_bytes) { std::memset(data, 7, size_bytes); }, nullptr, nullptr};
  auto fixed = bus.claim(0x1000, 16, "fixed", seven);
  REQUIRE(fixed.ok());
  std::atomic<bool> stop{false};
  std::atomic<int> wrong{0};
  std::vector<std::thread> readers;
  for (int i = 0; i < 3; ++i) {
    readers.emplace_back([&] {
      Bus::View view(bus);
      while (!stop) {
        if (read(view, 0x1000, 4) != 0x07070707) ++wrong;
        const uint64_t moving = read(view, 0x2000, 4);
        if (moving != 0x07070707 && moving != 0xffffffff) ++wrong;
      }
    });
  }
  for (int i = 0; i < 500; ++i) {
    auto moving = bus.claim(0x2000, 16, "moving", seven);
    if (!moving) ++wrong;
  }
  stop = true;
  for (auto& reader : readers) reader.join();
  CHECK(wrong == 0);
}
