// SPDX-License-Identifier: Apache-2.0
// A snapshot that a keeper handed out: it stays as it is, also when that one ends.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "clone/sdk/snapshot_backend.hpp"
#include "keepers.hpp"

namespace snapshot_memory {

// What a list needs of a snapshot.
struct Summary {
  uint64_t memory_bytes = 0, stored_bytes = 0;
};
Result<Summary> read_summary(const Keepers& keepers, const std::string& name);

class KeptSnapshot final : public clone_sdk::SnapshotImage {
 public:
  static Result<std::unique_ptr<KeptSnapshot>> open(const Keepers& keepers, const std::string& name);

  Result<std::optional<clone_snapshot_extent>> memory_extent(uint32_t index) override;
  Result<clone_sdk::Reader::Section> read_section(std::string_view owner, std::string_view tag) override;
  Result<std::vector<SectionInfo>> list_sections() override;
  Result<void> verify() override;

 private:
  KeptSnapshot() = default;

  std::string path_;  // of the keeper's socket, for messages
  KeptFiles files_;
  std::vector<std::byte> bytes_;  // of the state; the sections lie in it
  snapshot_file::State state_;
};

}  // namespace snapshot_memory
