// SPDX-License-Identifier: Apache-2.0
// Searches folders for plugin files and judges each by its manifest and its permissions.
#include "plugin/catalogue.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "util/fd.hpp"
#include "util/mapping.hpp"

namespace vmm {
namespace fs = std::filesystem;

namespace {

constexpr std::string_view kBuiltFolder = "lib/clone/plugins";

std::string octal(mode_t mode) {
  char text[8];
  std::snprintf(text, sizeof text, "%04o", mode & 07777u);
  return text;
}

// A folder further up may be writable by others if it is sticky: then they cannot rename what is not theirs.
Result<void> check_owner_and_mode(const std::string& path, bool sticky_is_enough, const std::string& way_out) {
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) return errno_error(path);
  if (status.st_uid != 0 && status.st_uid != ::geteuid())
    return Error{"refused: user " + std::to_string(status.st_uid) + " owns " + path + " (chown it to root" + way_out +
                 ")"};
  const bool others = (status.st_mode & S_IWOTH) || ((status.st_mode & S_IWGRP) && status.st_gid != 0);
  if (others && !(sticky_is_enough && (status.st_mode & S_ISVTX)))
    return Error{"refused: others can write to " + path + " (mode " + octal(status.st_mode) + "; chmod go-w it" +
                 way_out + ")"};
  return {};
}

}  // namespace

std::string installation_prefix() {
  std::error_code ignored;
  const fs::path binary = fs::read_symlink("/proc/self/exe", ignored);
  return binary.parent_path().parent_path().string();
}

std::vector<std::string> plugin_folders(const std::vector<std::string>& given) {
  std::vector<std::string> folders = given;
  if (const char* path = std::getenv("CLONE_PLUGIN_PATH")) {
    std::string_view rest = path;
    while (!rest.empty()) {
      const size_t end = rest.find(':');
      if (end != 0) folders.emplace_back(rest.substr(0, end));
      rest.remove_prefix(end == std::string_view::npos ? rest.size() : end + 1);
    }
  }
  folders.push_back((fs::path(installation_prefix()) / kBuiltFolder).string());
  return folders;
}

Result<void> check_trust(const std::string& path, const std::string& way_out) {
  if (::geteuid() != 0) return {};
  std::error_code error;
  const fs::path real = fs::canonical(path, error);
  if (error) return errno_error(path, error.value());
  TRY(check_owner_and_mode(real.string(), false, way_out));
  for (fs::path folder = real.parent_path();; folder = folder.parent_path()) {
    TRY(check_owner_and_mode(folder.string(), folder != real.parent_path(), way_out));
    if (folder == folder.root_path()) return {};
  }
}

Result<PluginFile> read_plugin_file(const std::string& path, PluginTrust trust) {
  // What is judged is what is loaded later: no link that others could turn elsewhere stays in the path.
  std::error_code error;
  const std::string real = fs::canonical(path, error).string();
  if (error) return errno_error(path, error.value());
  if (trust == PluginTrust::checked) TRY(check_trust(real));
  // Only headers and one section are looked at.
  const Mapping file = TRY(map_file(real, ReadAhead::nothing));
  Manifest manifest = TRY(parse_manifest(file.bytes()));
  TRY(check_abi(manifest));
  return PluginFile{real, std::move(manifest)};
}

Result<Catalogue> Catalogue::scan(const std::vector<std::string>& folders, PluginTrust trust) {
  Catalogue catalogue;
  for (const std::string& folder : folders) {
    std::error_code error;
    std::vector<std::string> paths;
    const fs::path absolute = fs::absolute(folder, error);
    for (fs::directory_iterator entry(absolute, error), end; !error && entry != end; entry.increment(error))
      if (entry->path().extension() == ".so") paths.push_back(entry->path().string());
    if (error && &folder != &folders.back()) return errno_error("plugin folder " + folder, error.value());
    std::sort(paths.begin(), paths.end());
    for (const std::string& path : paths) {
      auto file = read_plugin_file(path, trust);
      if (!file.ok()) {
        catalogue.refused_.push_back({path, std::move(file).error()});
      } else if (!catalogue.find_id(file->manifest.id)) {
        catalogue.files_.push_back(std::move(file).value());
      }
    }
  }
  return catalogue;
}

const PluginFile* Catalogue::find_id(std::string_view id) const {
  for (const PluginFile& file : files_)
    if (file.manifest.id == id) return &file;
  return nullptr;
}

Result<const PluginFile*> Catalogue::find(std::string_view kind, std::string_view name) const {
  std::string known;
  for (const PluginFile& file : files_) {
    if (file.manifest.find(kind, name)) return &file;
    for (const Provided& provided : file.manifest.provides)
      if (provided.kind == kind) known += (known.empty() ? "" : ", ") + provided.name;
  }
  const std::string what = std::string(kind) + " '" + std::string(name) + "'";
  for (const RefusedFile& refused : refused_)
    if (fs::path(refused.path).stem().string().find(name) != std::string::npos)
      return Error{what + ": " + refused.path + ": " + refused.error.message};
  return Error{"unknown " + what + (known.empty() ? ": no plugin offers any" : "; there are: " + known), ENOENT,
               CLONE_ERR_NOT_FOUND};
}

}  // namespace vmm
