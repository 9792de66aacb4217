// SPDX-License-Identifier: Apache-2.0
// What commands for a running VM share.
#include "cli/vm_option.hpp"

#include <cstdio>

namespace vmm {

void add_vm_flag(CLI::App& app, std::string& vm) {
  app.add_option("--vm-id", vm, "Name, id or process id of the VM; not needed when one runs.")->type_name("VM");
}

void add_vm_option(CLI::App& app, std::string& vm) {
  app.add_option("--vm-id,VM", vm, "Name, id or process id of the VM; not needed when one runs.")->type_name("VM");
}

Result<Contact> contact(const std::string& vm) {
  InstanceRecord instance = TRY(find_instance(vm));
  ControlClient client = TRY(ControlClient::connect(instance));
  return Contact{std::move(instance), std::move(client)};
}

std::string size_text(uint64_t bytes) {
  static constexpr char units[] = {'B', 'K', 'M', 'G', 'T'};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  for (; value >= 1024 && unit + 1 < sizeof units; ++unit) value /= 1024;
  char text[32];
  std::snprintf(text, sizeof text, value < 10 && unit > 0 && value != static_cast<int>(value) ? "%.1f%c" : "%.0f%c",
                value, units[unit]);
  return text;
}

std::string duration_text(int64_t ms) {
  const int64_t seconds = ms < 0 ? 0 : ms / 1000;
  char text[64];
  if (seconds < 60)
    std::snprintf(text, sizeof text, "%ds", static_cast<int>(seconds));
  else if (seconds < 3600)
    std::snprintf(text, sizeof text, "%dm %ds", static_cast<int>(seconds / 60), static_cast<int>(seconds % 60));
  else if (seconds < 86400)
    std::snprintf(text, sizeof text, "%dh %dm", static_cast<int>(seconds / 3600), static_cast<int>(seconds / 60 % 60));
  else
    std::snprintf(text, sizeof text, "%lldd %dh", static_cast<long long>(seconds / 86400),
                  static_cast<int>(seconds / 3600 % 24));
  return text;
}

}  // namespace vmm
