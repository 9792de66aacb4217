// SPDX-License-Identifier: Apache-2.0
// Power management registers, the clock and the keyboard controller, as guests drive them.
#include <doctest/doctest.h>
#include <time.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <random>

#include "fake_host.hpp"
#include "fake_plugin.hpp"

using namespace vmm::test;

namespace {

struct Machine {
  FakeHost host;
  DeviceUnderTest device;

  explicit Machine(const char* name) : device(PluginFile("pc-platform").device(name), host.handle(name)) {
    REQUIRE_MESSAGE(device.configure() == CLONE_OK, device.error);
    REQUIRE(device.start() == CLONE_OK);
  }
  uint8_t in8(uint16_t port) { return host.read<uint8_t>(CLONE_BUS_PIO, port); }
  uint16_t in16(uint16_t port) { return host.read<uint16_t>(CLONE_BUS_PIO, port); }
  uint32_t in32(uint16_t port) { return host.read<uint32_t>(CLONE_BUS_PIO, port); }
  void out8(uint16_t port, unsigned value) { host.write(CLONE_BUS_PIO, port, static_cast<uint8_t>(value)); }
  void out16(uint16_t port, unsigned value) { host.write(CLONE_BUS_PIO, port, static_cast<uint16_t>(value)); }
  void fuzz(uint16_t first, uint16_t count) {
    std::mt19937 random(11);
    for (int i = 0; i < 100'000; ++i) {
      const uint16_t offset = static_cast<uint16_t>(random() % count);
      const uint32_t size = 1u << random() % 4;
      if (offset + size > count) continue;
      uint64_t value = (static_cast<uint64_t>(random()) << 32) | random();
      if (random() % 2)
        host.bus_write(CLONE_BUS_PIO, static_cast<uint16_t>(first + offset), &value, size);
      else
        host.bus_read(CLONE_BUS_PIO, static_cast<uint16_t>(first + offset), &value, size);
      if (i % 5000 == 0) {
        REQUIRE(device.quiesce() == CLONE_OK);
        SavedState state;
        REQUIRE(device.save(state) == CLONE_OK);
        REQUIRE_MESSAGE(device.load(state) == CLONE_OK, device.error);
        REQUIRE(device.resume() == CLONE_OK);
      }
    }
  }
};

}  // namespace

TEST_CASE("acpi-pm: power-off and reset are requested by the values that it announced, and by no others") {
  Machine m("acpi-pm");
  const clone_acpi_power& power = m.host.acpi_power;
  REQUIRE(power.size == sizeof power);
  CHECK(power.sci_gsi == 9);
  CHECK((m.in16(power.control_port) & 1) == 1);  // SCI_EN: ACPI mode from the start
  const uint16_t sleep_type = static_cast<uint16_t>(power.sleep_type_s5 << 10);
  m.out16(power.control_port, sleep_type);
  CHECK(m.in16(power.control_port) == (sleep_type | 1));
  m.out16(power.control_port, 1u << 10 | 1u << 13);
  m.out8(power.reset_port, 0);
  m.out8(power.reset_port, 0x02);
  CHECK(m.host.machine_requests().empty());
  m.out16(power.control_port, sleep_type | 1u << 13);
  CHECK((m.in16(power.control_port) & 1u << 13) == 0);  // SLP_EN reads as zero
  m.out8(power.reset_port, power.reset_value);
  CHECK(m.host.machine_requests() == std::vector<uint32_t>{CLONE_MACHINE_POWER_OFF, CLONE_MACHINE_RESET});
}

TEST_CASE("acpi-pm: the power button raises the SCI of a guest that wants it, until the guest clears it") {
  Machine m("acpi-pm");
  const uint16_t status = m.host.acpi_power.event_port, enable = static_cast<uint16_t>(status + 2);
  CHECK(m.host.press_power_button() != CLONE_OK);  // nobody listens
  CHECK_FALSE(m.host.level(9));
  CHECK(m.in16(status) == 0x100);
  m.out16(status, 0x100);
  CHECK(m.in16(status) == 0);
  m.out16(enable, 0x120);
  CHECK(m.in16(enable) == 0x120);
  CHECK(m.host.press_power_button() == CLONE_OK);
  CHECK(m.host.level(9));
  m.out16(status, 0xfeff);
  CHECK(m.host.level(9));
  m.out8(static_cast<uint16_t>(status + 1), 0x01);
  CHECK_FALSE(m.host.level(9));
  CHECK(m.in16(enable) == 0x120);
}

