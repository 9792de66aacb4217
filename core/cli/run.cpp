// SPDX-License-Identifier: Apache-2.0
// `clone run`: settings from flags and profile, checked into a plan, and the machine run until it ends.
#include <CLI/CLI.hpp>
#include <cstdio>

#include "cli/command.hpp"
#include "cli/device_help.hpp"
#include "cli/machine_options.hpp"
#include "plan/profile.hpp"
#include "plan/settings.hpp"
#include "vm/session.hpp"

namespace vmm {
namespace {

struct RunOptions : StartOptions {
  std::string profile;
  bool dry_run = false;
};

}  // namespace

ExitCode run_command(const Arguments& arguments) {
  Timing timing;
  auto catalogue = scan_plugins(early_plugin_paths(arguments));
  if (!catalogue.ok()) return fail(catalogue.error());
  const std::vector<Setting> settings = all_settings(*catalogue);

  RunOptions options;
  CLI::App app("Boot a virtual machine: clone run --kernel FILE [--rootfs FILE | --initrd FILE] [OPTIONS]",
               "clone run");
  for (const Setting& setting : settings) add_setting(app, setting, options.settings);
  app.add_option("--profile", options.profile, "Settings from a YAML file; flags win over it.")
      ->type_name("FILE")
      ->group("Boot");
  app.add_flag("--dry-run", options.dry_run, "Print the resulting plan as a profile and exit.")->group("Output");
  add_start_options(app, options);
  if (const Parsed parsed = parse_settings(app, arguments, *catalogue); parsed.done) return parsed.code;
  apply_verbosity(options);

  PluginLibrary library(*catalogue);
  if (const auto printed = print_device_help(library, options.settings)) return *printed;

  std::vector<GivenSetting> profile;
  if (!options.profile.empty()) {
    auto read = read_profile(options.profile, settings);
    if (!read.ok()) return fail(read.error());
    profile = std::move(read).value();
  }
  auto plan = make_plan(profile, options.settings);
  if (!plan.ok()) return fail(plan.error(), ExitCode::usage);
  if (plan->kernel.empty()) return fail(Error{"--kernel is missing: give the kernel to boot"}, ExitCode::usage);
  timing.mark("plan");
  auto checked = check_plan(*plan, library);
  if (!checked.ok()) return fail(checked.error(), ExitCode::usage);
  timing.mark("plugins");
  if (options.dry_run) {
    std::fputs(write_profile(*checked).c_str(), stdout);
    return ExitCode::success;
  }
  Session session(*checked, library, timing, options.timing ? TimingReport::print : TimingReport::none);
  return exit_code_of(session.run());
}

}  // namespace vmm
