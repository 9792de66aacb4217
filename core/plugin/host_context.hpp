// SPDX-License-Identifier: Apache-2.0
// What stands behind clone_host.context: how a service finds the VM that its caller belongs to.
#pragma once

#include "clone/abi/host.h"
#include "memory/guest_memory.hpp"

namespace vmm {

class ConsoleHub;
class EventLoop;

struct HostContext {
  GuestMemory* memory = nullptr;
  EventLoop* main_loop = nullptr;
  ConsoleHub* console = nullptr;
};

inline GuestMemory& memory_of(const clone_host* host) { return *static_cast<HostContext*>(host->context)->memory; }

}  // namespace vmm
