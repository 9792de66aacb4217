// SPDX-License-Identifier: Apache-2.0
// Tables of a qcow2 file. Entries are hostile: each is checked when it is used.
#include "qcow2_file.hpp"

#include <endian.h>
#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cstring>

namespace virtio_blk::qcow2 {

namespace {

constexpr uint64_t kPageBytes = 4096;           // of tables, in which changes are written
constexpr uint64_t kMostSliceBytes = 64 << 10;  // 16 pages
constexpr uint64_t kMostCachedBytes = 32 << 20;
constexpr size_t kMostSlices = 8192;
constexpr uint64_t kMostReserved = 64;  // clusters
constexpr uint64_t kMostReservedBytes = 8 << 20;
constexpr uint64_t kAllZero = uint64_t{0xffff'ffff} << 32;  // bitmap: every subcluster reads as zeroes
constexpr uint64_t kAllData = 0xffff'ffff;
constexpr uint64_t kL1ReservedMask = 0x7f00'0000'0000'01ff;
constexpr uint64_t kMostRepairedClusters = uint64_t{1} << 26;  // two bytes of memory for each

Error damaged(const std::string& how) { return Error{"the image is damaged: " + how, EIO}; }

uint64_t align_down(uint64_t value, uint64_t to) { return value - value % to; }
uint64_t align_up(uint64_t value, uint64_t to) { return value + (to - value % to) % to; }

struct CompressedPlace {
  uint64_t offset, size_bytes;
};
CompressedPlace compressed_place(uint64_t entry, uint32_t cluster_bits) {
  const uint32_t offset_bits = 62 - (cluster_bits - 8);
  const uint64_t offset = entry & ((uint64_t{1} << offset_bits) - 1);
  const uint64_t sectors = entry >> offset_bits & ((uint64_t{1} << (cluster_bits - 8)) - 1);
  return {offset, (sectors + 1) * 512 - offset % 512};
}

// Bits of the units from the first up to the end, in the lower half of a bitmap.
uint64_t unit_bits(uint64_t first_unit, uint64_t end_unit) {
  const uint64_t below_end = end_unit == kSubclusters ? kAllData : (uint64_t{1} << end_unit) - 1;
  return below_end & ~((uint64_t{1} << first_unit) - 1);
}

}  // namespace

Result<std::unique_ptr<Qcow2File>> Qcow2File::open(int fd) {
  std::unique_ptr<Qcow2File> file(new Qcow2File);
  CLONE_TRY(file->load(fd));
  return file;
}

Qcow2File::~Qcow2File() {
  if (mode_ != Mode::write || corrupt_) return;
  if (reserved_.count) static_cast<void>(refcounts_.decrease(reserved_));
  // Nothing is under way any more.
  for (const auto& runs : limbo_) static_cast<void>(release(runs));
}

Result<void> Qcow2File::load(int fd) {
  fd_ = fd;
  const off_t end = ::lseek(fd, 0, SEEK_END);
  if (end < 0) return system_error(errno);
  file_bytes_ = static_cast<uint64_t>(end);
  header_ = CLONE_TRY(read_header(
      [fd](uint64_t offset, std::span<std::byte> into) { return read_at(fd, offset, into).ok(); }, file_bytes_));
  tables_.add(0, 1);
  refcounts_ = CLONE_TRY(Refcounts::load(fd, header_, file_bytes_, tables_));
  CLONE_TRY(load_l1());
  const uint64_t slice_bytes = std::min(header_.cluster_bytes(), kMostSliceBytes);
  slice_entries_ = slice_bytes / header_.l2_entry_bytes();
  return {};
}

Result<bool> Qcow2File::begin_writing(bool growable, Syncs syncs) {
  if (header_.incompatible & kCorrupt)
    return Error{"is marked as damaged; `qemu-img check -r all` mends it, readonly=on opens it as it is", EIO};
  if (header_.snapshot_count)
    return Error{"holds " + std::to_string(header_.snapshot_count) +
                 " internal snapshots, which are not supported for writing; allowed is readonly=on"};
  syncs_ = syncs;
  if (growable && file_bytes_ % header_.cluster_bytes()) {
    file_bytes_ = align_up(file_bytes_, header_.cluster_bytes());
    if (::ftruncate(fd_, static_cast<off_t>(file_bytes_)) != 0) return system_error(errno);
  }
  CLONE_TRY(refcounts_.prepare_writing(file_bytes_, growable, syncs, tables_));
  // What others keep beside the data is not kept up to date here. They must know before anything changes.
  if (header_.autoclear) {
    CLONE_TRY(write_field(field::autoclear, 0));
    if (syncs_ == Syncs::wanted && ::fdatasync(fd_) != 0) return system_error(errno);
  }
  const bool repaired = (header_.incompatible & kDirty) != 0;
  if (repaired) CLONE_TRY(repair(growable).context("its reference counts cannot be rebuilt"));
  mode_ = Mode::write;
  return repaired;
}

Result<void> Qcow2File::load_l1() {
  const uint64_t bytes = uint64_t{header_.l1_entries} * 8;
  const uint64_t clusters = align_up(bytes, header_.cluster_bytes()) >> header_.cluster_bits;
  if (!tables_.add(header_.l1_offset >> header_.cluster_bits, clusters))
    return Error{"has an L1 table that overlaps another table"};
  l1_.resize(header_.l1_entries);
  CLONE_TRY(read_at(fd_, header_.l1_offset, std::as_writable_bytes(std::span(l1_))).context("its L1 table"));
  std::vector<uint64_t> found;
  for (uint64_t& entry : l1_) {
    entry = be64toh(entry);
    const uint64_t offset = entry & kOffsetMask;
    if ((entry & kL1ReservedMask) || offset % header_.cluster_bytes())
      return Error{"has an L1 table with an entry that makes no sense"};
    if (!offset) continue;
    if (offset >= file_bytes_ || header_.cluster_bytes() > file_bytes_ - offset)
      return Error{"has an L2 table beyond the end of the file"};
    found.push_back(cluster_of(offset));
  }
  if (!tables_.add(std::move(found))) return Error{"has an L2 table that overlaps another table"};
  return {};
}

Result<void> Qcow2File::write_field(uint64_t offset, uint64_t value) const {
  value = htobe64(value);
  return write_at(fd_, offset, std::as_bytes(std::span(&value, 1)));
}

uint64_t Qcow2File::file_bytes() const {
  return mode_ == Mode::write ? refcounts_.end_cluster() << header_.cluster_bits : file_bytes_;
}

// Counts what the tables refer to, as the counts may lag behind them (lazy_refcounts).
Result<void> Qcow2File::repair(bool growable) {
  const uint64_t clusters = file_bytes_ >> header_.cluster_bits;
  if (clusters > kMostRepairedClusters) return Error{"it is too large for that; `qemu-img check -r all` does it"};
  std::vector<uint16_t> counts(clusters);
  for (uint64_t cluster = 0; cluster < clusters; ++cluster) counts[cluster] = tables_.overlaps(cluster, 1);
  const uint64_t most = std::min<uint64_t>(UINT16_MAX, largest_count(header_.refcount_order));
  const auto count = [&](uint64_t offset, uint64_t size_bytes, bool shared) -> Result<void> {
    for (uint64_t at = cluster_of(offset); at <= cluster_of(offset + size_bytes - 1); ++at) {
      if (at >= clusters) return damaged("a cluster lies beyond the end of the file");
      if ((counts[at] && !shared) || counts[at] == most) return damaged("a cluster is used twice");
      ++counts[at];
    }
    return {};
  };
  std::vector<uint64_t> table(header_.cluster_bytes() / 8);
  for (const uint64_t l1 : l1_) {
    if (!(l1 & kOffsetMask)) continue;
    CLONE_TRY(read_at(fd_, l1 & kOffsetMask, std::as_writable_bytes(std::span(table))));
    for (size_t i = 0; i < table.size(); i += words()) {
      const uint64_t entry = be64toh(table[i]);
      if (entry & kCompressed) {
        const CompressedPlace place = compressed_place(entry, header_.cluster_bits);
        // Several may share a cluster. The sectors of the last may go beyond the file.
        if (place.offset >= file_bytes_) return damaged("a cluster lies beyond the end of the file");
        CLONE_TRY(count(place.offset, std::min(place.size_bytes, file_bytes_ - place.offset), true));
      } else if (entry & kOffsetMask) {
        CLONE_TRY(count(align_down(entry & kOffsetMask, header_.cluster_bytes()), 1, false));
      }
    }
  }
  // A device is longer than what is used of it.
  while (!growable && !counts.empty() && !counts.back()) counts.pop_back();
  CLONE_TRY(refcounts_.rebuild(std::move(counts), tables_));
  header_.incompatible &= ~kDirty;
  return write_field(field::incompatible, header_.incompatible);
}

uint64_t Qcow2File::entry(const Position& position, size_t n) const {
  return position.slice ? be64toh(position.slice->entries[(position.index + n) * words()]) : 0;
}

uint64_t Qcow2File::bitmap(const Position& position, size_t n) const {
  return position.slice && header_.extended_l2() ? be64toh(position.slice->entries[(position.index + n) * 2 + 1]) : 0;
}

void Qcow2File::set_entry(const Position& position, size_t n, uint64_t entry, uint64_t bitmap) {
  L2Slice& slice = *position.slice;
  const size_t word = (position.index + n) * words();
  slice.entries[word] = htobe64(entry);
  if (header_.extended_l2()) slice.entries[word + 1] = htobe64(bitmap);
  if (!slice.dirty_pages) dirty_[slice.offset] = &slice;
  slice.dirty_pages |= 1u << word * 8 / kPageBytes;
}

Result<uint64_t> Qcow2File::l2_table(uint64_t index, Create create) {
  if (index >= l1_.size()) return damaged("an offset lies beyond the L1 table");
  const uint64_t old = l1_[index] & kOffsetMask;
  if (create == Create::no || (old && (l1_[index] & kCopied))) return old;
  const ClusterRun run = CLONE_TRY(allocate(1));
  const uint64_t offset = run.first << header_.cluster_bits;
  if (old) {
    if (Result<void> copied = copy_table(old, offset); !copied.ok()) {
      freed_.push_back(run);
      return std::move(copied).error();
    }
    freed_.push_back({cluster_of(old), 1});
    tables_.remove(cluster_of(old), 1);
    barrier_ = true;
  }
  tables_.add(run.first, 1);
  l1_[index] = offset | kCopied;
  dirty_l1_pages_.insert(static_cast<uint32_t>(index * 8 / kPageBytes));
  return offset;
}

// Slices of the old table are not dirty, since nothing is changed in it; they go, as the cluster may become another
// table.
Result<void> Qcow2File::copy_table(uint64_t from, uint64_t to) {
  std::vector<std::byte> table(header_.cluster_bytes());
  CLONE_TRY(read_at(fd_, from, table));
  CLONE_TRY(write_at(fd_, to, table));
  for (uint64_t at = from; at < from + table.size(); at += slice_entries_ * header_.l2_entry_bytes()) {
    const auto found = slice_at_.find(at);
    if (found == slice_at_.end()) continue;
    slices_.erase(found->second);
    slice_at_.erase(found);
  }
  return {};
}

Result<Qcow2File::Position> Qcow2File::position(uint64_t offset, Create create) {
  const uint64_t table = CLONE_TRY(l2_table(offset / header_.l2_span_bytes(), create));
  const uint64_t index = cluster_of(offset) % header_.l2_entries();
  Position position;
  position.index = index % slice_entries_;
  position.count = slice_entries_ - position.index;
  if (table) position.slice = CLONE_TRY(load_slice(table + (index - position.index) * header_.l2_entry_bytes()));
  return position;
}

Result<L2Slice*> Qcow2File::load_slice(uint64_t offset) {
  if (!slices_.empty() && slices_.front().offset == offset) return &slices_.front();
  if (const auto found = slice_at_.find(offset); found != slice_at_.end()) {
    slices_.splice(slices_.begin(), slices_, found->second);
    return &slices_.front();
  }
  const size_t slice_bytes = slice_entries_ * header_.l2_entry_bytes();
  const size_t limit = std::clamp<size_t>(kMostCachedBytes / slice_bytes, 4, kMostSlices);
  // While a commit is under way, another would overtake it: the limit is passed then.
  if (slices_.size() >= limit && dirty_.size() > limit / 2 && !commits_) CLONE_TRY(commit_now());
  L2Slice fresh;
  while (slices_.size() >= limit) {
    // The least used that is not needed; its memory is used again.
    const auto unused = std::find_if(slices_.rbegin(), slices_.rend(),
                                     [](const L2Slice& slice) { return !slice.dirty_pages && !slice.commits; });
    if (unused == slices_.rend()) break;
    slice_at_.erase(unused->offset);
    fresh.entries = std::move(unused->entries);
    slices_.erase(std::next(unused).base());
  }
  fresh.offset = offset;
  fresh.entries.resize(slice_bytes / 8);
  CLONE_TRY(read_at(fd_, offset, std::as_writable_bytes(std::span(fresh.entries))));
  slices_.push_front(std::move(fresh));
  slice_at_[offset] = slices_.begin();
  return &slices_.front();
}

Result<Place> Qcow2File::place_of(uint64_t entry, uint64_t bitmap, uint64_t unit) const {
  Place place;
  if (entry & kCompressed) {
    if (bitmap) return damaged("a compressed cluster has subclusters");
    const CompressedPlace compressed = compressed_place(entry, header_.cluster_bits);
    if (compressed.offset >= file_bytes() || (compressed.offset & ~kOffsetMask) >> 56)
      return damaged("a compressed cluster lies beyond the end of the file");
    place.content = Content::compressed;
    place.host_offset = compressed.offset;
    place.compressed_bytes = compressed.size_bytes;
    return place;
  }
  const uint64_t offset = entry & kOffsetMask;
  const bool zero_flag_known = header_.version >= 3 && !header_.extended_l2();
  if ((entry & kReservedMask) || (!zero_flag_known && (entry & kZero)) || offset % header_.cluster_bytes())
    return damaged("an L2 entry makes no sense");
  if (offset && offset >= file_bytes()) return damaged("a cluster lies beyond the end of the file");
  place.host_offset = offset;
  if (header_.extended_l2()) {
    const bool data = bitmap >> unit & 1;
    const bool zero = bitmap >> (unit + kSubclusters) & 1;
    if ((data && zero) || (data && !offset)) return damaged("the subclusters of an L2 entry make no sense");
    place.content = data ? Content::data : zero ? Content::zero : Content::unallocated;
    place.host_offset += unit * header_.unit_bytes();
  } else {
    place.content = entry & kZero ? Content::zero : offset ? Content::data : Content::unallocated;
  }
  return place;
}

Result<Place> Qcow2File::find(uint64_t offset, uint64_t length_bytes) {
  const Position position = CLONE_TRY(this->position(offset, Create::no));
  const uint64_t cluster = header_.cluster_bytes();
  const uint64_t unit = header_.unit_bytes();
  const uint64_t most = std::min(length_bytes, position.count * cluster - offset % cluster);
  if (!position.slice) return Place{Content::unallocated, most, 0, 0, 0};
  Place found;
  uint64_t done = 0;
  while (done < most) {
    const uint64_t at = offset % cluster + done;  // from the position's cluster on
    const size_t n = at / cluster;
    Place next = CLONE_TRY(place_of(entry(position, n), bitmap(position, n), at % cluster / unit));
    if (next.content == Content::compressed) {
      if (done) break;
      next.offset_in_cluster = at % cluster;
      next.length_bytes = std::min(most, cluster - at % cluster);
      return next;
    }
    next.host_offset += at % unit;
    if (done == 0)
      found = next;
    else if (next.content != found.content ||
             (found.content == Content::data && next.host_offset != found.host_offset + done))
      break;
    done = std::min(most, done + unit - at % unit);
  }
  found.length_bytes = done;
  return found;
}

Result<ClusterRun> Qcow2File::allocate(uint64_t wanted) {
  if (corrupt_) return system_error(EIO);
  if (!reserved_.count) {
    const uint64_t most = std::max<uint64_t>(1, kMostReservedBytes >> header_.cluster_bits);
    reserve_ = std::min({reserve_ * 2, kMostReserved, most});
    reserved_ = CLONE_TRY(refcounts_.allocate(std::max(reserve_, std::min(wanted, most)), tables_));
    barrier_ = true;  // counts before what refers to the clusters
  }
  const ClusterRun run{reserved_.first, std::min(wanted, reserved_.count)};
  reserved_ = {run.first + run.count, reserved_.count - run.count};
  return run;
}

// The guest's data never lands in a table, whatever the tables say.
Result<void> Qcow2File::check_target(uint64_t host_offset, uint64_t length_bytes) {
  if (corrupt_) return system_error(EIO);
  const uint64_t first = cluster_of(host_offset);
  const uint64_t end = cluster_of(host_offset + length_bytes - 1) + 1;
  if (end > refcounts_.end_cluster()) return damaged("a cluster lies beyond the end of the file");
  if (!tables_.overlaps(first, end - first)) return {};
  mark_corrupt();
  return damaged("a cluster of the disk lies in one of the tables");
}

void Qcow2File::mark_corrupt() {
  if (corrupt_.exchange(true) || mode_ != Mode::write || header_.version < 3) return;
  header_.incompatible |= kCorrupt;
  static_cast<void>(write_field(field::incompatible, header_.incompatible));
}

Result<WritePlan> Qcow2File::plan_write(uint64_t offset, uint64_t length_bytes) {
  const Position position = CLONE_TRY(this->position(offset, Create::yes));
  const uint64_t cluster = header_.cluster_bytes();
  const uint64_t unit = header_.unit_bytes();
  const uint64_t in_cluster = offset % cluster;
  const uint64_t most = std::min(length_bytes, position.count * cluster - in_cluster);
  const uint64_t first = entry(position, 0);
  WritePlan plan;

  const Place place = CLONE_TRY(place_of(first, bitmap(position, 0), in_cluster / unit));
  if (usable(first) && place.content == Content::data) {
    const Place run = CLONE_TRY(find(offset, most));
    // As far as all of it may be written to.
    uint64_t length = run.length_bytes;
    for (uint64_t at = cluster - in_cluster; at < length; at += cluster)
      if (!usable(entry(position, (in_cluster + at) / cluster))) length = at;
    CLONE_TRY(check_target(run.host_offset, length));
    plan.length_bytes = length;
    plan.host_offset = run.host_offset;
    return plan;
  }

  plan.in_place = false;
  if (usable(first) && header_.extended_l2()) {
    // Up to the next unit that holds data: writes to that one are in place, and wait for nobody.
    uint64_t end_unit = in_cluster / unit + 1;
    while (end_unit < kSubclusters && !(bitmap(position, 0) >> end_unit & 1)) ++end_unit;
    plan.length_bytes = std::min(most, end_unit * unit - in_cluster);
    plan.start = align_down(offset, unit);
    plan.end = align_up(offset + plan.length_bytes, unit);
    plan.host_offset = (first & kOffsetMask) + plan.start % cluster;
    CLONE_TRY(check_target(plan.host_offset, plan.end - plan.start));
    return plan;
  }

  // New clusters, as many in a row as need one. Of one that holds something already, nothing may be lost.
  const uint64_t count = (in_cluster + most + cluster - 1) / cluster;
  uint64_t wanted = 0;
  plan.whole_clusters = !header_.extended_l2();
  for (; wanted < count; ++wanted) {
    const uint64_t old = entry(position, wanted);
    static_cast<void>(CLONE_TRY(place_of(old, bitmap(position, wanted), 0)));
    if (usable(old)) break;
    CLONE_TRY(check_droppable(old));
    const bool holds = (old & kCompressed) || (old & kOffsetMask);
    if (holds && header_.extended_l2()) {
      if (wanted) break;
      plan.whole_clusters = true;
      ++wanted;
      break;
    }
  }
  plan.clusters = CLONE_TRY(allocate(wanted));
  plan.fresh = true;
  const uint64_t base = align_down(offset, cluster);
  plan.length_bytes = std::min(offset + most, base + plan.clusters.count * cluster) - offset;
  const uint64_t granule = plan.whole_clusters ? cluster : unit;
  plan.start = align_down(offset, granule);
  plan.end = align_up(offset + plan.length_bytes, granule);
  plan.host_offset = (plan.clusters.first << header_.cluster_bits) + (plan.start - base);
  return plan;
}

Result<void> Qcow2File::map(const WritePlan& plan) {
  const uint64_t cluster = header_.cluster_bytes();
  const uint64_t unit = header_.unit_bytes();
  const Position position = CLONE_TRY(this->position(plan.start, Create::yes));
  const uint64_t base = align_down(plan.start, cluster);
  const uint64_t count = (plan.end - base + cluster - 1) / cluster;
  for (uint64_t n = 0; n < count; ++n) {
    const uint64_t start = std::max(plan.start, base + n * cluster);
    const uint64_t end = std::min(plan.end, base + (n + 1) * cluster);
    const uint64_t old = entry(position, n);
    uint64_t bits = 0;
    if (header_.extended_l2()) {
      const uint64_t written =
          plan.whole_clusters ? kAllData : unit_bits(start % cluster / unit, (end - 1) % cluster / unit + 1);
      const uint64_t before = plan.whole_clusters ? 0 : bitmap(position, n);
      bits = (before | written) & ~(written << 32);
    }
    uint64_t mapped = old;
    if (plan.clusters.count) {
      mapped = (plan.clusters.first + n) << header_.cluster_bits | kCopied;
      drop(old);
    }
    set_entry(position, n, mapped, bits);
  }
  return {};
}

void Qcow2File::abandon(const WritePlan& plan) {
  if (plan.clusters.count) freed_.push_back(plan.clusters);
}

// What an entry refers to.
ClusterRun Qcow2File::target_of(uint64_t entry) const {
  if (entry & kCompressed) {
    const CompressedPlace place = compressed_place(entry, header_.cluster_bits);
    const uint64_t first = cluster_of(place.offset);
    return {first, cluster_of(place.offset + place.size_bytes - 1) - first + 1};
  }
  return {cluster_of(entry & kOffsetMask), entry & kOffsetMask ? 1u : 0u};
}

// Before an entry is replaced: what it refers to is given back, and that must be no table.
Result<void> Qcow2File::check_droppable(uint64_t entry) {
  const ClusterRun run = target_of(entry);
  if (!run.count) return {};
  return check_target(run.first << header_.cluster_bits, run.count << header_.cluster_bits);
}

// What an entry refers to is referred to once less.
void Qcow2File::drop(uint64_t entry) {
  const ClusterRun run = target_of(entry);
  if (!run.count) return;
  // Compressed clusters may share one: each counts by itself.
  const bool goes_on = !freed_.empty() && freed_.back().first + freed_.back().count == run.first;
  if (goes_on && !(entry & kCompressed))
    freed_.back().count += run.count;
  else
    freed_.push_back(run);
}

Result<ZeroPlan> Qcow2File::plan_zeroes(uint64_t offset, uint64_t length_bytes, Zeroing how, bool has_backing) {
  const uint64_t cluster = header_.cluster_bytes();
  Position position = CLONE_TRY(this->position(offset, Create::no));
  const uint64_t most = std::min(length_bytes, position.count * cluster - offset % cluster);
  if (!position.slice && !has_backing) return ZeroPlan{ZeroPlan::Kind::done, most, 0};

  // Parts of clusters.
  if (offset % cluster || most < cluster) {
    const uint64_t length = std::min(most, cluster - offset % cluster);
    const Place place = CLONE_TRY(find(offset, length));
    const bool zero = place.content == Content::zero || (place.content == Content::unallocated && !has_backing);
    if (zero) return ZeroPlan{ZeroPlan::Kind::done, place.length_bytes, 0};
    if (place.content == Content::data && usable(entry(position, 0))) {
      CLONE_TRY(check_target(place.host_offset, place.length_bytes));
      return ZeroPlan{ZeroPlan::Kind::host_range, place.length_bytes, place.host_offset};
    }
    return ZeroPlan{how == Zeroing::discard ? ZeroPlan::Kind::skip : ZeroPlan::Kind::write, place.length_bytes, 0};
  }

  // Whole ones. Version 2 has no flag to hide a backing file with.
  const uint64_t count = most / cluster;
  if (has_backing && header_.version < 3) {
    const Place place = CLONE_TRY(find(offset, cluster));
    if (place.content == Content::data && usable(entry(position, 0))) {
      CLONE_TRY(check_target(place.host_offset, cluster));
      return ZeroPlan{ZeroPlan::Kind::host_range, cluster, place.host_offset};
    }
    return ZeroPlan{how == Zeroing::discard ? ZeroPlan::Kind::skip : ZeroPlan::Kind::write, cluster, 0};
  }
  if (corrupt_) return system_error(EIO);
  // A table of our own, to be changed.
  position = CLONE_TRY(this->position(offset, Create::yes));
  uint64_t n = 0;
  for (; n < count; ++n) {
    const uint64_t old = entry(position, n);
    const uint64_t old_bits = bitmap(position, n);
    const Place place = CLONE_TRY(place_of(old, old_bits, 0));
    if (how == Zeroing::keep && usable(old) &&
        (header_.extended_l2() ? (old_bits & kAllData) == kAllData : place.content == Content::data)) {
      if (n) break;
      CLONE_TRY(check_target(place.host_offset, cluster));
      return ZeroPlan{ZeroPlan::Kind::host_range, cluster, place.host_offset};
    }
    const uint64_t now = header_.extended_l2() || !has_backing ? 0 : kZero;
    const uint64_t now_bits = header_.extended_l2() && has_backing ? kAllZero : 0;
    if (old == now && old_bits == now_bits) continue;
    CLONE_TRY(check_droppable(old));
    drop(old);
    set_entry(position, n, now, now_bits);
  }
  return ZeroPlan{ZeroPlan::Kind::done, n * cluster, 0};
}

Commit Qcow2File::begin_commit() {
  Commit commit;
  ++commits_;
  commit.barrier_first = std::exchange(barrier_, false);
  for (const auto& [offset, slice] : dirty_) {
    const std::span<const std::byte> bytes = std::as_bytes(std::span(slice->entries));
    const uint64_t page_bytes = std::min<uint64_t>(kPageBytes, bytes.size());
    for (uint32_t pages = slice->dirty_pages; pages; pages &= pages - 1) {
      const uint64_t at = static_cast<uint64_t>(__builtin_ctz(pages)) * page_bytes;
      const auto page = bytes.subspan(at, page_bytes);
      commit.l2.push_back({offset + at, {page.begin(), page.end()}});
    }
    slice->dirty_pages = 0;
    ++slice->commits;
    commit.slices.push_back(slice);
  }
  dirty_.clear();
  for (const uint32_t page : dirty_l1_pages_) {
    const size_t first = page * kPageBytes / 8;
    std::vector<uint64_t> raw;
    for (size_t i = first; i < std::min(first + kPageBytes / 8, l1_.size()); ++i) raw.push_back(htobe64(l1_[i]));
    const auto bytes = std::as_bytes(std::span(raw));
    commit.l1.push_back({header_.l1_offset + first * 8, {bytes.begin(), bytes.end()}});
    commit.l1_pages.push_back(page);
  }
  dirty_l1_pages_.clear();
  commit.freed = std::exchange(freed_, {});
  return commit;
}

Result<void> Qcow2File::write_l2(const Commit& commit) const {
  if (corrupt_) return system_error(EIO);
  for (const Commit::Page& page : commit.l2) CLONE_TRY(write_at(fd_, page.offset, page.bytes));
  return {};
}

Result<void> Qcow2File::write_l1(const Commit& commit) const {
  if (corrupt_) return system_error(EIO);
  for (const Commit::Page& page : commit.l1) CLONE_TRY(write_at(fd_, page.offset, page.bytes));
  return {};
}

Result<void> Qcow2File::end_commit(Commit commit) {
  --commits_;
  for (L2Slice* slice : commit.slices) --slice->commits;
  // A cluster that was freed while it was written to waits for that write, which may have begun in either epoch.
  limbo_[epoch_].insert(limbo_[epoch_].end(), commit.freed.begin(), commit.freed.end());
  for (int i = 0; i < 2 && accesses_[1 - epoch_].load(std::memory_order_acquire) == 0; ++i) {
    epoch_ = 1 - epoch_;
    CLONE_TRY(release(std::exchange(limbo_[epoch_], {})));
  }
  return {};
}

// Clusters that nothing refers to any more go back to the host. One that cannot does not keep the others.
Result<void> Qcow2File::release(const std::vector<ClusterRun>& runs) {
  Result<void> outcome;
  for (const ClusterRun& run : runs)
    if (Result<void> released = release(run); !released.ok() && outcome.ok()) outcome = std::move(released);
  return outcome;
}

Result<void> Qcow2File::release(ClusterRun run) {
  // In a damaged image two entries may refer to one cluster: the first gave it back, and it has become a table.
  CLONE_TRY(check_target(run.first << header_.cluster_bits, run.count << header_.cluster_bits));
  const std::vector<ClusterRun> unused = CLONE_TRY(refcounts_.decrease(run));
  for (const ClusterRun& hole : unused)
    static_cast<void>(::fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                  static_cast<off_t>(hole.first << header_.cluster_bits),
                                  static_cast<off_t>(hole.count << header_.cluster_bits)));
  return {};
}

void Qcow2File::fail_commit(Commit commit) {
  --commits_;
  barrier_ = true;
  for (L2Slice* slice : commit.slices) {
    --slice->commits;
    // Which pages it were is not kept: all of them.
    const size_t pages = (slice->entries.size() * 8 + kPageBytes - 1) / kPageBytes;
    slice->dirty_pages |= static_cast<uint32_t>((uint64_t{1} << pages) - 1);
    dirty_[slice->offset] = slice;
  }
  dirty_l1_pages_.insert(commit.l1_pages.begin(), commit.l1_pages.end());
  freed_.insert(freed_.end(), commit.freed.begin(), commit.freed.end());
}

Result<void> Qcow2File::commit_now() {
  Commit commit = begin_commit();
  const auto sync = [this]() -> Result<void> {
    if (syncs_ == Syncs::wanted && ::fdatasync(fd_) != 0) return system_error(errno);
    return {};
  };
  const auto write = [&]() -> Result<void> {
    const bool changes = !commit.l2.empty() || !commit.l1.empty();
    if (commit.barrier_first && changes) CLONE_TRY(sync());
    barrier_ |= commit.barrier_first && !changes;
    CLONE_TRY(write_l2(commit));
    if (!commit.l2.empty()) CLONE_TRY(sync());
    CLONE_TRY(write_l1(commit));
    if (!commit.l1.empty()) CLONE_TRY(sync());
    return {};
  };
  if (Result<void> written = write(); !written.ok()) {
    fail_commit(std::move(commit));
    return written;
  }
  return end_commit(std::move(commit));
}

Result<void> Qcow2File::grow(uint64_t size_bytes) {
  const uint64_t span = header_.l2_span_bytes();
  const uint64_t entries = size_bytes / span + (size_bytes % span != 0);
  if (entries > l1_.size()) {
    if (entries * 8 > kMostL1Bytes) return system_error(EFBIG);
    // The new table is complete before the header names it.
    const uint64_t clusters = align_up(entries * 8, header_.cluster_bytes()) >> header_.cluster_bits;
    const ClusterRun run = CLONE_TRY(refcounts_.allocate_at_end(clusters, tables_));
    if (run.count < clusters) {
      CLONE_TRY(refcounts_.decrease(run));
      return system_error(ENOSPC);
    }
    CLONE_TRY(commit_now());
    std::vector<uint64_t> raw(clusters * header_.cluster_bytes() / 8);
    std::transform(l1_.begin(), l1_.end(), raw.begin(), [](uint64_t entry) { return htobe64(entry); });
    const uint64_t offset = run.first << header_.cluster_bits;
    CLONE_TRY(write_at(fd_, offset, std::as_bytes(std::span(raw))));
    if (syncs_ == Syncs::wanted && ::fdatasync(fd_) != 0) return system_error(errno);
    std::array<std::byte, 12> place;
    const uint32_t count = htobe32(static_cast<uint32_t>(entries));
    const uint64_t start = htobe64(offset);
    std::memcpy(place.data(), &count, 4);
    std::memcpy(place.data() + 4, &start, 8);
    CLONE_TRY(write_at(fd_, field::l1_entries, place));
    const ClusterRun old{cluster_of(header_.l1_offset),
                         align_up(l1_.size() * 8, header_.cluster_bytes()) >> header_.cluster_bits};
    tables_.remove(old.first, old.count);
    tables_.add(run.first, run.count);
    header_.l1_offset = offset;
    header_.l1_entries = static_cast<uint32_t>(entries);
    l1_.resize(entries);
    if (syncs_ == Syncs::wanted && ::fdatasync(fd_) != 0) return system_error(errno);
    if (old.count) CLONE_TRY(refcounts_.decrease(old));
  }
  CLONE_TRY(write_field(field::size, size_bytes));
  header_.size_bytes = size_bytes;
  if (syncs_ == Syncs::wanted && ::fdatasync(fd_) != 0) return system_error(errno);
  return {};
}

}  // namespace virtio_blk::qcow2
