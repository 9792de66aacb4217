// SPDX-License-Identifier: Apache-2.0
// cpio archives in the "newc" form that Linux unpacks as an initramfs
// (Documentation/driver-api/early-userspace/buffer-format.rst).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "util/result.hpp"

namespace vmm {

// One member. `content` is a view: what it shows has to stay until the archive is written.
struct CpioEntry {
  std::string name;  // without a leading '/'
  uint32_t mode = 0;
  std::span<const std::byte> content;
  uint32_t device_major = 0;
  uint32_t device_minor = 0;

  static CpioEntry directory(std::string name, uint32_t permissions = 0755);
  static CpioEntry file(std::string name, std::span<const std::byte> content, uint32_t permissions = 0644);
  static CpioEntry symlink(std::string name, std::string_view target);
  static CpioEntry character_device(std::string name, uint32_t major, uint32_t minor, uint32_t permissions = 0600);
};

// The size of the archive, a multiple of 4, or why one of the entries cannot be in an archive.
Result<size_t> cpio_size_bytes(std::span<const CpioEntry> entries);

// Writes the archive. `output` has the size that cpio_size_bytes() gave for these entries. The bytes depend on the
// entries alone: owner root, time 0, inodes in order.
void write_cpio(std::span<const CpioEntry> entries, std::span<std::byte> output);

}  // namespace vmm
