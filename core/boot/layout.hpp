// SPDX-License-Identifier: Apache-2.0
// Where things lie in guest physical memory (docs/memory-map.md shows the whole map).
#pragma once

#include "clone/abi/machine.h"
#include "memory/guest_memory.hpp"

namespace vmm::layout {

// Below 1 MiB: what the boot leaves for the kernel, free again once the kernel has read it.
constexpr GuestAddress kGdt{0x500};
constexpr GuestAddress kIdentityPage{CLONE_IDENTITY_PAGE};  // kept from the guest's allocator: for a device
constexpr GuestAddress kBootInfo{0x7000};    // a page: boot_params (the "zero page"), or PVH's hvm_start_info
constexpr GuestAddress kStackTop{0x9000};    // a page of stack below it
constexpr GuestAddress kPageTables{0x9000};  // up to 6 pages
constexpr GuestAddress kRandomSeed{0xf000};
constexpr GuestAddress kCommandLine{0x20000};
constexpr uint64_t kCommandLineBytes = 0x10000;
constexpr GuestAddress kLowMemoryEnd{0x9fc00};  // the BIOS data area and video memory of a PC: never told to be memory
constexpr GuestAddress kAcpiTables{0xe0000};    // where a kernel without acpi_rsdp_addr scans for the RSDP
constexpr GuestAddress kAcpiTablesEnd{0x100000};

constexpr GuestAddress kKernelFloor{0x100000};  // no kernel is loaded below

// In the hole.
constexpr GuestAddress kMmioWindow{kHoleStart};  // registers of plugins' devices
constexpr uint64_t kMmioWindowBytes = 0x1000'0000;
constexpr GuestAddress kPciWindow{0xd000'0000};  // 32-bit PCI BARs
constexpr uint64_t kPciWindowBytes = 0x1000'0000;
constexpr GuestAddress kPciConfig{0xe000'0000};  // ECAM, 256 buses
constexpr uint64_t kPciConfigBytes = 0x1000'0000;
constexpr GuestAddress kIoApic{0xfec0'0000};
constexpr GuestAddress kLocalApic{0xfee0'0000};
constexpr GuestAddress kKvmIdentityMap{0xfffb'c000};  // a page, KVM_SET_IDENTITY_MAP_ADDR
constexpr GuestAddress kKvmTss{0xfffb'd000};          // three pages, KVM_SET_TSS_ADDR

}  // namespace vmm::layout
