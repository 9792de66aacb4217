// SPDX-License-Identifier: Apache-2.0
// ACPI tables (ACPI 6.5 §5.2) from plain data: no device is known here, their nodes arrive as AML.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "boot/aml.hpp"
#include "boot/layout.hpp"
#include "memory/guest_memory.hpp"
#include "util/result.hpp"

namespace vmm {

// What a device that only has registers and interrupts is in the DSDT.
struct AcpiNode {
  struct Ports {
    uint16_t start = 0;
    uint32_t count = 0;
  };
  struct Memory {
    GuestAddress start;
    uint64_t size_bytes = 0;
  };
  struct Interrupt {
    uint32_t gsi = 0;
    aml::Trigger trigger = aml::Trigger::edge;
    aml::Polarity polarity = aml::Polarity::active_high;
    aml::Sharing sharing = aml::Sharing::exclusive;
  };
  using Resource = std::variant<Ports, Memory, Interrupt>;

  std::string hid;       // "PNP0501" (EISA) or "LNRO0005" (ACPI)
  std::string cid = {};  // the same; empty: none
  std::optional<uint64_t> uid = {};
  std::vector<Resource> resources = {};
  aml::Bytes more = {};  // further terms in the device's scope
};

// The node as AML, named by its index ("D000" to "DZZZ"), so that no two in a DSDT are alike. An error for an id that
// is not one, or a range that wraps.
Result<aml::Bytes> acpi_node(const AcpiNode& node, unsigned index);

// The classic PM registers, from whichever device has them (§4.8.3): with no SMI command there is no way into ACPI
// mode, so its PM1 control register has to read with SCI_EN set.
struct AcpiPmBlock {
  uint16_t event_port = 0;    // PM1a_EVT_BLK, 4 ports
  uint16_t control_port = 0;  // PM1a_CNT_BLK, 2 ports
  uint16_t timer_port = 0;    // PM_TMR_BLK, 4 ports; 0: none
  uint8_t timer_bits = 24;    // 24 or 32
  uint32_t sci_gsi = 9;
  aml::Trigger sci_trigger = aml::Trigger::level;
  aml::Polarity sci_polarity = aml::Polarity::active_high;
};

// Where a hardware-reduced machine is put to sleep (§4.8.3.7): one byte each.
struct AcpiSleepPorts {
  uint16_t control_port = 0;
  uint16_t status_port = 0;
};

struct AcpiReset {
  uint16_t port = 0;
  uint8_t value = 0;
};

struct AcpiConfig {
  struct InterruptOverride {
    uint8_t irq = 0;  // ISA
    uint32_t gsi = 0;
    aml::Trigger trigger = aml::Trigger::edge;
    aml::Polarity polarity = aml::Polarity::active_high;
  };
  struct PciConfigWindow {
    GuestAddress start;
    unsigned bus_count = 0;  // 1 to 256, from bus 0
  };

  unsigned vcpu_count = 1;                    // APIC ids 0 to vcpu_count - 1
  std::vector<aml::Bytes> device_nodes = {};  // in \_SB, in this order
  // Without a PM block the machine is hardware-reduced: no PM registers, no PM timer, no legacy PICs.
  std::optional<AcpiPmBlock> pm = {};
  std::optional<AcpiSleepPorts> sleep_ports = {};
  std::optional<AcpiReset> reset = {};
  uint8_t s5_sleep_type = 5;  // what is written to power off
  std::optional<PciConfigWindow> pci = {};
  uint8_t io_apic_id = 0;
  GuestAddress io_apic = layout::kIoApic;
  // KVM's own routing has the PIT at GSI 0, which needs none; where the VM routes it to pin 2, {0, 2} belongs here. The
  // SCI's is added by itself.
  std::vector<InterruptOverride> overrides = {};
  bool has_i8042 = false;
  bool has_rtc = false;
};

// Writes all tables to the place for them below 1 MiB and returns the address of the RSDP.
Result<GuestAddress> write_acpi(GuestMemory& memory, const AcpiConfig& config);

}  // namespace vmm
