// SPDX-License-Identifier: Apache-2.0
// Pools of interrupt lines, PCI slots and address windows.
#include <doctest/doctest.h>

#include <set>

#include "bus/resources.hpp"

using namespace vmm;

TEST_CASE("a line asked for is exclusive, and free again when its lease goes") {
  GsiPool pool;
  auto serial = pool.allocate("serial", 4);
  REQUIRE(serial.ok());
  CHECK(serial->value() == 4);
  auto refused = pool.allocate("foo", 4);
  REQUIRE(!refused.ok());
  CHECK(refused.error().message == "GSI 4: taken by serial, wanted by foo");
  serial->release();
  CHECK(pool.allocate("foo", 4).ok());
  CHECK(pool.allocate("bar", 4).ok());  // foo's lease was a temporary
}

TEST_CASE("lines given away unasked avoid those of a PC") {
  GsiPool pool;
  std::vector<NumberLease> leases;
  std::set<uint32_t> seen;
  auto ten = pool.allocate("ten", 10);
  REQUIRE(ten.ok());
  for (;;) {
    auto lease = pool.allocate("device");
    if (!lease) {
      CHECK(lease.error().message == "GSI: none left for device, all 16 are taken");
      break;
    }
    CHECK(seen.insert(lease->value()).second);
    leases.push_back(std::move(*lease));
  }
  CHECK(leases.size() == 15);
  CHECK(leases.front().value() == 5);
  CHECK(leases[1].value() == 11);
  for (uint32_t reserved : {0, 1, 2, 3, 4, 8, 9, 10, 13}) CHECK(!seen.contains(reserved));
  leases.erase(leases.begin());
  CHECK(pool.allocate("again")->value() == 5);
}

TEST_CASE("numbers beyond the pool name what is allowed") {
  GsiPool lines;
  CHECK(lines.allocate("foo", 24).error().message == "GSI 24: wanted by foo: 0 to 23 are allowed");
  CHECK(lines.allocate("foo", 23).ok());
  PciSlotPool slots;
  CHECK(slots.allocate("foo", 32).error().message == "PCI slot 32: wanted by foo: 0 to 31 are allowed");
  auto bridge = slots.allocate("bridge", 0);
  auto first = slots.allocate("disk");
  REQUIRE(bridge.ok());
  REQUIRE(first.ok());
  CHECK(first->value() == 1);
}

TEST_CASE("a moved lease gives back once") {
  PciSlotPool pool;
  NumberLease lease;
  CHECK(!lease);
  lease = *pool.allocate("a", 3);
  NumberLease other = std::move(lease);
  CHECK(!lease);
  CHECK(!pool.allocate("b", 3).ok());
  other = *pool.allocate("c", 4);
  CHECK(pool.allocate("b", 3).ok());
  CHECK(!pool.allocate("b", 4).ok());
}

TEST_CASE("windows are first fit, aligned and apart") {
  WindowPool pool(GuestAddress{0xc000'0000}, GuestAddress{0xe000'0000});
  auto a = pool.allocate("a", 0x1000);
  auto b = pool.allocate("b", 0x200, 0x200);
  auto c = pool.allocate("c", 0x100000, 0x100000);
  auto d = pool.allocate("d", 0x1000);
  REQUIRE((a.ok() && b.ok() && c.ok() && d.ok()));
  CHECK(a->value() == GuestAddress{0xc000'0000});
  CHECK(b->value() == GuestAddress{0xc000'1000});
  CHECK(c->value() == GuestAddress{0xc010'0000});
  CHECK(d->value() == GuestAddress{0xc000'2000});  // the gap before c
  a->release();
  CHECK(pool.allocate("e", 0x2000)->value() == GuestAddress{0xc000'3000});  // too big for a's place
  CHECK(pool.allocate("f", 0x800)->value() == GuestAddress{0xc000'0000});
}

TEST_CASE("a window pool that is full says so") {
  WindowPool pool(GuestAddress{0xc000'0000}, GuestAddress{0xe000'0000});
  auto most = pool.allocate("most", 0x1fff'f000);
  REQUIRE(most.ok());
  CHECK(pool.allocate("last", 0x1000).ok());
  const auto refused = pool.allocate("foo", 0x2000);
  REQUIRE(!refused.ok());
  CHECK(refused.error().message ==
        "MMIO window for foo: 8192 bytes aligned to 0x1000: no room left in 0xc0000000-0xdfffffff");
  CHECK(!pool.allocate("huge", UINT64_MAX).ok());
  CHECK(!pool.allocate("far", 0x10, 1ull << 63).ok());
  CHECK(!pool.allocate("none", 0).ok());
  CHECK(!pool.allocate("odd", 0x10, 3).ok());
}
