// SPDX-License-Identifier: Apache-2.0
// `clone plugin check`: holds one plugin file against the rules of the interface, in child processes.
#pragma once

#include <string>
#include <vector>

#include "plugin/catalogue.hpp"
#include "plugin/library.hpp"
#include "plugin/options.hpp"

namespace vmm {

enum class CheckVerdict : char { passed = 'p', failed = 'f', skipped = 's' };

struct CheckRow {
  CheckVerdict verdict = CheckVerdict::failed;
  std::string what;    // the rule
  std::string detail;  // how it was broken, or why it could not be checked here
};

struct CheckReport {
  std::vector<CheckRow> rows;
  unsigned count(CheckVerdict verdict) const;
};

struct CheckOptions {
  PluginTrust trust = PluginTrust::checked;
  unsigned phase_limit_ms = 10'000;   // after which a phase of the check counts as hung
  std::vector<NamedOptions> options;  // for the device or transport of that name, besides its defaults
};

// A plugin that crashes or hangs is a failed row, not our end.
CheckReport check_plugin(const std::string& path, const CheckOptions& options);

// The known extensions that a freshly created device of this type offers, for a person: "clone.virtio-device/1, …".
std::string known_extensions(const DeviceType& type);

}  // namespace vmm
