// SPDX-License-Identifier: Apache-2.0
// The newc writer.
#include "boot/cpio.hpp"

#include <sys/stat.h>

#include <algorithm>

namespace vmm {
namespace {

constexpr std::string_view trailer_name = "TRAILER!!!";
constexpr size_t header_bytes = 6 + 13 * 8;
// The kernel refuses longer names (PATH_MAX, with the final NUL).
constexpr size_t longest_name_bytes = 4095;

constexpr size_t aligned(size_t size_bytes) { return (size_bytes + 3) & ~size_t{3}; }

size_t entry_size_bytes(std::string_view name, size_t content_bytes) {
  return aligned(header_bytes + name.size() + 1) + aligned(content_bytes);
}

// Writes forward through the output and pads with zeros: the memory may hold anything.
class Output {
 public:
  explicit Output(std::span<std::byte> bytes) : start_(bytes.data()), next_(bytes.data()) {}

  void bytes(const void* data, size_t size_bytes) {
    if (size_bytes != 0) std::memcpy(next_, data, size_bytes);
    next_ += size_bytes;
  }
  void hex(uint32_t value) {
    char digits[8];
    for (int i = 7; i >= 0; --i, value >>= 4) digits[i] = "0123456789ABCDEF"[value & 15];
    bytes(digits, sizeof digits);
  }
  void pad() {
    while ((next_ - start_) % 4 != 0) *next_++ = std::byte{0};
  }

 private:
  std::byte* start_;
  std::byte* next_;
};

void write_entry(Output& output, const CpioEntry& entry, uint32_t inode) {
  const uint32_t links = S_ISDIR(entry.mode) ? 2 : 1;
  output.bytes("070701", 6);
  for (const uint32_t field :
       {inode, entry.mode, 0u /* uid */, 0u /* gid */, links, 0u /* mtime */,
        static_cast<uint32_t>(entry.content.size()), 0u /* major */, 0u /* minor */, entry.device_major,
        entry.device_minor, static_cast<uint32_t>(entry.name.size() + 1), 0u /* check, newc has none */})
    output.hex(field);
  output.bytes(entry.name.c_str(), entry.name.size() + 1);
  output.pad();
  output.bytes(entry.content.data(), entry.content.size());
  output.pad();
}

}  // namespace

CpioEntry CpioEntry::directory(std::string name, uint32_t permissions) {
  return {std::move(name), S_IFDIR | permissions, {}};
}

CpioEntry CpioEntry::file(std::string name, std::span<const std::byte> content, uint32_t permissions) {
  return {std::move(name), S_IFREG | permissions, content};
}

CpioEntry CpioEntry::symlink(std::string name, std::string_view target) {
  return {std::move(name), S_IFLNK | 0777, std::as_bytes(std::span(target))};
}

CpioEntry CpioEntry::character_device(std::string name, uint32_t major, uint32_t minor, uint32_t permissions) {
  return {std::move(name), S_IFCHR | permissions, {}, major, minor};
}

Result<size_t> cpio_size_bytes(std::span<const CpioEntry> entries) {
  size_t total_bytes = entry_size_bytes(trailer_name, 0);
  for (const CpioEntry& entry : entries) {
    const auto refuse = [&entry](std::string_view reason) {
      return Error{"cpio entry \"" + entry.name + "\": " + std::string(reason), EINVAL};
    };
    if (entry.name.empty() || entry.name.front() == '/' || entry.name == trailer_name)
      return refuse("the name is empty, absolute or reserved");
    if (entry.name.size() > longest_name_bytes) return refuse("the name is too long");
    if (entry.name.find('\0') != std::string::npos) return refuse("the name holds a NUL");
    if (entry.content.size() > UINT32_MAX) return refuse("4 GiB or more do not fit the format");
    total_bytes += entry_size_bytes(entry.name, entry.content.size());
  }
  return total_bytes;
}

void write_cpio(std::span<const CpioEntry> entries, std::span<std::byte> output) {
  Output out(output);
  uint32_t inode = 0;
  for (const CpioEntry& entry : entries) write_entry(out, entry, ++inode);
  write_entry(out, CpioEntry{std::string(trailer_name), 0, {}}, 0);
}

}  // namespace vmm
