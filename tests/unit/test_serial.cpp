// SPDX-License-Identifier: Apache-2.0
// The serial port as a guest's driver and the user at the console see it.
#include <doctest/doctest.h>
#include <stdlib.h>
#include <unistd.h>

#include <fstream>
#include <iterator>
#include <random>
#include <string>

#include "fake_host.hpp"
#include "fake_plugin.hpp"

using namespace vmm::test;

namespace {

enum Register : uint16_t { RBR = 0x3f8, THR = RBR, IER, IIR, FCR = IIR, LCR, MCR, LSR, MSR, SCR };

struct Machine {
  FakeHost host;
  DeviceUnderTest serial{PluginFile("serial").device("serial"), host.handle("serial.0")};

  explicit Machine(const std::map<std::string, std::string>& options = {}) {
    REQUIRE_MESSAGE(serial.configure(options) == CLONE_OK, serial.error);
    REQUIRE(serial.start() == CLONE_OK);
  }
  uint8_t in(uint16_t port) { return host.read<uint8_t>(CLONE_BUS_PIO, port); }
  void out(uint16_t port, unsigned value) { host.write(CLONE_BUS_PIO, port, static_cast<uint8_t>(value)); }
  // As Linux leaves an open port.
  void open_port() {
    out(FCR, 0x81);
    out(LCR, 0x03);
    out(MCR, 0x0b);
    out(IER, 0x05);
  }
  std::string receive_all() {
    std::string all;
    while (in(LSR)&1) all += static_cast<char>(in(RBR));
    return all;
  }
};

}  // namespace

TEST_CASE("serial: describes itself and writes to the console") {
  Machine machine;
  REQUIRE(machine.host.acpi_nodes.size() == 1);
  const auto& node = machine.host.acpi_nodes[0];
  CHECK(node.hid == "PNP0501");
  REQUIRE(node.resources.size() == 2);
  CHECK(node.resources[0].start == 0x3f8);
  CHECK(node.resources[0].length == 8);
  CHECK(node.resources[1].start == 4);
  for (const char letter : std::string("boot\n")) {
    CHECK((machine.in(LSR)&0x60) == 0x60);
    machine.out(THR, static_cast<uint8_t>(letter));
  }
  CHECK(machine.host.console_output() == "boot\n");
  CHECK(machine.host.interrupts(4) == 0);
}

TEST_CASE("serial: Linux's probe finds a sound 16550A") {
  Machine m;
  // autoconfig(): IER keeps four bits, the scratch register keeps eight.
  m.out(IER, 0);
  CHECK(m.in(IER) == 0);
  m.out(IER, 0x0f);
  CHECK((m.in(IER)&0x0f) == 0x0f);
  m.out(IER, 0x40);
  CHECK(m.in(IER) == 0);
  m.out(SCR, 0xa5);
  CHECK(m.in(SCR) == 0xa5);
  // Loopback with OUT2 and RTS comes back as DCD and CTS.
  m.out(MCR, 0x10 | 0x0a);
  CHECK((m.in(MSR)&0xf0) == 0x90);
  m.out(MCR, 0);
  CHECK((m.in(MSR)&0xf0) == 0xb0);
  // FIFOs: both bits of IIR, no 64-byte FIFO; no EFR under LCR 0xbf.
  m.out(FCR, 0x01);
  CHECK((m.in(IIR)&0xc0) == 0xc0);
  m.out(LCR, 0xbf);
  CHECK(m.in(IIR) != 0);
  m.out(LCR, 0x80);
  m.out(RBR, 1);
  m.out(IER, 0);
  CHECK(m.in(RBR) == 1);
  m.out(LCR, 0);
  m.out(FCR, 0x21);
  CHECK((m.in(IIR)&0xe0) == 0xc0);
  CHECK(m.host.console_output().empty());

  // serial8250_do_startup(): the transmitter's interrupt comes again each time it is enabled (UART_BUG_THRE, _TXEN).
  m.out(MCR, 0x08);
  for (int i = 0; i < 2; ++i) {
    m.out(IER, 0x02);
    CHECK((m.in(LSR)&0x40) != 0);
    CHECK((m.in(IIR)&0x0f) == 0x02);
    CHECK((m.in(IIR)&0x0f) == 0x01);
    m.out(IER, 0);
  }
}

