// SPDX-License-Identifier: Apache-2.0
// Plugin files that are nothing but a manifest, for tests of what is read before a file is loaded.
#pragma once

#include <elf.h>

#include <cstring>
#include <string>
#include <vector>

#include "clone/abi/plugin.h"

namespace vmm::test {

inline clone_manifest good_manifest() {
  clone_manifest manifest{};
  std::memcpy(manifest.magic, CLONE_MANIFEST_MAGIC, sizeof manifest.magic);
  manifest.size = sizeof manifest;
  manifest.abi_major = CLONE_ABI_MAJOR;
  manifest.abi_minor = CLONE_ABI_MINOR;
  std::strcpy(manifest.id, "tester");
  std::strcpy(
      manifest.provides,
      CLONE_PROVIDES("device", "tester", "default")
          CLONE_PROVIDES_FLAG("--test", "tester", "[KIND]", "kind=%", "Tests.")
              CLONE_PROVIDES_FLAG("--main", "tester", "FILE", "path=%,main=on", "The main.")
                  CLONE_PROVIDES_FLAG_OPTION("--spare", "tester", "main=on", "[WHERE]", "spare", "memory", "Spares it.")
                      CLONE_PROVIDES_FLAG_OPTION("--depth", "tester", "", "N", "depth", "", "How deep."));
  return manifest;
}

// The smallest ELF file that has the section: header, names, section, three section headers.
inline std::vector<std::byte> elf_with(const void* section, size_t size_bytes) {
  const std::string names = std::string("\0.shstrtab\0", 11) + CLONE_MANIFEST_SECTION + std::string(1, '\0');
  Elf64_Ehdr header{};
  std::memcpy(header.e_ident, ELFMAG, SELFMAG);
  header.e_ident[EI_CLASS] = ELFCLASS64;
  header.e_machine = EM_X86_64;
  header.e_type = ET_DYN;
  header.e_shentsize = sizeof(Elf64_Shdr);
  header.e_shnum = 3;
  header.e_shstrndx = 1;
  Elf64_Shdr headers[3]{};
  headers[1].sh_name = 1;
  headers[1].sh_type = SHT_STRTAB;
  headers[1].sh_offset = sizeof header;
  headers[1].sh_size = names.size();
  headers[2].sh_name = 11;
  headers[2].sh_type = SHT_PROGBITS;
  headers[2].sh_offset = sizeof header + names.size();
  headers[2].sh_size = size_bytes;
  header.e_shoff = sizeof header + names.size() + size_bytes;
  std::string file(reinterpret_cast<const char*>(&header), sizeof header);
  file += names;
  file.append(static_cast<const char*>(section), size_bytes);
  file.append(reinterpret_cast<const char*>(headers), sizeof headers);
  const auto* bytes = reinterpret_cast<const std::byte*>(file.data());
  return {bytes, bytes + file.size()};
}

}  // namespace vmm::test
