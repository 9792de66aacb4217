// SPDX-License-Identifier: Apache-2.0
// An error in the kernel's words alone; whoever passes it on says what it was about.
#pragma once

#include <cerrno>
#include <cstring>

#include "clone/sdk/result.hpp"

namespace virtio_blk {

inline clone_sdk::Error system_error(int code = errno) { return {std::strerror(code), code, CLONE_ERR_SYSTEM}; }

}  // namespace virtio_blk
