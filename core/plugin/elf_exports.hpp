// SPDX-License-Identifier: Apache-2.0
// The symbols that a shared object offers to others.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "util/result.hpp"

namespace vmm {

// Names of the defined global and weak symbols of the dynamic symbol table. The bytes are those of a file that may be
// anything.
Result<std::vector<std::string>> exported_symbols(std::span<const std::byte> elf_file);

}  // namespace vmm
