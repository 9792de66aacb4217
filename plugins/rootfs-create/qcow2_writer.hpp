// SPDX-License-Identifier: Apache-2.0
// Writes a raw image as qcow2, once and in order (docs/interop/qcow2 of QEMU: version 3).
#pragma once

#include <functional>

#include "tree.hpp"

namespace rootfs {

// `raw` and `output` are open files, `output` empty. Clusters that read as zeros are left out.
Result<void> write_qcow2(const Fd& raw, uint64_t size_bytes, const Fd& output,
                         const std::function<void(uint64_t done)>& on_bytes);

}  // namespace rootfs
