// SPDX-License-Identifier: Apache-2.0
// The fake host keeps the promises of the interface that plugins are tested on.
#include <doctest/doctest.h>

#include "clone/sdk/host.hpp"
#include "fake_host.hpp"
#include "fake_plugin.hpp"

using namespace vmm::test;
using clone_sdk::Host;

namespace {

struct Latch {
  uint32_t value = 0;
  int ready_count = 0;
  int fd = -1;
  void read(uint64_t offset, void* data, uint32_t size_bytes) {
    const uint32_t shifted = value >> (8 * offset);
    std::memcpy(data, &shifted, size_bytes);
  }
  void write(uint64_t, const void* data, uint32_t size_bytes) { std::memcpy(&value, data, size_bytes); }
  void ready() {
    take_event(fd);
    ++ready_count;
  }
};

}  // namespace

TEST_CASE("fake host: claims are served, refused when they overlap, gone when released") {
  FakeHost fake;
  Latch latch;
  const Host host(fake.handle("latch.0"));
  const Host other(fake.handle("other.0"));
  {
    auto claim = host.claim<&Latch::read, &Latch::write>(CLONE_BUS_PIO, 0x70, 4, &latch);
    REQUIRE(claim.ok());
    fake.write<uint32_t>(CLONE_BUS_PIO, 0x70, 0x01020304);
    CHECK(latch.value == 0x01020304);
    CHECK(fake.read<uint8_t>(CLONE_BUS_PIO, 0x72) == 2);
    CHECK(fake.read<uint32_t>(CLONE_BUS_PIO, 0x72) == 0xffffffff);
    auto overlapping = other.claim<&Latch::read, &Latch::write>(CLONE_BUS_PIO, 0x73, 1, &latch);
    REQUIRE(!overlapping.ok());
    CHECK(overlapping.error().message.find("latch.0") != std::string::npos);
    CHECK(overlapping.error().message.find("other.0") != std::string::npos);
  }
  CHECK(fake.claim_count() == 0);
  CHECK(fake.read<uint8_t>(CLONE_BUS_PIO, 0x70) == 0xff);
}

TEST_CASE("fake host: an ioeventfd takes the write that matches and wakes its watch") {
  FakeHost fake;
  Latch latch;
  const Host host(fake.handle());
  const clone_sdk::Fd event(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  latch.fd = event.get();
  auto claim = host.claim<&Latch::read, &Latch::write>(CLONE_BUS_MMIO, 0xd000'0000, 4, &latch);
  REQUIRE(claim.ok());
  const auto* bus = *host.service<clone_host_bus>(CLONE_HOST_BUS);
  REQUIRE(bus->ioeventfd(host.raw(), CLONE_BUS_MMIO, 0xd000'0000, 4, 1, 7, event.get(), nullptr) == CLONE_OK);
  const auto* loop = *host.service<clone_host_loop>(CLONE_HOST_LOOP);
  auto watch =
      clone_sdk::Watch::start<&Latch::ready>(loop, loop->main_loop(host.raw()), event.get(), CLONE_READABLE, &latch);
  REQUIRE(watch.ok());
  fake.write<uint32_t>(CLONE_BUS_MMIO, 0xd000'0000, 7);
  CHECK(latch.value == 0);
  fake.write<uint32_t>(CLONE_BUS_MMIO, 0xd000'0000, 8);
  CHECK(latch.value == 8);
  fake.run_main_loop();
  CHECK(latch.ready_count == 1);
  CHECK(bus->ioeventfd_remove(host.raw(), CLONE_BUS_MMIO, 0xd000'0000, 4, 1, 7, event.get(), nullptr) == CLONE_OK);
  fake.write<uint32_t>(CLONE_BUS_MMIO, 0xd000'0000, 7);
  CHECK(latch.value == 7);
}

TEST_CASE("fake host: interrupts are counted whether pulsed, raised or signalled") {
  FakeHost fake;
  const Host host(fake.handle());
  const auto* irq = *host.service<clone_host_irq>(CLONE_HOST_IRQ);
  const uint32_t gsi = *host.allocate_gsi();
  CHECK(!host.allocate_gsi(gsi).ok());
  const clone_sdk::Fd event(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  REQUIRE(irq->irqfd(host.raw(), gsi, event.get(), -1, nullptr) == CLONE_OK);
  irq->pulse(host.raw(), gsi);
  irq->set_level(host.raw(), gsi, 1);
  irq->set_level(host.raw(), gsi, 1);
  signal_event(event.get());
  CHECK(fake.level(gsi));
  CHECK(fake.interrupts(gsi) == 3);
  CHECK(fake.interrupts(gsi) == 0);
}

TEST_CASE("fake host: a loop of its own runs posts in order and joins when destroyed") {
  FakeHost fake;
  const Host host(fake.handle());
  const auto* table = *host.service<clone_host_loop>(CLONE_HOST_LOOP);
  clone_loop* loop = nullptr;
  REQUIRE(table->create(host.raw(), "worker", &loop, nullptr) == CLONE_OK);
  static std::atomic<int> sum;
  sum = 0;
  int values[] = {1, 2, 3};
  for (int& value : values)
    table->post(
        loop, [](void* at) { sum = sum * 10 + *static_cast<int*>(at); }, &value);
  for (int waited_ms = 0; sum != 123 && waited_ms < 5000; ++waited_ms) ::usleep(1000);
  CHECK(sum == 123);
  table->destroy(loop);
}
