// SPDX-License-Identifier: Apache-2.0
// The commands of the `clone` binary; each has a file of its own.
#pragma once

#include <string>
#include <vector>

#include "plugin/catalogue.hpp"
#include "util/result.hpp"

namespace CLI {
class App;
}

namespace vmm {

// What the process ends with (docs/exit-codes.md).
enum class ExitCode : int {
  success = 0,
  cannot_start = 1,   // bad input, or the host refused something
  usage = 2,          // the command line makes no sense
  guest_reset = 3,    // the guest reset itself, with --no-reboot
  guest_crashed = 4,  // triple fault, or the guest reported a panic
  kvm_failed = 5,     // KVM could not run the guest on
  guest_stopped = 6,  // stopped without the guest's consent: grace over, second signal, Ctrl-A X
};

// Prints an error, one "clone: error: …" for each of its lines.
ExitCode fail(const Error& error, ExitCode code = ExitCode::cannot_start);

// Options of every command that looks for plugins.
struct PluginPaths {
  std::vector<std::string> folders;
  PluginTrust trust = PluginTrust::checked;
};
void add_plugin_options(CLI::App& app, PluginPaths& paths);
Result<Catalogue> scan_plugins(const PluginPaths& paths);

// Parses into `app`; a wrong command line is one line on standard error, --help goes to standard output. Empty: go on.
struct Parsed {
  bool done = false;
  ExitCode code = ExitCode::success;
};
Parsed parse(CLI::App& app, const std::vector<std::string>& arguments);

// `arguments` are those behind the command's name.
using Arguments = std::vector<std::string>;
ExitCode run_command(const Arguments& arguments);
ExitCode fork_command(const Arguments& arguments);
ExitCode snapshot_command(const Arguments& arguments);
ExitCode template_command(const Arguments& arguments);
ExitCode list_command(const Arguments& arguments);
ExitCode status_command(const Arguments& arguments);
ExitCode attach_command(const Arguments& arguments);
ExitCode logs_command(const Arguments& arguments);
ExitCode stop_command(const Arguments& arguments);
ExitCode pause_command(const Arguments& arguments);
ExitCode resume_command(const Arguments& arguments);
ExitCode metrics_command(const Arguments& arguments);
ExitCode plugin_command(const Arguments& arguments);
ExitCode doctor_command(const Arguments& arguments);
ExitCode exec_command(const Arguments& arguments);
ExitCode copy_command(const Arguments& arguments);

}  // namespace vmm
