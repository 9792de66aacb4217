// SPDX-License-Identifier: Apache-2.0
// Reads bzImage and ELF kernels, trusting no field of them, and places kernel and initrd in guest memory.
#include "boot/kernel.hpp"

#include <elf.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>
#include <optional>
#include <string_view>

#include "boot/layout.hpp"

namespace vmm {
namespace {

using Bytes = std::span<const std::byte>;

// Linux boot protocol: the header begins at 0x1f1 of the file; the byte at 0x201 is a jump over the rest of it.
constexpr uint64_t kHeaderStart = 0x1f1;
constexpr uint64_t kHeaderFixedEnd = 0x202;
constexpr uint64_t kSectorSize = 512;
constexpr uint16_t kBootFlag = 0xaa55;
constexpr uint32_t kHeaderMagic = 0x53726448;  // "HdrS"
constexpr uint16_t kLeastVersion = 0x020c;     // the first with xloadflags
constexpr uint64_t kEntry64Offset = 0x200;
// What the boot protocol of a 6.x kernel says of itself; used for ELF files, which have no header.
constexpr uint16_t kCurrentVersion = 0x020f;
constexpr uint32_t kLinuxCommandLineMax = 2047;
constexpr uint32_t kLinuxInitrdAddressMax = 0x7fffffff;

// Far above what any kernel has; they keep the time that a hostile file can take small.
constexpr uint64_t kProgramHeadersMax = 128;
constexpr uint64_t kNoteBytesMax = 64 << 10;
constexpr uint32_t kPvhEntryNote = 18;  // XEN_ELFNOTE_PHYS32_ENTRY
constexpr std::string_view kXenNoteName("Xen\0", 4);

std::string hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

std::string mebibytes(uint64_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }

// A sub-range of the file, or nothing when it does not lie in it.
std::optional<Bytes> part(Bytes file, uint64_t offset, uint64_t size_bytes) {
  if (offset > file.size() || size_bytes > file.size() - offset) return std::nullopt;
  return file.subspan(offset, size_bytes);
}

template <typename T>
std::optional<T> load(Bytes file, uint64_t offset) {
  const auto bytes = part(file, offset, sizeof(T));
  if (!bytes) return std::nullopt;
  T value;
  std::memcpy(&value, bytes->data(), sizeof value);
  return value;
}

// Between the least address for a kernel and the hole. Nothing wraps in there.
bool in_kernel_space(uint64_t start, uint64_t size_bytes) {
  return start >= layout::kKernelFloor.value && start <= kHoleStart && size_bytes <= kHoleStart - start;
}

std::string range_text(uint64_t start, uint64_t size_bytes) { return hex(start) + " + " + hex(size_bytes); }

// The first word of "6.1.0-56-cloud-amd64 (debian-kernel@…) #1 SMP …". It becomes the name of a folder: anything that
// could not be one is not a version.
std::string version_word(Bytes setup, uint64_t offset) {
  constexpr std::string_view allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+~-";
  if (offset >= setup.size()) return {};
  const std::string_view text(reinterpret_cast<const char*>(setup.data()) + offset, setup.size() - offset);
  const size_t end = text.find_first_not_of(allowed);
  if (end == 0 || end == text.npos || text[0] == '.' || end > 64) return {};
  if (text[end] != ' ' && text[end] != '\0') return {};
  return std::string(text.substr(0, end));
}

// A vmlinux has its version only in what it prints first.
std::string banner_version(Bytes content) {
  constexpr std::string_view banner = "Linux version ";
  const std::string_view text(reinterpret_cast<const char*>(content.data()), content.size());
  for (size_t at = text.find(banner); at != text.npos; at = text.find(banner, at)) {
    at += banner.size();
    if (std::string version = version_word(content, at); !version.empty()) return version;
  }
  return {};
}

// The 32-bit entry of a PVH kernel, when one of the notes gives it.
std::optional<uint64_t> find_pvh_entry(Bytes notes, uint64_t alignment) {
  const auto padded = [&](uint64_t size_bytes) { return (size_bytes + alignment - 1) & ~(alignment - 1); };
  uint64_t offset = 0;
  while (const auto note = load<Elf64_Nhdr>(notes, offset)) {
    const uint64_t name_offset = offset + sizeof *note;
    const uint64_t content_offset = offset + padded(sizeof *note + note->n_namesz);
    const auto name = part(notes, name_offset, note->n_namesz);
    if (name && note->n_type == kPvhEntryNote && name->size() == kXenNoteName.size() &&
        std::memcmp(name->data(), kXenNoteName.data(), name->size()) == 0) {
      if (note->n_descsz == 8) return load<uint64_t>(notes, content_offset);
      if (note->n_descsz == 4) return load<uint32_t>(notes, content_offset);
    }
    offset = content_offset + padded(note->n_descsz);  // 32-bit sizes: no wrap
  }
  return std::nullopt;
}

}  // namespace

Error KernelFile::wrong(const std::string& what) const { return Error{"kernel " + path_ + ": " + what, EINVAL}; }

Result<KernelFile> KernelFile::open(const std::string& path, BootProtocol wanted) {
  KernelFile kernel;
  kernel.path_ = path;
  auto file = map_file(path);
  if (!file) return Error{"kernel " + file.error().message, file.error().code};
  kernel.file_ = std::move(*file);

  const Bytes bytes = kernel.file_.bytes();
  const auto elf_magic = part(bytes, 0, SELFMAG);
  if (elf_magic && std::memcmp(elf_magic->data(), ELFMAG, SELFMAG) == 0) {
    TRY(kernel.parse_elf(wanted));
  } else if (load<uint16_t>(bytes, offsetof(boot_params, hdr.boot_flag)) == kBootFlag &&
             load<uint32_t>(bytes, offsetof(boot_params, hdr.header)) == kHeaderMagic) {
    TRY(kernel.parse_bzimage(wanted));
  } else {
    return kernel.wrong("neither a bzImage nor an ELF file");
  }
  return kernel;
}

Result<void> KernelFile::parse_bzimage(BootProtocol wanted) {
  const Bytes file = file_.bytes();
  if (wanted == BootProtocol::pvh) return wrong("a bzImage has no PVH entry (the vmlinux it is made from may)");

  // Only the part that the file says it has: later fields stay 0.
  const auto jump = load<uint8_t>(file, kHeaderFixedEnd - 1);
  const uint64_t header_end = kHeaderFixedEnd + jump.value_or(0);
  setup_header& header = image_.header;
  const auto header_bytes = part(file, kHeaderStart, std::min(header_end - kHeaderStart, uint64_t{sizeof header}));
  if (!jump || !header_bytes) return wrong("truncated in the middle of its header");
  std::memcpy(&header, header_bytes->data(), header_bytes->size());

  const unsigned minor = header.version & 0xff;
  const std::string version = std::to_string(header.version >> 8) + (minor < 10 ? ".0" : ".") + std::to_string(minor);
  if (header.version < kLeastVersion) return wrong("boot protocol " + version + ": at least 2.12 is needed");
  if (header_end < offsetof(boot_params, hdr.kernel_info_offset)) return wrong("its header is too short");
  if (!(header.xloadflags & XLF_KERNEL_64)) return wrong("no 64-bit entry (a 32-bit kernel?)");
  if (!(header.loadflags & LOADED_HIGH)) return wrong("a zImage; only a bzImage can be loaded");

  const uint64_t setup_bytes = (uint64_t{header.setup_sects ? header.setup_sects : 4u} + 1) * kSectorSize;
  const uint64_t content_bytes = uint64_t{header.syssize} * 16;
  const auto content = part(file, setup_bytes, content_bytes);
  if (!content) {
    return wrong("truncated: " + std::to_string(file.size()) + " bytes, the header tells of " +
                 std::to_string(setup_bytes + content_bytes));
  }
  if (content_bytes <= kEntry64Offset) return wrong("nothing in it but a header");

  // The kernel would move itself to pref_address from anywhere below it, so no other place saves memory.
  const uint64_t start = header.pref_address;
  const uint64_t used_bytes = std::max(uint64_t{header.init_size}, content_bytes);
  if (!in_kernel_space(start, used_bytes)) {
    return wrong("wants to be at " + range_text(start, used_bytes) + ", outside 1 MiB to 3 GiB");
  }
  if (header.relocatable_kernel) {
    const uint64_t alignment = header.kernel_alignment;
    if (!std::has_single_bit(alignment) || start % alignment != 0) {
      return wrong("its address " + hex(start) + " does not fit its alignment " + hex(alignment));
    }
  }

  image_.protocol = BootProtocol::linux64;
  image_.start = {start};
  image_.end = {start + used_bytes};
  image_.entry = {start + kEntry64Offset};
  if (header.kernel_version) {
    image_.version = version_word(file.first(setup_bytes), uint64_t{header.kernel_version} + kSectorSize);
  }
  segments_.push_back({image_.start, *content, 0});
  return {};
}

Result<void> KernelFile::parse_elf(BootProtocol wanted) {
  const Bytes file = file_.bytes();
  const auto header = load<Elf64_Ehdr>(file, 0);
  if (!header) return wrong("truncated in the middle of its ELF header");
  if (header->e_ident[EI_CLASS] != ELFCLASS64 || header->e_ident[EI_DATA] != ELFDATA2LSB ||
      header->e_machine != EM_X86_64) {
    return wrong("an ELF file, but not for 64-bit x86");
  }
  if (header->e_type != ET_EXEC && header->e_type != ET_DYN) return wrong("an ELF file that cannot be run");
  const uint64_t count = header->e_phnum;
  if (count == 0 || count > kProgramHeadersMax) {
    return wrong(std::to_string(count) + " ELF program headers: 1 to " + std::to_string(kProgramHeadersMax) +
                 " are allowed");
  }
  if (header->e_phentsize != sizeof(Elf64_Phdr)) return wrong("ELF program headers of an unknown size");
  const auto table = part(file, header->e_phoff, count * sizeof(Elf64_Phdr));
  if (!table) {
    return wrong("truncated: its " + std::to_string(count) + " ELF program headers are not all in the file");
  }

  std::optional<uint64_t> pvh_entry;
  for (uint64_t index = 0; index < count; ++index) {
    const Elf64_Phdr segment = *load<Elf64_Phdr>(*table, index * sizeof(Elf64_Phdr));
    const std::string name = "ELF segment " + std::to_string(index);
    if (segment.p_type == PT_NOTE && !pvh_entry) {
      const auto notes = part(file, segment.p_offset, segment.p_filesz);
      if (!notes) return wrong(name + " is not all in the file");
      if (notes->size() > kNoteBytesMax) return wrong(name + " has more than 64 KiB of notes");
      pvh_entry = find_pvh_entry(*notes, segment.p_align == 8 ? 8 : 4);
    }
    if (segment.p_type != PT_LOAD || segment.p_memsz == 0) continue;
    if (segment.p_filesz > segment.p_memsz) return wrong(name + " is longer in the file than in memory");
    const auto content = part(file, segment.p_offset, segment.p_filesz);
    if (!content) return wrong("truncated: " + name + " is not all in the file");
    if (!in_kernel_space(segment.p_paddr, segment.p_memsz)) {
      return wrong(name + " wants to be at " + range_text(segment.p_paddr, segment.p_memsz) +
                   ", outside 1 MiB to 3 GiB");
    }
    segments_.push_back({{segment.p_paddr}, *content, segment.p_memsz - segment.p_filesz});
  }
  if (segments_.empty()) return wrong("an ELF file with nothing to load");

  std::sort(segments_.begin(), segments_.end(),
            [](const Segment& a, const Segment& b) { return a.address < b.address; });
  const auto end_of = [](const Segment& segment) {
    return segment.address + (segment.content.size() + segment.zero_bytes);
  };
  for (size_t index = 1; index < segments_.size(); ++index) {
    if (end_of(segments_[index - 1]) > segments_[index].address) {
      return wrong("ELF segments overlap at " + hex(segments_[index].address.value));
    }
  }

  if (wanted == BootProtocol::pvh && !pvh_entry) return wrong("an ELF file without the note that gives a PVH entry");
  const bool pvh = pvh_entry && wanted != BootProtocol::linux64;
  image_.protocol = pvh ? BootProtocol::pvh : BootProtocol::linux64;
  image_.entry = {pvh ? *pvh_entry : header->e_entry};
  const bool inside = std::any_of(segments_.begin(), segments_.end(), [&](const Segment& segment) {
    return image_.entry >= segment.address && image_.entry < segment.address + segment.content.size();
  });
  if (!inside) return wrong("its entry " + hex(image_.entry.value) + " lies in no segment of the file");
  image_.start = segments_.front().address;
  image_.end = end_of(segments_.back());
  for (const Segment& segment : segments_)
    if (image_.version.empty()) image_.version = banner_version(segment.content);

  image_.header.boot_flag = kBootFlag;
  image_.header.header = kHeaderMagic;
  image_.header.version = kCurrentVersion;
  image_.header.loadflags = LOADED_HIGH;
  image_.header.xloadflags = XLF_KERNEL_64;
  image_.header.cmdline_size = kLinuxCommandLineMax;
  image_.header.initrd_addr_max = kLinuxInitrdAddressMax;
  return {};
}

Result<void> KernelFile::load_into(GuestMemory& memory) const {
  if (image_.end > memory.low_end()) {
    return Error{"kernel " + path_ + ": needs memory up to " + mebibytes(image_.end.value + 0xfffff) +
                     ", the guest has " + mebibytes(memory.low_end().value) + " below the PCI hole",
                 ENOMEM};
  }
  for (const Segment& segment : segments_) {
    const uint64_t size_bytes = segment.content.size() + segment.zero_bytes;
    std::byte* into = memory.slice(segment.address, size_bytes);
    memory.prefault(segment.address, segment.content.size());
    std::memcpy(into, segment.content.data(), segment.content.size());
    std::memset(into + segment.content.size(), 0, segment.zero_bytes);
    memory.mark_dirty(segment.address, size_bytes);
  }
  return {};
}

Result<InitrdPlace> find_initrd_place(const GuestMemory& memory, const KernelImage& kernel, uint64_t size_bytes) {
  const uint64_t limit = std::min(memory.low_end().value, uint64_t{kernel.header.initrd_addr_max} + 1);
  const uint64_t room = limit > kernel.end.value ? limit - kernel.end.value : 0;
  if (size_bytes <= room) {
    const uint64_t start = (limit - size_bytes) & ~(kPageSize - 1);
    if (start >= kernel.end.value) return InitrdPlace{{start}, size_bytes};
  }
  return Error{"initrd: " + std::to_string(size_bytes) + " bytes do not fit between the kernel's end at " +
                   hex(kernel.end.value) + " and " + hex(limit) + " (the guest has " + mebibytes(memory.size_bytes()) +
                   " of memory)",
               ENOMEM};
}

Result<InitrdPlace> place_initrd(GuestMemory& memory, const KernelImage& kernel, std::span<const std::byte> content) {
  const InitrdPlace initrd = TRY(find_initrd_place(memory, kernel, content.size()));
  memory.prefault(initrd.start, content.size());
  if (!memory.write(initrd.start, content.data(), content.size()) && !content.empty()) {
    return Error{"initrd: " + hex(initrd.start.value) + " is not memory", EFAULT};
  }
  return initrd;
}

}  // namespace vmm
