// SPDX-License-Identifier: Apache-2.0
// Opens a chain of snapshots, and makes one memory of theirs.
#include "stored_snapshot.hpp"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "clone/abi/snapshot_notes.h"
#include "zstd_file.hpp"

namespace snapshot_file {
namespace {

Result<OpenedFile> open_file(const Store& store, int folder_fd, const std::string& name, const char* file) {
  return open_own(folder_fd, file, Kind::file, store.path_of(name) + "/" + file);
}

// The one that there is: a file appears before the other goes, so that a third look finds what two have missed.
struct MemoryFile : OpenedFile {
  bool is_compressed = false;
};
Result<MemoryFile> open_memory(const Store& store, int folder_fd, const std::string& name) {
  for (const char* file : {kMemoryName, kCompressedName}) {
    auto opened = open_file(store, folder_fd, name, file);
    if (opened.ok()) return MemoryFile{std::move(*opened), file == kCompressedName};
    if (opened.error().code != ENOENT) return std::move(opened).error();
  }
  return MemoryFile{CLONE_TRY(open_file(store, folder_fd, name, kMemoryName)), false};
}

// Whatever a file says is damage, not a mistake of the caller's.
template <typename T>
Result<T> as_damage(Result<T> result, const std::string& path) {
  if (!result.ok()) result.error().status = CLONE_ERR_CORRUPT;
  return std::move(result).context(path);
}

// In place of what has the name. Others may be about to give theirs the same: whoever comes last wins.
Result<void> give_name(int fd, int folder_fd, const std::string& name) {
  constexpr int kMostAttempts = 8;
  const std::string nameless = "/proc/self/fd/" + std::to_string(fd);
  for (int attempt = 1;; ++attempt) {
    if (::linkat(AT_FDCWD, nameless.c_str(), folder_fd, name.c_str(), AT_SYMLINK_FOLLOW) == 0) return {};
    if (errno != EEXIST || attempt == kMostAttempts) return system_error();
    if (::unlinkat(folder_fd, name.c_str(), 0) != 0 && errno != ENOENT) return system_error();
  }
}

Result<std::string> note_file(std::string_view name) {
  const bool known = std::all_of(name.begin(), name.end(), [](char c) { return (c >= 'a' && c <= 'z') || c == '-'; });
  if (name.empty() || name.size() > 32 || !known)
    return Error{"a note's name: '" + std::string(name) + "' given; allowed are 1 to 32 of a-z and -"};
  return std::string(kNotePrefix) + std::string(name);
}

}  // namespace

Result<Summary> read_summary(const Store& store, const std::string& name) {
  const Fd folder = CLONE_TRY(store.open_folder(name));
  const OpenedFile state = CLONE_TRY(open_file(store, folder.get(), name, kStateName));
  const OpenedFile memory = CLONE_TRY(open_memory(store, folder.get(), name));
  const std::string path = store.path_of(name) + "/" + kStateName;
  std::vector<std::byte> beginning(std::min<uint64_t>(state.size_bytes, sizeof(HeaderRecord)));
  CLONE_TRY(read_at(state.fd.get(), 0, beginning).context(path));
  return Summary{CLONE_TRY(as_damage(parse_header(beginning), path)), state.stored_bytes + memory.stored_bytes};
}

Result<Member> open_member(const Store& store, const std::string& name) {
  Member member;
  member.name = name;
  member.path = store.path_of(name);
  const std::string state_path = member.path + "/" + kStateName;
  member.folder = CLONE_TRY(store.open_folder(name));
  const int folder_fd = member.folder.get();
  const OpenedFile state = CLONE_TRY(open_file(store, folder_fd, name, kStateName));
  if (state.size_bytes > kMostTableBytes + kMostSectionBytes)
    return Error{state_path + ": has " + std::to_string(state.size_bytes) + " bytes; allowed are " +
                     std::to_string(kMostTableBytes + kMostSectionBytes),
                 0, CLONE_ERR_CORRUPT};
  member.bytes.resize(state.size_bytes);
  CLONE_TRY(read_at(state.fd.get(), 0, member.bytes).context(state_path));
  member.state = CLONE_TRY(as_damage(parse_state(member.bytes), state_path));
  MemoryFile memory = CLONE_TRY(open_memory(store, folder_fd, name));
  if (!memory.is_compressed && memory.size_bytes != member.state.memory_bytes)
    return Error{member.path + "/" + kMemoryName + ": has " + std::to_string(memory.size_bytes) +
                     " bytes; the guest's memory has " + std::to_string(member.state.memory_bytes),
                 0, CLONE_ERR_CORRUPT};
  (memory.is_compressed ? member.compressed : member.memory) = std::move(memory.fd);
  return member;
}

Result<int> StoredSnapshot::memory_of(Member& member) {
  if (member.memory) return member.memory.get();
  const std::string path = member.path + "/" + kCompressedName;
  Fd memory(::memfd_create("clone-template-memory", MFD_CLOEXEC));
  if (!memory || ::ftruncate(memory.get(), static_cast<off_t>(member.state.memory_bytes)) != 0)
    return system_error().context(path);
  CLONE_TRY(decompress(member.compressed.get(), member.state.extents, memory.get()).context(path));
  member.memory = std::move(memory);
  return member.memory.get();
}

Result<std::unique_ptr<StoredSnapshot>> StoredSnapshot::open(const Store& store, const std::string& name) {
  std::unique_ptr<StoredSnapshot> snapshot(new StoredSnapshot);
  std::vector<Member>& chain = snapshot->chain_;
  chain.push_back(CLONE_TRY(open_member(store, name)));
  uint64_t& extent_count = snapshot->chain_extents_;
  extent_count = chain.back().state.extents.size();
  while (!chain.back().state.parent.empty()) {
    const Member& child = chain.back();
    const auto refused = [&](const std::string& why) {
      return Error{child.path + ": its parent '" + child.state.parent + "' " + why, 0, CLONE_ERR_CORRUPT};
    };
    if (std::any_of(chain.begin(), chain.end(), [&](const Member& m) { return m.name == child.state.parent; }))
      return refused("has it as a parent in turn");
    if (chain.size() == kMostMembers)
      return refused("would be number " + std::to_string(kMostMembers + 1) + " of the chain; allowed are " +
                     std::to_string(kMostMembers));
    auto opened = open_member(store, child.state.parent);
    if (!opened.ok() && opened.error().status == CLONE_ERR_NOT_FOUND) return refused("is missing in " + store.path());
    Member parent = CLONE_TRY(std::move(opened).context(child.path + ": its parent"));
    if (parent.state.identity != child.state.parent_identity)
      return refused("is another snapshot than the one that it was made over");
    if (parent.state.memory_bytes != child.state.memory_bytes)
      return refused("has a memory of " + std::to_string(parent.state.memory_bytes) + " bytes, it has " +
                     std::to_string(child.state.memory_bytes));
    extent_count += parent.state.extents.size();
    if (extent_count > kMostChainExtents)
      return refused("brings the chain to " + std::to_string(extent_count) + " extents; allowed are " +
                     std::to_string(kMostChainExtents));
    // Only the newest one's sections count.
    parent.state.sections.clear();
    parent.bytes = {};
    parent.folder.reset();
    chain.push_back(std::move(parent));
  }
  for (Member& member : chain) snapshot->pieces_ = lay_over(snapshot->pieces_, pieces_of(member));
  return snapshot;
}

// A full one's file is its memory as it is, holes and all: one mapping.
std::vector<StoredSnapshot::Piece> StoredSnapshot::pieces_of(Member& member) {
  std::vector<Piece> pieces;
  if (member.state.parent.empty()) {
    pieces.push_back({{0, member.state.memory_bytes}, &member});
    return pieces;
  }
  for (const Extent& extent : member.state.extents) pieces.push_back({extent, &member});
  return pieces;
}

// Both are ascending and apart, so is what comes out.
std::vector<StoredSnapshot::Piece> StoredSnapshot::lay_over(const std::vector<Piece>& upper,
                                                            const std::vector<Piece>& lower) {
  std::vector<Piece> result;
  auto next = upper.begin();
  for (Piece left : lower) {
    while (left.size_bytes) {
      for (; next != upper.end() && next->end() <= left.offset; ++next) result.push_back(*next);
      const uint64_t covered = next == upper.end() ? left.end() : std::min(next->offset, left.end());
      if (covered > left.offset) result.push_back({{left.offset, covered - left.offset}, left.member});
      const uint64_t end = left.end();
      left.offset = next == upper.end() ? end : std::clamp(next->end(), covered, end);
      left.size_bytes = end - left.offset;
    }
  }
  result.insert(result.end(), next, upper.end());
  return result;
}

Result<std::optional<clone_snapshot_extent>> StoredSnapshot::memory_extent(uint32_t index) {
  if (index >= pieces_.size()) return std::optional<clone_snapshot_extent>();
  const Piece& piece = pieces_[index];
  const int fd = CLONE_TRY(memory_of(*piece.member));
  return std::optional(
      clone_snapshot_extent{sizeof(clone_snapshot_extent), fd, piece.offset, piece.offset, piece.size_bytes});
}

Result<clone_sdk::Reader::Section> StoredSnapshot::read_section(std::string_view owner, std::string_view tag) {
  const auto& sections = chain_.front().state.sections;
  const auto found = sections.find({std::string(owner), std::string(tag)});
  if (found == sections.end())
    return Error{chain_.front().path + ": has no section " + std::string(owner) + "/" + std::string(tag), 0,
                 CLONE_ERR_NOT_FOUND};
  return clone_sdk::Reader::Section{found->second.version, found->second.bytes};
}

Result<std::vector<clone_sdk::SnapshotImage::SectionInfo>> StoredSnapshot::list_sections() {
  std::vector<SectionInfo> list;
  for (const auto& [key, section] : chain_.front().state.sections)
    list.push_back({key.first, key.second, section.version, section.bytes.size()});
  return list;
}

Result<void> StoredSnapshot::verify() {
  for (Member& member : chain_) {
    const std::string path = member.path + "/" + (member.compressed ? kCompressedName : kMemoryName);
    const int memory = CLONE_TRY(memory_of(member));
    const auto damaged = [&](const std::string& why) { return Error{path + ": " + why, 0, CLONE_ERR_CORRUPT}; };
    const Digest digest = CLONE_TRY(digest_of(memory, member.state.extents).context(path));
    if (digest != member.state.memory_digest) return damaged("is damaged: its checksum is another");
    if (!member.state.parent.empty()) continue;  // what lies outside of its extents is not used
    const uint64_t memory_bytes = member.state.memory_bytes;
    const uint64_t stray =
        CLONE_TRY(find_data_outside(memory, member.state.extents, memory_bytes).context(path));
    if (stray < memory_bytes)
      return damaged("is damaged: there is data at " + std::to_string(stray) + " where zeroes were saved");
  }
  return {};
}

Result<std::optional<std::vector<std::byte>>> StoredSnapshot::read_note(std::string_view name) {
  const std::string file = CLONE_TRY(note_file(name));
  const std::string path = chain_.front().path + "/" + file;
  const auto opened = open_own(chain_.front().folder.get(), file, Kind::file, path);
  if (!opened.ok() && opened.error().code == ENOENT) return std::optional<std::vector<std::byte>>();
  if (!opened.ok()) return opened.error();
  if (opened->size_bytes > CLONE_SNAPSHOT_NOTE_MAX_BYTES)
    return Error{path + ": has " + std::to_string(opened->size_bytes) + " bytes; allowed are " +
                     std::to_string(CLONE_SNAPSHOT_NOTE_MAX_BYTES),
                 0, CLONE_ERR_CORRUPT};
  std::optional<std::vector<std::byte>> note(opened->size_bytes);
  CLONE_TRY(read_at(opened->fd.get(), 0, *note).context(path));
  return note;
}

// Without a name until it is whole, so that who is killed leaves nothing behind; where the file system has no such files,
// under another name, which remove() takes for the snapshot's, too. It need not outlive a crash of the host, so nothing
// is synced.
Result<void> StoredSnapshot::write_note(std::string_view name, std::span<const std::byte> note) {
  const std::string file = CLONE_TRY(note_file(name));
  const std::string path = chain_.front().path + "/" + file;
  if (note.size() > CLONE_SNAPSHOT_NOTE_MAX_BYTES)
    return Error{path + ": " + std::to_string(note.size()) + " bytes given; allowed are " +
                 std::to_string(CLONE_SNAPSHOT_NOTE_MAX_BYTES)};
  const int folder_fd = chain_.front().folder.get();
  Fd fd(::openat(folder_fd, ".", O_TMPFILE | O_WRONLY | O_CLOEXEC, 0600));
  if (fd) {
    CLONE_TRY(write_at(fd.get(), 0, note).context(path));
    return give_name(fd.get(), folder_fd, file).context(path);
  }
  if (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL) return system_error().context(path);
  const std::string folder = "/proc/self/fd/" + std::to_string(folder_fd) + "/";
  std::string partial = folder + file + ".XXXXXX";
  fd = Fd(::mkostemp(partial.data(), O_CLOEXEC));
  if (!fd) return system_error().context(path);
  Result<void> written = write_at(fd.get(), 0, note);
  if (written.ok() && ::rename(partial.c_str(), (folder + file).c_str()) != 0) written = system_error();
  if (!written.ok()) ::unlink(partial.c_str());
  return std::move(written).context(path);
}

}  // namespace snapshot_file
