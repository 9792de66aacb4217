// SPDX-License-Identifier: Apache-2.0
// Settings as flags, and how a machine's end becomes an exit status.
#include "cli/machine_options.hpp"

#include <algorithm>
#include <cstring>

#include "util/log.hpp"

namespace vmm {

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

void add_start_options(CLI::App& app, StartOptions& options) {
  add_plugin_options(app, options.plugins);
  app.add_flag("--timing", options.timing, "Print what each step of the start took, on standard error.")
      ->group("Output");
  app.add_flag("--verbose,-v", options.verbose, "Tell more of what happens.")->group("Output");
  app.add_flag("--quiet,-q", options.quiet, "Print errors only.")->group("Output");
}

Parsed parse_settings(CLI::App& app, const Arguments& arguments, const Catalogue& catalogue) {
  const Parsed parsed = parse(app, arguments);
  // A flag may be unknown because the plugin that declares it was refused.
  if (parsed.done && parsed.code == ExitCode::usage)
    for (const RefusedFile& refused : catalogue.refused()) log_warning(refused.path + ": " + refused.error.message);
  return parsed;
}

void apply_verbosity(const StartOptions& options) {
  set_log_level(options.verbose ? LogLevel::debug : options.quiet ? LogLevel::error : LogLevel::warning);
}

ExitCode exit_code_of(const Result<Ending>& ending) {
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
