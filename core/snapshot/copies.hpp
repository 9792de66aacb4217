// SPDX-License-Identifier: Apache-2.0
// Copies of a snapshot, whole whatever chain it is of: in its store, or as one file that goes elsewhere.
#pragma once

#include <string>

#include "snapshot/backend.hpp"
#include "util/result.hpp"

namespace vmm {

// Checksums are compared first: damage is not copied. A copy that fails leaves nothing.
Result<void> flatten_snapshot(const SnapshotBackend& backend, const std::string& name, const std::string& copy);

// A file that is there is not replaced. The new one's size.
Result<uint64_t> export_snapshot(const SnapshotBackend& backend, const std::string& name, const std::string& path);
// The file may be anything; it becomes a snapshot when all of it was read. `name` empty: the exported one's. The name.
Result<std::string> import_snapshot(const SnapshotBackend& backend, const std::string& path, std::string name);

}  // namespace vmm
