// SPDX-License-Identifier: Apache-2.0
// Sections of a shared object for x86-64, read from bytes that may be anything.
#pragma once

#include <elf.h>

#include <cstring>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "util/result.hpp"

namespace vmm {

template <typename T>
std::optional<T> read_at(std::span<const std::byte> bytes, uint64_t offset) {
  if (offset > bytes.size() || bytes.size() - offset < sizeof(T)) return std::nullopt;
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

struct ElfSection {
  std::string_view name;
  Elf64_Shdr header{};
  std::span<const std::byte> bytes;  // empty for a section without bytes in the file
};

// All of them, in the file's order. Views into `file`.
Result<std::vector<ElfSection>> elf_sections(std::span<const std::byte> file);

// The text that starts at `offset` of a string table; what has no end ends with the table.
std::string_view string_at(std::span<const std::byte> table, uint64_t offset);

}  // namespace vmm
