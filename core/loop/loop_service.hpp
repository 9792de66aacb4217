// SPDX-License-Identifier: Apache-2.0
// clone.host-loop/1: event loops and threads for plugins.
#pragma once

#include "clone/abi/loop.h"

namespace vmm {

// The main loop is that of the HostContext behind the host.
const clone_host_loop* loop_service();

}  // namespace vmm
