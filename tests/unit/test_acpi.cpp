// SPDX-License-Identifier: Apache-2.0
// ACPI tables, found the way a guest finds them and judged by iasl.
#include <doctest/doctest.h>
#include <stdlib.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>

#include "boot/acpi.hpp"
#include "boot/layout.hpp"
#include "fake_host.hpp"
#include "fake_plugin.hpp"

using namespace vmm;
using aml::Bytes;
using vmm::test::DeviceUnderTest;
using vmm::test::FakeHost;
using vmm::test::PluginFile;

namespace {

class Tables {
 public:
  explicit Tables(const AcpiConfig& config) : memory_(make_memory()) {
    auto rsdp = write_acpi(memory_, config);
    REQUIRE(rsdp.ok());
    CHECK(rsdp->value == 0xe0000);  // where a guest that scans finds it, 16-byte aligned
    CHECK(text(*rsdp, 8) == "RSD PTR ");
    CHECK(sum(*rsdp, 20) == 0);
    CHECK(sum(*rsdp, 36) == 0);
    CHECK(get<uint8_t>(*rsdp + 15) == 2);
    const GuestAddress xsdt{get<uint64_t>(*rsdp + 24)};
    add(xsdt);
    for (uint32_t offset = 36; offset < size("XSDT"); offset += 8) add({get<uint64_t>(xsdt + offset)});
    add({at<uint64_t>("FACP", 140)});
    CHECK(at<uint32_t>("FACP", 40) == at<uint64_t>("FACP", 140));
  }

  bool has(const std::string& signature) const { return where_.contains(signature); }
  uint32_t size(const std::string& signature) const { return get<uint32_t>(where_.at(signature) + 4); }
  template <typename T>
  T at(const std::string& signature, uint64_t offset) const {
    return get<T>(where_.at(signature) + offset);
  }
  template <typename T>
  T get(GuestAddress address) const {
    return memory_.load<T>(address).value();
  }
  std::string text(GuestAddress address, uint64_t size_bytes) const {
    return {reinterpret_cast<const char*>(memory_.slice(address, size_bytes)), size_bytes};
  }
  std::string content(const std::string& signature) const { return text(where_.at(signature), size(signature)); }

  // The MADT's structures of one type.
  std::vector<std::string> interrupt_structures(uint8_t type) const {
    std::vector<std::string> found;
    for (uint32_t offset = 44; offset < size("APIC");) {
      const auto length = at<uint8_t>("APIC", offset + 1);
      REQUIRE(length >= 2);
      if (at<uint8_t>("APIC", offset) == type) found.push_back(text(where_.at("APIC") + offset, length));
      offset += length;
    }
    return found;
  }

 private:
  static GuestMemory make_memory() {
    auto memory = GuestMemory::create({.size_bytes = 1 << 20});
    REQUIRE(memory.ok());
    return std::move(*memory);
  }
  int sum(GuestAddress address, uint64_t size_bytes) const {
    uint8_t total = 0;
    for (char byte : text(address, size_bytes)) total = static_cast<uint8_t>(total + byte);
    return total;
  }
  void add(GuestAddress address) {
    const std::string signature = text(address, 4);
    CAPTURE(signature);
    where_[signature] = address;
    CHECK(address.value + size(signature) <= 0x100000);
    CHECK(sum(address, size(signature)) == 0);
  }