TEST_CASE("serial: the transmitter's interrupt follows the chip and costs few changes of the line") {
  Machine m;
  m.open_port();
  m.out(IER, 0x07);
  CHECK(m.host.interrupts(4) == 1);
  CHECK((m.in(IIR)&0x3f) == 0x02);
  CHECK_FALSE(m.host.level(4));
  for (int i = 0; i < 16; ++i) m.out(THR, 'x');
  CHECK(m.host.level(4));
  CHECK(m.host.interrupts(4) == 1);  // one for the burst
  m.in(LSR);                         // does not acknowledge it
  CHECK(m.host.level(4));
  CHECK((m.in(IIR)&0x3f) == 0x02);
  CHECK((m.in(IIR)&0x3f) == 0x01);
  CHECK_FALSE(m.host.level(4));
}

TEST_CASE("serial: received bytes interrupt, before the transmitter, while OUT2 is set") {
  Machine m;
  m.open_port();
  CHECK(m.host.type("hi") == 2);
  CHECK(m.host.interrupts(4) == 1);
  m.out(IER, 0x07);
  CHECK((m.in(IIR)&0x0f) == 0x0c);  // fewer than the trigger level of 8
  CHECK(m.host.type("123456") == 6);
  CHECK((m.in(IIR)&0x0f) == 0x04);
  m.out(MCR, 0x03);
  CHECK_FALSE(m.host.level(4));
  m.out(MCR, 0x0b);
  CHECK(m.host.level(4));
  CHECK(m.receive_all() == "hi123456");
  CHECK((m.in(IIR)&0x0f) == 0x02);
  CHECK(m.in(RBR) == 0);
}

TEST_CASE("serial: input waits for a driver that listens, and for room") {
  Machine m;
  CHECK(m.host.type("early") == 0);
  m.out(FCR, 0x07);  // a driver that starts clears what it finds
  m.in(RBR);
  CHECK(m.host.console_input_wanted() == 0);
  m.open_port();
  CHECK(m.host.console_input_wanted() == 1);

  const std::string much(100, 'm');
  CHECK(m.host.type(much) == 64);
  CHECK(m.host.type("more") == 0);
  CHECK(m.host.console_input_wanted() == 1);
  m.in(RBR);
  CHECK(m.host.console_input_wanted() == 2);
  m.in(RBR);
  CHECK(m.host.console_input_wanted() == 2);  // once
  CHECK(m.receive_all().size() == 62);
  CHECK(m.host.type("x") == 1);
  m.out(FCR, 0x83);
  CHECK((m.in(LSR)&1) == 0);

  Machine polled;
  CHECK(polled.host.type("y") == 0);
  for (int i = 0; i < 8; ++i) polled.in(LSR);
  CHECK(polled.host.console_input_wanted() == 1);
  CHECK(polled.host.type("y") == 1);
  CHECK(polled.receive_all() == "y");
}

TEST_CASE("serial: loopback returns bytes, overruns, and keeps them from the console") {
  Machine m;
  m.out(FCR, 0x01);
  m.out(MCR, 0x1b);
  m.out(IER, 0x0d);
  m.in(MSR);
  for (int i = 0; i < 65; ++i) m.out(THR, i);
  CHECK((m.in(IIR)&0x0f) == 0x06);
  CHECK((m.in(LSR)&0x03) == 0x03);
  CHECK((m.in(LSR)&0x02) == 0);
  for (int i = 0; i < 64; ++i) CHECK(m.in(RBR) == i);
  CHECK(m.host.type("no") == 0);
  CHECK(m.host.console_output().empty());
  // RI tells only its end, the others each change.
  m.out(MCR, 0x1f);
  CHECK(m.in(MSR) == 0xf0);
  m.out(MCR, 0x18);
  CHECK((m.in(IIR)&0x0f) == 0x00);
  CHECK(m.in(MSR) == 0x87);
  CHECK((m.in(IIR)&0x0f) == 0x01);
}

