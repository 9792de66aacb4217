// SPDX-License-Identifier: Apache-2.0
// Entry of the `clone` binary: finds the command and runs it.
#include <fcntl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>
#include <vector>

#include "cli/command.hpp"
#include "cli/external.hpp"
#include "clone/abi/base.h"
#include "plugin/crash_report.hpp"
#include "util/log.hpp"

namespace vmm {
namespace {

struct Command {
  const char* name;
  const char* help;
  ExitCode (*run)(const Arguments&);
};

constexpr Command kCommands[] = {
    {"run", "Boot a virtual machine.", run_command},
    {"fork", "Start a virtual machine from a template.", fork_command},
    {"snapshot", "Keep a running VM as a template.", snapshot_command},
    {"template", "List, inspect, verify, copy and remove templates.", template_command},
    {"list", "List the VMs that run.", list_command},
    {"status", "Tell what each VM and this host use of memory.", status_command},
    {"attach", "Enter a VM's serial console.", attach_command},
    {"logs", "Print what a VM's console printed.", logs_command},
    {"stop", "Power a VM off.", stop_command},
    {"pause", "Let a VM stand still.", pause_command},
    {"resume", "Let a paused VM go on.", resume_command},
    {"metrics", "Print a VM's metrics as Prometheus text.", metrics_command},
    {"exec", "Run a command in a virtual machine.", exec_command},
    {"cp", "Copy files into a virtual machine or out of it.", copy_command},
    {"plugin", "List, inspect and check plugins.", plugin_command},
    {"doctor", "Tell what this machine can do for virtual machines.", doctor_command},
};

void print_help() {
  std::puts("clone - a modular virtual machine monitor\n\nUsage: clone COMMAND [OPTION…]\n\nCommands:");
  for (const Command& command : kCommands) std::printf("  %-10s %s\n", command.name, command.help);
  for (const ExternalCommand& command : external_commands())
    std::printf("  %-10s %s\n", command.name.c_str(), command.summary.c_str());
  std::puts(
      "\nclone COMMAND --help tells more. To boot Debian's kernel with a disk image:\n\n"
      "  clone run --kernel /boot/vmlinuz-$(uname -r) --rootfs disk.img\n");
}

ExitCode dispatch(const Arguments& arguments) {
  if (arguments.empty()) {
    print_help();
    return ExitCode::usage;
  }
  const std::string& name = arguments.front();
  if (name == "--help" || name == "-h" || name == "help") {
    print_help();
    return ExitCode::success;
  }
  if (name == "--version" || name == "version") {
    std::printf("clone %s (plugin interface %u.%u)\n", CLONE_VERSION, CLONE_ABI_MAJOR, CLONE_ABI_MINOR);
    return ExitCode::success;
  }
  std::string known;
  for (const Command& command : kCommands) {
    if (name == command.name) return command.run({arguments.begin() + 1, arguments.end()});
    known += (known.empty() ? "" : ", ") + std::string(command.name);
  }
  for (const ExternalCommand& command : external_commands()) {
    if (name == command.name) return fail(become(command, {arguments.begin() + 1, arguments.end()}));
    known += ", " + command.name;
  }
  return fail(Error{"unknown command '" + name + "'; there are: " + known}, ExitCode::usage);
}

}  // namespace

ExitCode fail(const Error& error, ExitCode code) {
  std::string_view rest = error.message;
  while (!rest.empty()) {
    const size_t end = rest.find('\n');
    log_error(rest.substr(0, end));
    rest.remove_prefix(end == std::string_view::npos ? rest.size() : end + 1);
  }
  return code;
}

void add_plugin_options(CLI::App& app, PluginPaths& paths) {
  app.add_option("--plugin-dir", paths.folders, "Look for plugins in this folder first (also: CLONE_PLUGIN_PATH).")
      ->type_name("DIR")
      ->expected(1)
      ->allow_extra_args(false)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->group("Plugins");
  app.add_flag_callback(
         "--allow-insecure-plugins", [&paths] { paths.trust = PluginTrust::any; },
         "Load plugins that other users could have written.")
      ->group("Plugins");
}

Result<Catalogue> scan_plugins(const PluginPaths& paths) {
  return Catalogue::scan(plugin_folders(paths.folders), paths.trust);
}

Parsed parse(CLI::App& app, const Arguments& arguments) {
  try {
    std::vector<std::string> reversed(arguments.rbegin(), arguments.rend());  // as CLI11 wants them
    app.parse(reversed);
    return {};
  } catch (const CLI::CallForHelp&) {
    std::fputs(app.help().c_str(), stdout);
    return {true, ExitCode::success};
  } catch (const CLI::ParseError& error) {
    std::string message = error.what();
    while (!message.empty() && message.back() == '\n') message.pop_back();
    return {true, fail(Error{message + " (see " + app.get_name() + " --help)"}, ExitCode::usage)};
  }
}

}  // namespace vmm

namespace {

// A caller may have closed them; what is opened next would then be written to as if it were one of them.
void fill_standard_descriptors() {
  int fd = 0;
  do fd = ::open("/dev/null", O_RDWR);
  while (fd >= 0 && fd <= STDERR_FILENO);
  if (fd >= 0) ::close(fd);
}

}  // namespace

int main(int argc, char** argv) {
  fill_standard_descriptors();
  // Before any plugin is loaded: a crash in one is reported under its name.
  vmm::install_crash_handler();
  const vmm::Arguments arguments(argv + 1, argv + argc);
  return static_cast<int>(vmm::dispatch(arguments));
}
