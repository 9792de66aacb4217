// SPDX-License-Identifier: Apache-2.0
// `clone status`: memory of each VM and of the host, once or again and again.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <fstream>
#include <optional>
#include <thread>

#include "cli/command.hpp"
#include "cli/overview.hpp"
#include "cli/vm_option.hpp"
#include "memory/ksm.hpp"

namespace vmm {
namespace {

namespace json = boost::json;

struct HostMemory {
  uint64_t total_bytes = 0;
  uint64_t available_bytes = 0;
  uint64_t swap_used_bytes = 0;
};

HostMemory host_memory() {
  HostMemory memory;
  uint64_t swap_total = 0, swap_free = 0;
  std::ifstream file("/proc/meminfo");
  for (std::string line; std::getline(file, line);) {
    char name[64];
    unsigned long long kib = 0;
    if (std::sscanf(line.c_str(), "%63[^:]: %llu", name, &kib) != 2) continue;
    const std::string_view field = name;
    if (field == "MemTotal") memory.total_bytes = kib << 10;
    if (field == "MemAvailable") memory.available_bytes = kib << 10;
    if (field == "SwapTotal") swap_total = kib << 10;
    if (field == "SwapFree") swap_free = kib << 10;
  }
  memory.swap_used_bytes = swap_total - std::min(swap_total, swap_free);
  return memory;
}

std::optional<uint64_t> number_in(const json::value& value, const char* name) {
  const auto* object = value.if_object();
  const auto* field = object ? object->if_contains(name) : nullptr;
  if (!field || !field->is_number()) return std::nullopt;
  return field->to_number<uint64_t>();
}

std::string text_of(std::optional<uint64_t> bytes) { return bytes ? size_text(*bytes) : "-"; }

std::string report(const std::vector<VmOverview>& vms) {
  std::vector<std::vector<std::string>> rows = {
      {"NAME", "STATE", "MEMORY", "RESIDENT", "PRIVATE", "SHARED", "KSM", "BALLOON", "GUEST FREE", "ACTIVITY"}};
  uint64_t resident = 0, own = 0;
  for (const VmOverview& vm : vms) {
    const MemoryUsage* usage = vm.process ? &*vm.process : nullptr;
    const auto* agent = vm.agent.if_object();
    const auto* activity = agent ? agent->if_contains("activity") : nullptr;
    rows.push_back({vm.record.name, vm.state, size_text(vm.record.memory_bytes),
                    usage ? size_text(usage->resident_bytes) : "-", usage ? size_text(usage->private_bytes) : "-",
                    usage ? size_text(usage->shared_bytes) : "-", usage ? text_of(usage->merged_bytes) : "-",
                    text_of(number_in(vm.balloon, "balloon_bytes")), text_of(number_in(vm.agent, "available_bytes")),
                    activity && activity->is_string() ? std::string(activity->get_string()) : "-"});
    if (usage) {
      resident += usage->resident_bytes;
      own += usage->private_bytes;
    }
  }
  std::string text = table_text(rows);
  const HostMemory host = host_memory();
  text += "\n" + std::to_string(vms.size()) + (vms.size() == 1 ? " VM: " : " VMs: ") + size_text(resident) +
          " resident, of which " + size_text(own) + " private\nhost: " + size_text(host.available_bytes) +
          " available of " + size_text(host.total_bytes) + ", " + size_text(host.swap_used_bytes) + " swapped out\n" +
          ksm_text(read_ksm()) + "\n";
  return text;
}

json::object report_json(const std::vector<VmOverview>& vms) {
  json::array list;
  auto usage_json = [](const std::optional<MemoryUsage>& usage) -> json::value {
    if (!usage) return nullptr;
    return json::object{{"resident_bytes", usage->resident_bytes},
                        {"private_bytes", usage->private_bytes},
                        {"shared_bytes", usage->shared_bytes},
                        {"merged_bytes", usage->merged_bytes ? json::value(*usage->merged_bytes) : nullptr},
                        {"swapped_bytes", usage->swapped_bytes}};
  };
  for (const VmOverview& vm : vms)
    list.push_back({{"id", vm.record.id},
                    {"name", vm.record.name},
                    {"pid", vm.record.pid},
                    {"state", vm.state},
                    {"memory_bytes", vm.record.memory_bytes},
                    {"process", usage_json(vm.process)},
                    {"guest_memory", usage_json(vm.guest)},
                    {"balloon", vm.balloon},
                    {"guest", vm.agent}});
  const HostMemory host = host_memory();
  const KsmState ksm = read_ksm();
  return {{"vms", std::move(list)},
          {"host",
           {{"total_bytes", host.total_bytes},
            {"available_bytes", host.available_bytes},
            {"swap_used_bytes", host.swap_used_bytes},
            {"ksm_runs", ksm.runs},
            {"ksm_saved_bytes", ksm.saved_bytes}}}};
}

}  // namespace

ExitCode status_command(const Arguments& arguments) {
  bool as_json = false;
  std::optional<double> watch_seconds;
  CLI::App app("Tell what each VM and this host use of memory: clone status [--watch [SECONDS]] [--json]",
               "clone status");
  app.add_flag("--json", as_json, "As JSON, sizes in bytes.");
  app.add_option("--watch,-w", watch_seconds, "Draw it again every SECONDS (default: 2) until Ctrl-C.")
      ->type_name("[SECONDS]")
      ->expected(0, 1)
      ->default_str("2")
      ->check(CLI::Range(0.1, 3600.0));
  if (const Parsed parsed = parse(app, arguments); parsed.done) return parsed.code;
  if (watch_seconds && as_json) return fail(Error{"--json prints once; leave it or --watch out"}, ExitCode::usage);
  while (true) {
    const auto instances = list_instances();
    if (!instances.ok()) return fail(instances.error());
    const std::vector<VmOverview> vms = survey(*instances, Detail::memory);
    if (as_json) {
      std::puts(json::serialize(report_json(vms)).c_str());
      return ExitCode::success;
    }
    // Home, then the text, then whatever was below: no flicker.
    if (watch_seconds) std::fputs("\x1b[H\x1b[J", stdout);
    std::fputs(report(vms).c_str(), stdout);
    if (std::fflush(stdout) != 0) return ExitCode::success;  // the reader has left
    if (!watch_seconds) return ExitCode::success;
    std::this_thread::sleep_for(std::chrono::duration<double>(*watch_seconds));
  }
}

}  // namespace vmm
