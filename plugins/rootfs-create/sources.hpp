// SPDX-License-Identifier: Apache-2.0
// Where the files of an image come from: a distribution, a folder, a container image.
#pragma once

#include <string>
#include <vector>

#include "progress.hpp"
#include "tree.hpp"

namespace rootfs {

// What each source fills, and what it may use.
struct Context {
  Tree& tree;
  Spool& spool;
  const std::string& work;  // an empty folder of our own
  Progress& progress;
};

struct DistributionRequest {
  std::string name;     // debian, ubuntu, alpine
  std::string release;  // empty: a default
  std::string mirror;   // empty: the distribution's own
  std::string keys;     // a keyring or a folder of keys; empty: those that are installed
  std::vector<std::string> packages;
  bool ssh_server = false;
};
// By mmdebstrap, or debootstrap where it is missing.
Result<void> take_debian(const Context& context, const DistributionRequest& request);
Result<void> take_alpine(const Context& context, const DistributionRequest& request);
// Alpine's scripts of packages run in the guest, at its first boot; after the init is in its place.
Result<void> prepare_alpine_first_boot(const Context& context);

// `left_out` is a file that is not taken even if it is below the folder.
Result<void> take_folder(const Context& context, const std::string& folder, const struct stat& left_out);

struct ContainerConfig {
  std::vector<std::string> environment;
  std::vector<std::string> command;
  std::string directory;
};
enum class RegistryTls { verify, insecure };
Result<ContainerConfig> take_container(const Context& context, const std::string& reference, RegistryTls tls);

}  // namespace rootfs
