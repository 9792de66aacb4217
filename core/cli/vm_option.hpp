// SPDX-License-Identifier: Apache-2.0
// What commands for a running VM share: which VM, and how numbers are shown.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>

#include "control/client.hpp"
#include "control/instances.hpp"

namespace vmm {

// --vm-id, and the same as the only argument behind the options.
void add_vm_option(CLI::App& app, std::string& vm);
// For commands whose arguments are something else: --vm-id only.
void add_vm_flag(CLI::App& app, std::string& vm);

// The VM, and the line to it.
struct Contact {
  InstanceRecord instance;
  ControlClient client;
};
Result<Contact> contact(const std::string& vm);

// "512M", "1.5G", "12K": at most four characters and the unit.
std::string size_text(uint64_t bytes);
// "42s", "12m 3s", "5h 12m", "3d 4h".
std::string duration_text(int64_t ms);

}  // namespace vmm
