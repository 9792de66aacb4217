// SPDX-License-Identifier: Apache-2.0
// Fuzzes the state of a snapshot: the input is the file, as it is and with its checksums put right. Beside what the
// sanitizers see: what is accepted stays in its bounds, and written again it is accepted as the same.
#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "snapshot_seal.hpp"

using namespace snapshot_file;

namespace {

void require(bool holds, int line = __builtin_LINE()) {
  if (holds) return;
  std::fprintf(stderr, "%s:%d does not hold\n", __FILE__, line);
  std::abort();
}

std::vector<std::byte> encode(const State& state) {
  std::vector<std::byte> file = encode_tables(state);
  for (const auto& [key, section] : state.sections) file.insert(file.end(), section.bytes.begin(), section.bytes.end());
  return file;
}

void parse(std::span<const std::byte> file) {
  const auto header = parse_header(file.first(std::min(file.size(), sizeof(HeaderRecord))));
  const auto state = parse_state(file);
  if (!state.ok()) {
    require(!state.error().message.empty());
    return;
  }
  require(header.ok() && header->parent == state->parent && header->memory_bytes == state->memory_bytes);
  require(state->memory_bytes % kPageBytes == 0 && state->memory_bytes <= kMostMemoryBytes);
  require(state->parent.empty() || check_name("", state->parent).ok());
  uint64_t end = 0;
  for (const Extent& extent : state->extents) {
    require(extent.offset >= end && extent.size_bytes > 0 && extent.end() > extent.offset);
    require(extent.offset % kPageBytes == 0 && extent.size_bytes % kPageBytes == 0);
    end = extent.end();
  }
  require(end <= state->memory_bytes);
  for (const auto& [key, section] : state->sections) {
    require(check_word("", key.first).ok() && check_word("", key.second).ok());
    require(section.bytes.empty() || (section.bytes.data() >= file.data() &&
                                      section.bytes.data() + section.bytes.size() <= file.data() + file.size()));
    require(sha256(section.bytes) == section.digest);
  }
  const std::vector<std::byte> again = encode(*state);
  const auto second = parse_state(again);
  require(second.ok() && encode(*second) == again);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::span<const uint8_t> input(data, size);
  parse(std::as_bytes(input));
  std::vector<std::byte> sealed(std::as_bytes(input).begin(), std::as_bytes(input).end());
  seal(sealed);
  parse(sealed);
  return 0;
}
