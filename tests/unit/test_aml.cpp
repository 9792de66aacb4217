// SPDX-License-Identifier: Apache-2.0
// AML encodings, byte by byte.
#include <doctest/doctest.h>

#include <initializer_list>

#include "boot/aml.hpp"

using namespace vmm;
using aml::Bytes;

namespace {
Bytes raw(std::initializer_list<int> values) {
  Bytes bytes;
  for (int value : values) bytes.push_back(static_cast<std::byte>(value));
  return bytes;
}

// The PkgLength of a scope with so many bytes in it (name included), and whether the rest is as long as it says.
uint64_t scope_length(size_t content_bytes) {
  const Bytes scope = aml::scope("ABCD", Bytes(content_bytes - 4, std::byte{0xa3}));
  const auto byte = [&](size_t index) { return std::to_integer<uint64_t>(scope[index]); };
  const uint64_t following = byte(1) >> 6;
  uint64_t length = following ? byte(1) & 0xf : byte(1) & 0x3f;
  for (uint64_t index = 0; index < following; ++index) length |= byte(2 + index) << (4 + 8 * index);
  CHECK(length == scope.size() - 1);
  CHECK(length == content_bytes + 1 + following);
  CHECK(byte(2 + following) == 'A');
  return following;
}
}  // namespace

TEST_CASE("aml: PkgLength takes the fewest bytes that hold it") {
  CHECK(scope_length(62) == 0);  // 63 with itself
  CHECK(scope_length(63) == 1);  // 64 would not fit one byte: 65
  CHECK(scope_length(64) == 1);
  CHECK(scope_length(4093) == 1);  // 4095
  CHECK(scope_length(4094) == 2);  // 4096 would not fit two: 4097
  CHECK(scope_length(4096) == 2);
  CHECK(scope_length((1 << 20) - 4) == 2);
  CHECK(scope_length((1 << 20) - 3) == 3);
  CHECK(aml::scope("AB", {}) == raw({0x10, 5, 'A', 'B', '_', '_'}));
}

TEST_CASE("aml: names") {
  CHECK(aml::name_string("_HID") == raw({'_', 'H', 'I', 'D'}));
  CHECK(aml::name_string("\\_S5") == raw({'\\', '_', 'S', '5', '_'}));
  CHECK(aml::name_string("\\") == raw({'\\', 0}));
  CHECK(aml::name_string("^^A") == raw({'^', '^', 'A', '_', '_', '_'}));
  CHECK(aml::name_string("\\_SB.PCI0") == raw({'\\', 0x2e, '_', 'S', 'B', '_', 'P', 'C', 'I', '0'}));
  CHECK(aml::name_string("A.B.C") == raw({0x2f, 3, 'A', '_', '_', '_', 'B', '_', '_', '_', 'C', '_', '_', '_'}));
}

TEST_CASE("aml: data") {
  CHECK(aml::integer(0) == raw({0}));
  CHECK(aml::integer(1) == raw({1}));
  CHECK(aml::integer(2) == raw({0x0a, 2}));
  CHECK(aml::integer(0xff) == raw({0x0a, 0xff}));
  CHECK(aml::integer(0x100) == raw({0x0b, 0, 1}));
  CHECK(aml::integer(0xffff) == raw({0x0b, 0xff, 0xff}));
  CHECK(aml::integer(0x10000) == raw({0x0c, 0, 0, 1, 0}));
  CHECK(aml::integer(0xffffffff) == raw({0x0c, 0xff, 0xff, 0xff, 0xff}));
  CHECK(aml::integer(0x1'0000'0000) == raw({0x0e, 0, 0, 0, 0, 1, 0, 0, 0}));
  CHECK(aml::string("ab") == raw({0x0d, 'a', 'b', 0}));
  CHECK(aml::eisa_id("PNP0501") == raw({0x0c, 0x41, 0xd0, 0x05, 0x01}));
  CHECK(aml::eisa_id("PNP0A08") == raw({0x0c, 0x41, 0xd0, 0x0a, 0x08}));
  CHECK(aml::buffer(raw({7, 8})) == raw({0x11, 5, 0x0a, 2, 7, 8}));
  CHECK(aml::package({aml::integer(5), aml::integer(0)}) == raw({0x12, 5, 2, 0x0a, 5, 0}));
  const std::vector<Bytes> many(256, aml::integer(1));
  const Bytes package = aml::package(many);
  CHECK(package[0] == std::byte{0x13});
  CHECK(Bytes(package.begin() + 3, package.begin() + 6) == raw({0x0b, 0, 1}));
  CHECK(package.size() == 6 + 256);
}

TEST_CASE("aml: objects and statements") {
  CHECK(aml::name("_UID", aml::integer(3)) == raw({0x08, '_', 'U', 'I', 'D', 0x0a, 3}));
  CHECK(aml::device("DEV0", {}) == raw({0x5b, 0x82, 5, 'D', 'E', 'V', '0'}));
  CHECK(aml::method("_STA", 0, aml::return_value(aml::integer(15))) ==
        raw({0x14, 9, '_', 'S', 'T', 'A', 0, 0xa4, 0x0a, 15}));
  CHECK(aml::method("_EVT", 1, {}, aml::Serialized::yes) == raw({0x14, 6, '_', 'E', 'V', 'T', 9}));
  CHECK(aml::notify("PWRB", 0x80) == raw({0x86, 'P', 'W', 'R', 'B', 0x0a, 0x80}));
}

TEST_CASE("aml: resource descriptors") {
  using enum aml::Trigger;
  using enum aml::Polarity;
  CHECK(aml::resource_template({}) == raw({0x11, 5, 0x0a, 2, 0x79, 0}));
  CHECK(aml::io_ports(0x3f8, 8) == raw({0x47, 1, 0xf8, 3, 0xf8, 3, 1, 8}));
  CHECK(aml::memory32_fixed(0xc0000000, 0x200) == raw({0x86, 9, 0, 1, 0, 0, 0, 0xc0, 0, 2, 0, 0}));
  CHECK(aml::interrupt(5, edge, active_high) == raw({0x89, 6, 0, 3, 1, 5, 0, 0, 0}));
  CHECK(aml::interrupt(5, level, active_low, aml::Sharing::shared) == raw({0x89, 6, 0, 0xd, 1, 5, 0, 0, 0}));
  CHECK(aml::legacy_irq(4, edge, active_high) == raw({0x23, 0x10, 0, 1}));
  CHECK(aml::legacy_irq(9, level, active_low, aml::Sharing::shared) == raw({0x23, 0, 2, 0x18}));
  CHECK(aml::address_range(aml::AddressSpace::bus_number, aml::AddressWidth::word, aml::AddressUse::produced, 0, 256) ==
        raw({0x88, 0xd, 0, 2, 0xc, 0, 0, 0, 0, 0, 0xff, 0, 0, 0, 0, 1}));
  const Bytes wide = aml::address_range(aml::AddressSpace::memory, aml::AddressWidth::qword, aml::AddressUse::consumed,
                                        0x80'0000'0000, 0x1000);
  CHECK(wide.size() == 0x2b + 3);
  CHECK(Bytes(wide.begin(), wide.begin() + 6) == raw({0x8a, 0x2b, 0, 0, 0xd, 1}));
  CHECK(Bytes(wide.begin() + 22, wide.begin() + 30) == raw({0xff, 0x0f, 0, 0, 0x80, 0, 0, 0}));
}