  GuestMemory memory_;
  std::map<std::string, GuestAddress> where_;
};

Bytes node(const AcpiNode& given, unsigned index) {
  auto bytes = acpi_node(given, index);
  REQUIRE(bytes.ok());
  return std::move(*bytes);
}

AcpiConfig full_config() {
  AcpiConfig config;
  config.vcpu_count = 4;
  config.pm = AcpiPmBlock{.event_port = 0x600, .control_port = 0x604, .timer_port = 0x608, .timer_bits = 32};
  config.reset = AcpiReset{.port = 0x60c, .value = 6};
  config.pci = AcpiConfig::PciConfigWindow{.start = layout::kPciConfig, .bus_count = 256};
  config.overrides = {{.irq = 0, .gsi = 2}};
  config.has_rtc = true;
  using Ports = AcpiNode::Ports;
  using Memory = AcpiNode::Memory;
  using Interrupt = AcpiNode::Interrupt;
  config.device_nodes = {
      node({.hid = "PNP0501", .uid = 0, .resources = {Ports{0x3f8, 8}, Interrupt{4}}}, 0),
      node({.hid = "LNRO0005", .uid = 0, .resources = {Memory{{0xc0000000}, 0x200}, Interrupt{5}}}, 1),
      node({.hid = "LNRO0005",
            .cid = "PNP0C02",
            .uid = 1,
            .resources = {Memory{{0x40'0000'0000}, 1ull << 32}, Ports{0x1000, 0x1000},
                          Interrupt{20, aml::Trigger::level, aml::Polarity::active_low, aml::Sharing::shared}},
            .more = aml::method("_STA", 0, aml::return_value(aml::integer(15)))},
           46655),
  };
  return config;
}

// Runs a command in a folder; what it printed, then its exit status.
std::string run_in(const std::string& folder, const std::string& command) {
  FILE* pipe = ::popen(("cd " + folder + " && " + command + " 2>&1").c_str(), "r");
  REQUIRE(pipe != nullptr);
  std::string output;
  char buffer[4096];
  while (const size_t size = ::fread(buffer, 1, sizeof buffer, pipe)) output.append(buffer, size);
  return output + "exit " + std::to_string(::pclose(pipe));
}

// iasl has to read the table back, and to compile what it read without an error or a warning.
std::string disassembled(const std::string& table) {
  char folder[] = "/tmp/clone-test-acpi-XXXXXX";
  REQUIRE(::mkdtemp(folder) != nullptr);
  std::ofstream(folder + std::string("/dsdt.aml"), std::ios::binary) << table;
  const std::string decoded = run_in(folder, "iasl -d dsdt.aml");
  INFO(decoded);
  CHECK(decoded.find("ASL Output:    dsdt.dsl") != decoded.npos);
  CHECK(decoded.find("rror") == decoded.npos);
  CHECK(decoded.ends_with("exit 0"));
  std::ifstream file(folder + std::string("/dsdt.dsl"));
  const std::string source(std::istreambuf_iterator<char>(file), {});
  const std::string compiled = run_in(folder, "iasl -oa -p again dsdt.dsl");
  INFO(compiled);
  CHECK(compiled.find("Compilation successful. 0 Errors, 0 Warnings, 0 Remarks") != compiled.npos);
  std::ifstream again(folder + std::string("/again.aml"), std::ios::binary);
  const std::string recompiled(std::istreambuf_iterator<char>(again), {});
  // All but the header, where iasl puts its own name and version.
  CHECK(recompiled.size() == table.size());
  CHECK(recompiled.substr(std::min<size_t>(recompiled.size(), 36)) == table.substr(36));
  std::filesystem::remove_all(folder);
  return source;
}
}  // namespace

TEST_CASE("acpi: iasl reads the DSDT, and compiles it to the same bytes") {
  const std::string source = disassembled(Tables(full_config()).content("DSDT"));
  INFO(source);
  for (const std::string line :
       {"Name (\\_S5,", "Device (C000)", "Device (C003)", "Device (D000)", "Device (D001)", "Device (DZZZ)",
        "EisaId (\"PNP0501\") /* 16550A-compatible COM Serial Port */", "\"LNRO0005\"", "IO (Decode16,", "0xC0000000,",
        "0x00000040FFFFFFFF", "0x1FFF,", "Level, ActiveLow, Shared", "Edge, ActiveHigh, Exclusive"}) {
    CAPTURE(line);
    CHECK(source.find(line) != source.npos);
  }
}

