// SPDX-License-Identifier: Apache-2.0
// Finds the section `.clone_plugin` in an ELF file and takes the manifest apart.
#include "plugin/manifest.hpp"

#include <algorithm>
#include <cstring>

#include "clone/abi/plugin.h"
#include "plugin/elf_reader.hpp"
#include "util/utf8.hpp"

namespace vmm {
namespace {

Result<std::span<const std::byte>> find_section(std::span<const std::byte> file, std::string_view wanted) {
  for (const ElfSection& section : TRY(elf_sections(file)))
    if (section.name == wanted) return section.bytes;
  return Error{"not a plugin: it has no section " + std::string(wanted), ENOEXEC};
}

template <size_t n>
std::string text(const char (&field)[n]) {
  return std::string(field, ::strnlen(field, n));
}

std::vector<std::string> split(std::string_view line, char separator) {
  std::vector<std::string> fields;
  for (size_t start = 0;;) {
    const size_t end = line.find(separator, start);
    fields.emplace_back(line.substr(start, end - start));
    if (end == std::string_view::npos) return fields;
    start = end + 1;
  }
}

bool is_name(std::string_view name) {
  return !name.empty() && name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789-") == std::string_view::npos;
}

bool in_brackets(std::string_view text) { return text.starts_with('[') && text.ends_with(']'); }

constexpr std::string_view kKinds[] = {"device", "transport", "balloon-policy", "snapshot-backend"};

Result<void> parse_provides(const std::string& records, Manifest& manifest) {
  for (const std::string& line : split(records, '\n')) {
    if (line.empty()) continue;
    const auto fields = split(line, '\t');
    const Error unreadable{"the manifest has a record that cannot be read: " + printable(line)};
    const auto is_flag = [&fields](size_t least_fields) {
      return fields.size() >= least_fields && fields[1].starts_with("--") && is_name(fields[1].substr(2)) &&
             is_name(fields[2]);
    };
    if (fields[0] == "flag") {
      if (!is_flag(6)) return unreadable;
      manifest.flags.push_back({fields[1], fields[2], printable(fields[3]), in_brackets(fields[3]),
                                printable(fields[4]), printable(fields[5])});
    } else if (fields[0] == "flag-option") {
      if (!is_flag(8) || fields[5].empty()) return unreadable;
      // Behind the device's name these are options as in `--device NAME,key=value`.
      auto which = parse_named_options(fields[2] + (fields[3].empty() ? "" : "," + printable(fields[3])));
      if (!which.ok()) return unreadable;
      manifest.flag_options.push_back({fields[1], fields[2], std::move(which->options), printable(fields[4]),
                                       in_brackets(fields[4]), printable(fields[5]), printable(fields[6]),
                                       printable(fields[7])});
    } else if (std::find(std::begin(kKinds), std::end(kKinds), fields[0]) != std::end(kKinds)) {
      if (fields.size() < 3 || !is_name(fields[1])) return unreadable;
      manifest.provides.push_back({fields[0], fields[1], fields[2] == "default"});
    } else {
      manifest.unknown_records.push_back(printable(fields[0]));
    }
  }
  return {};
}

}  // namespace

const Provided* Manifest::find(std::string_view kind, std::string_view name) const {
  for (const Provided& provided : provides)
    if (provided.kind == kind && provided.name == name) return &provided;
  return nullptr;
}

Result<Manifest> parse_manifest(std::span<const std::byte> elf_file) {
  const auto section = TRY(find_section(elf_file, CLONE_MANIFEST_SECTION));
  // The part before the text has been the same since version 0 of the interface: it tells which version follows.
  constexpr size_t head_bytes = offsetof(clone_manifest, id);
  clone_manifest raw{};
  if (section.size() < head_bytes) return Error{"not a plugin: its manifest is too short"};
  std::memcpy(&raw, section.data(), head_bytes);
  if (std::memcmp(raw.magic, CLONE_MANIFEST_MAGIC, sizeof raw.magic) != 0)
    return Error{"not a plugin: its manifest does not begin with " CLONE_MANIFEST_MAGIC};
  if (raw.size < head_bytes || raw.size > section.size()) return Error{"not a plugin: its manifest has a wrong size"};
  std::memcpy(&raw, section.data(), std::min<size_t>(raw.size, sizeof raw));

  Manifest manifest;
  manifest.abi_major = raw.abi_major;
  manifest.abi_minor = raw.abi_minor;
  manifest.least_host_minor = raw.least_host_minor;
  if (manifest.abi_major != CLONE_ABI_MAJOR) return manifest;  // what follows may mean something else

  manifest.id = text(raw.id);
  manifest.version = printable(text(raw.version));
  manifest.vendor = printable(text(raw.vendor));
  manifest.licence = printable(text(raw.licence));
  manifest.description = printable(text(raw.description));
  if (!is_name(manifest.id)) return Error{"the manifest's id is not a name: '" + printable(manifest.id) + "'"};
  TRY(parse_provides(text(raw.provides), manifest));
  return manifest;
}

Result<void> check_abi(const Manifest& manifest) {
  auto version = [](uint32_t major, uint32_t minor) { return std::to_string(major) + "." + std::to_string(minor); };
  if (manifest.abi_major != CLONE_ABI_MAJOR)
    return Error{"built for plugin interface " + version(manifest.abi_major, manifest.abi_minor) + ", this clone has " +
                 version(CLONE_ABI_MAJOR, CLONE_ABI_MINOR) + " (the major number must be the same)"};
  if (manifest.least_host_minor > CLONE_ABI_MINOR)
    return Error{"needs plugin interface " + version(manifest.abi_major, manifest.least_host_minor) +
                 " or later, this clone has " + version(CLONE_ABI_MAJOR, CLONE_ABI_MINOR)};
  return {};
}

}  // namespace vmm
