// SPDX-License-Identifier: Apache-2.0
// A snapshot as it lies in the store, opened with all those that it is a difference to.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "clone/sdk/snapshot_backend.hpp"
#include "store.hpp"

namespace snapshot_file {

constexpr size_t kMostMembers = 64;              // of a chain
constexpr uint64_t kMostChainExtents = 4 << 20;  // of all members together

// What a list needs of a snapshot.
struct Summary {
  Header header;
  uint64_t stored_bytes = 0;
};
Result<Summary> read_summary(const Store& store, const std::string& name);

// One of a chain, read and checked; its memory not.
struct Member {
  std::string name, path;
  std::vector<std::byte> bytes;  // of the file `state`; the sections lie in it
  State state;
  Fd memory;
  Fd compressed;  // instead of it
  Fd folder;      // of the newest one, for its notes
};
Result<Member> open_member(const Store& store, const std::string& name);

// It needs neither store nor names once it is open: removed meanwhile, it stays as it is, but for its notes.
class StoredSnapshot final : public clone_sdk::SnapshotImage {
 public:
  static Result<std::unique_ptr<StoredSnapshot>> open(const Store& store, const std::string& name);

  const Header& header() const { return chain_.front().state; }
  size_t chain_length() const { return chain_.size(); }
  uint64_t chain_extents() const { return chain_extents_; }

  Result<std::optional<clone_snapshot_extent>> memory_extent(uint32_t index) override;
  Result<clone_sdk::Reader::Section> read_section(std::string_view owner, std::string_view tag) override;
  Result<std::vector<SectionInfo>> list_sections() override;
  Result<void> verify() override;
  // clone.snapshot-notes/1
  Result<std::optional<std::vector<std::byte>>> read_note(std::string_view name);
  Result<void> write_note(std::string_view name, std::span<const std::byte> note);

 private:
  // Guest memory and whose file it lies in, at its own offset.
  struct Piece : Extent {
    Member* member;
  };

  StoredSnapshot() = default;
  // A compressed one gets memory of its own, when it is first asked for.
  static Result<int> memory_of(Member& member);
  static std::vector<Piece> lay_over(const std::vector<Piece>& upper, const std::vector<Piece>& lower);
  static std::vector<Piece> pieces_of(Member& member);

  std::vector<Member> chain_;   // the newest first, a full one last; the sections are the newest one's
  uint64_t chain_extents_ = 0;  // of all members
  std::vector<Piece> pieces_;
};

}  // namespace snapshot_file
