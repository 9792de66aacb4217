// SPDX-License-Identifier: Apache-2.0
// Reads what may be anything, and writes what can be read.
#include "format.hpp"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace snapshot_file {
namespace {

static_assert(sizeof(HeaderRecord) == 208 && sizeof(SectionRecord) == 176 && sizeof(Extent) == 16);
static_assert(std::has_unique_object_representations_v<HeaderRecord> &&
              std::has_unique_object_representations_v<SectionRecord>);

Error corrupt(std::string message) { return {std::move(message), 0, CLONE_ERR_CORRUPT}; }

template <typename T>
T record_at(std::span<const std::byte> bytes, uint64_t offset) {
  T record;
  std::memcpy(&record, bytes.data() + offset, sizeof record);
  return record;
}

// "" also where no NUL ends it; neither is a good name or word.
template <size_t size>
std::string_view text_of(const char (&field)[size]) {
  const size_t length = ::strnlen(field, size);
  return {field, length == size ? 0 : length};
}

template <size_t size>
void put_text(char (&field)[size], std::string_view text) {
  std::copy_n(text.begin(), std::min(text.size(), size - 1), field);
}

// Of hostile text: what a terminal shows as it is, the rest as '?'.
std::string quoted(std::string_view text) {
  std::string shown = "'";
  for (const char c : text.substr(0, 80)) shown += c >= ' ' && c <= '~' ? c : '?';
  return shown + "'";
}

Digest digest_of_tables(std::span<const std::byte> tables) {
  const Digest zeroes{};
  constexpr size_t at = offsetof(HeaderRecord, tables_digest);
  return Sha256().update(tables.first(at)).update(zeroes).update(tables.subspan(at + sizeof zeroes)).finish();
}

Result<HeaderRecord> read_header_record(std::span<const std::byte> bytes) {
  if (bytes.size() < sizeof(HeaderRecord))
    return corrupt("has " + std::to_string(bytes.size()) + " bytes; its header alone has " +
                   std::to_string(sizeof(HeaderRecord)));
  const auto record = record_at<HeaderRecord>(bytes, 0);
  if (std::memcmp(record.magic, kMagic, sizeof kMagic) != 0) return corrupt("is not the state of a snapshot");
  if (record.format_version != kFormatVersion)
    return corrupt("has format version " + std::to_string(record.format_version) + "; known is " +
                   std::to_string(kFormatVersion));
  return record;
}

Result<Header> header_of(const HeaderRecord& record) {
  CLONE_TRY(check_memory_bytes(record.memory_bytes));
  if (record.parent[0])
    CLONE_TRY(check_name("its parent", {record.parent, ::strnlen(record.parent, sizeof record.parent)}));
  return Header{record.memory_bytes, record.identity, std::string(text_of(record.parent)), record.parent_identity,
                record.memory_digest};
}

Result<std::vector<Extent>> read_extents(std::span<const std::byte> table, uint64_t memory_bytes) {
  std::vector<Extent> extents(table.size() / sizeof(Extent));
  if (!extents.empty()) std::memcpy(extents.data(), table.data(), table.size());
  uint64_t end = 0;
  for (const Extent& extent : extents) {
    const std::string name = "extent " + std::to_string(&extent - extents.data());
    if (extent.offset % kPageBytes || extent.size_bytes % kPageBytes || !extent.size_bytes)
      return corrupt(name + " is not made of whole pages");
    if (extent.offset < end) return corrupt(name + " begins before the end of the one before it");
    if (extent.offset > memory_bytes || extent.size_bytes > memory_bytes - extent.offset)
      return corrupt(name + " reaches beyond the memory of " + std::to_string(memory_bytes) + " bytes");
    end = extent.end();
  }
  return extents;
}

Result<std::map<SectionKey, Section>> read_sections(std::span<const std::byte> table, std::span<const std::byte> data) {
  std::map<SectionKey, Section> sections;
  uint64_t used_bytes = 0;
  for (uint64_t at = 0; at < table.size(); at += sizeof(SectionRecord)) {
    const auto record = record_at<SectionRecord>(table, at);
    const std::string number = "section " + std::to_string(at / sizeof record);
    const std::string_view owner = text_of(record.owner), tag = text_of(record.tag);
    CLONE_TRY(check_word("its owner", owner).context(number));
    CLONE_TRY(check_word("its tag", tag).context(number));
    const std::string name = "section " + std::string(owner) + "/" + std::string(tag);
    if (record.size_bytes > data.size() - used_bytes)
      return corrupt(name + " has " + std::to_string(record.size_bytes) + " bytes; the file holds " +
                     std::to_string(data.size() - used_bytes) + " of them");
    const Section section{record.version, record.digest, data.subspan(used_bytes, record.size_bytes)};
    if (sha256(section.bytes) != section.digest) return corrupt(name + " is damaged: its checksum is another");
    SectionKey key{owner, tag};
    if (!sections.empty() && key <= sections.rbegin()->first)
      return corrupt(name + " is not in its place: sections stand in the order of their names, each once");
    sections.emplace_hint(sections.end(), std::move(key), section);
    used_bytes += record.size_bytes;
  }
  if (used_bytes != data.size())
    return corrupt("has " + std::to_string(data.size() - used_bytes) + " bytes that belong to no section");
  return sections;
}

bool is_letter_or_digit(char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9'); }

}  // namespace

Result<void> check_name(std::string_view what, std::string_view name) {
  const auto allowed = [](char c) {
    return is_letter_or_digit(c) || (c >= 'A' && c <= 'Z') || c == '.' || c == '_' || c == '-';
  };
  if (!name.empty() && name.size() <= kLongestName && name[0] != '.' && name[0] != '-' &&
      std::all_of(name.begin(), name.end(), allowed))
    return {};
  return Error{std::string(what) + ": " + quoted(name) +
               " given; allowed are 1 to 64 letters, digits, '.', '_' and '-', the first of them not '.' or '-'"};
}

Result<void> check_word(std::string_view what, std::string_view word) {
  const auto allowed = [](char c) { return is_letter_or_digit(c) || c == '.' || c == '_' || c == '-'; };
  if (!word.empty() && word.size() <= kLongestWord && std::all_of(word.begin(), word.end(), allowed)) return {};
  return Error{std::string(what) + ": " + quoted(word) +
               " given; allowed are 1 to 63 lower-case letters, digits, '.', '_' and '-'"};
}

Result<void> check_memory_bytes(uint64_t memory_bytes) {
  if (memory_bytes && memory_bytes % kPageBytes == 0 && memory_bytes <= kMostMemoryBytes) return {};
  return Error{"a memory of " + std::to_string(memory_bytes) + " bytes; allowed are whole pages of 4096 up to " +
               std::to_string(kMostMemoryBytes)};
}

Result<Header> parse_header(std::span<const std::byte> beginning) {
  return header_of(CLONE_TRY(read_header_record(beginning)));
}

Result<State> parse_state(std::span<const std::byte> file) {
  const HeaderRecord record = CLONE_TRY(read_header_record(file));
  if (record.section_count > kMostSections || record.extent_count > kMostExtents)
    return corrupt("has " + std::to_string(record.section_count) + " sections and " +
                   std::to_string(record.extent_count) + " extents; allowed are " + std::to_string(kMostSections) +
                   " and " + std::to_string(kMostExtents));
  if (record.file_bytes != file.size())
    return corrupt("has " + std::to_string(file.size()) + " bytes; its header says " +
                   std::to_string(record.file_bytes));
  const uint64_t section_table_bytes = record.section_count * sizeof(SectionRecord);
  const uint64_t extent_table_bytes = record.extent_count * sizeof(Extent);
  const uint64_t table_bytes = sizeof record + section_table_bytes + extent_table_bytes;
  if (file.size() < table_bytes)
    return corrupt("has " + std::to_string(file.size()) + " bytes; its tables alone have " +
                   std::to_string(table_bytes));
  if (file.size() - table_bytes > kMostSectionBytes)
    return corrupt("has sections of " + std::to_string(file.size() - table_bytes) + " bytes; allowed are " +
                   std::to_string(kMostSectionBytes));
  if (digest_of_tables(file.first(table_bytes)) != record.tables_digest)
    return corrupt("is damaged: the checksum of its tables is another");

  State state;
  static_cast<Header&>(state) = CLONE_TRY(header_of(record));
  state.extents = CLONE_TRY(
      read_extents(file.subspan(sizeof record + section_table_bytes, extent_table_bytes), record.memory_bytes));
  state.sections =
      CLONE_TRY(read_sections(file.subspan(sizeof record, section_table_bytes), file.subspan(table_bytes)));
  return state;
}

std::vector<std::byte> encode_tables(const State& state) {
  std::vector<std::byte> tables;
  const auto append = [&](const void* data, size_t size_bytes) {
    const auto* bytes = static_cast<const std::byte*>(data);
    tables.insert(tables.end(), bytes, bytes + size_bytes);
  };
  HeaderRecord header{};
  std::copy(std::begin(kMagic), std::end(kMagic), header.magic);
  header.format_version = kFormatVersion;
  header.section_count = static_cast<uint32_t>(state.sections.size());
  header.extent_count = state.extents.size();
  header.file_bytes =
      sizeof header + state.sections.size() * sizeof(SectionRecord) + state.extents.size() * sizeof(Extent);
  for (const auto& [key, section] : state.sections) header.file_bytes += section.bytes.size();
  header.memory_bytes = state.memory_bytes;
  header.identity = state.identity;
  header.parent_identity = state.parent_identity;
  put_text(header.parent, state.parent);
  header.memory_digest = state.memory_digest;
  append(&header, sizeof header);
  for (const auto& [key, section] : state.sections) {
    SectionRecord record{};
    put_text(record.owner, key.first);
    put_text(record.tag, key.second);
    record.version = section.version;
    record.size_bytes = section.bytes.size();
    record.digest = section.digest;
    append(&record, sizeof record);
  }
  append(state.extents.data(), state.extents.size() * sizeof(Extent));
  const Digest digest = digest_of_tables(tables);
  std::copy(digest.begin(), digest.end(), tables.begin() + offsetof(HeaderRecord, tables_digest));
  return tables;
}

Result<void> NewSections::add(State& state, std::string_view owner, std::string_view tag, uint32_t version,
                              std::span<const std::byte> data) {
  CLONE_TRY(check_word("a section's owner", owner));
  CLONE_TRY(check_word("a section's tag", tag));
  SectionKey key(owner, tag);
  const std::string name = "section " + key.first + "/" + key.second;
  if (state.sections.contains(key)) return Error{name + " is written a second time; allowed is once"};
  if (state.sections.size() == kMostSections)
    return Error{name + " would be number " + std::to_string(kMostSections + 1) + "; allowed are " +
                 std::to_string(kMostSections)};
  if (data.size() > kMostSectionBytes - size_bytes_)
    return Error{name + " has " + std::to_string(data.size()) + " bytes; of the " + std::to_string(kMostSectionBytes) +
                 " that all may have together, " + std::to_string(kMostSectionBytes - size_bytes_) +
                 " are left"};
  const auto& kept = bytes_.emplace_back(data.begin(), data.end());
  size_bytes_ += kept.size();
  state.sections.emplace(std::move(key), Section{version, sha256(kept), kept});
  return {};
}

}  // namespace snapshot_file
