// SPDX-License-Identifier: Apache-2.0
// Compressed clusters of qcow2 files.
#pragma once

#include <cstddef>
#include <span>

#include "format.hpp"

namespace virtio_blk::qcow2 {

// Fills `cluster` from its compressed form, which may be followed by other bytes; false when it is not one.
bool decompress(Compression compression, std::span<const std::byte> compressed, std::span<std::byte> cluster);

}  // namespace virtio_blk::qcow2
