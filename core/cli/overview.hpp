// SPDX-License-Identifier: Apache-2.0
// What `clone list` and `clone status` know of each VM, and the table that they print.
#pragma once

#include <boost/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "control/instances.hpp"
#include "memory/usage.hpp"

namespace vmm {

struct VmOverview {
  InstanceRecord record;
  std::string state;  // "not answering" when the control socket is silent
  int64_t uptime_ms = 0;
  std::optional<MemoryUsage> process;  // of the whole VMM
  std::optional<MemoryUsage> guest;    // of the guest's memory in it; for status only
  boost::json::value balloon;          // what balloon.status told, or null
  boost::json::value agent;            // what agent.status told, or null
};

enum class Detail { brief, memory };
// A VM that ends meanwhile is left out.
std::vector<VmOverview> survey(const std::vector<InstanceRecord>& instances, Detail detail);

// Columns as wide as their widest entry; the first row is the heading.
std::string table_text(const std::vector<std::vector<std::string>>& rows);

}  // namespace vmm
