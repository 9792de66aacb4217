// SPDX-License-Identifier: Apache-2.0
// Writes memory and state into files that have no name, and gives them to a keeper in one step.
#include "new_snapshot.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>

namespace snapshot_memory {
namespace {

using namespace snapshot_file;

// Holes up to this size are mapped along with the data around them: few mappings, and little memory if forks read them.
constexpr uint64_t kSmallHoleBytes = 2 << 20;
constexpr uint64_t kMostMappings = 512;

bool is_zero_page(const std::byte* page) {
  alignas(64) static constexpr std::byte zeroes[kPageBytes]{};
  return std::memcmp(page, zeroes, kPageBytes) == 0;
}

Result<Fd> make_file(const std::string& name) {
  Fd file(::memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!file) return system_error().context("memfd_create");
  return file;
}

// Where there is data, ascending and apart, at most kMostMappings.
Result<std::vector<Extent>> data_of(int file, uint64_t size_bytes) {
  const uint64_t small_hole_bytes = std::max(kSmallHoleBytes, size_bytes / kMostMappings);
  std::vector<Extent> extents;
  for (uint64_t at = 0; at < size_bytes;) {
    const off_t start = ::lseek(file, static_cast<off_t>(at), SEEK_DATA);
    if (start < 0 && errno == ENXIO) break;
    const off_t end = start < 0 ? start : ::lseek(file, start, SEEK_HOLE);
    if (end < 0) return system_error();
    const Extent data{static_cast<uint64_t>(start), static_cast<uint64_t>(end - start)};
    if (!extents.empty() && data.offset - extents.back().end() <= small_hole_bytes)
      extents.back().size_bytes = data.end() - extents.back().offset;
    else
      extents.push_back(data);
    at = data.end();
  }
  return extents;
}

}  // namespace

Result<std::unique_ptr<NewSnapshot>> NewSnapshot::begin(Keepers keepers, const std::string& name,
                                                        uint64_t memory_bytes) {
  std::unique_ptr<NewSnapshot> snapshot(new NewSnapshot(std::move(keepers), name));
  CLONE_TRY(check_memory_bytes(memory_bytes).context(snapshot->what()));
  CLONE_TRY(snapshot->keepers_.expect_free(name));
  snapshot->program_ = CLONE_TRY(open_keeper_program());
  State& state = snapshot->state_;
  state.memory_bytes = memory_bytes;
  if (::getrandom(state.identity.data(), sizeof state.identity, 0) != ssize_t{sizeof state.identity})
    return system_error().context("getrandom");
  snapshot->memory_ = CLONE_TRY(make_file("clone-template-memory").context(snapshot->what()));
  if (::ftruncate(snapshot->memory_.get(), static_cast<off_t>(memory_bytes)) != 0)
    return system_error().context(snapshot->what());
  return snapshot;
}

Result<void> NewSnapshot::check_writing() const {
  if (phase_ == Phase::writing) return {};
  return Error{what() + (phase_ == Phase::committed ? ": is complete already"
                                                    : ": an earlier write failed; it can only be closed"),
               0, CLONE_ERR_STATE};
}

Result<void> NewSnapshot::write_memory(uint64_t memory_offset, std::span<const std::byte> data) {
  CLONE_TRY(check_writing());
  if (memory_offset % kPageBytes || data.size() % kPageBytes || data.size() > state_.memory_bytes ||
      memory_offset > state_.memory_bytes - data.size())
    return Error{what() + ": " + std::to_string(data.size()) + " bytes at " + std::to_string(memory_offset) +
                 " given; allowed are whole pages of 4096 inside the memory of " + std::to_string(state_.memory_bytes) +
                 " bytes"};
  auto written = write(memory_offset, data);
  if (!written.ok()) phase_ = Phase::failed;
  return std::move(written).context(what());
}

// Pages of zeroes become holes, whatever was there before.
Result<void> NewSnapshot::write(uint64_t memory_offset, std::span<const std::byte> data) {
  const uint64_t count = data.size() / kPageBytes;
  const auto is_hole = [&](uint64_t page) { return is_zero_page(data.data() + page * kPageBytes); };
  for (uint64_t page = 0, end = 0; page < count; page = end) {
    const bool hole = is_hole(page);
    for (end = page + 1; end < count && is_hole(end) == hole;) ++end;
    const uint64_t offset = memory_offset + page * kPageBytes, size_bytes = (end - page) * kPageBytes;
    if (!hole)
      CLONE_TRY(write_at(memory_.get(), offset, data.subspan(page * kPageBytes, size_bytes)));
    else if (::fallocate(memory_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                         static_cast<off_t>(size_bytes)) != 0)
      return system_error();
  }
  return {};
}

Result<void> NewSnapshot::write_section(std::string_view owner, std::string_view tag, uint32_t version,
                                        std::span<const std::byte> data) {
  CLONE_TRY(check_writing());
  return sections_.add(state_, owner, tag, version, data);
}

Result<void> NewSnapshot::commit() {
  CLONE_TRY(check_writing());
  phase_ = Phase::failed;
  state_.extents = CLONE_TRY(data_of(memory_.get(), state_.memory_bytes).context(what()));
  const Fd state = CLONE_TRY(write_state().context(what()));
  CLONE_TRY(keepers_.publish(name_, program_.get(), memory_.get(), state.get()).context(what()));
  phase_ = Phase::committed;
  return {};
}

Result<Fd> NewSnapshot::write_state() const {
  Fd file = CLONE_TRY(make_file("clone-template-state"));
  const std::vector<std::byte> tables = encode_tables(state_);
  CLONE_TRY(write_at(file.get(), 0, tables));
  uint64_t offset = tables.size();
  for (const auto& [key, section] : state_.sections) {
    CLONE_TRY(write_at(file.get(), offset, section.bytes));
    offset += section.bytes.size();
  }
  return file;
}

}  // namespace snapshot_memory
