// SPDX-License-Identifier: Apache-2.0
// Warm start of a fork's memory: pages that its template's forks touch in their first moments are mapped ahead.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "loop/thread.hpp"
#include "memory/guest_memory.hpp"
#include "snapshot/backend.hpp"
#include "util/result.hpp"

namespace vmm {

enum class PrefaultMode { none, recorded, all };

// The note of a template that holds the pages. It is a hint: whoever can write it makes a fork map pages of its own
// memory, at most kMostWrittenPages as copies, and nothing else.
inline constexpr const char* kTouchedNote = "touched-pages";
constexpr uint64_t kMostWrittenPages = 4096;

// More than fits is left out.
std::vector<std::byte> encode_touched(const TouchedPages& pages, uint64_t page_count);
// Of a memory with so many pages.
Result<TouchedPages> decode_touched(std::span<const std::byte> note, uint64_t page_count);

// Beside a machine that is made and runs: maps what is recorded; where nothing is, records what it has touched after a
// moment.
class Prefault {
 public:
  // What it works on lasts as long as it; `image` may be NULL.
  static Result<std::unique_ptr<Prefault>> start(const GuestMemory& memory, PrefaultMode mode, SnapshotImage* image);
  // Maps what is recorded, and returns when that is done. False: nothing is recorded.
  static bool map_recorded(const GuestMemory& memory, SnapshotImage& image);
  Prefault(const Prefault&) = delete;
  Prefault& operator=(const Prefault&) = delete;
  // Ends it within a piece.
  ~Prefault();

 private:
  Prefault(const GuestMemory& memory, SnapshotImage* image) : memory_(memory), image_(image) {}

  std::optional<TouchedPages> recorded() const;
  void map_all_of(const TouchedPages& pages);
  void map_recorded_or_record();
  Result<void> record() const;
  void map_all();
  bool map(std::span<const PageRun> runs, GuestMemory::Use use);
  bool is_stopped();

  const GuestMemory& memory_;
  SnapshotImage* const image_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stopped_ = false;
  Thread thread_;
};

}  // namespace vmm
