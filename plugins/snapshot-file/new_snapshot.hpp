// SPDX-License-Identifier: Apache-2.0
// A snapshot being made: nothing is seen of it until it is whole and on the disk.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "clone/sdk/snapshot_backend.hpp"
#include "store.hpp"

namespace snapshot_file {

// The pages that were written. [any]
class PageSet {
 public:
  explicit PageSet(uint64_t pages) : words_((pages + 63) / 64) {}
  bool has(uint64_t page) const { return word(page).load(std::memory_order_relaxed) >> page % 64 & 1; }
  void add(uint64_t page) { word(page).fetch_or(uint64_t{1} << page % 64, std::memory_order_relaxed); }
  // Ascending and apart. Gaps of up to that many bytes are taken along.
  std::vector<Extent> extents(uint64_t gap_bytes) const;

 private:
  const std::atomic<uint64_t>& word(uint64_t page) const { return words_[page / 64]; }
  std::atomic<uint64_t>& word(uint64_t page) { return words_[page / 64]; }

  std::vector<std::atomic<uint64_t>> words_;
};

class NewSnapshot final : public clone_sdk::SnapshotImage {
 public:
  // parent: "" for a full one.
  static Result<std::unique_ptr<NewSnapshot>> begin(Store store, const std::string& name, const std::string& parent,
                                                    uint64_t memory_bytes);
  ~NewSnapshot() override;

  Result<void> write_memory(uint64_t memory_offset, std::span<const std::byte> data) override;
  Result<void> write_section(std::string_view owner, std::string_view tag, uint32_t version,
                             std::span<const std::byte> data) override;
  Result<void> commit() override;

 private:
  // What failed halfway cannot become a snapshot.
  enum class Phase { writing, failed, committed };

  NewSnapshot(Store store, std::string name, uint64_t memory_bytes)
      : store_(std::move(store)), name_(std::move(name)), pages_(memory_bytes / kPageBytes) {
    state_.memory_bytes = memory_bytes;
  }
  Result<void> check_writing() const;
  Result<void> write(uint64_t memory_offset, std::span<const std::byte> data);
  Result<void> finish_files();
  Result<void> publish();
  std::string path_of(const char* file) const { return store_.path_of(folder_.name) + "/" + file; }

  Store store_;
  std::string name_;
  TemporaryFolder folder_;
  Fd memory_;
  PageSet pages_;
  State state_;
  NewSections sections_;
  uint64_t most_extents_ = kMostExtents;
  std::atomic<Phase> phase_ = Phase::writing;
};

// A snapshot that is there already, by name.
Error already_there(const Store& store, const std::string& name);

}  // namespace snapshot_file
