// SPDX-License-Identifier: Apache-2.0
// `clone plugin list | inspect NAME | check FILE.so`.
#include <CLI/CLI.hpp>
#include <boost/json.hpp>
#include <cstdio>

#include "cli/command.hpp"
#include "cli/device_help.hpp"
#include "plugin/checker.hpp"
#include "plugin/library.hpp"
#include "plugin/options.hpp"

namespace vmm {
namespace {

namespace json = boost::json;

std::string abi_of(const Manifest& manifest) {
  return std::to_string(manifest.abi_major) + "." + std::to_string(manifest.abi_minor);
}

json::object to_json(const PluginFile& file) {
  const Manifest& manifest = file.manifest;
  json::array provides;
  for (const Provided& provided : manifest.provides)
    provides.push_back(
        json::object{{"kind", provided.kind}, {"name", provided.name}, {"default", provided.by_default}});
  json::array flags;
  for (const ShortFlag& flag : manifest.flags) flags.push_back(json::string(flag.flag));
  for (const FlagOption& flag : manifest.flag_options) flags.push_back(json::string(flag.flag));
  return {{"id", manifest.id},           {"version", manifest.version},         {"vendor", manifest.vendor},
          {"licence", manifest.licence}, {"description", manifest.description}, {"abi", abi_of(manifest)},
          {"path", file.path},           {"provides", std::move(provides)},     {"flags", std::move(flags)}};
}

ExitCode list(const Catalogue& catalogue, bool as_json) {
  if (as_json) {
    json::array plugins, refused;
    for (const PluginFile& file : catalogue.files()) plugins.push_back(to_json(file));
    for (const RefusedFile& file : catalogue.refused())
      refused.push_back(json::object{{"path", file.path}, {"error", file.error.message}});
    std::puts(json::serialize(json::object{{"plugins", std::move(plugins)}, {"refused", std::move(refused)}}).c_str());
    return ExitCode::success;
  }
  std::printf("%-18s %-9s %-5s %-20s %s\n", "PLUGIN", "VERSION", "ABI", "PROVIDES", "DESCRIPTION");
  for (const PluginFile& file : catalogue.files()) {
    std::string provides;
    for (const Provided& provided : file.manifest.provides) {
      provides += (provides.empty() ? "" : ", ");
      provides += provided.kind == "device" ? provided.name : provided.kind + " " + provided.name;
    }
    std::printf("%-18s %-9s %-5s %-20s %s\n", file.manifest.id.c_str(), file.manifest.version.c_str(),
                abi_of(file.manifest).c_str(), provides.c_str(), file.manifest.description.c_str());
  }
  for (const RefusedFile& file : catalogue.refused())
    std::printf("%s: %s\n", file.path.c_str(), file.error.message.c_str());
  return ExitCode::success;
}

std::string capabilities_of(uint32_t bits) {
  std::string text;
  for (const auto& [bit, name] : {std::pair{CLONE_CAN_SAVE, "saves its state"},
                                  {CLONE_CAN_MIGRATE, "migrates"},
                                  {CLONE_NEEDS_PCI, "needs a PCI transport"},
                                  {CLONE_NEEDS_VHOST, "needs vhost"}})
    if (bits & bit) text += (text.empty() ? "" : ", ") + std::string(name);
  return text.empty() ? "none" : text;
}

ExitCode inspect(const Catalogue& catalogue, const std::string& name) {
  const PluginFile* file = catalogue.find_id(name);
  for (const PluginFile& candidate : catalogue.files())
    for (const Provided& provided : candidate.manifest.provides)
      if (!file && provided.name == name) file = &candidate;
  if (!file) {
    std::string known;
    for (const PluginFile& other : catalogue.files()) known += (known.empty() ? "" : ", ") + other.manifest.id;
    for (const RefusedFile& refused : catalogue.refused())
      if (refused.path.find("/" + name + ".so") != std::string::npos)
        return fail(Error{"plugin '" + name + "': " + refused.path + ": " + refused.error.message});
    return fail(Error{"unknown plugin '" + name + "'; there are: " + known});
  }
  const Manifest& manifest = file->manifest;
  std::printf("%s %s: %s\n  file       %s\n  vendor     %s\n  licence    %s\n  interface  %s, host %u.%u or later\n",
              manifest.id.c_str(), manifest.version.c_str(), manifest.description.c_str(), file->path.c_str(),
              manifest.vendor.c_str(), manifest.licence.c_str(), abi_of(manifest).c_str(), manifest.abi_major,
              manifest.least_host_minor);
  for (const ShortFlag& flag : manifest.flags)
    std::printf("  flag       %s %s: %s\n", flag.flag.c_str(), flag.value_name.c_str(), flag.help.c_str());
  for (const FlagOption& flag : manifest.flag_options)
    std::printf("  flag       %s %s: %s\n", flag.flag.c_str(), flag.value_name.c_str(), flag.help.c_str());

  PluginLibrary library(catalogue);
  for (const Provided& provided : manifest.provides) {
    auto show = [&](const DeviceType& type) {
      std::printf("\n%s %s%s: %s\n  abilities: %s\n  extensions: %s\n", provided.kind.c_str(), provided.name.c_str(),
                  provided.by_default ? " (default)" : "", type.descriptor.help,
                  capabilities_of(type.descriptor.capabilities).c_str(), known_extensions(type).c_str());
      if (type.descriptor.guest_modules && *type.descriptor.guest_modules)
        std::printf("  kernel modules in the guest: %s\n", type.descriptor.guest_modules);
      std::fputs(option_table(type.descriptor).c_str(), stdout);
    };
    if (provided.kind == "device") {
      auto type = library.device(provided.name);
      if (!type.ok()) return fail(type.error());
      show(*type);
    } else if (provided.kind == "transport") {
      auto type = library.transport(provided.name);
      if (!type.ok()) return fail(type.error());
      show(*type);
    } else if (provided.kind == "balloon-policy") {
      auto type = library.balloon_policy(provided.name);
      if (!type.ok()) return fail(type.error());
      std::printf("\n%s %s%s: %s\n  abilities: %s\n", provided.kind.c_str(), provided.name.c_str(),
                  provided.by_default ? " (default)" : "", type->descriptor.help,
                  capabilities_of(type->descriptor.capabilities).c_str());
      std::fputs(option_table(type->descriptor).c_str(), stdout);
    } else {
      std::printf("\n%s %s\n", provided.kind.c_str(), provided.name.c_str());
    }
  }
  return ExitCode::success;
}

ExitCode check(const std::string& path, CheckOptions options, const std::vector<std::string>& given) {
  for (const std::string& text : given) {
    auto named = parse_named_options(text);
    if (!named.ok()) return fail(std::move(named).error().context("--with"), ExitCode::usage);
    options.options.push_back(std::move(named).value());
  }
  const CheckReport report = check_plugin(path, options);
  for (const CheckRow& row : report.rows) {
    const char* verdict = row.verdict == CheckVerdict::passed   ? "ok"
                          : row.verdict == CheckVerdict::failed ? "FAIL"
                                                                : "skip";
    std::printf("%-4s  %s%s%s\n", verdict, row.what.c_str(), row.detail.empty() ? "" : ": ", row.detail.c_str());
  }
  const unsigned failed = report.count(CheckVerdict::failed);
  std::printf("%s: %u passed, %u failed, %u skipped\n", path.c_str(), report.count(CheckVerdict::passed), failed,
              report.count(CheckVerdict::skipped));
  return failed == 0 ? ExitCode::success : ExitCode::cannot_start;
}

}  // namespace

ExitCode plugin_command(const Arguments& arguments) {
  CLI::App app("List, inspect and check plugins.", "clone plugin");
  // Not require_subcommand(): it would complain of that before it names the word that is none.
  app.callback([&app] {
    if (app.get_subcommands().empty()) throw CLI::RequiredError("list, inspect or check");
  });
  PluginPaths paths;
  add_plugin_options(app, paths);
  app.fallthrough();
  bool as_json = false;
  std::string name;
  CLI::App* list_app = app.add_subcommand("list", "The plugins that are found, and files that were refused.");
  list_app->add_flag("--json", as_json, "As JSON.");
  CLI::App* inspect_app = app.add_subcommand("inspect", "What a plugin holds: options, extensions, interface.");
  inspect_app->add_option("NAME", name, "Of the plugin, or of a device in it.")->required();
  CLI::App* check_app = app.add_subcommand("check", "Hold a plugin file against the rules of the interface.");
  check_app->add_option("FILE", name, "The .so file.")->required();
  std::vector<std::string> check_options;
  check_app
      ->add_option("--with", check_options, "Options for a device or transport of the plugin, besides its defaults.")
      ->type_name("NAME,KEY=VALUE...")
      ->expected(1)
      ->allow_extra_args(false)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  unsigned time_limit_s = 10;
  check_app->add_option("--time-limit", time_limit_s, "When a phase of the check counts as hung (default: 10).")
      ->type_name("SECONDS")
      ->check(CLI::Range(1, 3600));
  if (const Parsed parsed = parse(app, arguments); parsed.done) return parsed.code;

  if (*check_app) return check(name, {paths.trust, time_limit_s * 1000, {}}, check_options);
  auto catalogue = scan_plugins(paths);
  if (!catalogue.ok()) return fail(catalogue.error());
  return *list_app ? list(*catalogue, as_json) : inspect(*catalogue, name);
}

}  // namespace vmm
