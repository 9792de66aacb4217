// SPDX-License-Identifier: Apache-2.0
// Headers of qcow2 files. A header is hostile: fields are copied out, then checked, and no sum of them may overflow.
#include "format.hpp"

#include <endian.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <vector>

namespace virtio_blk::qcow2 {

namespace {

constexpr size_t kVersion2Bytes = 72;
constexpr size_t kVersion3Bytes = 104;
constexpr uint64_t kKnownIncompatible = kDirty | kCorrupt | kExternalData | kCompressionType | kExtendedL2;

// Header extensions.
constexpr uint32_t kEnd = 0;
constexpr uint32_t kBackingFormat = 0xe2792aca;
constexpr uint32_t kEncryption = 0x0537be77;
constexpr size_t kLongestFormatName = 16;

template <typename T>
T get(std::span<const std::byte> bytes, size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  if constexpr (sizeof(T) == 8) return be64toh(value);
  return static_cast<T>(be32toh(static_cast<uint32_t>(value)));
}

void put32(std::vector<std::byte>& bytes, size_t offset, uint32_t value) {
  value = htobe32(value);
  std::memcpy(bytes.data() + offset, &value, sizeof value);
}
void put64(std::vector<std::byte>& bytes, size_t offset, uint64_t value) {
  value = htobe64(value);
  std::memcpy(bytes.data() + offset, &value, sizeof value);
}

// Whether [offset, offset + size) lies in a file of `file_bytes`.
bool within(uint64_t offset, uint64_t size, uint64_t file_bytes) {
  return offset <= file_bytes && size <= file_bytes - offset;
}

Result<void> read_extensions(const ReadAt& read, uint64_t start, uint64_t end, Header& header) {
  for (uint64_t at = start; at + 8 <= end;) {
    std::array<std::byte, 8> head;
    if (!read(at, head)) return Error{"is cut off within its header extensions"};
    const auto type = get<uint32_t>(head, 0);
    const auto length = get<uint32_t>(head, 4);
    at += 8;
    if (type == kEnd) return {};
    if (length > end - at) return Error{"has a header extension that is longer than the header"};
    if (type == kEncryption) return Error{"is encrypted, which is not supported"};
    if (type == kBackingFormat) {
      if (length > kLongestFormatName) return Error{"has a backing format whose name is too long"};
      header.backing_format.resize(length);
      if (!read(at, std::as_writable_bytes(std::span(header.backing_format))))
        return Error{"is cut off within its header extensions"};
      header.backing_format = printable(std::move(header.backing_format));
    }
    at += (uint64_t{length} + 7) / 8 * 8;
  }
  return {};
}

Result<void> check_tables(const Header& header, uint64_t file_bytes) {
  const uint64_t cluster = header.cluster_bytes();
  const uint64_t l1_bytes = uint64_t{header.l1_entries} * 8;
  if (l1_bytes > kMostL1Bytes) return Error{"has an L1 table of more than 32 MiB"};
  // Rounded up without overflow near 2^64.
  const uint64_t span = header.l2_span_bytes();
  const uint64_t needed = header.size_bytes / span + (header.size_bytes % span != 0);
  if (needed > header.l1_entries)
    return Error{"has a disk of " + std::to_string(header.size_bytes) + " bytes, more than its L1 table can map"};
  if (header.l1_offset % cluster) return Error{"has an L1 table that begins within a cluster"};
  if (!within(header.l1_offset, l1_bytes, file_bytes)) return Error{"has an L1 table beyond the end of the file"};
  if (l1_bytes && header.l1_offset == 0) return Error{"has an L1 table that overlaps its header"};

  const uint64_t refcount_bytes = uint64_t{header.refcount_table_clusters} << header.cluster_bits;
  if (refcount_bytes > kMostRefcountTableBytes) return Error{"has a refcount table of more than 8 MiB"};
  if (refcount_bytes == 0) return Error{"has no refcount table"};
  if (header.refcount_table_offset % cluster) return Error{"has a refcount table that begins within a cluster"};
  if (header.refcount_table_offset == 0) return Error{"has a refcount table that overlaps its header"};
  if (!within(header.refcount_table_offset, refcount_bytes, file_bytes))
    return Error{"has a refcount table beyond the end of the file"};
  const bool apart = header.l1_offset + l1_bytes <= header.refcount_table_offset ||
                     header.refcount_table_offset + refcount_bytes <= header.l1_offset || l1_bytes == 0;
  if (!apart) return Error{"has an L1 table that overlaps its refcount table"};
  return {};
}

}  // namespace

std::string printable(std::string text) {
  for (char& c : text)
    if (static_cast<unsigned char>(c) < ' ' || c == 0x7f) c = '?';
  return text;
}

bool has_magic(std::span<const std::byte> first_bytes) {
  return first_bytes.size() >= 4 && get<uint32_t>(first_bytes, 0) == kMagic;
}

Result<Header> read_header(const ReadAt& read, uint64_t file_bytes) {
  std::array<std::byte, kVersion3Bytes + 8> raw{};
  if (file_bytes < kVersion2Bytes || !read(0, std::span(raw).first(kVersion2Bytes)))
    return Error{"is too short for a qcow2 header"};
  if (!has_magic(raw)) return Error{"is not a qcow2 file: it does not begin with 'QFI'"};

  Header header;
  header.version = get<uint32_t>(raw, 4);
  if (header.version != 2 && header.version != 3)
    return Error{"is of qcow2 version " + std::to_string(header.version) + "; supported are 2 and 3"};
  uint64_t header_bytes = kVersion2Bytes;
  if (header.version == 3) {
    if (!read(0, std::span(raw).first(kVersion3Bytes))) return Error{"is too short for a qcow2 header"};
    header_bytes = get<uint32_t>(raw, 100);
    header.incompatible = get<uint64_t>(raw, 72);
    header.autoclear = get<uint64_t>(raw, field::autoclear);
    header.refcount_order = get<uint32_t>(raw, 96);
  }
  header.cluster_bits = get<uint32_t>(raw, 20);
  if (header.cluster_bits < kLeastClusterBits || header.cluster_bits > kMostClusterBits)
    return Error{"has clusters of 2^" + std::to_string(header.cluster_bits) + " bytes; supported are 2^9 to 2^21"};
  if (header.version == 3 &&
      (header_bytes < kVersion3Bytes || header_bytes > header.cluster_bytes() || header_bytes % 8))
    return Error{"has a header of " + std::to_string(header_bytes) + " bytes"};
  if (const uint64_t unknown = header.incompatible & ~kKnownIncompatible)
    return Error{"uses a feature that is not known (incompatible feature bit " +
                 std::to_string(__builtin_ctzll(unknown)) + ")"};
  if (header.incompatible & kExternalData) return Error{"keeps its data in another file, which is not supported"};
  if (get<uint32_t>(raw, 32) != 0) return Error{"is encrypted, which is not supported"};
  if (header.refcount_order > 6)
    return Error{"has reference counts of 2^" + std::to_string(header.refcount_order) + " bits; allowed are up to 64"};
  if (header.extended_l2() && header.cluster_bits < 14)
    return Error{"has extended L2 entries and clusters of less than 16 KiB"};
  if (header.incompatible & kCompressionType) {
    if (header_bytes < kVersion3Bytes + 8 || !read(0, raw)) return Error{"does not say how it is compressed"};
    const auto compression = static_cast<uint8_t>(raw[kVersion3Bytes]);
    if (compression > 1) return Error{"is compressed in a way that is not known (" + std::to_string(compression) + ")"};
    header.compression = static_cast<Compression>(compression);
  }

  header.size_bytes = get<uint64_t>(raw, field::size);
  header.l1_entries = get<uint32_t>(raw, field::l1_entries);
  header.l1_offset = get<uint64_t>(raw, field::l1_offset);
  header.refcount_table_offset = get<uint64_t>(raw, field::refcount_table_offset);
  header.refcount_table_clusters = get<uint32_t>(raw, field::refcount_table_clusters);
  header.snapshot_count = get<uint32_t>(raw, 60);
  if (header.size_bytes > uint64_t{1} << 62)
    return Error{"has a disk of " + std::to_string(header.size_bytes) + " bytes; at most 2^62 are possible"};
  CLONE_TRY(check_tables(header, file_bytes));

  // Extensions end where the backing file's name begins, or with the first cluster.
  const auto name_offset = get<uint64_t>(raw, 8);
  const auto name_bytes = get<uint32_t>(raw, 16);
  uint64_t extensions_end = std::min(header.cluster_bytes(), file_bytes);
  if (name_offset) {
    if (name_bytes > kLongestBackingName) return Error{"has a backing file name of more than 1023 bytes"};
    if (name_offset < header_bytes || !within(name_offset, name_bytes, header.cluster_bytes()))
      return Error{"has a backing file name outside of its header"};
    header.backing_name.resize(name_bytes);
    if (!read(name_offset, std::as_writable_bytes(std::span(header.backing_name))))
      return Error{"is cut off within its backing file name"};
    if (header.backing_name.find('\0') != std::string::npos)
      return Error{"has a backing file name with a NUL byte in it"};
    extensions_end = name_offset;
  }
  CLONE_TRY(read_extensions(read, header_bytes, extensions_end, header));
  return header;
}

Result<void> create(int fd, const NewFile& file) {
  Header header;
  header.cluster_bits = file.cluster_bits;
  header.incompatible = file.extended_l2 ? kExtendedL2 : 0;
  const uint64_t cluster = header.cluster_bytes();
  const uint64_t span = header.l2_span_bytes();
  const uint64_t l1_entries = file.size_bytes / span + (file.size_bytes % span != 0);
  const uint64_t l1_clusters = (l1_entries * 8 + cluster - 1) / cluster;
  const uint64_t used_clusters = 3 + l1_clusters;
  // One refcount block, of two bytes for each cluster, for all that is written here.
  if (l1_entries * 8 > kMostL1Bytes || used_clusters > cluster / 2)
    return Error{"a disk of " + std::to_string(file.size_bytes) + " bytes is too large for clusters of " +
                 std::to_string(cluster)};
  if (file.backing_name.size() > kLongestBackingName || file.backing_format.size() > kLongestFormatName)
    return Error{"the name of the backing file is longer than 1023 bytes"};

  std::vector<std::byte> head(3 * cluster);
  put32(head, 0, kMagic);
  put32(head, 4, 3);
  put32(head, 20, header.cluster_bits);
  put64(head, field::size, file.size_bytes);
  put32(head, field::l1_entries, static_cast<uint32_t>(l1_entries));
  put64(head, field::l1_offset, 3 * cluster);
  put64(head, field::refcount_table_offset, cluster);
  put32(head, field::refcount_table_clusters, 1);
  put64(head, field::incompatible, header.incompatible);
  put32(head, 96, header.refcount_order);
  put32(head, 100, kVersion3Bytes);
  size_t at = kVersion3Bytes;
  if (!file.backing_name.empty()) {
    if (cluster < at + 8 + kLongestFormatName + 8 + file.backing_name.size())
      return Error{"the name of the backing file is too long for clusters of " + std::to_string(cluster)};
    put32(head, at, kBackingFormat);
    put32(head, at + 4, static_cast<uint32_t>(file.backing_format.size()));
    std::memcpy(head.data() + at + 8, file.backing_format.data(), file.backing_format.size());
    at += 8 + (file.backing_format.size() + 7) / 8 * 8 + 8;  // and the end of the extensions
    put64(head, 8, at);
    put32(head, 16, static_cast<uint32_t>(file.backing_name.size()));
    std::memcpy(head.data() + at, file.backing_name.data(), file.backing_name.size());
  }
  put64(head, cluster, 2 * cluster);
  for (uint64_t i = 0; i < used_clusters; ++i) head[2 * cluster + 2 * i + 1] = std::byte{1};

  for (size_t done = 0; done < head.size();) {
    const ssize_t count = ::pwrite(fd, head.data() + done, head.size() - done, static_cast<off_t>(done));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return Error{std::strerror(count ? errno : ENOSPC), count ? errno : ENOSPC, CLONE_ERR_SYSTEM};
    done += static_cast<size_t>(count);
  }
  if (::ftruncate(fd, static_cast<off_t>(used_clusters * cluster)) != 0)
    return Error{std::strerror(errno), errno, CLONE_ERR_SYSTEM};
  return {};
}

}  // namespace virtio_blk::qcow2
