// SPDX-License-Identifier: Apache-2.0
// Reference counts on disk. Blocks are not cached: allocation takes many clusters at a time, and the page cache is
// near.
#include "refcounts.hpp"

#include <endian.h>
#include <fcntl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

namespace virtio_blk::qcow2 {

namespace {

constexpr uint64_t kScanBytes = 4096;
constexpr uint64_t kMostFileBytes = uint64_t{1} << 55;  // what an entry's offset can name

Error wrong_count(uint64_t cluster) {
  return Error{"the reference count of cluster " + std::to_string(cluster) + " is wrong", EIO};
}

}  // namespace

Result<Refcounts> Refcounts::load(int fd, const Header& header, uint64_t file_bytes, ClusterSet& tables) {
  Refcounts counts;
  counts.fd_ = fd;
  counts.header_ = header;
  const uint64_t clusters = header.refcount_table_clusters;
  if (!tables.add(header.refcount_table_offset >> header.cluster_bits, clusters))
    return Error{"has a refcount table that overlaps another table"};
  counts.table_.resize(clusters * header.cluster_bytes() / 8);
  CLONE_TRY(read_at(fd, header.refcount_table_offset, std::as_writable_bytes(std::span(counts.table_)))
                .context("its refcount table"));
  std::vector<uint64_t> blocks;
  for (uint64_t& entry : counts.table_) {
    entry = be64toh(entry);
    if (!entry) continue;
    if (entry % header.cluster_bytes()) return Error{"has a refcount block that begins within a cluster"};
    if (entry >= file_bytes) return Error{"has a refcount block beyond the end of the file"};
    blocks.push_back(entry >> header.cluster_bits);
  }
  if (!tables.add(std::move(blocks))) return Error{"has a refcount block that overlaps another table"};
  return counts;
}

Result<void> Refcounts::prepare_writing(uint64_t file_bytes, bool growable, Syncs syncs, const ClusterSet& tables) {
  growable_ = growable;
  syncs_ = syncs;
  end_ = used_end_ = file_bytes >> header_.cluster_bits;
  limit_ = kMostFileBytes >> header_.cluster_bits;
  if (growable) return {};
  // A device is longer than what is used of it, and what it holds there is not known to be zeroes.
  limit_ = end_;
  used_end_ = ~uint64_t{0};
  // Whatever the counts say, nothing new lands in a table.
  end_ = std::min(std::max(CLONE_TRY(find_end()), tables.end()), limit_);
  return {};
}

Result<uint64_t> Refcounts::find_end() const {
  std::vector<std::byte> bytes(header_.cluster_bytes());
  for (uint64_t block = table_.size(); block-- > 0;) {
    if (!table_[block]) continue;
    CLONE_TRY(read_at(fd_, table_[block], bytes));
    for (uint64_t i = per_block(); i-- > 0;)
      if (value_at(bytes, i)) return std::min(block * per_block() + i + 1, limit_);
  }
  return uint64_t{0};
}

uint64_t Refcounts::value_at(std::span<const std::byte> block, uint64_t index) const {
  const uint32_t order = header_.refcount_order;
  if (order < 3) {
    const uint64_t bit = index << order;
    return static_cast<uint64_t>(block[bit / 8]) >> bit % 8 & largest_count(order);
  }
  const size_t bytes = size_t{1} << (order - 3);
  uint64_t value = 0;
  for (size_t i = 0; i < bytes; ++i) value = value << 8 | static_cast<uint64_t>(block[index * bytes + i]);
  return value;
}

void Refcounts::set_value(std::span<std::byte> block, uint64_t index, uint64_t value) const {
  const uint32_t order = header_.refcount_order;
  if (order < 3) {
    const uint64_t bit = index << order;
    const auto mask = static_cast<std::byte>(largest_count(order) << bit % 8);
    block[bit / 8] = (block[bit / 8] & ~mask) | (static_cast<std::byte>(value << bit % 8) & mask);
    return;
  }
  const size_t bytes = size_t{1} << (order - 3);
  for (size_t i = bytes; i-- > 0; value >>= 8) block[index * bytes + i] = static_cast<std::byte>(value);
}

Result<uint64_t> Refcounts::get(uint64_t cluster) const {
  if (!has_block(cluster)) return uint64_t{0};
  const uint64_t bit = cluster % per_block() << header_.refcount_order;
  std::array<std::byte, 8> bytes{};
  const size_t size = std::max<size_t>(size_t{1} << header_.refcount_order >> 3, 1);
  CLONE_TRY(read_at(fd_, table_[block_of(cluster)] + bit / 8, std::span(bytes).first(size)));
  // The bytes hold this count, or the eight around it.
  return value_at(bytes, header_.refcount_order < 3 ? bit % 8 >> header_.refcount_order : 0);
}

template <typename Change>
Result<void> Refcounts::for_blocks(ClusterRun run, Change&& change) {
  std::vector<std::byte> bytes;
  while (run.count) {
    if (!has_block(run.first)) return Error{"cluster " + std::to_string(run.first) + " has no refcount block", EIO};
    const uint64_t index = run.first % per_block();
    const uint64_t count = std::min(run.count, per_block() - index);
    const uint64_t first_byte = (index << header_.refcount_order) / 8;
    const uint64_t end_byte = (((index + count) << header_.refcount_order) + 7) / 8;
    const uint64_t offset = table_[block_of(run.first)] + first_byte;
    bytes.resize(end_byte - first_byte);
    CLONE_TRY(read_at(fd_, offset, bytes));
    CLONE_TRY(
        change(std::span(bytes), index - (first_byte * 8 >> header_.refcount_order), ClusterRun{run.first, count}));
    CLONE_TRY(write_at(fd_, offset, bytes));
    run.first += count;
    run.count -= count;
  }
  return {};
}

Result<void> Refcounts::increase(ClusterRun run) {
  return for_blocks(run, [&](std::span<std::byte> bytes, uint64_t index, ClusterRun part) -> Result<void> {
    for (uint64_t i = 0; i < part.count; ++i) {
      const uint64_t value = value_at(bytes, index + i);
      if (value == largest_count(header_.refcount_order)) return wrong_count(part.first + i);
      set_value(bytes, index + i, value + 1);
    }
    return {};
  });
}

Result<std::vector<ClusterRun>> Refcounts::decrease(ClusterRun run) {
  std::vector<ClusterRun> unused;
  CLONE_TRY(for_blocks(run, [&](std::span<std::byte> bytes, uint64_t index, ClusterRun part) -> Result<void> {
    for (uint64_t i = 0; i < part.count; ++i) {
      const uint64_t cluster = part.first + i;
      const uint64_t value = value_at(bytes, index + i);
      if (value == 0) return wrong_count(cluster);
      set_value(bytes, index + i, value - 1);
      if (value > 1) continue;
      if (!unused.empty() && unused.back().first + unused.back().count == cluster)
        ++unused.back().count;
      else
        unused.push_back({cluster, 1});
    }
    return {};
  }));
  cursor_ = std::min(cursor_, run.first);
  return unused;
}

// From the cursor on, which it moves behind what is in use; count 0 when the file has no free cluster.
Result<ClusterRun> Refcounts::find_free(uint64_t wanted, const ClusterSet& tables) {
  std::vector<std::byte> bytes;
  ClusterRun found;
  while (cursor_ + found.count < end_ && found.count < wanted) {
    const uint64_t cluster = cursor_ + found.count;
    if (!has_block(cluster)) {
      if (found.count) break;
      // A sparse file may go on far beyond what the table can count.
      if (block_of(cluster) >= table_.size()) {
        cursor_ = end_;
        break;
      }
      cursor_ = std::min((block_of(cluster) + 1) * per_block(), end_);
      continue;
    }
    // A piece of the block, on a byte's border.
    const uint64_t per_piece = std::max<uint64_t>(kScanBytes * 8 >> header_.refcount_order, 8);
    const uint64_t piece_first = cluster - cluster % per_block() + cluster % per_block() / per_piece * per_piece;
    const uint64_t piece_end = std::min(piece_first + per_piece, cluster - cluster % per_block() + per_block());
    bytes.resize((((piece_end - piece_first) << header_.refcount_order) + 7) / 8);
    CLONE_TRY(
        read_at(fd_, table_[block_of(cluster)] + (piece_first % per_block() << header_.refcount_order) / 8, bytes));
    for (uint64_t at = cluster; at < std::min(piece_end, end_) && found.count < wanted; ++at) {
      const bool free = value_at(bytes, at - piece_first) == 0 && !tables.overlaps(at, 1);
      if (free) {
        ++found.count;
      } else if (found.count) {
        found.first = cursor_;
        return found;
      } else {
        cursor_ = at + 1;
      }
    }
  }
  found.first = cursor_;
  return found;
}

Result<ClusterRun> Refcounts::allocate(uint64_t wanted, ClusterSet& tables) {
  const ClusterRun run = CLONE_TRY(find_free(wanted, tables));
  if (run.count == 0) return allocate_at_end(wanted, tables);
  CLONE_TRY(increase(run));
  cursor_ = run.first + run.count;
  CLONE_TRY(clear(run));
  return run;
}

// On a device the last clusters may be fewer.
Result<ClusterRun> Refcounts::allocate_at_end(uint64_t wanted, ClusterSet& tables) {
  if (limit_ <= end_) return system_error(ENOSPC);
  CLONE_TRY(ensure_blocks(std::min(wanted, limit_ - end_), tables));
  if (limit_ <= end_) return system_error(ENOSPC);
  const ClusterRun run = {end_, std::min(wanted, limit_ - end_)};
  CLONE_TRY(extend(end_ + run.count));
  CLONE_TRY(clear(run));
  CLONE_TRY(increase(run));
  if (cursor_ == run.first) cursor_ += run.count;
  return run;
}

Result<void> Refcounts::extend(uint64_t end_cluster) {
  if (end_cluster > limit_) return system_error(growable_ ? EFBIG : ENOSPC);
  if (growable_ && ::ftruncate(fd_, static_cast<off_t>(end_cluster << header_.cluster_bits)) != 0)
    return system_error(errno);
  end_ = end_cluster;
  return {};
}

// Blocks for the counts of `count` clusters at the file's end; each takes a cluster there itself.
Result<void> Refcounts::ensure_blocks(uint64_t count, ClusterSet& tables) {
  const auto first_missing = [&] {
    uint64_t at = end_;
    while (at < end_ + count && has_block(at)) at = (block_of(at) + 1) * per_block();
    return std::min(at, end_ + count);
  };
  for (uint64_t at; (at = first_missing()) < end_ + count;) {
    if (block_of(at) >= table_.size())
      CLONE_TRY(grow_table(block_of(at + count), tables));
    else
      CLONE_TRY(add_block(block_of(at), tables));
  }
  return {};
}

// The new block lies at the end of the file, and may have to count itself.
Result<void> Refcounts::add_block(uint64_t block, ClusterSet& tables) {
  const uint64_t cluster = end_;
  CLONE_TRY(extend(end_ + 1));
  CLONE_TRY(clear({cluster, 1}));
  const uint64_t before = std::exchange(table_[block], cluster << header_.cluster_bits);
  Result<void> written = increase({cluster, 1});
  // Counted before it is used, wherever the machine stops.
  if (written.ok()) written = sync();
  const uint64_t entry = htobe64(table_[block]);
  if (written.ok())
    written = write_at(fd_, header_.refcount_table_offset + block * 8, std::as_bytes(std::span(&entry, 1)));
  if (!written.ok()) {
    table_[block] = before;
    return written;
  }
  tables.add(cluster, 1);
  return {};
}

// A table of twice the size, or for `last_block`, at the end of the file: it is complete before the header names it.
Result<void> Refcounts::grow_table(uint64_t last_block, ClusterSet& tables) {
  const uint64_t per_cluster = header_.cluster_bytes() / 8;
  const uint64_t first = end_;
  const uint64_t old_clusters = header_.refcount_table_clusters;
  const uint64_t table_clusters = std::max(old_clusters * 2, (last_block + 2 + per_cluster) / per_cluster);
  if (table_clusters * header_.cluster_bytes() > kMostRefcountTableBytes) return system_error(EFBIG);
  std::vector<uint64_t> old = table_;
  table_.resize(table_clusters * per_cluster);

  // Blocks for the counts of the table and of themselves.
  uint64_t total = table_clusters;
  std::vector<uint64_t> added;
  for (uint64_t at = first; at < first + total; at = (block_of(at) + 1) * per_block()) {
    if (block_of(at) >= table_.size() || has_block(at)) continue;
    table_[block_of(at)] = (first + total++) << header_.cluster_bits;
    added.push_back(block_of(at));
  }
  const auto build = [&]() -> Result<void> {
    CLONE_TRY(extend(first + total));
    CLONE_TRY(clear({first, total}));
    CLONE_TRY(increase({first, total}));
    std::vector<uint64_t> raw(table_.size());
    std::transform(table_.begin(), table_.end(), raw.begin(), [](uint64_t entry) { return htobe64(entry); });
    CLONE_TRY(write_at(fd_, first << header_.cluster_bits, std::as_bytes(std::span(raw))));
    CLONE_TRY(sync());
    std::array<std::byte, 12> place;
    const uint64_t offset = htobe64(first << header_.cluster_bits);
    const uint32_t clusters = htobe32(static_cast<uint32_t>(table_clusters));
    std::memcpy(place.data(), &offset, 8);
    std::memcpy(place.data() + 8, &clusters, 4);
    return write_at(fd_, field::refcount_table_offset, place);
  };
  if (Result<void> built = build(); !built.ok()) {
    table_ = std::move(old);
    return built;
  }
  tables.add(first, total);
  const ClusterRun old_table{header_.refcount_table_offset >> header_.cluster_bits, old_clusters};
  tables.remove(old_table.first, old_table.count);
  header_.refcount_table_offset = first << header_.cluster_bits;
  header_.refcount_table_clusters = static_cast<uint32_t>(table_clusters);
  CLONE_TRY(sync());
  CLONE_TRY(decrease(old_table));
  return {};
}

// Zeroes for what may hold something else.
Result<void> Refcounts::clear(ClusterRun run) {
  const uint64_t used_end =
      std::exchange(used_end_, growable_ ? std::max(used_end_, run.first + run.count) : used_end_);
  if (run.first >= used_end) return {};
  const auto start = static_cast<off_t>(run.first << header_.cluster_bits);
  const auto size = static_cast<off_t>(run.count << header_.cluster_bits);
  if (::fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, size) == 0) return {};
  const std::vector<std::byte> zeroes(header_.cluster_bytes());
  for (uint64_t i = 0; i < run.count; ++i) CLONE_TRY(write_at(fd_, (run.first + i) << header_.cluster_bits, zeroes));
  return {};
}

