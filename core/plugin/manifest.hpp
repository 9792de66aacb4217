// SPDX-License-Identifier: Apache-2.0
// A plugin file's manifest, read from its ELF section before any code of the file runs (clone/abi/plugin.h).
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "plugin/options.hpp"
#include "util/result.hpp"

namespace vmm {

// What a plugin holds: a device, a transport, a policy or a backend, by its name on the command line.
struct Provided {
  std::string kind;
  std::string name;
  bool by_default = false;  // every machine gets one unless told otherwise
};

// A short form on the command line: `--rootfs FILE` for `--device …,path=FILE,root=on`.
struct ShortFlag {
  std::string flag;
  std::string device;
  std::string value_name;  // as --help shows it
  bool value_is_optional = false;
  std::string expansion;  // "path=%,root=on"
  std::string help;
};

// A short form for an option of a device that is planned anyway: `--flag VALUE` for option=VALUE on it.
struct FlagOption {
  std::string flag;
  std::string device;
  KeyValues which;  // what that device has: {"root", "on"}
  std::string value_name;
  bool value_is_optional = false;
  std::string option;
  std::string left_out;  // its value then
  std::string help;
};

struct Manifest {
  uint32_t abi_major = 0;
  uint32_t abi_minor = 0;
  uint32_t least_host_minor = 0;
  std::string id, version, vendor, licence, description;
  std::vector<Provided> provides;
  std::vector<ShortFlag> flags;
  std::vector<FlagOption> flag_options;
  std::vector<std::string> unknown_records;  // their kinds; of a newer interface than this host's

  const Provided* find(std::string_view kind, std::string_view name) const;
};

// The bytes are those of a file that may be anything. Errors do not name the file.
Result<Manifest> parse_manifest(std::span<const std::byte> elf_file);

// Whether this host can load it: same major, and no more than this host's minor asked for.
Result<void> check_abi(const Manifest& manifest);

}  // namespace vmm
