// SPDX-License-Identifier: Apache-2.0
// Finds and runs commands that are programs of their own.
#include "cli/external.hpp"

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "plugin/catalogue.hpp"

namespace vmm {
namespace fs = std::filesystem;

std::vector<ExternalCommand> external_commands() {
  constexpr std::string_view prefix = "clone-";
  std::vector<ExternalCommand> commands;
  std::error_code error;
  fs::directory_iterator entry(installation_prefix() + "/libexec/clone", error);
  for (const fs::directory_iterator end; !error && entry != end; entry.increment(error)) {
    fs::path path = entry->path();
    const std::string stem = path.stem().string();
    if (path.extension() != ".summary" || !stem.starts_with(prefix)) continue;
    ExternalCommand command;
    std::ifstream file(path);
    std::getline(file, command.summary);
    command.name = stem.substr(prefix.size());
    command.path = path.replace_extension().string();
    commands.push_back(std::move(command));
  }
  std::sort(commands.begin(), commands.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
  return commands;
}

Error become(const ExternalCommand& command, const std::vector<std::string>& arguments) {
  // What is judged is what is run: no link that others could turn elsewhere stays in the path.
  std::error_code error;
  const std::string real = fs::canonical(command.path, error).string();
  if (error) return errno_error(command.path, error.value());
  if (auto trusted = check_trust(real, ""); !trusted.ok()) return std::move(trusted).error();
  std::vector<char*> words = {const_cast<char*>(real.c_str())};
  for (const std::string& argument : arguments) words.push_back(const_cast<char*>(argument.c_str()));
  words.push_back(nullptr);
  ::execv(real.c_str(), words.data());
  return errno_error(real);
}

}  // namespace vmm
