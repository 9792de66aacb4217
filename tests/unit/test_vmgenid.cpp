// SPDX-License-Identifier: Apache-2.0
// The generation id: what a machine says of itself when it boots, goes on, and goes on elsewhere.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <span>

#include "boot/aml.hpp"
#include "fake_host.hpp"
#include "fake_plugin.hpp"

using namespace vmm::test;
namespace aml = vmm::aml;

namespace {

// As docs/fork.md has it.
struct Page {
  char magic[8];
  uint32_t version, size_bytes;
  std::array<uint8_t, 16> id;
  uint64_t generation;
  std::array<uint8_t, 32> seed;
  char name[64];
};
constexpr uint64_t kPage = 0x6000;
constexpr uint32_t kGsi = 13;

struct Machine {
  FakeHost host;
  DeviceUnderTest device{PluginFile("pc-platform").device("vmgenid"), host.handle("vmgenid")};

  explicit Machine(const std::string& name = "") {
    host.machine_name = name;
    REQUIRE_MESSAGE(device.configure() == CLONE_OK, device.error);
  }
  Page page() {
    Page page;
    REQUIRE(host.memory().read({kPage}, &page, sizeof page));
    return page;
  }
  SavedState save() {
    SavedState state;
    REQUIRE(device.quiesce() == CLONE_OK);
    REQUIRE(device.save(state) == CLONE_OK);
    return state;
  }
};

}  // namespace

TEST_CASE("vmgenid: ACPI describes a generation counter and a device that tells of its change") {
  Machine m;
  // That all of it is well-formed is for iasl to say (test_acpi.cpp).
  const auto has = [&](const aml::Bytes& part) {
    return std::ranges::search(m.host.acpi_aml, part).begin() != m.host.acpi_aml.end();
  };
  for (const char* name : {"_CID", "_DDN"}) CHECK(has(aml::name(name, aml::string("VM_Gen_Counter"))));
  const std::string_view halves("\x02\x0b\x10\x60\x00", 5);  // two of them: 0x6010 and zero
  const auto package = std::as_bytes(std::span(halves));
  CHECK(has({package.begin(), package.end()}));
  CHECK(has(aml::name("_HID", aml::string("ACPI0013"))));
  CHECK(has(aml::interrupt(kGsi, aml::Trigger::edge, aml::Polarity::active_high)));
  CHECK(has(aml::notify("VGEN", 0x80)));
}

TEST_CASE("vmgenid: a boot writes the page and interrupts nobody; pauses change nothing") {
  Machine m("web");
  REQUIRE(m.device.start() == CLONE_OK);
  const Page page = m.page();
  CHECK(std::memcmp(page.magic, "CLONEID", 8) == 0);
  CHECK(page.version == 1);
  CHECK(page.size_bytes == sizeof page);
  CHECK(page.generation == 1);
  CHECK(std::string(page.name) == "web");
  REQUIRE(m.device.quiesce() == CLONE_OK);
  REQUIRE(m.device.resume() == CLONE_OK);
  const Page again = m.page();
  CHECK(std::memcmp(&again, &page, sizeof page) == 0);
  CHECK(m.host.interrupts(kGsi) == 0);
  // The next boot is another run.
  REQUIRE(m.device.quiesce() == CLONE_OK);
  REQUIRE(m.device.reset() == CLONE_OK);
  REQUIRE(m.device.resume() == CLONE_OK);
  CHECK(m.page().id != page.id);
  CHECK(m.page().generation == 1);
  CHECK(m.host.interrupts(kGsi) == 0);
}

TEST_CASE("vmgenid: each load makes another id and seed, and interrupts once when it begins") {
  Machine source("source");
  REQUIRE(source.device.start() == CLONE_OK);
  SavedState state = source.save();
  REQUIRE(source.device.resume() == CLONE_OK);
  const Page was = source.page();
  Machine one("one"), two(std::string(80, 'x'));
  for (Machine* fork : {&one, &two}) {
    REQUIRE_MESSAGE(fork->device.load(state) == CLONE_OK, fork->device.error);
    CHECK(fork->host.interrupts(kGsi) == 0);  // the machine's interrupt chips may not have been loaded yet
    REQUIRE(fork->device.start() == CLONE_OK);
    CHECK(fork->host.interrupts(kGsi) == 1);
    CHECK(fork->page().generation == 2);
    CHECK(fork->page().id != was.id);
    CHECK(fork->page().seed != was.seed);
  }
  CHECK(one.page().id != two.page().id);
  CHECK(one.page().seed != two.page().seed);
  CHECK(std::string(one.page().name) == "one");
  CHECK(std::string(two.page().name) == std::string(63, 'x'));
  const Page is = source.page();
  CHECK(std::memcmp(&is, &was, sizeof is) == 0);
  CHECK(source.host.interrupts(kGsi) == 0);

  SavedState next = one.save();
  Machine third;
  REQUIRE(third.device.load(next) == CLONE_OK);
  REQUIRE(third.device.start() == CLONE_OK);
  CHECK(third.page().generation == 3);
  CHECK(third.page().name[0] == '\0');
}

TEST_CASE("vmgenid: what cannot have been saved is refused") {
  Machine m;
  REQUIRE(m.device.start() == CLONE_OK);
  const SavedState good = m.save();
  for (const uint64_t generation : {uint64_t{0}, ~uint64_t{0}}) {
    SavedState bad = good;
    std::memcpy(bad.sections["generation"].bytes.data(), &generation, sizeof generation);
    CHECK(m.device.load(bad) == CLONE_ERR_CORRUPT);
  }
  SavedState none;
  CHECK(m.device.load(none) == CLONE_ERR_CORRUPT);
}
