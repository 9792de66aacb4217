// SPDX-License-Identifier: Apache-2.0
// Renders option tables.
#include "cli/device_help.hpp"

#include <algorithm>
#include <cstdio>

#include "plugin/options.hpp"

namespace vmm {

std::string option_table(const clone_descriptor& descriptor) {
  size_t widest = 0;
  for (const clone_option* const* row = descriptor.options; *row; ++row)
    widest = std::max(widest, std::string((*row)->name).size() + 1 + describe_option_type(**row).size());
  std::string text;
  for (const clone_option* const* row = descriptor.options; *row; ++row) {
    const clone_option& option = **row;
    std::string head = std::string(option.name) + "=" + describe_option_type(option);
    head.resize(std::max(head.size(), std::min<size_t>(widest, 48)), ' ');
    text += "  " + head + "  " + option.help;
    if (option.flags & CLONE_OPTION_REQUIRED) text += " (required)";
    if (option.default_value) text += " (default: " + std::string(option.default_value) + ")";
    text += "\n";
  }
  return text.empty() ? "  It has no options.\n" : text;
}

namespace {

std::optional<Result<std::string>> help_of(PluginLibrary& library, const std::string& kind, const std::string& value) {
  auto named = parse_named_options(value);
  if (!named.ok()) return std::nullopt;
  const bool asked = std::any_of(named->options.begin(), named->options.end(),
                                 [](const auto& option) { return option.first == "help"; });
  if (!asked) return std::nullopt;
  auto render = [](const auto& type) {
    return std::string(type.descriptor.name) + ": " + type.descriptor.help + "\n" + option_table(type.descriptor);
  };
  if (kind == "transport") {
    auto type = library.transport(named->name);
    if (!type.ok()) return Result<std::string>(std::move(type).error());
    return Result<std::string>(render(*type));
  }
  if (kind == "balloon-policy") {
    auto type = library.balloon_policy(named->name);
    if (!type.ok()) return Result<std::string>(std::move(type).error());
    return Result<std::string>(render(*type));
  }
  auto type = library.device(named->name);
  if (!type.ok()) return Result<std::string>(std::move(type).error());
  return Result<std::string>(render(*type));
}

}  // namespace

std::optional<ExitCode> print_device_help(PluginLibrary& library, const std::vector<GivenSetting>& settings) {
  for (const GivenSetting& given : settings) {
    const std::string& kind = given.setting->name;
    if (kind != "device" && kind != "transport" && kind != "balloon-policy") continue;
    const auto help = help_of(library, kind, given.value);
    if (!help) continue;
    if (!help->ok()) return fail(help->error(), ExitCode::usage);
    std::fputs(help->value().c_str(), stdout);
    return ExitCode::success;
  }
  return std::nullopt;
}

}  // namespace vmm
