// SPDX-License-Identifier: Apache-2.0
// Asks every VM and /proc.
#include "cli/overview.hpp"

#include <algorithm>
#include <chrono>

#include "control/client.hpp"

namespace vmm {
namespace {
constexpr auto kPatience = std::chrono::milliseconds(1000);
}

std::vector<VmOverview> survey(const std::vector<InstanceRecord>& instances, Detail detail) {
  using namespace std::chrono;
  const int64_t now_ms = duration_cast<milliseconds>(system_clock::now().time_since_epoch()).count();
  std::vector<VmOverview> all;
  for (const InstanceRecord& record : instances) {
    VmOverview vm;
    vm.record = record;
    vm.uptime_ms = std::max<int64_t>(0, now_ms - record.started_ms);
    vm.state = "not answering";
    auto client = ControlClient::connect(record, kPatience);
    if (!client.ok() && (client.error().code == ENOENT || client.error().code == ECONNREFUSED)) {
      vm.state = "starting";  // its directory is made before its sockets; or it has just gone
    } else if (client.ok()) {
      auto info = client->call("vm.info", {}, kPatience);
      if (info.ok()) {
        if (const auto* object = info->result.if_object())
          if (const auto* state = object->if_contains("state"); state && state->is_string())
            vm.state = state->get_string();
        if (detail == Detail::memory) {
          if (auto balloon = client->call("vm.balloon", {}, kPatience); balloon.ok())
            vm.balloon = std::move(balloon->result);
          if (auto agent = client->call("vm.guest", {}, kPatience); agent.ok()) vm.agent = std::move(agent->result);
        }
      } else if (info.error().code == ECONNRESET) {
        continue;
      }
    }
    auto process = memory_usage(record.pid);
    if (!process.ok() && (process.error().code == ENOENT || process.error().code == ESRCH)) continue;
    if (process.ok()) vm.process = *process;
    if (detail == Detail::memory)
      if (auto guest = guest_memory_usage(record.pid); guest.ok()) vm.guest = *guest;
    all.push_back(std::move(vm));
  }
  return all;
}

std::string table_text(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string text;
  for (const auto& row : rows) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      line += row[i];
      if (i + 1 < row.size()) line += std::string(widths[i] - row[i].size() + 2, ' ');
    }
    text += line + "\n";
  }
  return text;
}

}  // namespace vmm
