// SPDX-License-Identifier: Apache-2.0
// A plan is kept as the profile that makes it again.
#include "snapshot/plan_sections.hpp"

#include <algorithm>
#include <filesystem>
#include <string_view>

#include "plan/profile.hpp"

namespace vmm {
namespace {

constexpr uint32_t kVersion = 1;
constexpr const char* kProfile = "profile";
constexpr const char* kFolder = "folder";

std::string_view as_text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

Result<void> set_options(Plan& plan, const GivenSetting& given) {
  Plan alone;
  TRY(given.setting->apply(alone, given.value, given.source));
  const PlannedDevice& wanted = alone.devices.front();
  const auto device = std::ranges::find(plan.devices, wanted.type, &PlannedDevice::type);
  if (device == plan.devices.end()) return Error{"the machine that is forked has no " + wanted.type};
  for (const auto& [key, value] : wanted.options) {
    std::erase_if(device->options, [&](const auto& option) { return option.first == key; });
    device->options.emplace_back(key, value);
    device->option_folders[key] = given.source.base_folder;
  }
  return {};
}

}  // namespace

Result<void> describe_plan(const CheckedPlan& plan, Sections& sections) {
  const std::string profile = write_profile(plan);
  std::error_code ignored;
  const std::string folder = std::filesystem::current_path(ignored).string();
  TRY(sections.put(kCoreSections, kProfile, kVersion, std::as_bytes(std::span(profile))));
  return sections.put(kCoreSections, kFolder, kVersion, std::as_bytes(std::span(folder)));
}

Result<void> check_core_sections(const Sections& sections) {
  return check_known(sections, kCoreSections, {kProfile, kFolder, kSnapshotIdTag});
}

Result<std::string_view> saved_profile(const Sections& sections) {
  return as_text(TRY(sections.get(kCoreSections, kProfile, kVersion)));
}

Result<std::vector<GivenSetting>> saved_settings(const Sections& sections, const std::vector<Setting>& settings) {
  const auto profile = TRY(saved_profile(sections));
  const auto folder = as_text(TRY(sections.get(kCoreSections, kFolder, kVersion)));
  auto given = TRY(parse_profile(std::string(profile), "the snapshot's profile", std::string(folder), settings));
  std::erase_if(given, [](const GivenSetting& one) { return one.setting->name == "name"; });
  return given;
}

bool is_setting_of_forks(const Setting& setting) {
  static constexpr std::string_view names[] = {"name", "no-control", "grace", "no-reboot", "ksm"};
  return setting.changes_devices || setting.adds_device || setting.sets_default_device ||
         std::ranges::find(names, setting.name) != std::end(names);
}

Result<Plan> plan_of_fork(const std::vector<GivenSetting>& profile, const std::vector<GivenSetting>& given) {
  std::vector<GivenSetting> others, of_default_devices;
  for (const GivenSetting& one : given) (one.setting->sets_default_device ? of_default_devices : others).push_back(one);
  Plan plan = TRY(make_plan(profile, others));
  plan.complete = true;  // the guest knows of no others
  // Those that the profile does not have come from the command line.
  for (PlannedDevice& device : plan.devices) device.is_new = device.where.empty();
  for (const GivenSetting& one : of_default_devices) TRY(set_options(plan, one).context(one.where));
  return plan;
}

}  // namespace vmm
