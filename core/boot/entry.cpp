// SPDX-License-Identifier: Apache-2.0
// Writes what a kernel finds when it gets control: boot_params or hvm_start_info, GDT, page tables.
#include "boot/entry.hpp"

#include <asm/bootparam.h>
#include <sys/random.h>

#include <algorithm>
#include <cstddef>
#include <vector>

#include "boot/layout.hpp"

namespace vmm {
namespace {

// The offsets that Documentation/x86/zero-page.rst gives.
static_assert(sizeof(boot_params) == kPageSize);
static_assert(offsetof(boot_params, acpi_rsdp_addr) == 0x070);
static_assert(offsetof(boot_params, ext_ramdisk_image) == 0x0c0);
static_assert(offsetof(boot_params, e820_entries) == 0x1e8);
static_assert(offsetof(boot_params, hdr) == 0x1f1);
static_assert(offsetof(boot_params, hdr.cmd_line_ptr) == 0x228);
static_assert(offsetof(boot_params, hdr.setup_data) == 0x250);
static_assert(offsetof(boot_params, e820_table) == 0x2d0);

constexpr uint8_t kUnregisteredLoader = 0xff;

// Xen, public/arch-x86/hvm/start_info.h.
struct PvhStartInfo {
  uint32_t magic = 0x336ec578;
  uint32_t version = 1;
  uint32_t flags = 0;
  uint32_t module_count = 0;
  uint64_t modules = 0;
  uint64_t command_line = 0;
  uint64_t rsdp = 0;
  uint64_t memory_map = 0;
  uint32_t memory_map_entries = 0;
  uint32_t reserved = 0;
};
static_assert(sizeof(PvhStartInfo) == 56);

struct PvhModule {
  uint64_t start = 0;
  uint64_t size_bytes = 0;
  uint64_t command_line = 0;
  uint64_t reserved = 0;
};

struct PvhMemoryRange {
  uint64_t start = 0;
  uint64_t size_bytes = 0;
  uint32_t kind = 0;
  uint32_t reserved = 0;
};
static_assert(sizeof(PvhMemoryRange) == 24);

// All three in the page at kBootInfo.
constexpr uint64_t kPvhModuleOffset = 0x40;
constexpr uint64_t kPvhMapOffset = 0x80;
static_assert(kPvhMapOffset + E820_MAX_ENTRIES_ZEROPAGE * sizeof(PvhMemoryRange) <= kPageSize);

// Segment selectors of the Linux boot protocol; the task segment takes two entries in long mode.
constexpr uint16_t kCodeSelector = 0x10;
constexpr uint16_t kDataSelector = 0x18;
constexpr uint16_t kTaskSelector = 0x20;
constexpr size_t kGdtEntries = 6;

constexpr uint64_t kCr0ProtectedMode = 1 << 0;
constexpr uint64_t kCr0ExtensionType = 1 << 4;  // always 1
constexpr uint64_t kCr0Paging = 1ull << 31;
constexpr uint64_t kCr4PhysicalAddressExtension = 1 << 5;
constexpr uint64_t kEferLongModeEnable = 1 << 8;
constexpr uint64_t kEferLongModeActive = 1 << 10;

constexpr uint64_t kPagePresentWritable = 0x3;
constexpr uint64_t kPageLarge = 0x80;
constexpr uint64_t kEntriesInTable = 512;

Error too_small(const GuestMemory& memory) {
  return Error{"memory: " + std::to_string(memory.size_bytes() >> 10) + " KiB: a guest needs at least 1024 KiB",
               EINVAL};
}

Result<void> write_command_line(GuestMemory& memory, const KernelImage& kernel, const std::string& text) {
  // Before cmdline_size came to the header, 255 was the limit.
  const uint64_t kernel_max = kernel.header.cmdline_size ? kernel.header.cmdline_size : 255;
  const uint64_t longest = std::min(kernel_max, layout::kCommandLineBytes - 1);
  if (text.size() > longest) {
    return Error{"command line: " + std::to_string(text.size()) + " characters, the kernel takes at most " +
                     std::to_string(longest),
                 E2BIG};
  }
  if (text.find('\0') != text.npos) return Error{"command line: a NUL character in it", EINVAL};
  if (!memory.write(layout::kCommandLine, text.c_str(), text.size() + 1)) return too_small(memory);
  return {};
}

// A seed that the kernel credits (and wipes): its random numbers are ready at once, with no device.
bool write_random_seed(GuestMemory& memory) {
  struct {
    uint64_t next = 0;
    uint32_t type = SETUP_RNG_SEED;
    uint32_t length = 32;
    uint8_t seed[32];
  } node;
  static_assert(offsetof(decltype(node), seed) == offsetof(setup_data, data));
  return ::getrandom(node.seed, sizeof node.seed, 0) == sizeof node.seed && memory.store(layout::kRandomSeed, node);
}

Result<void> write_boot_params(GuestMemory& memory, const KernelImage& kernel, const BootConfig& config,
                               const std::vector<MemoryRange>& map) {
  boot_params params{};
  params.hdr = kernel.header;
  params.hdr.type_of_loader = kUnregisteredLoader;
  params.hdr.code32_start = static_cast<uint32_t>(kernel.start.value);
  params.hdr.cmd_line_ptr = static_cast<uint32_t>(layout::kCommandLine.value);
  // Below the hole, so that the upper halves (ext_ramdisk_*) stay 0.
  params.hdr.ramdisk_image = 0;
  params.hdr.ramdisk_size = 0;
  if (config.initrd && config.initrd->size_bytes) {
    params.hdr.ramdisk_image = static_cast<uint32_t>(config.initrd->start.value);
    params.hdr.ramdisk_size = static_cast<uint32_t>(config.initrd->size_bytes);
  }
  params.hdr.setup_data = write_random_seed(memory) ? layout::kRandomSeed.value : 0;
  params.acpi_rsdp_addr = config.rsdp.value;
  for (const MemoryRange& range : map) {
    params.e820_table[params.e820_entries++] = {range.start.value, range.size_bytes, static_cast<uint32_t>(range.kind)};
  }
  if (!memory.store(layout::kBootInfo, params)) return too_small(memory);
  return {};
}

Result<void> write_start_info(GuestMemory& memory, const BootConfig& config, const std::vector<MemoryRange>& map) {
  PvhStartInfo info;
  info.command_line = layout::kCommandLine.value;
  info.rsdp = config.rsdp.value;
  info.memory_map = layout::kBootInfo.value + kPvhMapOffset;
  info.memory_map_entries = static_cast<uint32_t>(map.size());
  PvhModule module;
  if (config.initrd && config.initrd->size_bytes) {
    info.module_count = 1;
    info.modules = layout::kBootInfo.value + kPvhModuleOffset;
    module = {config.initrd->start.value, config.initrd->size_bytes, 0, 0};
  }
  std::vector<PvhMemoryRange> ranges;
  for (const MemoryRange& range : map) {
    ranges.push_back({range.start.value, range.size_bytes, static_cast<uint32_t>(range.kind), 0});
  }
  const bool written =
      memory.store(layout::kBootInfo, info) && memory.store(layout::kBootInfo + kPvhModuleOffset, module) &&
      memory.write(layout::kBootInfo + kPvhMapOffset, ranges.data(), ranges.size() * sizeof(PvhMemoryRange));
  if (!written) return too_small(memory);
  return {};
}

// The descriptor of a segment (Intel SDM vol. 3, §3.4.5).
uint64_t descriptor(const SegmentState& segment) {
  const uint64_t limit = segment.g ? segment.limit >> 12 : segment.limit;
  return (limit & 0xffff) | (segment.base & 0xff'ffff) << 16 | uint64_t{segment.type} << 40 |
         uint64_t{segment.s} << 44 | uint64_t{segment.dpl} << 45 | uint64_t{segment.present} << 47 |
         (limit >> 16 & 0xf) << 48 | uint64_t{segment.l} << 53 | uint64_t{segment.db} << 54 |
         uint64_t{segment.g} << 55 | (segment.base >> 24 & 0xff) << 56;
}

bool write_gdt(GuestMemory& memory, const EntryState& state) {
  uint64_t gdt[kGdtEntries] = {};
  for (const SegmentState* segment : {&state.code, &state.data, &state.task}) {
    gdt[segment->selector / sizeof gdt[0]] = descriptor(*segment);
  }
  return memory.store(GuestAddress{state.gdt_base}, gdt);
}

// Virtual = physical, from 0 on.
bool write_page_tables(GuestMemory& memory, PageTables kind) {
  using Table = uint64_t[kEntriesInTable];
  constexpr uint64_t top = layout::kPageTables.value;
  constexpr uint64_t directory_pointers = top + kPageSize;
  constexpr uint64_t directories = top + 2 * kPageSize;
  constexpr uint64_t directory_count = 4;

  Table table{directory_pointers | kPagePresentWritable};
  if (!memory.store(GuestAddress{top}, table)) return false;
  table[0] = 0;
  if (kind == PageTables::half_terabyte) {
    for (uint64_t index = 0; index < kEntriesInTable; ++index) {
      table[index] = index << 30 | kPageLarge | kPagePresentWritable;
    }
    return memory.store(GuestAddress{directory_pointers}, table);
  }
  for (uint64_t index = 0; index < directory_count; ++index) {
    table[index] = (directories + index * kPageSize) | kPagePresentWritable;
  }
  if (!memory.store(GuestAddress{directory_pointers}, table)) return false;
  for (uint64_t directory = 0; directory < directory_count; ++directory) {
    for (uint64_t index = 0; index < kEntriesInTable; ++index) {
      table[index] = (directory * kEntriesInTable + index) << 21 | kPageLarge | kPagePresentWritable;
    }
    if (!memory.store(GuestAddress{directories + directory * kPageSize}, table)) return false;
  }
  return true;
}

EntryState entry_state(const KernelImage& kernel) {
  const bool long_mode = kernel.protocol == BootProtocol::linux64;
  EntryState state;
  state.protocol = kernel.protocol;
  state.rip = kernel.entry.value;
  state.rsp = layout::kStackTop.value;
  state.cr0 = kCr0ProtectedMode | kCr0ExtensionType;
  // Types: execute/read accessed, read/write accessed, busy 32-bit or 64-bit task segment.
  state.code = {.limit = 0xffff'ffff, .selector = kCodeSelector, .type = 0xb, .present = 1, .s = 1, .g = 1};
  state.data = {.limit = 0xffff'ffff, .selector = kDataSelector, .type = 0x3, .present = 1, .db = 1, .s = 1, .g = 1};
  state.task = {.limit = 0x67, .selector = kTaskSelector, .type = 0xb, .present = 1};
  state.gdt_base = layout::kGdt.value;
  state.gdt_limit = kGdtEntries * sizeof(uint64_t) - 1;
  if (long_mode) {
    state.rsi = layout::kBootInfo.value;
    state.code.l = 1;
    state.cr0 |= kCr0Paging;
    state.cr3 = layout::kPageTables.value;
    state.cr4 = kCr4PhysicalAddressExtension;
    state.efer = kEferLongModeEnable | kEferLongModeActive;
  } else {
    state.rbx = layout::kBootInfo.value;
    state.code.db = 1;
  }
  return state;
}

}  // namespace

Result<EntryState> prepare_entry(GuestMemory& memory, const KernelImage& kernel, const BootConfig& config) {
  const std::vector<MemoryRange> map = memory_map(memory, config.reserved);
  if (map.size() > E820_MAX_ENTRIES_ZEROPAGE) {
    return Error{"memory map: " + std::to_string(map.size()) + " entries, a kernel takes at most 128", E2BIG};
  }
  TRY(write_command_line(memory, kernel, config.command_line));
  if (kernel.protocol == BootProtocol::linux64) {
    TRY(write_boot_params(memory, kernel, config, map));
  } else {
    TRY(write_start_info(memory, config, map));
  }
  const EntryState state = entry_state(kernel);
  const bool written = write_gdt(memory, state) && (!state.cr3 || write_page_tables(memory, config.page_tables));
  if (!written) return too_small(memory);
  return state;
}

}  // namespace vmm
