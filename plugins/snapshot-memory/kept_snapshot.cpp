// SPDX-License-Identifier: Apache-2.0
// Reads what a keeper handed out once, and checks all of it before anything is used.
#include "kept_snapshot.hpp"

namespace snapshot_memory {
namespace {

using namespace snapshot_file;

// Whatever is wrong with what was handed out is damage, not a mistake of the caller's.
template <typename T>
Result<T> as_damage(Result<T> result, const std::string& path) {
  if (!result.ok()) result.error().status = CLONE_ERR_CORRUPT;
  return std::move(result).context(path);
}

Result<void> check_header(const Header& header, const KeptFiles& files) {
  if (!header.parent.empty()) return Error{"is a difference to '" + header.parent + "'; kept are full snapshots"};
  if (files.memory_bytes != header.memory_bytes)
    return Error{"its memory has " + std::to_string(files.memory_bytes) + " bytes; the guest's has " +
                 std::to_string(header.memory_bytes)};
  return {};
}

}  // namespace

Result<Summary> read_summary(const Keepers& keepers, const std::string& name) {
  const KeptFiles files = CLONE_TRY(keepers.ask(name));
  const std::string path = keepers.path_of(name);
  std::vector<std::byte> beginning(std::min<uint64_t>(files.state_bytes, sizeof(HeaderRecord)));
  CLONE_TRY(read_at(files.state.get(), 0, beginning).context(path));
  const Header header = CLONE_TRY(as_damage(parse_header(beginning), path));
  CLONE_TRY(as_damage(check_header(header, files), path));
  return Summary{header.memory_bytes, files.stored_bytes};
}

Result<std::unique_ptr<KeptSnapshot>> KeptSnapshot::open(const Keepers& keepers, const std::string& name) {
  std::unique_ptr<KeptSnapshot> snapshot(new KeptSnapshot);
  const std::string& path = snapshot->path_ = keepers.path_of(name);
  const KeptFiles& files = snapshot->files_ = CLONE_TRY(keepers.ask(name));
  if (files.state_bytes > kMostTableBytes + kMostSectionBytes)
    return Error{path + ": its state has " + std::to_string(files.state_bytes) + " bytes; allowed are " +
                     std::to_string(kMostTableBytes + kMostSectionBytes),
                 0, CLONE_ERR_CORRUPT};
  snapshot->bytes_.resize(files.state_bytes);
  CLONE_TRY(read_at(files.state.get(), 0, snapshot->bytes_).context(path));
  snapshot->state_ = CLONE_TRY(as_damage(parse_state(snapshot->bytes_), path));
  CLONE_TRY(as_damage(check_header(snapshot->state_, files), path));
  return snapshot;
}

Result<std::optional<clone_snapshot_extent>> KeptSnapshot::memory_extent(uint32_t index) {
  if (index >= state_.extents.size()) return std::optional<clone_snapshot_extent>();
  const Extent& extent = state_.extents[index];
  return std::optional(clone_snapshot_extent{sizeof(clone_snapshot_extent), files_.memory.get(), extent.offset,
                                             extent.offset, extent.size_bytes});
}

Result<clone_sdk::Reader::Section> KeptSnapshot::read_section(std::string_view owner, std::string_view tag) {
  const auto found = state_.sections.find({std::string(owner), std::string(tag)});
  if (found == state_.sections.end())
    return Error{path_ + ": has no section " + std::string(owner) + "/" + std::string(tag), 0, CLONE_ERR_NOT_FOUND};
  return clone_sdk::Reader::Section{found->second.version, found->second.bytes};
}

Result<std::vector<clone_sdk::SnapshotImage::SectionInfo>> KeptSnapshot::list_sections() {
  std::vector<SectionInfo> list;
  for (const auto& [key, section] : state_.sections)
    list.push_back({key.first, key.second, section.version, section.bytes.size()});
  return list;
}

// The sections' sums. Memory has none: sealed, it cannot be changed where it lies.
Result<void> KeptSnapshot::verify() {
  CLONE_TRY(as_damage(parse_state(bytes_), path_));
  return {};
}

}  // namespace snapshot_memory
