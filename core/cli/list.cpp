// SPDX-License-Identifier: Apache-2.0
// `clone list`: the VMs that run, found by their directories.
#include <CLI/CLI.hpp>
#include <cstdio>

#include "cli/command.hpp"
#include "cli/overview.hpp"
#include "cli/vm_option.hpp"

namespace vmm {

ExitCode list_command(const Arguments& arguments) {
  bool as_json = false;
  bool no_daemon = false;
  CLI::App app("List the VMs that run: clone list [--json]", "clone list");
  app.add_flag("--json", as_json, "As JSON, sizes in bytes.");
  app.add_flag("--no-daemon", no_daemon, "Look at the VMs themselves (there is no daemon yet: always so).");
  if (const Parsed parsed = parse(app, arguments); parsed.done) return parsed.code;
  const auto instances = list_instances();
  if (!instances.ok()) return fail(instances.error());
  const std::vector<VmOverview> vms = survey(*instances, Detail::brief);

  if (as_json) {
    boost::json::array list;
    for (const VmOverview& vm : vms) {
      boost::json::object entry = {{"id", vm.record.id},        {"name", vm.record.name},
                                   {"pid", vm.record.pid},      {"state", vm.state},
                                   {"vcpus", vm.record.vcpus},  {"memory_bytes", vm.record.memory_bytes},
                                   {"uptime_ms", vm.uptime_ms}, {"directory", vm.record.directory}};
      entry["resident_bytes"] = vm.process ? boost::json::value(vm.process->resident_bytes) : nullptr;
      entry["private_bytes"] = vm.process ? boost::json::value(vm.process->private_bytes) : nullptr;
      list.push_back(std::move(entry));
    }
    std::puts(boost::json::serialize(list).c_str());
    return ExitCode::success;
  }
  std::vector<std::vector<std::string>> rows = {
      {"PID", "ID", "NAME", "STATE", "VCPUS", "MEMORY", "RSS", "PRIVATE", "UPTIME"}};
  for (const VmOverview& vm : vms)
    rows.push_back({std::to_string(vm.record.pid), vm.record.id, vm.record.name, vm.state,
                    std::to_string(vm.record.vcpus), size_text(vm.record.memory_bytes),
                    vm.process ? size_text(vm.process->resident_bytes) : "?",
                    vm.process ? size_text(vm.process->private_bytes) : "?", duration_text(vm.uptime_ms)});
  std::fputs(table_text(rows).c_str(), stdout);
  return ExitCode::success;
}

}  // namespace vmm