Result<void> Refcounts::sync() const {
  if (syncs_ == Syncs::none || ::fdatasync(fd_) == 0) return {};
  return system_error(errno);
}

Result<void> Refcounts::rebuild(std::vector<uint16_t> counts, ClusterSet& tables) {
  end_ = std::max<uint64_t>(end_, counts.size());
  for (uint64_t first = 0; first < counts.size(); first += per_block()) {
    if (has_block(first)) continue;
    const auto end = counts.begin() + static_cast<ptrdiff_t>(std::min<uint64_t>(first + per_block(), counts.size()));
    if (std::all_of(counts.begin() + static_cast<ptrdiff_t>(first), end, [](uint16_t n) { return n == 0; })) continue;
    if (block_of(first) >= table_.size()) return Error{"its refcount table is too small for it"};
    // Its own count is written with all the others.
    counts.resize(end_ + 1);
    counts[end_] = 1;
    const uint64_t cluster = end_;
    CLONE_TRY(extend(end_ + 1));
    CLONE_TRY(clear({cluster, 1}));
    table_[block_of(first)] = cluster << header_.cluster_bits;
    const uint64_t entry = htobe64(table_[block_of(first)]);
    CLONE_TRY(write_at(fd_, header_.refcount_table_offset + block_of(first) * 8, std::as_bytes(std::span(&entry, 1))));
    tables.add(cluster, 1);
  }
  std::vector<std::byte> block(header_.cluster_bytes());
  for (uint64_t first = 0; first < counts.size(); first += per_block()) {
    if (!has_block(first)) continue;
    std::fill(block.begin(), block.end(), std::byte{0});
    for (uint64_t i = 0; i < per_block() && first + i < counts.size(); ++i) set_value(block, i, counts[first + i]);
    CLONE_TRY(write_at(fd_, table_[block_of(first)], block));
  }
  cursor_ = 0;
  return sync();
}

}  // namespace virtio_blk::qcow2
