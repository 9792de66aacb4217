// SPDX-License-Identifier: Apache-2.0
// Bytes as pairs of hexadecimal digits; they are some tens of thousands.
#include "snapshot/handover.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "memory/guest_memory.hpp"
#include "memory/usage.hpp"

namespace vmm {
namespace {

namespace json = boost::json;

constexpr char kDigits[] = "0123456789abcdef";

std::string hex_of(std::span<const std::byte> bytes) {
  std::string text;
  text.reserve(bytes.size() * 2);
  for (const std::byte byte : bytes) {
    text += kDigits[static_cast<unsigned>(byte) >> 4];
    text += kDigits[static_cast<unsigned>(byte) & 15];
  }
  return text;
}

// -1: not a digit.
int digit(char c) {
  const char* found = std::find(std::begin(kDigits), std::end(kDigits) - 1, c);
  return found == std::end(kDigits) - 1 ? -1 : static_cast<int>(found - kDigits);
}

Result<std::vector<std::byte>> bytes_of(std::string_view text) {
  const Error error{"sections: not pairs of hexadecimal digits", 0, CLONE_ERR_CORRUPT};
  if (text.size() % 2 != 0) return error;
  std::vector<std::byte> bytes(text.size() / 2);
  for (size_t i = 0; i < bytes.size(); ++i) {
    const int high = digit(text[2 * i]), low = digit(text[2 * i + 1]);
    if (high < 0 || low < 0) return error;
    bytes[i] = static_cast<std::byte>(high << 4 | low);
  }
  return bytes;
}

Result<void> write_all(int file, std::span<const std::byte> bytes, uint64_t offset) {
  while (!bytes.empty()) {
    const ssize_t written = ::pwrite(file, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return errno_error("the fork's memory");
    offset += static_cast<uint64_t>(written);
    bytes = bytes.subspan(static_cast<size_t>(written));
  }
  return {};
}

}  // namespace

json::array sections_to_json(const Sections& sections) {
  json::array rows;
  for (const auto& [key, section] : sections.all())
    rows.push_back(json::array{key.first, key.second, section.version, hex_of(section.bytes)});
  return rows;
}

Result<Sections> sections_from_json(const json::value& given) {
  const Error error{"sections: not a list of [owner, tag, version, bytes]", 0, CLONE_ERR_CORRUPT};
  if (!given.is_array()) return error;
  Sections sections;
  for (const json::value& row : given.get_array()) {
    if (!row.is_array() || row.get_array().size() != 4) return error;
    const json::array& fields = row.get_array();
    if (!fields[0].is_string() || !fields[1].is_string() || !fields[3].is_string()) return error;
    boost::system::error_code failed;
    const auto version = fields[2].to_number<uint32_t>(failed);
    if (failed) return error;
    const auto bytes = TRY(bytes_of(fields[3].get_string()));
    TRY(sections.put(fields[0].get_string(), fields[1].get_string(), version, bytes));
  }
  return sections;
}

Result<Fd> make_memory_file(const GuestMemory& memory) {
  Fd file(::memfd_create(kGuestMemoryName, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!file) return errno_error("memfd_create");
  if (::ftruncate(file.get(), static_cast<off_t>(memory.size_bytes())) != 0) return errno_error("ftruncate");
  if (::fcntl(file.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0) return errno_error("F_ADD_SEALS");
  return file;
}

Result<void> put_memory(int file, uint64_t offset, std::span<const std::byte> bytes) {
  static constexpr std::byte zeroes[kPageSize]{};
  const auto is_zero = [&](size_t at) { return std::memcmp(bytes.data() + at, zeroes, kPageSize) == 0; };
  for (size_t at = 0, end = 0; at < bytes.size(); at = end) {
    const bool hole = is_zero(at);
    for (end = at + kPageSize; end < bytes.size() && is_zero(end) == hole;) end += kPageSize;
    if (!hole)
      TRY(write_all(file, bytes.subspan(at, end - at), offset + at));
    else if (::fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset + at),
                         static_cast<off_t>(end - at)) != 0)
      return errno_error("the fork's memory");
  }
  return {};
}

}  // namespace vmm
