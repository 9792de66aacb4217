// SPDX-License-Identifier: Apache-2.0
// The plan of a machine among its saved state, and how a fork of it differs.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "plan/plan.hpp"
#include "plan/settings.hpp"
#include "snapshot/sections.hpp"
#include "util/result.hpp"

namespace vmm {

// Without backend= of one's own.
inline constexpr const char* kDefaultSnapshotBackend = "file";

// A random number that tells a snapshot from others that were made of the same machine: a section of the owner "core".
inline constexpr const char* kSnapshotIdTag = "snapshot-id";

// Sections of the owner "core".
Result<void> describe_plan(const CheckedPlan& plan, Sections& sections);

// An error by the name of a section of the core's that is unknown here.
Result<void> check_core_sections(const Sections& sections);

// The profile of the saved machine; it lies in the sections.
Result<std::string_view> saved_profile(const Sections& sections);
// The settings of the saved machine, without its name. Relative paths start from where it was started.
Result<std::vector<GivenSetting>> saved_settings(const Sections& sections, const std::vector<Setting>& settings);

// Whether a fork may be given another value: what does not change the machine that its guest knows, or adds to it.
bool is_setting_of_forks(const Setting& setting);
// The machine of the profile, with what a fork is given. A short form for a device that is there already sets options of it.
Result<Plan> plan_of_fork(const std::vector<GivenSetting>& profile, const std::vector<GivenSetting>& given);

}  // namespace vmm
