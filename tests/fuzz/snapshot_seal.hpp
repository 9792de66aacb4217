// SPDX-License-Identifier: Apache-2.0
// Puts right the size and the checksums of a snapshot's state whose fields were changed, so that what lies behind these
// checks is reached.
#pragma once

#include <cstring>

#include "snapshot-file/format.hpp"

namespace snapshot_file {

inline void seal(std::span<std::byte> file) {
  HeaderRecord header;
  if (file.size() < sizeof header) return;
  std::memcpy(&header, file.data(), sizeof header);
  header.file_bytes = file.size();
  header.tables_digest = {};
  std::memcpy(file.data(), &header, sizeof header);
  if (header.section_count > kMostSections || header.extent_count > kMostExtents) return;
  const uint64_t table_bytes =
      sizeof header + header.section_count * sizeof(SectionRecord) + header.extent_count * sizeof(Extent);
  if (table_bytes > file.size()) return;
  std::span<const std::byte> data = file.subspan(table_bytes);
  for (uint32_t i = 0; i < header.section_count; ++i) {
    std::byte* const at = file.data() + sizeof header + i * sizeof(SectionRecord);
    SectionRecord record;
    std::memcpy(&record, at, sizeof record);
    if (record.size_bytes > data.size()) break;
    record.digest = sha256(data.first(record.size_bytes));
    data = data.subspan(record.size_bytes);
    std::memcpy(at, &record, sizeof record);
  }
  const Digest digest = sha256(file.first(table_bytes));
  std::memcpy(file.data() + offsetof(HeaderRecord, tables_digest), digest.data(), digest.size());
}

}  // namespace snapshot_file
