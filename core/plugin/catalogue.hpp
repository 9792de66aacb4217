// SPDX-License-Identifier: Apache-2.0
// Which plugin files there are, what they hold, and whether they can be trusted; nothing is loaded to find out.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "plugin/manifest.hpp"
#include "util/result.hpp"

namespace vmm {

enum class PluginTrust { checked, any };  // any: --allow-insecure-plugins

struct PluginFile {
  std::string path;  // absolute
  Manifest manifest;
};

// A file that is called .so but cannot be used, and why.
struct RefusedFile {
  std::string path;
  Error error;
};

class Catalogue {
 public:
  // Looks into each folder for *.so. A folder that the user named and that is missing is an error. Of two files with
  // the same id the one in the earlier folder counts.
  static Result<Catalogue> scan(const std::vector<std::string>& folders, PluginTrust trust);

  const std::vector<PluginFile>& files() const { return files_; }
  const std::vector<RefusedFile>& refused() const { return refused_; }

  // The plugin that holds `name` of this kind. The error lists what there is, and why a file that bears the name was
  // refused.
  Result<const PluginFile*> find(std::string_view kind, std::string_view name) const;
  const PluginFile* find_id(std::string_view id) const;

 private:
  std::vector<PluginFile> files_;
  std::vector<RefusedFile> refused_;
};

// The folders that are searched: those given, CLONE_PLUGIN_PATH's, then lib/clone/plugins beside the binary's folder.
std::vector<std::string> plugin_folders(const std::vector<std::string>& given);

// The folder that the installed tree stands in: where bin/clone is, one up.
std::string installation_prefix();

// When running as root: nobody but root may be able to change the file or replace it. One line says who could, and ends
// with `way_out`.
Result<void> check_trust(const std::string& path, const std::string& way_out = ", or give --allow-insecure-plugins");

// Reads and judges one file without loading it.
Result<PluginFile> read_plugin_file(const std::string& path, PluginTrust trust);

}  // namespace vmm
