// SPDX-License-Identifier: Apache-2.0
// The core speaks of errors as plugins do: clone/sdk/result.hpp under the core's names.
#pragma once

#include "clone/sdk/result.hpp"

namespace vmm {
using clone_sdk::errno_error;
using clone_sdk::Error;
using clone_sdk::Result;
}  // namespace vmm

#define TRY(expression) CLONE_TRY(expression)
