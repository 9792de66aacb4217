// SPDX-License-Identifier: Apache-2.0
// Which clusters of a qcow2 file are in use: reference counts, their table, and the search for free clusters.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "file_access.hpp"
#include "format.hpp"

namespace virtio_blk::qcow2 {

// Clusters that hold tables. Nothing else may lie in one, and the guest's data is never written there. A sorted vector:
// a hostile file may claim millions of tables, and tables are added rarely afterwards, mostly at the file's end.
class ClusterSet {
 public:
  // False when one of them is there already, or twice among them; then nothing is certain of the set.
  bool add(std::vector<uint64_t> added) {
    std::sort(added.begin(), added.end());
    const auto old_size = static_cast<ptrdiff_t>(clusters_.size());
    clusters_.reserve(clusters_.size() + added.size());
    clusters_.insert(clusters_.end(), added.begin(), added.end());
    if (old_size && !added.empty() && clusters_[static_cast<size_t>(old_size) - 1] >= added.front())
      std::inplace_merge(clusters_.begin(), clusters_.begin() + old_size, clusters_.end());
    return std::adjacent_find(clusters_.begin(), clusters_.end()) == clusters_.end();
  }
  bool add(uint64_t first, uint64_t count) {
    if (count && overlaps(first, count)) return false;
    auto at = clusters_.insert(std::lower_bound(clusters_.begin(), clusters_.end(), first), count, 0);
    for (uint64_t i = 0; i < count; ++i) *at++ = first + i;
    return true;
  }
  void remove(uint64_t first, uint64_t count) {
    const auto start = std::lower_bound(clusters_.begin(), clusters_.end(), first);
    clusters_.erase(start, std::lower_bound(start, clusters_.end(), first + count));
  }
  bool overlaps(uint64_t first, uint64_t count) const {
    const auto found = std::lower_bound(clusters_.begin(), clusters_.end(), first);
    return found != clusters_.end() && *found - first < count;
  }
  // Behind the last of them.
  uint64_t end() const { return clusters_.empty() ? 0 : clusters_.back() + 1; }

 private:
  std::vector<uint64_t> clusters_;
};

struct ClusterRun {
  uint64_t first = 0;
  uint64_t count = 0;
};

// That 2^order bits hold.
inline uint64_t largest_count(uint32_t order) { return order == 6 ? ~uint64_t{0} : (uint64_t{1} << (1u << order)) - 1; }

enum class Syncs { wanted, none };  // none: a crash of the host may damage the file

// One thread at a time. What changes is written at once, so that a process that dies leaves clusters that nobody uses,
// never used ones that count as free.
class Refcounts {
 public:
  // Reads the table and claims its clusters in `tables`. Messages do not name the file.
  static Result<Refcounts> load(int fd, const Header& header, uint64_t file_bytes, ClusterSet& tables);

  // For a file that is written to, once `tables` has all of them. `file_bytes` is a multiple of the cluster, `growable`
  // tells a file from a device.
  Result<void> prepare_writing(uint64_t file_bytes, bool growable, Syncs syncs, const ClusterSet& tables);

  Result<uint64_t> get(uint64_t cluster) const;
  // Adds 1, or takes 1 away, from each of the run.
  Result<void> increase(ClusterRun run);
  // Returns those of the run that nothing refers to any more.
  Result<std::vector<ClusterRun>> decrease(ClusterRun run);

  // At most `wanted` clusters in a row that were free and count 1 now; they read as zeroes.
  Result<ClusterRun> allocate(uint64_t wanted, ClusterSet& tables);
  // The same, all that is wanted, at the end of the file.
  Result<ClusterRun> allocate_at_end(uint64_t wanted, ClusterSet& tables);

  // Makes the counts what `counts` says, one for each cluster from the first on.
  Result<void> rebuild(std::vector<uint16_t> counts, ClusterSet& tables);

  uint64_t end_cluster() const { return end_; }

 private:
  uint64_t per_block() const { return header_.cluster_bytes() * 8 >> header_.refcount_order; }
  uint64_t block_of(uint64_t cluster) const { return cluster / per_block(); }
  bool has_block(uint64_t cluster) const { return block_of(cluster) < table_.size() && table_[block_of(cluster)] != 0; }
  uint64_t value_at(std::span<const std::byte> block, uint64_t index) const;
  void set_value(std::span<std::byte> block, uint64_t index, uint64_t value) const;

  // Calls change(bytes, first index in them, run) for the part of each block that holds the run's counts, and writes
  // the bytes back.
  template <typename Change>
  Result<void> for_blocks(ClusterRun run, Change&& change);
  Result<ClusterRun> find_free(uint64_t wanted, const ClusterSet& tables);
  Result<void> extend(uint64_t end_cluster);
  Result<void> ensure_blocks(uint64_t count, ClusterSet& tables);
  Result<void> add_block(uint64_t block, ClusterSet& tables);
  Result<void> grow_table(uint64_t last_block, ClusterSet& tables);
  Result<void> clear(ClusterRun run);
  Result<uint64_t> find_end() const;
  Result<void> sync() const;

  int fd_ = -1;
  Header header_;
  std::vector<uint64_t> table_;  // offsets of the blocks, 0 for none
  uint64_t end_ = 0;             // clusters in the file; on a device, up to the last that is used
  uint64_t limit_ = 0;           // that it can have
  uint64_t cursor_ = 0;          // nothing below is free
  uint64_t used_end_ = 0;        // from here on the file was never written to
  bool growable_ = true;
  Syncs syncs_ = Syncs::wanted;
};

}  // namespace virtio_blk::qcow2
