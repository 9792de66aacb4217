// SPDX-License-Identifier: Apache-2.0
// A strict reader of newc archives, written apart from the writer it checks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

struct CpioMember {
  std::string name;
  std::string content;
  uint32_t inode = 0, mode = 0, uid = 0, gid = 0, links = 0, mtime = 0, rmajor = 0, rminor = 0;
};

// The members before the trailer; nothing where the archive is not well formed to its last byte.
inline std::optional<std::vector<CpioMember>> read_cpio(std::span<const std::byte> archive) {
  const std::string bytes(reinterpret_cast<const char*>(archive.data()), archive.size());
  std::vector<CpioMember> members;
  size_t at = 0;
  const auto skip_padding = [&] {
    for (; at % 4 != 0; ++at)
      if (at >= bytes.size() || bytes[at] != '\0') return false;
    return true;
  };
  for (;;) {
    if (bytes.size() - at < 110 || bytes.compare(at, 6, "070701") != 0) return std::nullopt;
    uint32_t field[13];
    for (size_t i = 0; i < 13; ++i) {
      const std::string digits = bytes.substr(at + 6 + i * 8, 8);
      if (digits.find_first_not_of("0123456789abcdefABCDEF") != std::string::npos) return std::nullopt;
      field[i] = static_cast<uint32_t>(std::stoul(digits, nullptr, 16));
    }
    at += 110;
    const size_t name_bytes = field[11], content_bytes = field[6];
    if (name_bytes == 0 || bytes.size() - at < name_bytes || bytes[at + name_bytes - 1] != '\0') return std::nullopt;
    CpioMember member{bytes.substr(at, name_bytes - 1),
                      {},
                      field[0],
                      field[1],
                      field[2],
                      field[3],
                      field[4],
                      field[5],
                      field[9],
                      field[10]};
    at += name_bytes;
    if (!skip_padding() || bytes.size() - at < content_bytes) return std::nullopt;
    member.content = bytes.substr(at, content_bytes);
    at += content_bytes;
    if (!skip_padding()) return std::nullopt;
    if (member.name == "TRAILER!!!") break;
    members.push_back(std::move(member));
  }
  if (at != bytes.size()) return std::nullopt;
  return members;
}