TEST_CASE("acpi: iasl reads what plugins add, and compiles it to the same bytes") {
  AcpiConfig config = full_config();
  FakeHost host;
  DeviceUnderTest vmgenid(PluginFile("pc-platform").device("vmgenid"), host.handle("vmgenid"));
  DeviceUnderTest transport(PluginFile("transport-mmio").transport("mmio"), host.handle("mmio"));
  REQUIRE(vmgenid.configure() == CLONE_OK);
  REQUIRE(transport.configure({{"slots", "15"}}) == CLONE_OK);
  config.device_nodes.push_back(host.acpi_aml);
  const std::string source = disassembled(Tables(config).content("DSDT"));
  INFO(source);
  for (const std::string line :
       {"Device (VGEN)", "Notify (VGEN, 0x80)", "\"ACPI0013\"", "Device (SLTS)", "Name (_HID, \"ACPI0004\"",
        "OperationRegion (TAKN, SystemIO, 0x0680, 0x04)", "Field (TAKN, DWordAcc, NoLock, Preserve)", "T014,   1",
        "Device (S000)", "Device (S014)", "Method (_STA, 0, NotSerialized)", "Return ((T014 * 0x0F))", "0x00000200,",
        "Notify (SLTS, Zero)"}) {
    CAPTURE(line);
    CHECK(source.find(line) != source.npos);
  }
}

TEST_CASE("acpi: FADT with PM registers") {
  const Tables tables(full_config());
  CHECK(tables.size("FACP") == 276);
  CHECK(tables.at<uint8_t>("FACP", 8) == 6);
  CHECK(tables.at<uint8_t>("FACP", 131) == 5);
  const auto flags = tables.at<uint32_t>("FACP", 112);
  CHECK((flags & 1 << 20) == 0);
  CHECK((flags & 1 << 10) != 0);
  CHECK((flags & 1 << 8) != 0);
  CHECK((flags & 1 << 4) == 0);  // the fixed power button
  CHECK((flags & 1 << 5) != 0);
  CHECK(tables.at<uint16_t>("FACP", 46) == 9);
  CHECK(tables.at<uint32_t>("FACP", 48) == 0);
  CHECK(tables.at<uint32_t>("FACP", 56) == 0x600);
  CHECK(tables.at<uint32_t>("FACP", 64) == 0x604);
  CHECK(tables.at<uint32_t>("FACP", 76) == 0x608);
  CHECK(tables.at<uint32_t>("FACP", 88) == 0x04000204);
  CHECK(tables.at<uint64_t>("FACP", 120) == 0x60c);
  CHECK(tables.at<uint8_t>("FACP", 128) == 6);
  CHECK(tables.at<uint64_t>("FACP", 152) == 0x600);
  CHECK(tables.at<uint64_t>("FACP", 176) == 0x604);
  CHECK(tables.at<uint64_t>("FACP", 212) == 0x608);
  CHECK(tables.at<uint16_t>("FACP", 109) == 0x04);
  const GuestAddress facs{tables.at<uint32_t>("FACP", 36)};
  CHECK(facs.value % 64 == 0);
  CHECK(tables.text(facs, 4) == "FACS");
  CHECK(tables.get<uint32_t>(facs + 4) == 64);
}

TEST_CASE("acpi: without PM registers the machine is hardware-reduced") {
  AcpiConfig config;
  config.sleep_ports = AcpiSleepPorts{.control_port = 0x610, .status_port = 0x611};
  config.has_i8042 = true;
  const Tables tables(config);
  CHECK((tables.at<uint32_t>("FACP", 112) & 1 << 20) != 0);
  CHECK((tables.at<uint32_t>("FACP", 112) & 1 << 10) == 0);
  CHECK(tables.at<uint32_t>("FACP", 36) == 0);
  CHECK(tables.at<uint32_t>("FACP", 56) == 0);
  CHECK(tables.at<uint64_t>("FACP", 248) == 0x610);
  CHECK(tables.at<uint64_t>("FACP", 260) == 0x611);
  CHECK(tables.at<uint16_t>("FACP", 109) == 0x26);
  CHECK(tables.at<uint32_t>("APIC", 40) == 0);
  CHECK(tables.interrupt_structures(2).empty());
  CHECK_FALSE(tables.has("MCFG"));
  disassembled(tables.content("DSDT"));
}

