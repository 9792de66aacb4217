// SPDX-License-Identifier: Apache-2.0
// Makes a tree boot as a machine: an init, a login on the serial console, name, network, the guest's agent.
#pragma once

#include <string>

#include "sources.hpp"

namespace rootfs {

// What may be changed: a folder of the user's keeps what it has, an image of ours is set up.
enum class Origin { distribution, container, folder };

struct Setup {
  Origin origin = Origin::folder;
  std::string hostname;         // empty: what the tree has, or "clone"
  std::string ssh_keys;         // the text for authorized_keys
  std::string agent_path;       // on the host; empty: none
  std::string plain_init_path;  // on the host
  ContainerConfig container;
};

Result<void> make_bootable(const Context& context, const Setup& setup);

Result<void> check_hostname(const std::string& name);

}  // namespace rootfs
