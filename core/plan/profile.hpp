// SPDX-License-Identifier: Apache-2.0
// Profiles: the settings of a VM in a YAML file, and a plan written as one.
#pragma once

#include <string>
#include <vector>

#include "plan/settings.hpp"

namespace vmm {

// Mistakes are reported as "FILE:LINE:COLUMN: …", all of them, one a line.
Result<std::vector<GivenSetting>> read_profile(const std::string& path, const std::vector<Setting>& settings);

// The same of a text. Mistakes begin with `name`, relative paths start from `folder`.
Result<std::vector<GivenSetting>> parse_profile(const std::string& text, const std::string& name,
                                                const std::string& folder, const std::vector<Setting>& settings);

// YAML that read_profile() turns into the same plan again.
std::string write_profile(const CheckedPlan& plan);

}  // namespace vmm
