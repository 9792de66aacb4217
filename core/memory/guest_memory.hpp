// SPDX-License-Identifier: Apache-2.0
// The guest's physical memory as the host sees it: checked access, dirty marks, as few slots as possible.
#pragma once

#include <atomic>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "util/fd.hpp"
#include "util/mapping.hpp"
#include "util/result.hpp"

namespace vmm {

// A guest physical address; never a host pointer, never an offset.
struct GuestAddress {
  uint64_t value = 0;
  auto operator<=>(const GuestAddress&) const = default;
  constexpr GuestAddress operator+(uint64_t bytes) const { return {value + bytes}; }
};

// The map of guest physical memory (docs/memory-map.md): memory below the hole, the hole with everything that is
// not memory, the rest of the memory from 4 GiB on.
constexpr uint64_t kPageSize = 4096;
constexpr uint64_t kHoleStart = 0xc000'0000;
constexpr uint64_t kHoleEnd = 0x1'0000'0000;

enum class MemoryBacking { anonymous, memfd };
enum class HugePages {
  off,
  kernel,       // transparent ones where the kernel is loaded: it touches all of that anyway
  transparent,  // everywhere
  reserved_2m,  // from the host's pool (hugetlb)
};

struct MemoryConfig {
  uint64_t size_bytes = 512ull << 20;
  MemoryBacking backing = MemoryBacking::anonymous;
  HugePages huge_pages = HugePages::kernel;
  bool mergeable = true;  // MADV_MERGEABLE: open to the host's KSM
};

// A part of a snapshot's memory: guest memory is counted as one stretch, regions one behind the other.
struct MemoryExtent {
  int fd = -1;
  uint64_t fd_offset = 0;
  uint64_t memory_offset = 0;
  uint64_t size_bytes = 0;
};
// From such a file; it may end too early.
Result<void> read_snapshot_memory(int fd, uint64_t offset, std::span<std::byte> into);

// Pages of the memory, counted in the same way: a bit each, page 0 is bit 0 of word 0.
class PageSet {
 public:
  void add_run(uint64_t first, uint64_t count);
  // `first_page` is a multiple of 64.
  void add(uint64_t first_page, std::span<const uint64_t> words);
  void add(const PageSet& other) { add(0, other.words_); }
  void clear() { words_.clear(); }
  uint64_t count() const;
  // The first page from there on that is in it, and the first behind that which is not, but none from `end` on.
  std::pair<uint64_t, uint64_t> next_run(uint64_t page, uint64_t end) const;

 private:
  std::vector<uint64_t> words_;
};

struct PageRun {
  uint64_t first = 0, count = 0;
};
// Pages of restored memory that are in use: still the snapshot's, or written since. Runs ascend and are apart.
struct TouchedPages {
  std::vector<PageRun> read, written;
};

class GuestMemory {
 public:
  struct Region {
    GuestAddress start;
    uint64_t size_bytes = 0;
    std::byte* host = nullptr;
  };

  // Reserves address space only (MAP_NORESERVE); pages come on first touch, zeroed. The size is a multiple of a page,
  // of 2 MiB with reserved huge pages (which are taken from the host's pool now, so that no access fails later).
  static Result<GuestMemory> create(const MemoryConfig& config);

  // Memory whose contents are those of a snapshot, copied page by page as they are written (MAP_PRIVATE): extents that
  // ascend and do not overlap, whole pages; what none covers is zeroes. Of very many the largest are mapped, the others
  // read. The descriptors may be closed afterwards, the files must not change. Memory of its own even where the
  // configuration says memfd.
  static Result<GuestMemory> restore(MemoryConfig config, std::span<const MemoryExtent> extents);

  // In ascending order; one region up to 3 GiB, two above that.
  std::span<const Region> regions() const { return regions_; }
  uint64_t size_bytes() const { return size_bytes_; }
  int memfd() const { return memfd_.get(); }  // -1 unless backed by one

  // The host's view of [start, start + size), or nullptr unless the whole range lies in one region. A size of 0
  // is valid at any address inside a region. [any]
  std::byte* slice(GuestAddress start, uint64_t size_bytes) const;

  // The end of the memory below the hole: where what must have a 32-bit address has to fit.
  GuestAddress low_end() const { return regions_.front().start + regions_.front().size_bytes; }

  // Makes the pages of a range present now, before they are filled: cheaper than by a fault each. Only a hint. [any]
  void prefault(GuestAddress start, uint64_t size_bytes) const;
  // Wishes for transparent huge pages wherever the range touches one. A host without them does without. [any]
  void prefer_huge_pages(GuestAddress start, uint64_t size_bytes) const;

