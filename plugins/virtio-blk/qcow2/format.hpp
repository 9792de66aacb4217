// SPDX-License-Identifier: Apache-2.0
// The qcow2 format: what stands in a file's header, checked, and a new file written (QEMU: docs/interop/qcow2.txt).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "clone/sdk/result.hpp"

namespace virtio_blk::qcow2 {

using clone_sdk::Error;
using clone_sdk::Result;

constexpr uint32_t kMagic = 0x514649fb;  // "QFI" 0xfb
constexpr uint32_t kLeastClusterBits = 9;
constexpr uint32_t kMostClusterBits = 21;
constexpr uint64_t kMostL1Bytes = 32 << 20;
constexpr uint64_t kMostRefcountTableBytes = 8 << 20;
constexpr uint32_t kLongestBackingName = 1023;

// Incompatible features: who does not know one must not open the file.
constexpr uint64_t kDirty = 1 << 0;
constexpr uint64_t kCorrupt = 1 << 1;
constexpr uint64_t kExternalData = 1 << 2;
constexpr uint64_t kCompressionType = 1 << 3;
constexpr uint64_t kExtendedL2 = 1 << 4;

// L1 and L2 entries.
constexpr uint64_t kCopied = uint64_t{1} << 63;      // the reference count is exactly 1
constexpr uint64_t kCompressed = uint64_t{1} << 62;  // L2 only
constexpr uint64_t kZero = 1;                        // L2 only, version 3, not with extended entries
constexpr uint64_t kOffsetMask = 0x00ff'ffff'ffff'fe00;
// The bits that an entry of a plain cluster must leave clear.
constexpr uint64_t kReservedMask = 0x3f00'0000'0000'01fe;

constexpr uint32_t kSubclusters = 32;  // of a cluster, with extended entries

// Where fields stand that are written in place: the rest of a header, its extensions too, stays as it is.
namespace field {
constexpr uint64_t size = 24;
constexpr uint64_t l1_entries = 36;
constexpr uint64_t l1_offset = 40;
constexpr uint64_t refcount_table_offset = 48;
constexpr uint64_t refcount_table_clusters = 56;
constexpr uint64_t incompatible = 72;
constexpr uint64_t autoclear = 88;
}  // namespace field

enum class Compression : uint8_t { zlib = 0, zstd = 1 };

struct Header {
  uint32_t version = 3;
  uint32_t cluster_bits = 16;
  uint64_t size_bytes = 0;  // of the guest's disk
  uint32_t l1_entries = 0;
  uint64_t l1_offset = 0;
  uint64_t refcount_table_offset = 0;
  uint32_t refcount_table_clusters = 0;
  uint32_t refcount_order = 4;  // a reference count has 2^order bits
  uint32_t snapshot_count = 0;
  uint64_t incompatible = 0;
  uint64_t autoclear = 0;
  Compression compression = Compression::zlib;
  std::string backing_name;    // "" without one
  std::string backing_format;  // "" when the file does not say

  uint64_t cluster_bytes() const { return uint64_t{1} << cluster_bits; }
  bool extended_l2() const { return (incompatible & kExtendedL2) != 0; }
  uint64_t l2_entry_bytes() const { return extended_l2() ? 16 : 8; }
  uint64_t l2_entries() const { return cluster_bytes() / l2_entry_bytes(); }  // of one table
  // A cluster, or the part of it that is allocated by itself.
  uint64_t unit_bytes() const { return extended_l2() ? cluster_bytes() / kSubclusters : cluster_bytes(); }
  // Guest bytes that one L2 table maps.
  uint64_t l2_span_bytes() const { return l2_entries() << cluster_bits; }
};

// Reads file content at an offset; false when it is not there. A file, or a buffer of a test.
using ReadAt = std::function<bool(uint64_t offset, std::span<std::byte> into)>;

// What may go to a terminal or a log of text that a file holds.
std::string printable(std::string text);

bool has_magic(std::span<const std::byte> first_bytes);

// Everything of a header that can be judged without the tables; `file_bytes` is the file's length. What this driver
// cannot serve is refused by name. Messages do not name the file.
Result<Header> read_header(const ReadAt& read, uint64_t file_bytes);

struct NewFile {
  uint64_t size_bytes = 0;
  uint32_t cluster_bits = 16;
  bool extended_l2 = false;    // subclusters: a small write over a base copies less
  std::string backing_name;    // as it shall stand in the file
  std::string backing_format;  // "raw" or "qcow2"; required with a backing file
};

// Makes an empty file, open for writing and of length 0, a disk of the given size. Not synced.
Result<void> create(int fd, const NewFile& file);

}  // namespace virtio_blk::qcow2