TEST_CASE("acpi: MADT and MCFG") {
  const Tables tables(full_config());
  CHECK(tables.at<uint32_t>("APIC", 36) == 0xfee00000);
  CHECK(tables.at<uint32_t>("APIC", 40) == 1);
  const auto processors = tables.interrupt_structures(0);
  REQUIRE(processors.size() == 4);
  CHECK(processors[3] == std::string("\0\10\3\3\1\0\0\0", 8));
  CHECK(tables.interrupt_structures(9).empty());
  CHECK(tables.interrupt_structures(1).at(0) == std::string("\1\14\0\0\0\0\300\376\0\0\0\0", 12));
  const auto overrides = tables.interrupt_structures(2);
  REQUIRE(overrides.size() == 2);
  CHECK(overrides[0] == std::string("\2\12\0\0\2\0\0\0\5\0", 10));
  CHECK(overrides[1] == std::string("\2\12\0\11\11\0\0\0\15\0", 10));
  CHECK(tables.at<uint64_t>("MCFG", 44) == 0xe0000000);
  CHECK(tables.at<uint16_t>("MCFG", 54) == 0xff00);
}

TEST_CASE("acpi: x2APIC structures from id 255 on") {
  AcpiConfig config;
  config.vcpu_count = 257;
  const Tables tables(config);
  CHECK(tables.interrupt_structures(0).size() == 255);
  const auto processors = tables.interrupt_structures(9);
  REQUIRE(processors.size() == 2);
  CHECK(processors[1] == std::string("\11\20\0\0\0\1\0\0\1\0\0\0\0\1\0\0", 16));
  CHECK(disassembled(tables.content("DSDT")).find("Device (C100)") != std::string::npos);
}

TEST_CASE("acpi: nodes and tables that cannot be") {
  const auto refusal = [](const AcpiNode& given, unsigned index = 0) {
    auto bytes = acpi_node(given, index);
    return bytes ? std::string() : bytes.error().message;
  };
  for (const char* id : {"", "PNP05", "pnp0501", "PNP050G", "LNRO000Z", "LNRO00055", "\"NP0501", "ABCD\\000"}) {
    CAPTURE(id);
    CHECK(refusal({.hid = id}).find(std::string("ACPI id ") + id) == 0);
    if (*id) CHECK(refusal({.hid = "PNP0501", .cid = id}).find(std::string("ACPI id ") + id) == 0);
  }
  CHECK(refusal({.hid = "PNP0501"}) == "");
  CHECK(refusal({.hid = "PNP0501", .resources = {AcpiNode::Ports{0xffff, 2}}}).find("ACPI node PNP0501: 2 ports") == 0);
  CHECK(refusal({.hid = "PNP0501", .resources = {AcpiNode::Ports{0, 0}}}) != "");
  CHECK(refusal({.hid = "PNP0501", .resources = {AcpiNode::Ports{0, 0x10000}}}) != "");
  CHECK(refusal({.hid = "PNP0501", .resources = {AcpiNode::Memory{{1}, 0}}}) != "");
  CHECK(refusal({.hid = "PNP0501", .resources = {AcpiNode::Memory{{1}, ~uint64_t{0}}}}) == "");
  CHECK(refusal({.hid = "PNP0501", .resources = {AcpiNode::Memory{{2}, ~uint64_t{0}}}}) != "");
  CHECK(refusal({.hid = "PNP0501"}, 46656).find("more than 46656 devices") != std::string::npos);

  auto memory = GuestMemory::create({.size_bytes = 1 << 20});
  REQUIRE(memory.ok());
  AcpiConfig config;
  config.device_nodes.assign(3, Bytes(60000, std::byte{0xa3}));
  auto written = write_acpi(*memory, config);
  REQUIRE_FALSE(written.ok());
  CHECK(written.error().message.find("there is room for 131072 below 1 MiB") != std::string::npos);
  auto small = GuestMemory::create({.size_bytes = kPageSize});
  REQUIRE(small.ok());
  CHECK_FALSE(write_acpi(*small, AcpiConfig{}).ok());
}
