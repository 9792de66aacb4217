// SPDX-License-Identifier: Apache-2.0
// What VM to make: every setting, checked against what the plugins declare before anything is opened.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "boot/entry.hpp"
#include "memory/guest_memory.hpp"
#include "plugin/library.hpp"
#include "plugin/options.hpp"
#include "util/result.hpp"

namespace vmm {

struct PlannedDevice {
  std::string type;
  KeyValues options;
  std::string base_folder;  // that relative paths start from; empty: the current one
  std::string where;        // "vm.yaml:3:5", of one from a profile; messages begin with it
  // The base folder of options that came from elsewhere than the device.
  std::map<std::string, std::string> option_folders = {};
  bool is_new = false;  // the machine was saved without it
};

constexpr const char* kNoBalloonPolicy = "none";

enum class OnReboot { again, exit };

struct Plan {
  std::string kernel;
  std::string initrd;
  std::string modules;  // of the kernel, for the generated initrd; empty: /lib/modules
  std::string init;     // that the generated initrd starts; empty: /sbin/init
  std::string command_line;
  BootProtocol protocol = BootProtocol::automatic;
  MemoryConfig memory;
  uint32_t vcpus = 1;
  PlannedDevice transport{"mmio", {}, {}, {}};
  PlannedDevice balloon_policy;  // type: empty for the default one, "none" for none
  std::vector<PlannedDevice> devices;
  std::vector<std::string> without;  // default devices that are not wanted
  bool complete = false;             // no default devices are added
  OnReboot on_reboot = OnReboot::again;
  uint64_t grace_ms = 10'000;
  std::string name;     // empty: its id serves
  bool control = true;  // a directory with sockets for other commands
};

// The plan with the plugins' word on it.
struct CheckedDevice {
  std::string instance;  // "serial.0"
  DeviceType type;
  OptionValues options;
  bool is_new = false;
};

struct CheckedPlan {
  Plan plan;
  TransportType transport;
  OptionValues transport_options;
  std::optional<PolicyType> balloon_policy;
  OptionValues balloon_policy_options;
  std::vector<CheckedDevice> devices;  // in the order of the plan, then the defaults
};

// Loads the plugins that the plan names and checks every option. Reports all mistakes, one a line.
Result<CheckedPlan> check_plan(const Plan& plan, PluginLibrary& library);

}  // namespace vmm
