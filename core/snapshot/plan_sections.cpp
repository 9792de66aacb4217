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

}  // namespace

Result<void> describe_plan(const CheckedPlan& plan, Sections& sections) {
  const std::string profile = write_profile(plan);
  std::error_code ignored;
  const std::string folder = std::filesystem::current_path(ignored).string();
  TRY(sections.put(kCoreSections, kProfile, kVersion, std::as_bytes(std::span(profile))));
  return sections.put(kCoreSections, kFolder, kVersion, std::as_bytes(std::span(folder)));
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
  return setting.changes_devices || setting.adds_device || std::ranges::find(names, setting.name) != std::end(names);
}

}  // namespace vmm
