// SPDX-License-Identifier: Apache-2.0
// Option tables of devices, transports and balloon policies as text.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "cli/command.hpp"
#include "plan/settings.hpp"
#include "plugin/library.hpp"

namespace vmm {

// The options of a descriptor, a line each: name, type, default, help.
std::string option_table(const clone_descriptor& descriptor);

// For `--device NAME,help` and `--transport NAME,help` and the like; nothing when no help was asked for.
std::optional<ExitCode> print_device_help(PluginLibrary& library, const std::vector<GivenSetting>& settings);

}  // namespace vmm
