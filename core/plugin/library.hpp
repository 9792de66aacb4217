// SPDX-License-Identifier: Apache-2.0
// Loads plugin files and hands out the tables of what they make. A loaded file stays until the process ends.
#pragma once

#include <algorithm>
#include <cstring>
#include <map>
#include <string>

#include "clone/abi/balloon_policy.h"
#include "clone/abi/device.h"
#include "clone/abi/plugin.h"
#include "clone/abi/snapshot_backend.h"
#include "clone/abi/transport.h"
#include "plugin/catalogue.hpp"
#include "util/result.hpp"

namespace vmm {

// A table from the other side of the border, as far as both know it; what the other side does not have is zero.
template <typename Table>
Table copy_table(const Table* table) {
  Table copy{};
  if (table) std::memcpy(&copy, table, std::min<size_t>(table->size, sizeof copy));
  return copy;
}

struct DeviceType {
  const PluginFile* file = nullptr;
  clone_descriptor descriptor{};
  clone_device_ops ops{};
};

struct TransportType : DeviceType {
  decltype(clone_transport_type::attach) attach = nullptr;
};

struct PolicyType {
  const PluginFile* file = nullptr;
  clone_descriptor descriptor{};
  clone_balloon_policy_type table{};
};

struct BackendType {
  const PluginFile* file = nullptr;
  clone_descriptor descriptor{};
  clone_snapshot_backend_type table{};
};

class PluginLibrary {
 public:
  explicit PluginLibrary(const Catalogue& catalogue) : catalogue_(&catalogue) {}
  const Catalogue& catalogue() const { return *catalogue_; }

  Result<DeviceType> device(std::string_view name);
  Result<TransportType> transport(std::string_view name);
  Result<PolicyType> balloon_policy(std::string_view name);
  Result<BackendType> snapshot_backend(std::string_view name);

  // Loads the file (RTLD_NOW, RTLD_LOCAL), asks for its entry and runs its init.
  Result<const clone_plugin*> load(const PluginFile& file);

 private:
  template <typename Factory>
  Result<const Factory*> factory(const PluginFile& file, const char* id);

  const Catalogue* catalogue_;
  std::map<std::string, const clone_plugin*> loaded_;  // by path
};

}  // namespace vmm
