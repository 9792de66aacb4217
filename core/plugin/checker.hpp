// SPDX-License-Identifier: Apache-2.0
// `clone plugin check`: holds one plugin file against the rules of the interface, in a child process.
#pragma once

#include <string>
#include <vector>

#include "plugin/catalogue.hpp"
#include "plugin/library.hpp"

namespace vmm {

struct CheckRow {
  bool passed = false;
  std::string what;    // the rule
  std::string detail;  // how it was broken
};

struct CheckReport {
  std::vector<CheckRow> rows;
  unsigned passed() const;
  unsigned failed() const;
};

// A plugin that crashes or hangs is a failed row, not our end.
CheckReport check_plugin(const std::string& path, PluginTrust trust);

// The known extensions that a freshly created device of this type offers, for a person: "clone.virtio-device/1, …".
std::string known_extensions(const DeviceType& type);

}  // namespace vmm
