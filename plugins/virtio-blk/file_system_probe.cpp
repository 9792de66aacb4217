// SPDX-License-Identifier: Apache-2.0
// Superblocks, by their magic numbers (Linux: fs/ext4/ext4.h, include/uapi/linux/magic.h and each file system's own).
#include "file_system_probe.hpp"

#include <endian.h>

#include <array>
#include <cstring>

namespace virtio_blk {

namespace {

constexpr uint64_t kBtrfsMagicOffset = 0x10040;
constexpr size_t kExtSuperblock = 1024;

uint32_t u32(std::span<const std::byte> bytes, size_t offset) {
  uint32_t value;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return le32toh(value);
}

uint16_t u16(std::span<const std::byte> bytes, size_t offset) {
  uint16_t value;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return le16toh(value);
}

// One driver mounts all three; the name says which features are in use.
const char* ext_version(std::span<const std::byte> head) {
  constexpr uint32_t kHasJournal = 0x4;
  constexpr uint32_t kIncompatibleOfExt3 = 0x2 | 0x4 | 0x10;  // file types, needs recovery, meta block groups
  constexpr uint32_t kReadOnlyOfExt3 = 0x1 | 0x2 | 0x4;       // sparse superblocks, large files, B-tree directories
  const uint32_t compatible = u32(head, kExtSuperblock + 0x5c);
  const uint32_t incompatible = u32(head, kExtSuperblock + 0x60);
  const uint32_t read_only_compatible = u32(head, kExtSuperblock + 0x64);
  if ((incompatible & ~kIncompatibleOfExt3) || (read_only_compatible & ~kReadOnlyOfExt3)) return "ext4";
  return compatible & kHasJournal ? "ext3" : "ext2";
}

}  // namespace

// The checksum modules are looked up by the kernel at run time; no module's list of dependencies names them.
FileSystem probe_file_system(Image& image) {
  std::array<std::byte, 2048> head{};
  if (!image.read(0, head)) return {};
  if (std::memcmp(head.data(), "XFSB", 4) == 0) return {"xfs", "xfs crc32c_generic"};
  if (std::memcmp(head.data(), "hsqs", 4) == 0) return {"squashfs", "squashfs"};
  if (u16(head, kExtSuperblock + 0x38) == 0xef53) return {ext_version(head), "ext4 crc32c_generic"};
  if (u32(head, 1024) == 0xe0f5e1e2) return {"erofs", "erofs crc32c_generic"};
  if (u32(head, 1024) == 0xf2f52010) return {"f2fs", "f2fs crc32_generic"};
  std::array<std::byte, 8> btrfs{};
  if (image.read(kBtrfsMagicOffset, btrfs) && std::memcmp(btrfs.data(), "_BHRfS_M", 8) == 0)
    return {"btrfs", "btrfs crc32c_generic"};
  return {};
}

}  // namespace virtio_blk
