// SPDX-License-Identifier: Apache-2.0
// What the host knows behind a clone_host: whose it is, and the parts of the VM that its services work on.
#pragma once

#include <string>

#include "clone/abi/host.h"

namespace vmm {

class ConsoleHub;
class ControlServer;
class EventLoop;
class GuestMemory;
class InstanceDirectory;
class Machine;

// Parts that a host does not have are NULL: their services are then not offered.
struct HostContext {
  GuestMemory* memory = nullptr;
  EventLoop* main_loop = nullptr;
  ConsoleHub* console = nullptr;
  Machine* machine = nullptr;
  ControlServer* control = nullptr;
  const InstanceDirectory* directory = nullptr;  // with `control`
};

// The context's owner: services work on the VM of their caller. [any]
inline HostContext& context_of(const clone_host* host) { return *static_cast<HostContext*>(host->context); }

// A clone_host for one plugin or one device. It does not move: plugins keep its address. The context outlives it.
class HostHandle {
 public:
  HostHandle(std::string name, HostContext& context);
  HostHandle(const HostHandle&) = delete;
  HostHandle& operator=(const HostHandle&) = delete;

  const clone_host* raw() const { return &raw_; }
  const std::string& name() const { return name_; }

 private:
  std::string name_;
  clone_host raw_;
};

}  // namespace vmm
