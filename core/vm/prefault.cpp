// SPDX-License-Identifier: Apache-2.0
// A thread that maps pages in pieces while the machine is made and begins to run, or records them once.
#include "vm/prefault.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "util/log.hpp"

namespace vmm {
namespace {

// What a machine touches until then are its first moments.
constexpr std::chrono::milliseconds kFirstMoments{2000};
// While a piece is mapped, whoever gives memory back or maps other memory waits.
constexpr uint64_t kPiecePages = 64;

// The note: this, then the runs of pages that were read, then of those that were written. Little endian, as the host is.
constexpr char kMagic[8] = {'T', 'O', 'U', 'C', 'H', 'E', 'D', '1'};
struct NoteHeader {
  char magic[8];
  uint64_t page_count;  // of the memory
  uint32_t read_runs, written_runs;
};
struct NoteRun {
  uint32_t first, count;
};
constexpr size_t kMostRuns = (CLONE_SNAPSHOT_NOTE_MAX_BYTES - sizeof(NoteHeader)) / sizeof(NoteRun) / 2;  // each

std::vector<NoteRun> note_runs(std::span<const PageRun> runs, uint64_t most_pages) {
  std::vector<NoteRun> noted;
  for (const PageRun& run : runs) {
    const uint64_t count = std::min(run.count, most_pages);
    if (noted.size() == kMostRuns || count == 0 || run.first + count > UINT32_MAX) break;
    most_pages -= count;
    noted.push_back({static_cast<uint32_t>(run.first), static_cast<uint32_t>(count)});
  }
  return noted;
}

}  // namespace

std::vector<std::byte> encode_touched(const TouchedPages& pages, uint64_t page_count) {
  const std::vector<NoteRun> read = note_runs(pages.read, page_count);
  const std::vector<NoteRun> written = note_runs(pages.written, kMostWrittenPages);
  NoteHeader header{{}, page_count, static_cast<uint32_t>(read.size()), static_cast<uint32_t>(written.size())};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  std::vector<std::byte> note;
  const auto append = [&note](const auto& items) {
    const auto bytes = std::as_bytes(std::span(items));
    note.insert(note.end(), bytes.begin(), bytes.end());
  };
  append(std::span(&header, 1));
  append(read);
  append(written);
  return note;
}

Result<TouchedPages> decode_touched(std::span<const std::byte> note, uint64_t page_count) {
  const auto refused = [](const char* why) {
    return Error{std::string("the template's touched pages: ") + why, 0, CLONE_ERR_CORRUPT};
  };
  NoteHeader header{};
  if (note.size() < sizeof header) return refused("are cut off");
  std::memcpy(&header, note.data(), sizeof header);
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0) return refused("are of another format");
  if (header.page_count != page_count) return refused("are of another memory");
  const size_t run_count = size_t{header.read_runs} + header.written_runs;
  if (header.read_runs > kMostRuns || header.written_runs > kMostRuns ||
      note.size() != sizeof header + run_count * sizeof(NoteRun))
    return refused("have another size than they say");
  TouchedPages pages;
  uint64_t end = 0, written_pages = 0;
  for (size_t i = 0; i < run_count; ++i) {
    NoteRun run{};
    std::memcpy(&run, note.data() + sizeof header + i * sizeof run, sizeof run);
    const bool is_read = i < header.read_runs;
    if (i == header.read_runs) end = 0;
    if (run.first < end || run.count == 0 || run.first >= page_count || run.count > page_count - run.first)
      return refused("overlap, or lie outside of it");
    end = uint64_t{run.first} + run.count;
    if (!is_read && (written_pages += run.count) > kMostWrittenPages) return refused("are too many written ones");
    (is_read ? pages.read : pages.written).push_back({run.first, run.count});
  }
  return pages;
}

Result<std::unique_ptr<Prefault>> Prefault::start(const GuestMemory& memory, PrefaultMode mode, SnapshotImage* image) {
  std::unique_ptr<Prefault> prefault(new Prefault(memory, image));
  if (mode == PrefaultMode::none || (mode == PrefaultMode::recorded && !image)) return prefault;
  prefault->thread_ = TRY(spawn_thread("clone-prefault", [self = prefault.get(), mode] {
    mode == PrefaultMode::all ? self->map_all() : self->map_recorded_or_record();
  }));
  return prefault;
}

Prefault::~Prefault() {
  {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
  }
  wake_.notify_all();
}

bool Prefault::is_stopped() {
  const std::lock_guard lock(mutex_);
  return stopped_;
}

bool Prefault::map(std::span<const PageRun> runs, GuestMemory::Use use) {
  for (const PageRun& run : runs)
    for (uint64_t done = 0; done < run.count; done += kPiecePages)
      if (is_stopped() || !memory_.populate({run.first + done, std::min(kPiecePages, run.count - done)}, use))
        return false;
  return true;
}

bool Prefault::map_recorded(const GuestMemory& memory, SnapshotImage& image) {
  Prefault prefault(memory, &image);
  const auto pages = prefault.recorded();
  if (pages) prefault.map_all_of(*pages);
  return pages.has_value();
}

std::optional<TouchedPages> Prefault::recorded() const {
  const auto note = image_->read_note(kTouchedNote);
  if (!note.ok()) log_debug(note.error().message);
  if (!note.ok() || !*note) return std::nullopt;
  auto pages = decode_touched(**note, memory_.size_bytes() / kPageSize);
  if (pages.ok()) return std::move(*pages);
  log_debug(pages.error().message);
  return std::nullopt;
}

// The copies first: they are what a vCPU would wait for longest.
void Prefault::map_all_of(const TouchedPages& pages) {
  if (map(pages.written, GuestMemory::Use::write)) map(pages.read, GuestMemory::Use::read);
}

void Prefault::map_recorded_or_record() {
  if (const auto pages = recorded()) return map_all_of(*pages);
  {
    std::unique_lock lock(mutex_);
    if (wake_.wait_for(lock, kFirstMoments, [this] { return stopped_; })) return;
  }
  // A template that this process may not write to stays without.
  if (const auto recorded = record(); !recorded.ok()) log_debug(recorded.error().message);
}

Result<void> Prefault::record() const {
  const TouchedPages pages = TRY(memory_.touched());
  return image_->write_note(kTouchedNote, encode_touched(pages, memory_.size_bytes() / kPageSize));
}

// Holes are zeroes, for which the host would use memory.
void Prefault::map_all() {
  const PageSet pages = memory_.base_pages();
  const uint64_t end = memory_.size_bytes() / kPageSize;
  for (uint64_t page = 0; page < end;) {
    const auto [first, run_end] = pages.next_run(page, end);
    const PageRun run{first, run_end - first};
    if (!map({&run, 1}, GuestMemory::Use::read)) return;
    page = run_end;
  }
}

}  // namespace vmm
