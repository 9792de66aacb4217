// SPDX-License-Identifier: Apache-2.0
// Everything that can be said about a VM, one row a setting: a flag on the command line, a key in a profile.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "plan/plan.hpp"
#include "plugin/catalogue.hpp"
#include "util/result.hpp"

namespace vmm {

enum class SettingKind {
  value,           // given once; the command line wins over a profile
  optional_value,  // the value may be left out
  list,            // given any number of times; the command line adds to a profile
  toggle,          // no value on the command line, on or off in a profile
};

// Where a value comes from: errors and relative paths depend on it.
struct SettingSource {
  std::string base_folder;  // of the profile; empty for the command line
  std::string position;     // "profile.yaml:3:9"; empty for the command line
};

struct Setting {
  std::string name;        // "kernel" is --kernel on the command line and `kernel:` in a profile
  std::string value_name;  // "FILE"
  std::string group;       // heading in --help
  std::string help;
  SettingKind kind = SettingKind::value;
  // The value as a user wrote it. Errors say what is allowed; the caller puts the name in front.
  std::function<Result<void>(Plan&, const std::string& value, const SettingSource&)> apply;
  bool changes_devices = false;  // those that other settings make: applied after all of these
  bool adds_device = false;      // one more, of those that a machine may have any number of
  bool sets_default_device = false;  // the one that every machine has, unless it was left out
};

// The core's own settings, then the short forms that plugins declare in their manifests.
std::vector<Setting> all_settings(const Catalogue& catalogue);

// A setting as it was given: on the command line (in that order) or in a profile.
struct GivenSetting {
  const Setting* setting = nullptr;
  std::string value;
  SettingSource source;
  std::string where;  // "--kernel" or "profile.yaml:3:9: kernel"
};

// Profile first, then the command line over it.
Result<Plan> make_plan(const std::vector<GivenSetting>& profile, const std::vector<GivenSetting>& command_line);

}  // namespace vmm
