// SPDX-License-Identifier: Apache-2.0
// Walks the section headers of an ELF file (System V ABI, "Sections"); every offset is checked against the file.
#include "plugin/elf_reader.hpp"

namespace vmm {

std::string_view string_at(std::span<const std::byte> table, uint64_t offset) {
  if (offset >= table.size()) return {};
  const auto* start = reinterpret_cast<const char*>(table.data()) + offset;
  return {start, ::strnlen(start, table.size() - offset)};
}

Result<std::vector<ElfSection>> elf_sections(std::span<const std::byte> file) {
  const Error broken{"not a plugin: the ELF file is damaged", ENOEXEC};
  const auto header = read_at<Elf64_Ehdr>(file, 0);
  if (!header || std::memcmp(header->e_ident, ELFMAG, SELFMAG) != 0)
    return Error{"not a plugin: not an ELF file", ENOEXEC};
  if (header->e_ident[EI_CLASS] != ELFCLASS64 || header->e_machine != EM_X86_64 || header->e_type != ET_DYN)
    return Error{"not a plugin: not a shared object for x86-64", ENOEXEC};
  if (header->e_shentsize != sizeof(Elf64_Shdr) || header->e_shoff > file.size()) return broken;

  std::vector<ElfSection> sections;
  for (uint64_t index = 0; index < header->e_shnum; ++index) {
    const auto section = read_at<Elf64_Shdr>(file, header->e_shoff + index * sizeof(Elf64_Shdr));
    if (!section) return broken;
    ElfSection added{{}, *section, {}};
    if (section->sh_type != SHT_NOBITS && section->sh_type != SHT_NULL) {
      if (section->sh_offset > file.size() || file.size() - section->sh_offset < section->sh_size) return broken;
      added.bytes = file.subspan(section->sh_offset, section->sh_size);
    }
    sections.push_back(added);
  }
  if (header->e_shstrndx >= sections.size()) return broken;
  const auto names = sections[header->e_shstrndx].bytes;
  for (ElfSection& section : sections) section.name = string_at(names, section.header.sh_name);
  return sections;
}

}  // namespace vmm
