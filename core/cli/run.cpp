// SPDX-License-Identifier: Apache-2.0
// `clone run`: settings from flags and profile, checked into a plan, and the machine run until it ends.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "cli/command.hpp"
#include "cli/device_help.hpp"
#include "plan/profile.hpp"
#include "plan/settings.hpp"
#include "util/log.hpp"
#include "vm/session.hpp"

namespace vmm {
namespace {

struct RunOptions {
  PluginPaths plugins;
  std::string profile;
  bool dry_run = false;
  bool timing = false;
  bool quiet = false;
  bool verbose = false;
  std::vector<GivenSetting> settings;
};

// Flags depend on the plugins there are, so the two options that decide about plugins are read first.
PluginPaths early_plugin_paths(const Arguments& arguments) {
  PluginPaths paths;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i] == "--plugin-dir" && i + 1 < arguments.size()) paths.folders.push_back(arguments[i + 1]);
    if (arguments[i].starts_with("--plugin-dir="))
      paths.folders.push_back(arguments[i].substr(std::strlen("--plugin-dir=")));
    if (arguments[i] == "--allow-insecure-plugins") paths.trust = PluginTrust::any;
  }
  return paths;
}

void add_setting(CLI::App& app, const Setting& setting, std::vector<GivenSetting>& given) {
  const std::string flag = "--" + setting.name + (setting.name == "mem" ? ",--mem-mb" : "");
  auto record = [&setting, &given](std::string value) {
    given.push_back({&setting, std::move(value), {}, "--" + setting.name});
  };
  if (setting.kind == SettingKind::toggle) {
    app.add_flag_callback(
           flag, [record] { record("on"); }, setting.help)
        ->group(setting.group);
    return;
  }
  CLI::Option* option = app.add_option_function<std::vector<std::string>>(
      flag,
      [record, &setting, &given](const std::vector<std::string>& values) {
        // Of a value given twice the last counts.
        if (setting.kind != SettingKind::list)
          std::erase_if(given, [&](const GivenSetting& earlier) { return earlier.setting == &setting; });
        for (const std::string& value : values) record(value);
      },
      setting.help);
  option->type_name(setting.value_name)
      ->group(setting.group)
      ->expected(setting.kind == SettingKind::optional_value ? 0 : 1, 1)
      ->allow_extra_args(false)
      ->trigger_on_parse()
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
}

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
  add_plugin_options(app, options.plugins);
  app.add_flag("--dry-run", options.dry_run, "Print the resulting plan as a profile and exit.")->group("Output");
  app.add_flag("--timing", options.timing, "Print what each step of the start took, on standard error.")
      ->group("Output");
  app.add_flag("--verbose,-v", options.verbose, "Tell more of what happens.")->group("Output");
  app.add_flag("--quiet,-q", options.quiet, "Print errors only.")->group("Output");
  if (const Parsed parsed = parse(app, arguments); parsed.done) {
    // A flag may be unknown because the plugin that declares it was refused.
    if (parsed.code == ExitCode::usage)
      for (const RefusedFile& refused : catalogue->refused()) log_warning(refused.path + ": " + refused.error.message);
    return parsed.code;
  }
  set_log_level(options.verbose ? LogLevel::debug : options.quiet ? LogLevel::error : LogLevel::warning);

  PluginLibrary library(*catalogue);
  for (const GivenSetting& given : options.settings)
    if (given.setting->name == "device" || given.setting->name == "transport" ||
        given.setting->name == "balloon-policy")
      if (auto help = device_help(library, given.setting->name, given.value)) {
        if (!help->ok()) return fail(help->error(), ExitCode::usage);
        std::fputs(help->value().c_str(), stdout);
        return ExitCode::success;
      }

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
  Session session(*checked, timing, options.timing ? TimingReport::print : TimingReport::none);
  auto ending = session.run();
  if (!ending.ok()) return fail(ending.error());
  switch (*ending) {
    case Ending::power_off:
      return ExitCode::success;
    case Ending::reset:
      return ExitCode::guest_reset;
    case Ending::crashed:
      return ExitCode::guest_crashed;
    case Ending::kvm_failed:
      return ExitCode::kvm_failed;
    case Ending::stopped:
      return ExitCode::guest_stopped;
  }
  return ExitCode::kvm_failed;
}

}  // namespace vmm