  // What of restored memory is mapped by now: what was read, what the kernel mapped around that, what was written.
  // [any]
  Result<TouchedPages> touched() const;
  enum class Use { read, write };
  // Maps pages of restored memory ahead of their use, those that will be written as copies; what was given back stays
  // so. Pages that are not memory are left out. False when the host's kernel cannot (before Linux 5.14). [any]
  bool populate(PageRun run, Use use) const;

  // Copies; false, and nothing done, when the range is not memory. write() marks pages dirty. [any]
  [[nodiscard]] bool read(GuestAddress start, void* into, uint64_t size_bytes) const;
  [[nodiscard]] bool write(GuestAddress start, const void* from, uint64_t size_bytes);

  template <typename T>
  requires std::is_trivially_copyable_v<T> std::optional<T> load(GuestAddress start)
  const {
    T value;
    if (!read(start, &value, sizeof value)) return std::nullopt;
    return value;
  }
  template <typename T>
  requires std::is_trivially_copyable_v<T>
  [[nodiscard]] bool store(GuestAddress start, const T& value) { return write(start, &value, sizeof value); }

  // Memory that others could share (a memfd) becomes this process's own: what is written from now on is written to a
  // copy, and a child process sees it as it is now. The machine is paused. How long it takes does not depend on how much
  // was touched; what does is to let go of the mappings it gives, of the memory as it was, which nobody uses. [control]
  Result<std::vector<Mapping>> make_private();
  // Whether the host's KSM may merge its pages; as configured at first. [control]
  void set_mergeable(bool wanted);
  // What lies in the files that are mapped: the memfd, or what this was restored from. Without their holes, as to read
  // one may fill it. [any]
  PageSet base_pages() const;
  // All that may hold anything but zeroes; what is written during the call may be missing. [any]
  Result<PageSet> contents() const;
  // Whether a child process is to get this memory too, as is so at first: fork(2) copies a table of all its pages, and
  // whoever writes to one afterwards copies the page. [control]
  void share_with_children(bool wanted) const;
  // Calls visit(offset, bytes) for these pages in ascending order, in pieces of at most `most_bytes`; the offset counts
  // regions one behind the other. Ends with the first error. [any]
  Result<void> visit_pages(const PageSet& pages, uint64_t most_bytes,
                           const std::function<Result<void>(uint64_t, std::span<const std::byte>)>& visit) const;

  // Of restored memory: the pages that are, or may be, other than in the snapshot. Written to, given back to the host,
  // or read rather than mapped. What is written during the call may be missing. [any]
  Result<PageSet> changed_pages() const;

  // Gives whole pages back to the host; they read as zeroes afterwards, and are marked dirty. False, and nothing done,
  // unless the range is whole pages of one region. [any]
  [[nodiscard]] bool discard(GuestAddress start, uint64_t size_bytes);

  // Dirty pages written by the host side; KVM's own log is apart. Off until enabled, with no mark set: marks then cost
  // one load. On return, what was written without a mark is seen by all. Enabling is [control], one caller at a time.
  void enable_dirty_tracking(bool enabled);
  // After the write itself, so that a page taken meanwhile is marked again. What is not memory is ignored. [any]
  void mark_dirty(GuestAddress start, uint64_t size_bytes);
  // Takes and clears the marks of one region: a bit for each page, page 0 of the region is bit 0 of word 0. Empty
  // when tracking was never enabled.
  std::vector<uint64_t> take_dirty(size_t region_index);

 private:
  struct DirtyBitmap {
    std::atomic<bool> enabled{false};
    std::vector<std::unique_ptr<std::atomic<uint64_t>[]>> words;  // one array for each region
  };

  static Mapping move_away(const Region& region);
  Result<int> keep_file(int fd, std::map<int, int>& kept);
  void become_restored();
  void drop_restored(std::byte* host, uint64_t offset, uint64_t size_bytes);
  // Of memory as one stretch, regions one behind the other.
  uint64_t offset_of(GuestAddress start) const;
  static constexpr size_t kNoRegion = ~size_t{0};
  // The index of the region that [start, start + size) lies in.
  size_t find_region(GuestAddress start, uint64_t size_bytes) const;

  std::vector<Region> regions_;
  std::vector<Mapping> mappings_;
  uint64_t size_bytes_ = 0;
  Fd memfd_;
  std::vector<MemoryExtent> base_;  // mapped files: the memfd, or what this was restored from
  std::vector<Fd> base_files_;      // their descriptors, but for the memfd
  // A page that was not written is the snapshot's, unless other memory has replaced it.
  struct Restored {
    std::mutex mutex;
    std::vector<bool> replaced;  // by page, regions one behind the other
    uint32_t ranges = 0;         // that were
  };
  std::unique_ptr<Restored> restored_;
  bool mergeable_ = false;
  bool reserved_pages_ = false;
  std::unique_ptr<DirtyBitmap> dirty_;
};

}  // namespace vmm
