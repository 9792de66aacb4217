// SPDX-License-Identifier: Apache-2.0
// What stands behind clone_host.context: the parts of the VM that the host's services reach.
#pragma once

namespace vmm {

class GuestMemory;
class EventLoop;
class ConsoleHub;

struct HostContext {
  GuestMemory* memory = nullptr;
  EventLoop* main_loop = nullptr;
  ConsoleHub* console = nullptr;
};

}  // namespace vmm
