// SPDX-License-Identifier: Apache-2.0
// Lays out RSDP, XSDT, FADT, FACS, MADT, MCFG and DSDT.
#include "boot/acpi.hpp"

#include <algorithm>
#include <cstring>
#include <span>
#include <string_view>

namespace vmm {
namespace {

using aml::Bytes;

constexpr unsigned kNodeMax = 36 * 36 * 36;
constexpr unsigned kFirstX2ApicId = 255;

struct [[gnu::packed]] Header {
  char signature[4];
  uint32_t length;
  uint8_t revision;
  uint8_t checksum = 0;
  char oem_id[6] = {'C', 'L', 'O', 'N', 'E', ' '};
  char oem_table_id[8] = {'C', 'L', 'O', 'N', 'E', 'V', 'M', ' '};
  uint32_t oem_revision = 1;
  char creator_id[4] = {'C', 'L', 'N', 'E'};
  uint32_t creator_revision = 1;
};
static_assert(sizeof(Header) == 36);

struct [[gnu::packed]] Rsdp {
  char signature[8] = {'R', 'S', 'D', ' ', 'P', 'T', 'R', ' '};
  uint8_t checksum = 0;  // of the first 20 bytes
  char oem_id[6] = {'C', 'L', 'O', 'N', 'E', ' '};
  uint8_t revision = 2;
  uint32_t rsdt = 0;
  uint32_t length = 36;
  uint64_t xsdt = 0;
  uint8_t extended_checksum = 0;
  uint8_t reserved[3] = {};
};
static_assert(sizeof(Rsdp) == 36);

// §5.2.3.2. Address space 1 is I/O; access size 1 is a byte, 2 a word, 3 a double word.
struct [[gnu::packed]] GenericAddress {
  uint8_t space = 0;
  uint8_t bits = 0;
  uint8_t bit_offset = 0;
  uint8_t access_size = 0;
  uint64_t address = 0;
};

GenericAddress ports(uint16_t start, unsigned count) {
  if (start == 0) return {};
  return {1, static_cast<uint8_t>(8 * count), 0, static_cast<uint8_t>(count == 1 ? 1 : count == 2 ? 2 : 3), start};
}

// §5.2.9.
struct [[gnu::packed]] Fadt {
  Header header{{'F', 'A', 'C', 'P'}, sizeof(Fadt), 6};
  uint32_t facs = 0;
  uint32_t dsdt = 0;
  uint8_t reserved = 0;
  uint8_t preferred_pm_profile = 0;
  uint16_t sci_int = 0;
  uint32_t smi_command = 0;
  uint8_t acpi_enable = 0;
  uint8_t acpi_disable = 0;
  uint8_t s4bios_request = 0;
  uint8_t pstate_control = 0;
  uint32_t pm1a_event = 0;
  uint32_t pm1b_event = 0;
  uint32_t pm1a_control = 0;
  uint32_t pm1b_control = 0;
  uint32_t pm2_control = 0;
  uint32_t pm_timer = 0;
  uint32_t gpe0 = 0;
  uint32_t gpe1 = 0;
  uint8_t pm1_event_length = 0;
  uint8_t pm1_control_length = 0;
  uint8_t pm2_control_length = 0;
  uint8_t pm_timer_length = 0;
  uint8_t gpe0_length = 0;
  uint8_t gpe1_length = 0;
  uint8_t gpe1_base = 0;
  uint8_t cstate_control = 0;
  uint16_t c2_latency = 0xffff;  // above 100 and 1000: there is no C2, no C3
  uint16_t c3_latency = 0xffff;
  uint16_t flush_size = 0;
  uint16_t flush_stride = 0;
  uint8_t duty_offset = 0;
  uint8_t duty_width = 0;
  uint8_t day_alarm = 0;
  uint8_t month_alarm = 0;
  uint8_t century = 0;
  uint16_t boot_architecture = 0;
  uint8_t reserved2 = 0;
  uint32_t flags = 0;
  GenericAddress reset;
  uint8_t reset_value = 0;
  uint16_t arm_boot_architecture = 0;
  uint8_t minor_revision = 5;
  uint64_t x_facs = 0;
  uint64_t x_dsdt = 0;
  GenericAddress x_pm1a_event;
  GenericAddress x_pm1b_event;
  GenericAddress x_pm1a_control;
  GenericAddress x_pm1b_control;
  GenericAddress x_pm2_control;
  GenericAddress x_pm_timer;
  GenericAddress x_gpe0;
  GenericAddress x_gpe1;
  GenericAddress sleep_control;
  GenericAddress sleep_status;
  uint64_t hypervisor_vendor = 0;
};
static_assert(sizeof(Fadt) == 276);
static_assert(offsetof(Fadt, flags) == 112 && offsetof(Fadt, x_dsdt) == 140 && offsetof(Fadt, sleep_control) == 244);

// Flags of the FADT (§5.2.9, table 5.10).
constexpr uint32_t kWbinvd = 1 << 0;
constexpr uint32_t kC1OnAllProcessors = 1 << 2;
constexpr uint32_t kNoFixedPowerButton = 1 << 4;
constexpr uint32_t kNoFixedSleepButton = 1 << 5;
constexpr uint32_t kNoFixedRtcWake = 1 << 6;
constexpr uint32_t kTimer32Bits = 1 << 8;
constexpr uint32_t kResetRegister = 1 << 10;
constexpr uint32_t kHardwareReduced = 1 << 20;
// Boot architecture flags (table 5.11).
constexpr uint16_t kHas8042 = 1 << 1;
constexpr uint16_t kNoVga = 1 << 2;
constexpr uint16_t kNoCmosRtc = 1 << 5;

struct [[gnu::packed]] Facs {
  char signature[4] = {'F', 'A', 'C', 'S'};
  uint32_t length = sizeof(Facs);
  uint32_t hardware_signature = 0;
  uint32_t waking_vector = 0;
  uint32_t global_lock = 0;
  uint32_t flags = 0;
  uint64_t x_waking_vector = 0;
  uint8_t version = 2;
  uint8_t reserved[31] = {};
};
static_assert(sizeof(Facs) == 64);

// Interrupt controller structures of the MADT (§5.2.12).
struct [[gnu::packed]] MadtHeader {
  Header header{{'A', 'P', 'I', 'C'}, 0, 5};
  uint32_t local_apic = static_cast<uint32_t>(layout::kLocalApic.value);
  uint32_t flags = 0;  // bit 0: the machine has 8259 PICs too
};
struct [[gnu::packed]] LocalApic {
  uint8_t type = 0;
  uint8_t length = sizeof(LocalApic);
  uint8_t processor_uid = 0;
  uint8_t apic_id = 0;
  uint32_t flags = 1;  // enabled
};
struct [[gnu::packed]] IoApic {
  uint8_t type = 1;
  uint8_t length = sizeof(IoApic);
  uint8_t id = 0;
  uint8_t reserved = 0;
  uint32_t address = 0;
  uint32_t first_gsi = 0;
};
struct [[gnu::packed]] SourceOverride {
  uint8_t type = 2;
  uint8_t length = sizeof(SourceOverride);
  uint8_t bus = 0;  // ISA
  uint8_t irq = 0;
  uint32_t gsi = 0;
  uint16_t flags = 0;  // bits 0-1: 1 active high, 3 active low; bits 2-3: 1 edge, 3 level
};
struct [[gnu::packed]] LocalApicNmi {
  uint8_t type = 4;
  uint8_t length = sizeof(LocalApicNmi);
  uint8_t processor_uid = 0xff;  // all
  uint16_t flags = 0;
  uint8_t lint = 1;
};
struct [[gnu::packed]] LocalX2Apic {
  uint8_t type = 9;
  uint8_t length = sizeof(LocalX2Apic);
  uint16_t reserved = 0;
  uint32_t apic_id = 0;
  uint32_t flags = 1;  // enabled
  uint32_t processor_uid = 0;
};
static_assert(sizeof(MadtHeader) == 44 && sizeof(LocalApic) == 8 && sizeof(IoApic) == 12);
static_assert(sizeof(SourceOverride) == 10 && sizeof(LocalApicNmi) == 6 && sizeof(LocalX2Apic) == 16);

// PCI Firmware Specification 3.3, §4.1.2: one allocation.
struct [[gnu::packed]] Mcfg {
  Header header{{'M', 'C', 'F', 'G'}, sizeof(Mcfg), 1};
  uint64_t reserved = 0;
  uint64_t start = 0;
  uint16_t segment_group = 0;
  uint8_t first_bus = 0;
  uint8_t last_bus = 0;
  uint32_t reserved2 = 0;
};
static_assert(sizeof(Mcfg) == 60);

template <typename T>
void append(Bytes& bytes, const T& value) {
  const auto raw = std::as_bytes(std::span(&value, 1));
  bytes.insert(bytes.end(), raw.begin(), raw.end());
}

// What makes the sum of all bytes 0.
uint8_t checksum(std::span<const std::byte> bytes) {
  uint8_t sum = 0;
  for (std::byte byte : bytes) sum = static_cast<uint8_t>(sum + std::to_integer<uint8_t>(byte));
  return static_cast<uint8_t>(-sum);
}

// Sets length and checksum of a finished table.
Bytes seal(Bytes table) {
  const auto length = static_cast<uint32_t>(table.size());
  std::memcpy(table.data() + offsetof(Header, length), &length, sizeof length);
  table[offsetof(Header, checksum)] = std::byte{0};
  table[offsetof(Header, checksum)] = std::byte{checksum(table)};
  return table;
}

template <typename T>
Bytes seal(const T& table) {
  Bytes bytes;
  append(bytes, table);
  return seal(std::move(bytes));
}

// A name of one letter and the index in three digits of the base.
std::string indexed_name(char letter, unsigned index, unsigned base) {
  constexpr std::string_view digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ";
  return {letter, digits[index / base / base % base], digits[index / base % base], digits[index % base]};
}

bool all_of(std::string_view text, std::string_view allowed) { return text.find_first_not_of(allowed) == text.npos; }

// §6.1.5: an EISA id in its compressed form, or an ACPI id of four characters and four digits.
Result<Bytes> hardware_id(std::string_view id) {
  constexpr std::string_view letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
  constexpr std::string_view letters_digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";
  constexpr std::string_view hex_digits = "0123456789ABCDEF";
  if (id.size() == 7 && all_of(id.substr(0, 3), letters) && all_of(id.substr(3), hex_digits)) return aml::eisa_id(id);
  if (id.size() == 8 && all_of(id.substr(0, 4), letters_digits) && all_of(id.substr(4), hex_digits)) {
    return aml::string(id);
  }
  return Error{"ACPI id " + std::string(id) + ": like PNP0501 or LNRO0005 it has to be", EINVAL};
}

Result<Bytes> resource(const AcpiNode::Ports& ports) {
  if (ports.count == 0 || ports.count > 0x10000u - ports.start) {
    return Error{std::to_string(ports.count) + " ports from " + std::to_string(ports.start) + ": not within 64 KiB",
                 EINVAL};
  }
  if (ports.count <= 0xff) return aml::io_ports(ports.start, static_cast<uint8_t>(ports.count));
  if (ports.count == 0x10000) return Error{"65536 ports: at most 65535 for one device", EINVAL};
  return aml::address_range(aml::AddressSpace::io, aml::AddressWidth::word, aml::AddressUse::consumed, ports.start,
                            ports.count);
}

Result<Bytes> resource(const AcpiNode::Memory& memory) {
  const uint64_t start = memory.start.value;
  if (memory.size_bytes == 0 || memory.size_bytes - 1 > ~start) {
    return Error{std::to_string(memory.size_bytes) + " bytes from " + std::to_string(start) + ": not a range", EINVAL};
  }
  if (start + (memory.size_bytes - 1) <= 0xffff'ffff && memory.size_bytes <= 0xffff'ffff) {
    return aml::memory32_fixed(static_cast<uint32_t>(start), static_cast<uint32_t>(memory.size_bytes));
  }
  return aml::address_range(aml::AddressSpace::memory, aml::AddressWidth::qword, aml::AddressUse::consumed, start,
                            memory.size_bytes);
}

Result<Bytes> resource(const AcpiNode::Interrupt& interrupt) {
  return aml::interrupt(interrupt.gsi, interrupt.trigger, interrupt.polarity, interrupt.sharing);
}

Bytes make_dsdt(const AcpiConfig& config) {
  Bytes system_bus;
  const auto add = [&](const Bytes& term) { system_bus.insert(system_bus.end(), term.begin(), term.end()); };
  for (unsigned index = 0; index < config.vcpu_count; ++index) {
    add(aml::device(indexed_name('C', index, 16),
                    aml::join({aml::name("_HID", aml::string("ACPI0007")), aml::name("_UID", aml::integer(index))})));
  }
  for (const Bytes& node : config.device_nodes) add(node);

  Bytes table;
  append(table, Header{{'D', 'S', 'D', 'T'}, 0, 2});
  const Bytes sleep_type = aml::integer(config.s5_sleep_type);
  const Bytes body =
      aml::join({aml::name("\\_S5", aml::package({sleep_type, sleep_type, aml::integer(0), aml::integer(0)})),
                 aml::scope("\\_SB", system_bus)});
  table.insert(table.end(), body.begin(), body.end());
  return seal(std::move(table));
}

Bytes make_madt(const AcpiConfig& config) {
  Bytes table;
  append(table, MadtHeader{.flags = config.pm ? 1u : 0u});
  for (unsigned id = 0; id < config.vcpu_count; ++id) {
    if (id < kFirstX2ApicId) {
      append(table, LocalApic{.processor_uid = static_cast<uint8_t>(id), .apic_id = static_cast<uint8_t>(id)});
    } else {
      append(table, LocalX2Apic{.apic_id = id, .processor_uid = id});
    }
  }
  append(table, IoApic{.id = config.io_apic_id, .address = static_cast<uint32_t>(config.io_apic.value)});
  std::vector<AcpiConfig::InterruptOverride> overrides = config.overrides;
  if (config.pm && config.pm->sci_gsi < 16) {
    overrides.push_back({static_cast<uint8_t>(config.pm->sci_gsi), config.pm->sci_gsi, config.pm->sci_trigger,
                         config.pm->sci_polarity});
  }
  for (const auto& source : overrides) {
    const unsigned polarity = source.polarity == aml::Polarity::active_high ? 1 : 3;
    const unsigned trigger = source.trigger == aml::Trigger::edge ? 1 : 3;
    append(table, SourceOverride{
                      .irq = source.irq, .gsi = source.gsi, .flags = static_cast<uint16_t>(polarity | trigger << 2)});
  }
  append(table, LocalApicNmi{});
  return seal(std::move(table));
}

Bytes make_fadt(const AcpiConfig& config, uint32_t dsdt, uint32_t facs) {
  Fadt table;
  table.dsdt = dsdt;
  table.x_dsdt = dsdt;
  table.facs = facs;  // x_facs stays 0: only one of the two is given
  table.flags = kWbinvd | kC1OnAllProcessors | kNoFixedSleepButton | kNoFixedRtcWake;
  table.boot_architecture =
      static_cast<uint16_t>(kNoVga | (config.has_i8042 ? kHas8042 : 0) | (config.has_rtc ? 0 : kNoCmosRtc));
  if (config.pm) {
    const AcpiPmBlock& pm = *config.pm;
    table.sci_int = static_cast<uint16_t>(pm.sci_gsi);
    table.pm1a_event = pm.event_port;
    table.pm1a_control = pm.control_port;
    table.pm1_event_length = 4;
    table.pm1_control_length = 2;
    table.x_pm1a_event = ports(pm.event_port, 4);
    table.x_pm1a_control = ports(pm.control_port, 2);
    // Both PM1 blocks are read and written as words.
    table.x_pm1a_event.access_size = 2;
    if (pm.timer_port) {
      table.pm_timer = pm.timer_port;
      table.pm_timer_length = 4;
      table.x_pm_timer = ports(pm.timer_port, 4);
      if (pm.timer_bits == 32) table.flags |= kTimer32Bits;
    }
  } else {
    table.flags |= kHardwareReduced | kNoFixedPowerButton;
  }
  if (config.sleep_ports) {
    table.sleep_control = ports(config.sleep_ports->control_port, 1);
    table.sleep_status = ports(config.sleep_ports->status_port, 1);
  }
  if (config.reset) {
    table.flags |= kResetRegister;
    table.reset = ports(config.reset->port, 1);
    table.reset_value = config.reset->value;
  }
  return seal(table);
}

Bytes make_mcfg(const AcpiConfig::PciConfigWindow& window) {
  Mcfg table;
  table.start = window.start.value;
  table.last_bus = static_cast<uint8_t>(std::clamp(window.bus_count, 1u, 256u) - 1);
  return seal(table);
}

Bytes make_xsdt(std::span<const uint64_t> tables) {
  Bytes table;
  append(table, Header{{'X', 'S', 'D', 'T'}, 0, 1});
  for (uint64_t address : tables) append(table, address);
  return seal(std::move(table));
}

Bytes make_rsdp(uint64_t xsdt) {
  Rsdp rsdp;
  rsdp.xsdt = xsdt;
  const auto bytes = std::as_bytes(std::span(&rsdp, 1));
  rsdp.checksum = checksum(bytes.first(20));
  rsdp.extended_checksum = checksum(bytes);
  return {bytes.begin(), bytes.end()};
}

}  // namespace

Result<Bytes> acpi_node(const AcpiNode& node, unsigned index) {
  if (index >= kNodeMax) return Error{"ACPI: more than " + std::to_string(kNodeMax) + " devices", E2BIG};
  Bytes body = aml::name("_HID", TRY(hardware_id(node.hid)));
  const auto add = [&](const Bytes& term) { body.insert(body.end(), term.begin(), term.end()); };
  if (!node.cid.empty()) add(aml::name("_CID", TRY(hardware_id(node.cid))));
  if (node.uid) add(aml::name("_UID", aml::integer(*node.uid)));
  std::vector<Bytes> descriptors;
  for (const auto& given : node.resources) {
    auto descriptor = std::visit([](const auto& each) { return resource(each); }, given);
    descriptors.push_back(TRY(std::move(descriptor).context("ACPI node " + node.hid)));
  }
  if (!descriptors.empty()) add(aml::name("_CRS", aml::resource_template(descriptors)));
  add(node.more);
  return aml::device(indexed_name('D', index, 36), body);
}

Result<GuestAddress> write_acpi(GuestMemory& memory, const AcpiConfig& config) {
  constexpr uint64_t room = layout::kAcpiTablesEnd.value - layout::kAcpiTables.value;
  constexpr uint64_t alignment = 64;                      // what the FACS needs, more than any other
  uint64_t next = layout::kAcpiTables.value + alignment;  // after the RSDP
  bool written = true;
  // Counts on when there is no more room, so that the error can tell how much was needed.
  const auto place = [&](const Bytes& table) {
    const uint64_t address = next;
    next = (next + table.size() + alignment - 1) & ~(alignment - 1);
    written = written && next <= layout::kAcpiTablesEnd.value &&
              memory.write(GuestAddress{address}, table.data(), table.size());
    return address;
  };

  uint64_t facs = 0;
  if (config.pm) {
    Bytes table;
    append(table, Facs{});
    facs = place(table);
  }
  const uint64_t dsdt = place(make_dsdt(config));
  std::vector<uint64_t> tables;
  tables.push_back(place(make_fadt(config, static_cast<uint32_t>(dsdt), static_cast<uint32_t>(facs))));
  tables.push_back(place(make_madt(config)));
  if (config.pci) tables.push_back(place(make_mcfg(*config.pci)));
  const uint64_t xsdt = place(make_xsdt(tables));
  const Bytes rsdp = make_rsdp(xsdt);
  written = written && memory.write(layout::kAcpiTables, rsdp.data(), rsdp.size());
  if (!written) {
    return Error{"ACPI tables: " + std::to_string(next - layout::kAcpiTables.value) + " bytes, there is room for " +
                     std::to_string(room) + " below 1 MiB",
                 ENOSPC};
  }
  return layout::kAcpiTables;
}

}  // namespace vmm
