// SPDX-License-Identifier: Apache-2.0
// A file descriptor that closes itself.
#pragma once

#include "clone/sdk/fd.hpp"

namespace vmm {
using clone_sdk::Fd;
}  // namespace vmm