TEST_CASE("acpi-pm: the timer runs at 3.579545 MHz and goes on after a load") {
  Machine m("acpi-pm");
  const uint16_t timer = m.host.acpi_power.timer_port;
  const auto start = std::chrono::steady_clock::now();
  const uint32_t first = m.in32(timer);
  ::usleep(50'000);
  const uint32_t ticks = m.in32(timer) - first;
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  CHECK(ticks >= 0.049 * 3'579'545);
  CHECK(ticks <= (seconds + 0.001) * 3'579'545);

  m.host.press_power_button();
  m.out16(m.host.acpi_power.event_port + 2, 0x100);
  REQUIRE(m.device.quiesce() == CLONE_OK);
  SavedState state;
  REQUIRE(m.device.save(state) == CLONE_OK);
  const uint32_t at_save = m.in32(timer);
  ::usleep(20'000);
  FakeHost host;
  DeviceUnderTest copy(PluginFile("pc-platform").device("acpi-pm"), host.handle("acpi-pm"));
  REQUIRE(copy.configure() == CLONE_OK);
  REQUIRE(copy.load(state) == CLONE_OK);
  REQUIRE(copy.start() == CLONE_OK);
  CHECK(host.level(9));
  CHECK(host.read<uint32_t>(CLONE_BUS_PIO, timer) - at_save < 0.015 * 3'579'545);

  state.sections["pm"].bytes[0] = std::byte{0x02};
  CHECK(copy.load(state) == CLONE_ERR_CORRUPT);
  REQUIRE(copy.quiesce() == CLONE_OK);
  REQUIRE(copy.reset() == CLONE_OK);
  REQUIRE(copy.resume() == CLONE_OK);
  CHECK_FALSE(host.level(9));
  CHECK(host.read<uint16_t>(CLONE_BUS_PIO, 0x602) == 0);
}

namespace {

struct Clock : Machine {
  Clock() : Machine("rtc") {}
  uint8_t get(unsigned index) {
    out8(0x70, index);
    return in8(0x71);
  }
  void set(unsigned index, unsigned value) {
    out8(0x70, index);
    out8(0x71, value);
  }
  static int bcd(unsigned value) { return static_cast<int>((value >> 4) * 10 + (value & 15)); }
  // As a driver reads it: again until nothing changed meanwhile.
  time_t time() {
    while (true) {
      while (get(10) & 0x80) {
      }
      tm parts{};
      parts.tm_sec = bcd(get(0));
      parts.tm_min = bcd(get(2));
      parts.tm_hour = bcd(get(4));
      parts.tm_mday = bcd(get(7));
      parts.tm_mon = bcd(get(8)) - 1;
      parts.tm_year = bcd(get(9)) + 100 * bcd(get(0x32)) - 1900;
      if (parts.tm_sec == bcd(get(0))) return ::timegm(&parts);
    }
  }
  // As Linux sets it (mc146818_set_time()).
  void set_time(const tm& parts) {
    const uint8_t b = get(11), a = get(10);
    set(11, b | 0x80);
    set(10, a | 0x70);
    const auto put = [&](unsigned index, int value) { set(index, value / 10 << 4 | value % 10); };
    put(9, parts.tm_year % 100);
    put(8, parts.tm_mon + 1);
    put(7, parts.tm_mday);
    put(4, parts.tm_hour);
    put(2, parts.tm_min);
    put(0, parts.tm_sec);
    put(0x32, (parts.tm_year + 1900) / 100);
    set(11, b);
    set(10, a);
  }
};

}  // namespace

TEST_CASE("rtc: tells the host's time in UTC") {
  Clock clock;
  CHECK(std::llabs(clock.time() - ::time(nullptr)) <= 1);
  CHECK((clock.get(13) & 0x80) != 0);
  const time_t now = ::time(nullptr);
  tm parts{};
  ::gmtime_r(&now, &parts);
  CHECK(clock.get(6) == parts.tm_wday + 1);
  CHECK((clock.host.acpi_legacy & CLONE_ACPI_LEGACY_RTC) != 0);
  REQUIRE(clock.host.acpi_nodes.size() == 1);
  CHECK(clock.host.acpi_nodes[0].hid == "PNP0B00");
}

TEST_CASE("rtc: binary and 12-hour registers") {
  Clock clock;
  tm parts{};
  for (const auto& [hour, expected] : {std::pair{0, 0x12}, {11, 0x11}, {12, 0x92}, {23, 0x91}}) {
    parts.tm_year = 124;
    parts.tm_mday = 29;
    parts.tm_mon = 1;
    parts.tm_hour = hour;
    parts.tm_min = 34;
    clock.set_time(parts);
    clock.set(11, 0x00);
    CHECK(clock.get(4) == expected);
    clock.set(11, 0x06);
    CHECK(clock.get(4) == hour);
    CHECK(clock.get(2) == 34);
    CHECK(clock.get(9) == 24);
    CHECK(clock.get(0x32) == 20);
    clock.set(11, 0x02);
  }
}

TEST_CASE("rtc: a time that the guest sets goes on, over reset and save too") {
  Clock clock;
  tm parts{};
  parts.tm_year = 99;
  parts.tm_mon = 11;
  parts.tm_mday = 31;
  parts.tm_hour = 23;
  parts.tm_min = 59;
  parts.tm_sec = 10;
  clock.set_time(parts);
  const time_t wanted = ::timegm(&parts);
  CHECK(clock.time() - wanted <= 1);
  CHECK(clock.time() >= wanted);
  // While the guest holds SET the registers stand.
  clock.set(11, 0x82);
  const uint8_t second = clock.get(0);
  ::usleep(1'100'000);
  CHECK(clock.get(0) == second);
  clock.set(0, 0x20);
  clock.set(11, 0x02);
  CHECK(clock.time() - wanted >= 10);
  CHECK(clock.time() - wanted <= 11);

  clock.set(0x40, 0x99);
  REQUIRE(clock.device.quiesce() == CLONE_OK);
  SavedState state, again;
  REQUIRE(clock.device.save(state) == CLONE_OK);
  REQUIRE(clock.device.save(again) == CLONE_OK);
  CHECK(state.sections == again.sections);
  Clock copy;
  REQUIRE(copy.device.quiesce() == CLONE_OK);
  REQUIRE(copy.device.load(state) == CLONE_OK);
  REQUIRE(copy.device.reset() == CLONE_OK);
  REQUIRE(copy.device.resume() == CLONE_OK);
  CHECK(copy.time() - wanted <= 12);
  CHECK(copy.time() - wanted >= 10);
  CHECK(copy.get(0x40) == 0x99);
  for (int i = 0; i < 8; ++i) state.sections["rtc"].bytes[static_cast<size_t>(i)] = std::byte{0x7f};
  CHECK(copy.device.load(state) == CLONE_ERR_CORRUPT);
}

TEST_CASE("rtc: update and alarm interrupts hold the line until register C is read") {
  Clock clock;
  clock.get(12);
  CHECK(clock.host.interrupts(8) == 0);
  clock.set(11, 0x12);
  REQUIRE(clock.host.run_until([&] { return clock.host.level(8); }, 3000));
  CHECK((clock.get(12) & 0x90) == 0x90);
  CHECK_FALSE(clock.host.level(8));
  CHECK(clock.get(12) == 0);

  clock.set(1, 0xc0);  // every second
  clock.set(3, 0xff);
  clock.set(5, 0xff);
  clock.set(11, 0x22);
  REQUIRE(clock.host.run_until([&] { return clock.host.level(8); }, 3000));
  CHECK((clock.get(12) & 0xa0) == 0xa0);
  clock.set(5, 0x24);  // never
  clock.get(12);
  CHECK_FALSE(clock.host.run_until([&] { return clock.host.level(8); }, 1200));
}

TEST_CASE("i8042: resets by 0xfe and by the output port, and answers a probe at once") {
  Machine m("i8042");
  CHECK((m.in8(0x64) & 0x03) == 0);  // neither buffer is full: kb_wait() returns
  CHECK(m.host.acpi_legacy == 0);
  const auto command = [&](unsigned value) {
    m.out8(0x64, value);
    REQUIRE((m.in8(0x64) & 1) == 1);
    return m.in8(0x60);
  };
  CHECK(command(0xaa) == 0x55);
  CHECK((m.in8(0x64) & 1) == 0);
  const uint8_t byte = command(0x20);
  m.out8(0x64, 0x60);
  m.out8(0x60, byte | 0x40u);
  CHECK(command(0x20) == (byte | 0x40));
  CHECK(command(0xa9) == 0x01);
  m.out8(0x64, 0xd3);
  m.out8(0x60, 0x5a);
  CHECK((m.in8(0x64) & 0x21) == 0x01);  // an answer, but not from a mouse
  m.in8(0x60);
  m.out8(0x60, 0xf2);  // to a keyboard: silence
  CHECK((m.in8(0x64) & 1) == 0);
  m.out8(0x64, 0xff);
  CHECK(m.host.machine_requests().empty());
  m.out8(0x64, 0xfe);
  CHECK(m.host.machine_requests() == std::vector<uint32_t>{CLONE_MACHINE_RESET});
  m.out8(0x64, 0xd1);
  m.out8(0x60, 0x02);
  CHECK(m.host.machine_requests().size() == 2);

  m.out8(0x64, 0xaa);
  SavedState state;
  REQUIRE(m.device.quiesce() == CLONE_OK);
  REQUIRE(m.device.save(state) == CLONE_OK);
  Machine copy("i8042");
  REQUIRE(copy.device.load(state) == CLONE_OK);
  CHECK((copy.in8(0x64) & 1) == 1);
  CHECK(copy.in8(0x60) == 0x55);
  state.sections["i8042"].bytes[2] = std::byte{7};
  CHECK(copy.device.load(state) == CLONE_ERR_CORRUPT);
  REQUIRE(copy.device.reset() == CLONE_OK);
  CHECK((copy.in8(0x64) & 1) == 0);
}

TEST_CASE("pc-platform: no sequence of accesses does harm; every state that arises can be loaded") {
  Machine("acpi-pm").fuzz(0x600, 16);
  Machine("rtc").fuzz(0x70, 2);
  Machine("i8042").fuzz(0x60, 5);
}
