// SPDX-License-Identifier: Apache-2.0
// Kernel files: what they are is found out before there is a VM, and then copied once into its memory.
#pragma once

#include <asm/bootparam.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "memory/guest_memory.hpp"
#include "util/mapping.hpp"
#include "util/result.hpp"

namespace vmm {

enum class BootProtocol {
  automatic,  // PVH for an ELF file that has its note, 64-bit Linux for any other
  linux64,    // Linux boot protocol, 64-bit entry, boot_params in rsi
  pvh,        // 32-bit entry, hvm_start_info in ebx
};

// What the rest of the boot has to know about a kernel.
struct KernelImage {
  BootProtocol protocol = BootProtocol::linux64;  // never automatic
  GuestAddress entry;
  // All the memory the kernel uses before it looks at the memory map: file, bss, room to decompress itself.
  GuestAddress start;
  GuestAddress end;
  // A bzImage's own; for an ELF file one that says what a current kernel's would.
  setup_header header{};
  // The release, "6.1.0-56-cloud-amd64": the folder under /lib/modules. Of a bzImage as its header says, of an ELF file as
  // its banner does. Empty when not known.
  std::string version;
};

class KernelFile {
 public:
  // A bzImage (boot protocol 2.12 or later with a 64-bit entry) or an ELF file for x86-64. Everything in the file is
  // checked here, and read ahead while the VM is made; errors name the path.
  static Result<KernelFile> open(const std::string& path, BootProtocol wanted = BootProtocol::automatic);

  const KernelImage& image() const { return image_; }
  const std::string& path() const { return path_; }

  // Copies the kernel to where it wants to be. An error when the guest has too little memory below the hole.
  Result<void> load_into(GuestMemory& memory) const;

 private:
  struct Segment {
    GuestAddress address;
    std::span<const std::byte> content;
    uint64_t zero_bytes = 0;  // after the content
  };

  Result<void> parse_bzimage(BootProtocol wanted);
  Result<void> parse_elf(BootProtocol wanted);
  Error wrong(const std::string& what) const;

  std::string path_;
  Mapping file_;
  KernelImage image_;
  std::vector<Segment> segments_;
};

struct InitrdPlace {
  GuestAddress start;
  uint64_t size_bytes = 0;
};

// The highest page-aligned place for an initrd: above the kernel, in the memory below the hole, and not above what
// the kernel can reach (initrd_addr_max). Whoever makes an initrd can write it there directly.
Result<InitrdPlace> find_initrd_place(const GuestMemory& memory, const KernelImage& kernel, uint64_t size_bytes);
// The same for an initrd that is there already; copies it once.
Result<InitrdPlace> place_initrd(GuestMemory& memory, const KernelImage& kernel, std::span<const std::byte> content);

}  // namespace vmm
