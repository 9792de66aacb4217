// SPDX-License-Identifier: Apache-2.0
// Writes a snapshot's files under a temporary name, and gives them their own in one step.
#include "new_snapshot.hpp"

#include <fcntl.h>
#include <stdio.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <bit>

#include "stored_snapshot.hpp"

namespace snapshot_file {
namespace {

Result<void> write_state(int fd, const State& state) {
  const std::vector<std::byte> tables = encode_tables(state);
  CLONE_TRY(write_at(fd, 0, tables));
  uint64_t offset = tables.size();
  for (const auto& [key, section] : state.sections) {
    CLONE_TRY(write_at(fd, offset, section.bytes));
    offset += section.bytes.size();
  }
  return sync(fd);
}

}  // namespace

std::vector<Extent> PageSet::extents(uint64_t gap_bytes) const {
  std::vector<Extent> extents;
  for (size_t i = 0; i < words_.size(); ++i) {
    uint64_t bits = words_[i].load(std::memory_order_relaxed);
    while (bits) {
      const int start = std::countr_zero(bits);
      const int count = std::countr_one(bits >> start);
      bits = start + count < 64 ? bits >> (start + count) << (start + count) : 0;
      const Extent run = {(i * 64 + static_cast<unsigned>(start)) * kPageBytes,
                          static_cast<unsigned>(count) * kPageBytes};
      if (!extents.empty() && run.offset - extents.back().end() <= gap_bytes)
        extents.back().size_bytes = run.end() - extents.back().offset;
      else
        extents.push_back(run);
    }
  }
  return extents;
}

Error already_there(const Store& store, const std::string& name) {
  return {
      "there is a snapshot '" + name + "' in " + store.path() + " already; allowed is another name, or to remove it",
      EEXIST, CLONE_ERR_BUSY};
}

Result<std::unique_ptr<NewSnapshot>> NewSnapshot::begin(Store store, const std::string& name, const std::string& parent,
                                                        uint64_t memory_bytes) {
  CLONE_TRY(check_memory_bytes(memory_bytes).context("snapshot '" + name + "'"));
  std::unique_ptr<NewSnapshot> snapshot(new NewSnapshot(std::move(store), name, memory_bytes));
  State& state = snapshot->state_;
  if (!parent.empty()) {
    const auto opened = CLONE_TRY(StoredSnapshot::open(snapshot->store_, parent));
    if (opened->header().memory_bytes != memory_bytes)
      return Error{"snapshot '" + name + "': a memory of " + std::to_string(memory_bytes) + " bytes; its parent '" +
                   parent + "' has " + std::to_string(opened->header().memory_bytes)};
    if (opened->chain_length() == kMostMembers)
      return Error{"snapshot '" + name + "': its parent '" + parent + "' is the last of a chain of " +
                   std::to_string(kMostMembers) + ", which is the most; allowed is a full snapshot"};
    state.parent = parent;
    state.parent_identity = opened->header().identity;
    snapshot->most_extents_ = std::min(kMostExtents, kMostChainExtents - opened->chain_extents());
  }
  if (::getrandom(state.identity.data(), sizeof state.identity, 0) != ssize_t{sizeof state.identity})
    return system_error().context("getrandom");
  {
    const auto lock = CLONE_TRY(snapshot->store_.lock());
    if (CLONE_TRY(snapshot->store_.has(name))) return already_there(snapshot->store_, name);
    snapshot->store_.clear_left_folders();
    snapshot->folder_ = CLONE_TRY(snapshot->store_.make_temporary(name));
  }
  const std::string path = snapshot->path_of(kMemoryName);
  snapshot->memory_ = CLONE_TRY(create_file(snapshot->folder_.fd.get(), kMemoryName).context(path));
  if (::ftruncate(snapshot->memory_.get(), static_cast<off_t>(memory_bytes)) != 0) return system_error().context(path);
  return snapshot;
}

NewSnapshot::~NewSnapshot() {
  if (folder_.fd && phase_ != Phase::committed) store_.clear(folder_.fd.get(), folder_.name);
}

Result<void> NewSnapshot::check_writing() const {
  if (phase_ == Phase::writing) return {};
  return Error{
      "snapshot '" + name_ + "': " +
          (phase_ == Phase::committed ? "is complete already" : "an earlier write failed; it can only be closed"),
      0, CLONE_ERR_STATE};
}

Result<void> NewSnapshot::write_memory(uint64_t memory_offset, std::span<const std::byte> data) {
  CLONE_TRY(check_writing());
  if (memory_offset % kPageBytes || data.size() % kPageBytes || data.size() > state_.memory_bytes ||
      memory_offset > state_.memory_bytes - data.size())
    return Error{"snapshot '" + name_ + "': " + std::to_string(data.size()) + " bytes at " +
                 std::to_string(memory_offset) + " given; allowed are whole pages of 4096 inside the memory of " +
                 std::to_string(state_.memory_bytes) + " bytes"};
  auto written = write(memory_offset, data);
  if (!written.ok()) phase_ = Phase::failed;
  return std::move(written).context(path_of(kMemoryName));
}

// A page of zeroes is a hole, unless something else was written there before.
Result<void> NewSnapshot::write(uint64_t memory_offset, std::span<const std::byte> data) {
  const uint64_t first = memory_offset / kPageBytes, count = data.size() / kPageBytes;
  const auto is_hole = [&](uint64_t page) {
    return is_zero_page(data.data() + page * kPageBytes) && !pages_.has(first + page);
  };
  for (uint64_t page = 0, end = 0; page < count; page = end) {
    const bool hole = is_hole(page);
    for (end = page + 1; end < count && is_hole(end) == hole;) ++end;
    // In a full snapshot what is in no extent is zeroes, otherwise it is the parent's.
    if (hole && state_.parent.empty()) continue;
    if (!hole)
      CLONE_TRY(write_at(memory_.get(), memory_offset + page * kPageBytes,
                         data.subspan(page * kPageBytes, (end - page) * kPageBytes)));
    for (uint64_t done = page; done < end; ++done) pages_.add(first + done);
  }
  return {};
}

Result<void> NewSnapshot::write_section(std::string_view owner, std::string_view tag, uint32_t version,
                                        std::span<const std::byte> data) {
  CLONE_TRY(check_writing());
  return sections_.add(state_, owner, tag, version, data);
}

Result<void> NewSnapshot::commit() {
  CLONE_TRY(check_writing());
  phase_ = Phase::failed;
  CLONE_TRY(finish_files());
  CLONE_TRY(publish());
  phase_ = Phase::committed;
  return {};
}

Result<void> NewSnapshot::finish_files() {
  state_.extents = pages_.extents(0);
  // Gaps are zeroes in a full snapshot, and can be taken along.
  for (uint64_t gap = kPageBytes; state_.parent.empty() && state_.extents.size() > most_extents_; gap *= 2)
    state_.extents = pages_.extents(gap);
  if (state_.extents.size() > most_extents_)
    return Error{"snapshot '" + name_ + "': " + std::to_string(state_.extents.size()) +
                 " ranges of memory differ from its parent's; allowed are " + std::to_string(most_extents_) +
                 ", or a full snapshot"};
  state_.memory_digest = CLONE_TRY(digest_of(memory_.get(), state_.extents).context(path_of(kMemoryName)));
  const Fd state = CLONE_TRY(create_file(folder_.fd.get(), kStateName).context(path_of(kStateName)));
  CLONE_TRY(write_state(state.get(), state_).context(path_of(kStateName)));
  CLONE_TRY(sync(memory_.get()).context(path_of(kMemoryName)));
  return sync(folder_.fd.get()).context(store_.path_of(folder_.name));
}

// Under the lock, so that the parent is not removed meanwhile.
Result<void> NewSnapshot::publish() {
  const auto lock = CLONE_TRY(store_.lock());
  if (!state_.parent.empty()) {
    const Summary parent =
        CLONE_TRY(read_summary(store_, state_.parent).context("snapshot '" + name_ + "': its parent"));
    if (parent.header.identity != state_.parent_identity)
      return Error{"snapshot '" + name_ + "': its parent '" + state_.parent +
                       "' is another one now than when this one was begun",
                   0, CLONE_ERR_STATE};
  }
  const int folder = store_.fd();
  if (::renameat2(folder, folder_.name.c_str(), folder, name_.c_str(), RENAME_NOREPLACE) != 0) {
    if (errno == EEXIST) return already_there(store_, name_);
    return system_error().context(store_.path_of(name_));
  }
  if (auto synced = sync(folder); !synced.ok()) {
    // Not durable, so not there.
    ::renameat(folder, name_.c_str(), folder, folder_.name.c_str());
    return std::move(synced).context(store_.path());
  }
  return {};
}

}  // namespace snapshot_file
