// SPDX-License-Identifier: Apache-2.0
// Reads the dynamic symbol table (System V ABI, "Symbol Table").
#include "plugin/elf_exports.hpp"

#include "plugin/elf_reader.hpp"

namespace vmm {

Result<std::vector<std::string>> exported_symbols(std::span<const std::byte> elf_file) {
  const auto sections = TRY(elf_sections(elf_file));
  std::vector<std::string> names;
  for (const ElfSection& section : sections) {
    if (section.header.sh_type != SHT_DYNSYM) continue;
    if (section.header.sh_link >= sections.size()) return Error{"its dynamic symbols have no names"};
    const auto strings = sections[section.header.sh_link].bytes;
    for (uint64_t offset = 0; const auto symbol = read_at<Elf64_Sym>(section.bytes, offset);
         offset += sizeof(Elf64_Sym)) {
      const bool global = ELF64_ST_BIND(symbol->st_info) == STB_GLOBAL || ELF64_ST_BIND(symbol->st_info) == STB_WEAK ||
                          ELF64_ST_BIND(symbol->st_info) == STB_GNU_UNIQUE;
      if (global && symbol->st_shndx != SHN_UNDEF) names.emplace_back(string_at(strings, symbol->st_name));
    }
  }
  return names;
}

}  // namespace vmm