TEST_CASE("serial: saved and loaded with bytes under way; the same state gives the same bytes") {
  Machine m;
  m.open_port();
  m.out(SCR, 0x42);
  CHECK(m.host.type("abc") == 3);
  CHECK(m.in(RBR) == 'a');
  REQUIRE(m.serial.quiesce() == CLONE_OK);
  CHECK(m.host.type("late") == 0);
  SavedState state, again;
  REQUIRE(m.serial.save(state) == CLONE_OK);
  REQUIRE(m.serial.save(again) == CLONE_OK);
  CHECK(state.sections == again.sections);
  REQUIRE(m.serial.resume() == CLONE_OK);
  CHECK(m.host.console_input_wanted() == 1);

  FakeHost host;
  DeviceUnderTest copy(PluginFile("serial").device("serial"), host.handle("serial.0"));
  REQUIRE(copy.configure() == CLONE_OK);
  REQUIRE(copy.load(state) == CLONE_OK);
  CHECK_FALSE(host.level(4));
  REQUIRE(copy.start() == CLONE_OK);
  CHECK(host.level(4));
  CHECK(host.read<uint8_t>(CLONE_BUS_PIO, SCR) == 0x42);
  CHECK(host.read<uint8_t>(CLONE_BUS_PIO, RBR) == 'b');
  CHECK(host.read<uint8_t>(CLONE_BUS_PIO, RBR) == 'c');
  CHECK_FALSE(host.level(4));

  // Reset: as after start().
  REQUIRE(copy.quiesce() == CLONE_OK);
  REQUIRE(copy.reset() == CLONE_OK);
  SavedState fresh, first;
  REQUIRE(copy.save(fresh) == CLONE_OK);
  Machine unused;
  REQUIRE(unused.serial.save(first) == CLONE_OK);
  CHECK(fresh.sections == first.sections);
  REQUIRE(copy.resume() == CLONE_OK);

  // A hostile stream.
  SavedState missing;
  CHECK(copy.load(missing) == CLONE_ERR_CORRUPT);
  CHECK(copy.error.find("uart") != std::string::npos);
  SavedState shorter = state;
  shorter.sections["uart"].bytes.pop_back();
  CHECK(copy.load(shorter) == CLONE_ERR_CORRUPT);
  SavedState newer = state;
  newer.sections["uart"].version = 2;
  CHECK(copy.load(newer) == CLONE_ERR_CORRUPT);
  SavedState lying = state;
  lying.sections["uart"].bytes[11] = std::byte{65};
  CHECK(copy.load(lying) == CLONE_ERR_CORRUPT);
}

TEST_CASE("serial: a second port writes to a file, and cannot be the console too") {
  char path[] = "/tmp/clone-test-serial-XXXXXX";
  ::close(::mkstemp(path));
  const auto content = [&] {
    std::ifstream file(path);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  {
    Machine m({{"port", "0x2f8"}, {"irq", "3"}, {"file", path}});
    for (const char letter : std::string("one\ntwo")) m.out(0x2f8, static_cast<uint8_t>(letter));
    CHECK(content() == "one\n");
    CHECK(m.host.console_output().empty());

    DeviceUnderTest first(PluginFile("serial").device("serial"), m.host.handle("serial.1"));
    REQUIRE(first.configure() == CLONE_OK);
    DeviceUnderTest taken(PluginFile("serial").device("serial"), m.host.handle("serial.2"));
    CHECK(taken.configure({{"port", "0x3e8"}, {"irq", "5"}}) == CLONE_ERR_BUSY);
    DeviceUnderTest silent(PluginFile("serial").device("serial"), m.host.handle("serial.3"));
    CHECK(silent.configure({{"port", "0x3e8"}, {"irq", "6"}, {"console", "off"}}) == CLONE_OK);
  }
  CHECK(content() == "one\ntwo");
  ::unlink(path);

  FakeHost host;
  DeviceUnderTest nowhere(PluginFile("serial").device("serial"), host.handle("serial.0"));
  CHECK(nowhere.configure({{"file", "/nonexistent/log"}}) == CLONE_ERR_SYSTEM);
  CHECK(nowhere.error.find("/nonexistent/log: No such file") != std::string::npos);
  CHECK(host.claim_count() == 0);
}

TEST_CASE("serial: no sequence of accesses does harm; every state that arises can be loaded") {
  Machine m;
  std::mt19937 random(7);
  for (int i = 0; i < 200'000; ++i) {
    const uint16_t offset = random() % 8;
    const uint32_t size = 1u << random() % 4;
    if (offset + size > 8) continue;
    uint64_t value = (static_cast<uint64_t>(random()) << 32) | random();
    if (random() % 2)
      m.host.bus_write(CLONE_BUS_PIO, static_cast<uint16_t>(RBR + offset), &value, size);
    else
      m.host.bus_read(CLONE_BUS_PIO, static_cast<uint16_t>(RBR + offset), &value, size);
    if (i % 50 == 0) m.host.type("typed while the guest does what it likes");
    if (i % 5000 == 0) {
      REQUIRE(m.serial.quiesce() == CLONE_OK);
      SavedState state;
      REQUIRE(m.serial.save(state) == CLONE_OK);
      REQUIRE_MESSAGE(m.serial.load(state) == CLONE_OK, m.serial.error);
      REQUIRE(m.serial.resume() == CLONE_OK);
    }
  }
  m.out(LCR, 0);
  m.out(MCR, 0x0b);
  m.out(FCR, 0x07);
  const size_t before = m.host.console_output().size();
  m.out(THR, '!');
  CHECK(m.host.console_output().size() == before + 1);
}
