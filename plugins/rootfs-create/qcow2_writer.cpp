// SPDX-License-Identifier: Apache-2.0
// An empty image, then one pass: data clusters and the L2 tables that map them, then the L1 table and the refcounts.
#include "qcow2_writer.hpp"

#include <endian.h>
#include <unistd.h>

#include <algorithm>

#include "progress.hpp"
#include "virtio-blk/qcow2/format.hpp"

namespace rootfs {
namespace {

namespace qcow2 = virtio_blk::qcow2;
using qcow2::kCopied;

constexpr unsigned kClusterBits = 16;
constexpr uint64_t kClusterBytes = uint64_t{1} << kClusterBits;
constexpr uint64_t kTableEntries = kClusterBytes / 8;       // of an L1, L2 or refcount table's cluster
constexpr uint64_t kRefcountsPerBlock = kClusterBytes / 2;  // of 16 bits
// Where qcow2::create() puts them, a cluster each but for the L1 table; the header is in cluster 0.
constexpr uint64_t kRefcountTable = 1, kFirstRefcountBlock = 2, kL1Table = 3;

uint64_t divided(uint64_t value, uint64_t by) { return (value + by - 1) / by; }

Result<void> write_at(const Fd& fd, const void* data, size_t size_bytes, uint64_t offset) {
  const char* next = static_cast<const char*>(data);
  while (size_bytes > 0) {
    const ssize_t count = ::pwrite(fd.get(), next, size_bytes, static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return errno_error("writing the qcow2 image");
    next += count;
    offset += static_cast<uint64_t>(count);
    size_bytes -= static_cast<size_t>(count);
  }
  return {};
}

// Reads up to a cluster at `offset`; what is behind the end of the file reads as zeros.
Result<void> read_cluster(const Fd& raw, uint64_t offset, std::vector<char>& cluster) {
  size_t used = 0;
  while (used < cluster.size()) {
    const ssize_t count =
        ::pread(raw.get(), cluster.data() + used, cluster.size() - used, static_cast<off_t>(offset + used));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return errno_error("reading the raw image");
    if (count == 0) break;
    used += static_cast<size_t>(count);
  }
  std::fill(cluster.begin() + static_cast<ptrdiff_t>(used), cluster.end(), 0);
  return {};
}

// The first offset from `offset` on that may hold data; `size_bytes` if there is none.
uint64_t next_data(const Fd& raw, uint64_t offset, uint64_t size_bytes) {
  const off_t data = ::lseek(raw.get(), static_cast<off_t>(offset), SEEK_DATA);
  if (data >= 0) return std::min(static_cast<uint64_t>(data), size_bytes);
  return errno == ENXIO ? size_bytes : offset;
}

}  // namespace

Result<void> write_qcow2(const Fd& raw, uint64_t size_bytes, const Fd& output,
                         const std::function<void(uint64_t done)>& on_bytes) {
  const uint64_t guest_clusters = divided(size_bytes, kClusterBytes);
  std::vector<uint64_t> l1(divided(guest_clusters, kTableEntries));
  std::vector<uint64_t> l2(kTableEntries);
  std::vector<char> cluster(kClusterBytes);
  uint64_t end = kL1Table + divided(l1.size(), kTableEntries);  // clusters of the output so far
  TRY(qcow2::create(output.get(), {.size_bytes = size_bytes, .cluster_bits = kClusterBits})
          .context("writing the qcow2 image"));

  // Each L2 table follows the data that it maps.
  uint64_t number = next_data(raw, 0, size_bytes) / kClusterBytes;
  while (number < guest_clusters) {
    const uint64_t table = number / kTableEntries;
    std::fill(l2.begin(), l2.end(), 0);
    bool used = false;
    while (number < guest_clusters && number / kTableEntries == table) {
      TRY(interrupted());
      TRY(read_cluster(raw, number * kClusterBytes, cluster));
      if (std::any_of(cluster.begin(), cluster.end(), [](char c) { return c != 0; })) {
        TRY(write_at(output, cluster.data(), kClusterBytes, end * kClusterBytes));
        l2[number % kTableEntries] = htobe64((end++ * kClusterBytes) | kCopied);
        used = true;
      }
      if (on_bytes) on_bytes(number * kClusterBytes);
      const uint64_t behind = (number + 1) * kClusterBytes;
      number = behind < size_bytes ? next_data(raw, behind, size_bytes) / kClusterBytes : guest_clusters;
      if (number * kClusterBytes < behind) number = behind / kClusterBytes;
    }
    if (!used) continue;
    TRY(write_at(output, l2.data(), kClusterBytes, end * kClusterBytes));
    l1[table] = htobe64((end++ * kClusterBytes) | kCopied);
  }
  TRY(write_at(output, l1.data(), l1.size() * 8, kL1Table * kClusterBytes));

  // Refcounts count their own clusters too. The first block is there, further ones are put at the end.
  std::vector<uint64_t> blocks = {htobe64(kFirstRefcountBlock * kClusterBytes)};
  while (blocks.size() * kRefcountsPerBlock < end) blocks.push_back(htobe64(end++ * kClusterBytes));
  if (blocks.size() > kTableEntries) return Error{"the contents are more than the 16T that a qcow2 image can hold"};
  TRY(write_at(output, blocks.data(), blocks.size() * 8, kRefcountTable * kClusterBytes));
  std::vector<uint16_t> refcounts(kRefcountsPerBlock, htobe16(1));
  for (const uint64_t block : blocks) {
    const uint64_t counted = std::min(kRefcountsPerBlock, end);
    std::fill(refcounts.begin() + static_cast<ptrdiff_t>(counted), refcounts.end(), 0);
    TRY(write_at(output, refcounts.data(), kClusterBytes, be64toh(block)));
    end -= counted;
  }
  return {};
}

}  // namespace rootfs
