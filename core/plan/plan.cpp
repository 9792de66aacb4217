// SPDX-License-Identifier: Apache-2.0
// Checks a plan against the plugins' option tables.
#include "plan/plan.hpp"

#include <algorithm>
#include <filesystem>
#include <map>

namespace vmm {
namespace {

// Relative paths of a profile start from the profile's folder.
KeyValues resolve_paths(const PlannedDevice& device, const clone_descriptor& descriptor) {
  KeyValues options = device.options;
  for (auto& [key, value] : options) {
    const auto own = device.option_folders.find(key);
    const std::string& folder = own == device.option_folders.end() ? device.base_folder : own->second;
    if (folder.empty()) continue;
    for (const clone_option* const* row = descriptor.options; *row; ++row)
      if (key == (*row)->name && (*row)->type == CLONE_OPTION_PATH && !value.empty() && !is_word_of(**row, value))
        value = (std::filesystem::path(folder) / value).lexically_normal().string();
  }
  return options;
}

// The first balloon policy that is meant for every machine.
std::string default_balloon_policy(const Catalogue& catalogue) {
  for (const PluginFile& file : catalogue.files())
    for (const Provided& provided : file.manifest.provides)
      if (provided.kind == "balloon-policy" && provided.by_default) return provided.name;
  return kNoBalloonPolicy;
}

}  // namespace

Result<CheckedPlan> check_plan(const Plan& plan, PluginLibrary& library) {
  CheckedPlan checked;
  checked.plan = plan;
  Plan& full = checked.plan;
  std::string mistakes;
  auto mistake = [&](const std::string& text) { mistakes += (mistakes.empty() ? "" : "\n") + text; };
  auto mistake_in = [&](const PlannedDevice& device, const std::string& text) {
    mistake((device.where.empty() ? "" : device.where + ": ") + text);
  };

  std::vector<std::string> unused = plan.without;
  for (const PluginFile& file : library.catalogue().files())
    for (const Provided& provided : file.manifest.provides) {
      if (provided.kind != "device" || !provided.by_default) continue;
      const bool unwanted = std::erase(unused, provided.name) > 0;
      const bool planned = std::any_of(full.devices.begin(), full.devices.end(),
                                       [&](const PlannedDevice& device) { return device.type == provided.name; });
      if (!unwanted && !planned && !plan.complete) full.devices.push_back({provided.name, {}, {}, {}});
    }
  for (const std::string& name : unused) mistake("--without " + name + ": no plugin offers such a default device");

  auto check = [&](const std::string& what, const PlannedDevice& device, const auto& type) {
    auto options = OptionValues::check(type.descriptor, resolve_paths(device, type.descriptor));
    if (options.ok()) return std::move(options).value();
    mistake_in(device, what + ": " + options.error().message);
    return OptionValues{};
  };

  if (auto transport = library.transport(full.transport.type); transport.ok()) {
    checked.transport = *transport;
    checked.transport_options = check("transport " + full.transport.type, full.transport, *transport);
  } else {
    mistake_in(full.transport, transport.error().message);
  }

  PlannedDevice& policy = full.balloon_policy;
  if (policy.type.empty()) policy.type = default_balloon_policy(library.catalogue());
  if (policy.type == kNoBalloonPolicy) {
    if (!policy.options.empty()) mistake_in(policy, "balloon policy none: it has no options");
  } else if (auto type = library.balloon_policy(policy.type); type.ok()) {
    checked.balloon_policy_options = check("balloon policy " + policy.type, policy, *type);
    checked.balloon_policy = std::move(type).value();
  } else {
    mistake_in(policy, type.error().message);
  }

  std::map<std::string, unsigned> counts;
  for (const PlannedDevice& device : full.devices) {
    auto type = library.device(device.type);
    if (!type.ok()) {
      mistake_in(device, type.error().message);
      continue;
    }
    CheckedDevice& added = checked.devices.emplace_back();
    added.instance = device.type + "." + std::to_string(counts[device.type]++);
    added.type = *type;
    added.is_new = device.is_new;
    added.options = check("device " + device.type, device, added.type);
  }
  if (!mistakes.empty()) return Error{mistakes};
  return checked;
}

}  // namespace vmm
