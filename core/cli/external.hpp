// SPDX-License-Identifier: Apache-2.0
// Commands that are programs of their own: libexec/clone/clone-NAME, with what --help says of it in clone-NAME.summary.
#pragma once

#include <string>
#include <vector>

#include "util/result.hpp"

namespace vmm {

struct ExternalCommand {
  std::string name;
  std::string summary;  // one line
  std::string path;
};

// Those that are installed, by name. A program without a summary is no command.
std::vector<ExternalCommand> external_commands();

// Becomes the program; returns only what went wrong. It has to be as trustworthy as a plugin.
Error become(const ExternalCommand& command, const std::vector<std::string>& arguments);

}  // namespace vmm
