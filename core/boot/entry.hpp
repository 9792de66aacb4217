// SPDX-License-Identifier: Apache-2.0
// All that lies in memory and registers when a kernel gets control, as data: KVM is told elsewhere.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "boot/e820.hpp"
#include "boot/kernel.hpp"
#include "memory/guest_memory.hpp"
#include "util/result.hpp"

namespace vmm {

// The hidden part of a segment register; the fields of kvm_segment, with their names.
struct SegmentState {
  uint64_t base = 0;
  uint32_t limit = 0;
  uint16_t selector = 0;
  uint8_t type = 0;
  uint8_t present = 0;
  uint8_t dpl = 0;
  uint8_t db = 0;  // 32-bit default size
  uint8_t s = 0;   // code or data, not a system segment
  uint8_t l = 0;   // 64-bit code
  uint8_t g = 0;   // the limit counts pages
};

// The registers of the first vCPU at the kernel's first instruction. All that is not here is 0: no interrupts
// (RFLAGS.IF clear, IDT limit 0), no debug registers. The other vCPUs wait for INIT and SIPI.
//
// linux64 (Documentation/x86/boot.rst, "64-bit Boot Protocol"): long mode, paging on, everything the kernel needs
// identity-mapped, __BOOT_CS = 0x10 and __BOOT_DS = 0x18 flat and 4 GiB, boot_params in rsi.
// pvh (Xen docs/misc/pvh.pandoc): protected mode without paging, CR0 = PE, CR4 = 0, flat 32-bit segments, a 32-bit
// task segment of base 0 and limit 0x67, hvm_start_info in ebx.
struct EntryState {
  BootProtocol protocol = BootProtocol::linux64;
  uint64_t rip = 0;
  uint64_t rsp = 0;
  uint64_t rsi = 0;
  uint64_t rbx = 0;
  uint64_t rflags = 0x2;  // bit 1 is always set
  uint64_t cr0 = 0;
  uint64_t cr3 = 0;
  uint64_t cr4 = 0;
  uint64_t efer = 0;
  SegmentState code;
  SegmentState data;  // ds, es, fs, gs, ss
  SegmentState task;  // tr
  uint64_t gdt_base = 0;
  uint16_t gdt_limit = 0;
};

enum class PageTables {
  four_gigabytes,  // 2 MiB pages; every CPU has them
  half_terabyte,   // 1 GiB pages, where the guest's CPUID has them (pdpe1gb)
};

struct BootConfig {
  std::string command_line = {};
  std::optional<InitrdPlace> initrd = {};
  std::span<const MemoryRange> reserved = {};  // beside the core's own, e.g. the PCI configuration window
  GuestAddress rsdp = {};                      // 0: no ACPI
  PageTables page_tables = PageTables::four_gigabytes;
};

// Writes the command line, the memory map with boot_params or hvm_start_info, the GDT and the page tables for a kernel
// that is loaded. A bare guest gets the same.
Result<EntryState> prepare_entry(GuestMemory& memory, const KernelImage& kernel, const BootConfig& config);

}  // namespace vmm
