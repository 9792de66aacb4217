// SPDX-License-Identifier: Apache-2.0
// One qcow2 file: where the guest's clusters are in it, and how that changes. It moves metadata only, by system calls
// of its own; the guest's data is its caller's. One thread at a time (but see Commit).
//
// What reaches the file in which order, so that a process or host that dies leaves at most clusters that nobody uses:
// reference counts go up at once, before anything refers to a cluster; then, with a commit, come L2 tables, then L1,
// then counts go down. Between these steps lies a sync, and data that replaces older data is synced before the L2
// tables.
#pragma once

#include <atomic>
#include <list>
#include <memory>
#include <set>
#include <unordered_map>
#include <vector>

#include "format.hpp"
#include "refcounts.hpp"

namespace virtio_blk::qcow2 {

enum class Content : uint8_t { unallocated, zero, data, compressed };

// What stands at a guest offset, for `length_bytes` from there.
struct Place {
  Content content = Content::unallocated;
  uint64_t length_bytes = 0;
  uint64_t host_offset = 0;        // data: of the first byte; compressed: of the cluster's compressed form
  uint64_t compressed_bytes = 0;   // at most; the file may end before
  uint64_t offset_in_cluster = 0;  // compressed: of the guest offset
};

// Where a write goes. One that is not in place replaces whole units, of which the guest gives a part: the rest is
// copied from what was there. It counts once map() was called.
struct WritePlan {
  bool in_place = true;
  uint64_t length_bytes = 0;    // of the write that this serves
  uint64_t host_offset = 0;     // in place: of the first byte; else of `start`
  uint64_t start = 0, end = 0;  // the units, as guest offsets
  bool fresh = false;           // they read as zeroes in the file
  bool whole_clusters = false;  // or units of clusters that keep the others
  ClusterRun clusters;          // newly allocated; none when units of a cluster are filled
};

// What is to be done for zeroes at a guest offset, for `length_bytes` from there.
struct ZeroPlan {
  enum class Kind { done, host_range, write, skip };
  Kind kind = Kind::done;
  uint64_t length_bytes = 0;
  uint64_t host_offset = 0;
};
enum class Zeroing {
  discard,     // advice: what is easy
  deallocate,  // has to read as zeroes
  keep,        // the same, and space that is allocated stays so
};

// A piece of an L2 table in memory.
struct L2Slice {
  uint64_t offset = 0;            // in the file
  std::vector<uint64_t> entries;  // as in the file, in its byte order
  uint32_t dirty_pages = 0;
  uint32_t commits = 0;  // under way
};

// Changed metadata on its way to the file: the steps between syncs. The calls that write need no lock.
struct Commit {
  // There is one at a time, and one that began is ended or failed.
  bool empty() const { return l2.empty() && l1.empty() && freed.empty(); }
  bool barrier_first = false;
  struct Page {
    uint64_t offset;
    std::vector<std::byte> bytes;
  };
  std::vector<Page> l2, l1;
  std::vector<ClusterRun> freed;
  std::vector<L2Slice*> slices;  // kept in memory meanwhile
  std::vector<uint32_t> l1_pages;
};

class Qcow2File {
 public:
  // The descriptor stays the caller's. Messages do not name the file. Nothing is written.
  static Result<std::unique_ptr<Qcow2File>> open(int fd);
  // From here on all of it may be called. True when the image had not been closed and was repaired.
  Result<bool> begin_writing(bool growable, Syncs syncs);
  Qcow2File(const Qcow2File&) = delete;
  // Gives back what was allocated in advance; what was not committed is lost.
  ~Qcow2File();

  const Header& header() const { return header_; }
  // Bytes that the file has; data beyond reads as zeroes, within the last cluster.
  uint64_t file_bytes() const;

  Result<Place> find(uint64_t offset, uint64_t length_bytes);
  Result<WritePlan> plan_write(uint64_t offset, uint64_t length_bytes);
  // A plan that was carried out, or that need not be: its units read as zeroes before and after.
  Result<void> map(const WritePlan& plan);
  // A plan that failed.
  void abandon(const WritePlan& plan);
  // Data that replaces older data was written: it has to be durable before the tables are.
  void require_barrier() { barrier_ = true; }
  Result<ZeroPlan> plan_zeroes(uint64_t offset, uint64_t length_bytes, Zeroing how, bool has_backing);

