// SPDX-License-Identifier: Apache-2.0
// What `clone run` and `clone fork` share: flags made of settings, and the way from a machine's end to an exit status.
#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "cli/command.hpp"
#include "plan/settings.hpp"
#include "vm/machine.hpp"

namespace vmm {

// Options of a command that starts a machine, besides its settings.
struct StartOptions {
  PluginPaths plugins;
  bool timing = false;
  bool quiet = false;
  bool verbose = false;
  std::vector<GivenSetting> settings;
};

// Flags depend on the plugins there are, so the two options that decide about plugins are read first.
PluginPaths early_plugin_paths(const Arguments& arguments);

void add_setting(CLI::App& app, const Setting& setting, std::vector<GivenSetting>& given);
void add_start_options(CLI::App& app, StartOptions& options);

// As parse(); tells what plugins were refused when a flag is unknown.
Parsed parse_settings(CLI::App& app, const Arguments& arguments, const Catalogue& catalogue);
void apply_verbosity(const StartOptions& options);

// The status for the end of a machine; an error is printed.
ExitCode exit_code_of(const Result<Ending>& ending);

}  // namespace vmm
