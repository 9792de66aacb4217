// SPDX-License-Identifier: Apache-2.0
// Whether a snapshot's memory lies compressed in the store.
#pragma once

#include <string>

#include "store.hpp"

namespace snapshot_file {

// Whole before and after, and whenever the process ends: the other file appears under its name when it is on the disk,
// and the one before it goes then. Both compare the checksum of the memory.
Result<void> set_compressed(const Store& store, const std::string& name, bool on);

}  // namespace snapshot_file
