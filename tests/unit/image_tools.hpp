// SPDX-License-Identifier: Apache-2.0
// QEMU's own tools, and whole files, for tests of disk images.
#pragma once

#include <doctest/doctest.h>
#include <sys/wait.h>

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace vmm::test {

// The status of a command; its output goes to a file of that folder.
inline int shell(const std::string& folder, const std::string& command) {
  return std::system(("cd " + folder + " && (" + command + ") >log 2>&1").c_str());
}

inline std::vector<uint8_t> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline std::string log_of(const std::string& folder) {
  const auto bytes = read_file(folder + "/log");
  return {bytes.begin(), bytes.end()};
}

inline void write_file(const std::string& path, const std::vector<uint8_t>& bytes) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
}

// What QEMU reads from an image.
inline std::vector<uint8_t> content(const std::string& folder, const std::string& name) {
  REQUIRE_MESSAGE(shell(folder, "qemu-img convert -U -O raw " + name + " content.raw") == 0, log_of(folder));
  return read_file(folder + "/content.raw");
}

// 0: sound; 3: clusters that nobody uses, no damage.
inline void check(const std::string& folder, const std::string& name, bool leaks_allowed = false) {
  const int status = WEXITSTATUS(shell(folder, "qemu-img check " + name));
  const bool sound = status == 0 || (leaks_allowed && status == 3);
  CHECK_MESSAGE(sound, log_of(folder));
}

}  // namespace vmm::test
