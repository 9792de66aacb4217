// SPDX-License-Identifier: Apache-2.0
// A snapshot being made: files in memory of this process alone, until a keeper has them.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "clone/sdk/snapshot_backend.hpp"
#include "keepers.hpp"

namespace snapshot_memory {

class NewSnapshot final : public clone_sdk::SnapshotImage {
 public:
  static Result<std::unique_ptr<NewSnapshot>> begin(Keepers keepers, const std::string& name, uint64_t memory_bytes);

  Result<void> write_memory(uint64_t memory_offset, std::span<const std::byte> data) override;
  Result<void> write_section(std::string_view owner, std::string_view tag, uint32_t version,
                             std::span<const std::byte> data) override;
  Result<void> commit() override;

 private:
  // What failed halfway cannot become a snapshot.
  enum class Phase { writing, failed, committed };

  NewSnapshot(Keepers keepers, std::string name) : keepers_(std::move(keepers)), name_(std::move(name)) {}
  Result<void> check_writing() const;
  Result<void> write(uint64_t memory_offset, std::span<const std::byte> data);
  Result<Fd> write_state() const;
  std::string what() const { return "snapshot '" + name_ + "'"; }

  Keepers keepers_;
  std::string name_;
  Fd program_;  // the keeper's
  Fd memory_;
  snapshot_file::State state_;
  snapshot_file::NewSections sections_;
  std::atomic<Phase> phase_ = Phase::writing;
};

}  // namespace snapshot_memory