  // A transfer from or to a place that was found: the cluster is not given to others before it ended. end_access() [any
  // thread].
  uint32_t begin_access() {
    accesses_[epoch_].fetch_add(1, std::memory_order_relaxed);
    return epoch_;
  }
  void end_access(uint32_t epoch) { accesses_[epoch].fetch_sub(1, std::memory_order_release); }

  Commit begin_commit();
  Result<void> write_l2(const Commit& commit) const;  // [any thread]
  Result<void> write_l1(const Commit& commit) const;  // [any thread]
  Result<void> end_commit(Commit commit);
  void fail_commit(Commit commit);
  // All of it, at once.
  Result<void> commit_now();

  Result<void> grow(uint64_t size_bytes);

 private:
  using Slices = std::list<L2Slice>;
  struct Position {
    L2Slice* slice = nullptr;  // none: no L2 table
    size_t index = 0;          // of the cluster's entry
    size_t count = 0;          // clusters from there on in the slice
  };
  enum class Create { no, yes };

  Qcow2File() = default;
  enum class Mode { read, write };

  Result<void> load(int fd);
  Result<void> load_l1();
  Result<void> repair(bool growable);
  Result<void> write_field(uint64_t offset, uint64_t value) const;

  size_t words() const { return header_.extended_l2() ? 2 : 1; }
  uint64_t cluster_of(uint64_t offset) const { return offset >> header_.cluster_bits; }
  uint64_t entry(const Position& position, size_t n) const;
  uint64_t bitmap(const Position& position, size_t n) const;
  void set_entry(const Position& position, size_t n, uint64_t entry, uint64_t bitmap);
  Result<Position> position(uint64_t offset, Create create);
  Result<L2Slice*> load_slice(uint64_t offset);
  Result<uint64_t> l2_table(uint64_t index, Create create);
  Result<void> copy_table(uint64_t from, uint64_t to);
  // Of one unit, with host_offset that of the unit.
  Result<Place> place_of(uint64_t entry, uint64_t bitmap, uint64_t unit) const;
  bool usable(uint64_t entry) const {
    return (entry & kCopied) && !(entry & kCompressed) && (entry & kOffsetMask) != 0 &&
           (header_.extended_l2() || !(entry & kZero));
  }
  ClusterRun target_of(uint64_t entry) const;
  Result<void> check_droppable(uint64_t entry);
  void drop(uint64_t entry);
  // An inconsistency was found: nothing is written any more, here or by others.
  void mark_corrupt();
  Result<ClusterRun> allocate(uint64_t wanted);
  Result<void> check_target(uint64_t host_offset, uint64_t length_bytes);
  Result<void> release(const std::vector<ClusterRun>& runs);
  Result<void> release(ClusterRun run);

  int fd_ = -1;
  Mode mode_ = Mode::read;  // until writing begins
  Syncs syncs_ = Syncs::wanted;
  Header header_;
  uint64_t file_bytes_ = 0;  // when it was opened
  ClusterSet tables_;
  Refcounts refcounts_;
  std::vector<uint64_t> l1_;
  std::set<uint32_t> dirty_l1_pages_;

  size_t slice_entries_ = 0;  // clusters that a slice maps
  Slices slices_;             // the last used first
  std::unordered_map<uint64_t, Slices::iterator> slice_at_;
  std::unordered_map<uint64_t, L2Slice*> dirty_;

  ClusterRun reserved_;
  uint64_t reserve_ = 4;
  bool barrier_ = false;
  uint32_t commits_ = 0;  // under way: 0 or 1
  std::atomic<bool> corrupt_ = false;

  std::vector<ClusterRun> freed_;     // since the last commit
  std::vector<ClusterRun> limbo_[2];  // committed; accesses of that epoch may be under way
  std::atomic<uint64_t> accesses_[2] = {0, 0};
  uint32_t epoch_ = 0;
};

}  // namespace virtio_blk::qcow2
