// SPDX-License-Identifier: Apache-2.0
// A machine's state on its way to another process of this host: sections as JSON, memory as a descriptor.
#pragma once

#include <boost/json.hpp>
#include <cstdint>
#include <span>

#include "snapshot/sections.hpp"
#include "util/fd.hpp"
#include "util/result.hpp"

namespace vmm {

class GuestMemory;

boost::json::array sections_to_json(const Sections& sections);
Result<Sections> sections_from_json(const boost::json::value& json);

// A file in memory of the size of `memory`, empty.
Result<Fd> make_memory_file(const GuestMemory& memory);
// Whole pages into it; those of zeroes become holes, whatever was there before. [any]
Result<void> put_memory(int file, uint64_t offset, std::span<const std::byte> bytes);

}  // namespace vmm
