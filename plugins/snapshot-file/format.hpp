// SPDX-License-Identifier: Apache-2.0
// The format of a snapshot's file `state`: checked as a whole when it is read, written in one go (README.md).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <list>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "clone/sdk/result.hpp"
#include "sha256.hpp"

namespace snapshot_file {

using clone_sdk::Error;
using clone_sdk::Result;

constexpr uint64_t kPageBytes = 4096;
constexpr uint64_t kMostMemoryBytes = uint64_t{1} << 42;
constexpr uint64_t kMostSectionBytes = 256 << 20;  // of all sections together; an export takes no more either
constexpr uint32_t kMostSections = 1 << 16;
constexpr uint64_t kMostExtents = 1 << 20;
constexpr size_t kLongestName = 64;
constexpr size_t kLongestWord = 63;  // of an owner, a tag

using Identity = std::array<std::byte, 16>;

// What stands in the file, one behind the other: a header, its sections' records, its extents, the sections' bytes.
// Integers are little endian. Text ends in NUL.
constexpr char kMagic[8] = {'C', 'L', 'O', 'N', 'E', 'S', 'N', 'P'};
constexpr uint32_t kFormatVersion = 1;
struct HeaderRecord {
  char magic[8];
  uint32_t format_version;
  uint32_t section_count;
  uint64_t extent_count;
  uint64_t file_bytes;
  uint64_t memory_bytes;
  Identity identity;
  Identity parent_identity;
  char parent[72];  // "" in a full snapshot
  Digest memory_digest;
  Digest tables_digest;  // of this header with zeroes here, the sections' records and the extents
};
struct SectionRecord {
  char owner[kLongestWord + 1];
  char tag[kLongestWord + 1];
  uint32_t version;
  uint32_t reserved;
  uint64_t size_bytes;
  Digest digest;
};
struct Extent {
  uint64_t offset;  // in guest memory and in the file `memory`
  uint64_t size_bytes;
  uint64_t end() const { return offset + size_bytes; }
};
constexpr uint64_t kMostTableBytes =
    sizeof(HeaderRecord) + kMostSections * sizeof(SectionRecord) + kMostExtents * sizeof(Extent);

struct Header {
  uint64_t memory_bytes = 0;
  Identity identity{};
  std::string parent;  // "" in a full snapshot
  Identity parent_identity{};
  Digest memory_digest{};  // of the extents' bytes in `memory`, in their order
};
struct Section {
  uint32_t version = 0;
  Digest digest{};
  std::span<const std::byte> bytes;
};
using SectionKey = std::pair<std::string, std::string>;  // owner, tag
struct State : Header {
  std::map<SectionKey, Section> sections;  // in the file in this order
  std::vector<Extent> extents;             // ascending, apart, whole pages inside the memory
};

// The sections of a state while it is written, within the bounds in which it can be read again.
class NewSections {
 public:
  // A word for each of owner and tag; both together once.
  Result<void> add(State& state, std::string_view owner, std::string_view tag, uint32_t version,
                   std::span<const std::byte> data);

 private:
  std::list<std::vector<std::byte>> bytes_;  // the state's sections lie in them
  uint64_t size_bytes_ = 0;
};

inline bool is_zero_page(const std::byte* page) {
  alignas(64) static constexpr std::byte zeroes[kPageBytes]{};
  return std::memcmp(page, zeroes, kPageBytes) == 0;
}

Result<void> check_name(std::string_view what, std::string_view name);
Result<void> check_word(std::string_view what, std::string_view word);
Result<void> check_memory_bytes(uint64_t memory_bytes);

// Of a file's beginning, without looking at the rest: good for a list.
Result<Header> parse_header(std::span<const std::byte> beginning);
// Everything that does not make sense is refused, every checksum of the state compared. Sections' bytes lie in `file`.
Result<State> parse_state(std::span<const std::byte> file);
// The file up to the sections' bytes.
std::vector<std::byte> encode_tables(const State& state);

}  // namespace snapshot_file
