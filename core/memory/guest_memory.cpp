// SPDX-License-Identifier: Apache-2.0
// Maps the guest's memory, checks each access to it and keeps the marks of what the host side wrote.
#include "memory/guest_memory.hpp"

#include <fcntl.h>
#include <linux/membarrier.h>
#include <linux/memfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <fstream>
#include <map>
#include <string>

#include "memory/pagemap.hpp"
#include "memory/usage.hpp"

namespace vmm {
namespace {

constexpr uint64_t kMiB = 1ull << 20;
constexpr uint64_t kHugePageSize = 2 * kMiB;
// A KVM memory slot holds less than 2^31 pages; half of that also keeps clear of every CPU's address width.
constexpr uint64_t kMaximumSize = 4ull << 40;
constexpr uint64_t kPagesInWord = 64;
// Each may split a mapping in three; the kernel allows 65530 by default.
constexpr uint32_t kMostReplacedRanges = 8192;

std::string size_text(uint64_t size_bytes) {
  if (size_bytes % kMiB == 0 && size_bytes != 0) return std::to_string(size_bytes / kMiB) + " MiB";
  return std::to_string(size_bytes) + " bytes";
}

// Address space at a multiple of 2 MiB, where a huge page fits.
Result<Mapping> reserve_aligned(uint64_t size_bytes) {
  const uint64_t reserved_bytes = size_bytes + kHugePageSize;
  void* reserved = ::mmap(nullptr, reserved_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) return errno_error("mmap");
  const auto first = reinterpret_cast<uintptr_t>(reserved);
  const uintptr_t start = (first + kHugePageSize - 1) & ~(kHugePageSize - 1);
  const uint64_t before = start - first;
  if (before) ::munmap(reserved, before);
  if (before < kHugePageSize) ::munmap(reinterpret_cast<void*>(start + size_bytes), kHugePageSize - before);
  return Mapping(reinterpret_cast<void*>(start), size_bytes);
}

// Guest memory is aligned to 2 MiB on the host too: only then can a huge page of the host back one of the guest.
// `fd` is -1 for anonymous memory.
Result<Mapping> map_region(const MemoryConfig& config, uint64_t size_bytes, int fd, uint64_t offset) {
  Mapping mapping = TRY(reserve_aligned(size_bytes));
  int flags = MAP_FIXED | (fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS);
  if (config.huge_pages != HugePages::reserved_2m) {
    flags |= MAP_NORESERVE;
  } else if (fd < 0) {
    flags |= MAP_HUGETLB | (21 << MAP_HUGE_SHIFT);
  }
  void* const mapped = mapping.data();
  if (::mmap(mapped, size_bytes, PROT_READ | PROT_WRITE, flags, fd, static_cast<off_t>(offset)) == MAP_FAILED)
    return errno_error("mmap");

  // All are wishes: a host kernel built without one of them answers EINVAL, and the guest runs all the same.
  if (config.huge_pages == HugePages::transparent) ::madvise(mapped, size_bytes, MADV_HUGEPAGE);
  if (config.mergeable) ::madvise(mapped, size_bytes, MADV_MERGEABLE);
  if (fd < 0) ::prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, mapped, size_bytes, kGuestMemoryName);
  return mapping;
}

Result<Fd> create_memfd(const MemoryConfig& config) {
  unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  if (config.huge_pages == HugePages::reserved_2m) flags |= MFD_HUGETLB | MFD_HUGE_2MB;
  Fd fd(::memfd_create(kGuestMemoryName, flags));
  if (!fd) return errno_error("memfd_create");
  if (::ftruncate(fd.get(), static_cast<off_t>(config.size_bytes)) != 0) return errno_error("ftruncate");
  // Whoever else gets the descriptor (vhost-user, a fork) cannot cut the pages away from under us.
  if (::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0) return errno_error("F_ADD_SEALS");
  return fd;
}

// The kernel has a limit for the mappings of a process (vm.max_map_count): each extent may take two, and half of all is
// left to others.
uint64_t most_mapped_extents() {
  uint64_t most = 65530;
  std::ifstream("/proc/sys/vm/max_map_count") >> most;
  return most / 4;
}

// Extents of at least so many bytes are mapped.
uint64_t smallest_to_map(std::span<const MemoryExtent> extents) {
  const uint64_t most = most_mapped_extents();
  if (extents.size() <= most) return 0;
  std::vector<uint64_t> sizes;
  for (const MemoryExtent& extent : extents) sizes.push_back(extent.size_bytes);
  std::nth_element(sizes.begin(), sizes.begin() + static_cast<ptrdiff_t>(most), sizes.end(), std::greater());
  return sizes[most] + 1;
}

}  // namespace

Result<void> read_snapshot_memory(int fd, uint64_t offset, std::span<std::byte> into) {
  while (!into.empty()) {
    const ssize_t count = ::pread(fd, into.data(), into.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return errno_error("the snapshot's memory");
    if (count == 0) return Error{"the snapshot's memory: its file ends too early", 0, CLONE_ERR_CORRUPT};
    offset += static_cast<uint64_t>(count);
    into = into.subspan(static_cast<size_t>(count));
  }
  return {};
}

void PageSet::add_run(uint64_t first, uint64_t count) {
  if (count == 0) return;
  words_.resize(std::max(words_.size(), (first + count - 1) / kPagesInWord + 1));
  for (const uint64_t end = first + count; first < end;) {
    const uint64_t bit = first % kPagesInWord, bits = std::min(kPagesInWord - bit, end - first);
    words_[first / kPagesInWord] |= (~uint64_t{0} >> (kPagesInWord - bits)) << bit;
    first += bits;
  }
}

void PageSet::add(uint64_t first_page, std::span<const uint64_t> words) {
  const uint64_t first = first_page / kPagesInWord;
  if (words_.size() < first + words.size()) words_.resize(first + words.size());
  for (size_t i = 0; i < words.size(); ++i) words_[first + i] |= words[i];
}

uint64_t PageSet::count() const {
  uint64_t pages = 0;
  for (const uint64_t word : words_) pages += static_cast<uint64_t>(std::popcount(word));
  return pages;
}

std::pair<uint64_t, uint64_t> PageSet::next_run(uint64_t page, uint64_t end) const {
  // The next page that is in it, or is not: by words, of which most are empty.
  const auto find = [&](uint64_t from, bool wanted) {
    while (from < end && from / kPagesInWord < words_.size()) {
      const uint64_t word = words_[from / kPagesInWord];
      const uint64_t left = (wanted ? word : ~word) >> from % kPagesInWord;
      if (left) return std::min(end, from + static_cast<uint64_t>(std::countr_zero(left)));
      from = (from / kPagesInWord + 1) * kPagesInWord;
    }
    return wanted ? end : std::min(end, from);
  };
  const uint64_t first = find(page, true);
  return {first, find(first, false)};
}

Result<GuestMemory> GuestMemory::create(const MemoryConfig& config) {
  const bool reserved_pages = config.huge_pages == HugePages::reserved_2m;
  const std::string what = "memory: " + size_text(config.size_bytes);
  const uint64_t unit = reserved_pages ? kHugePageSize : kPageSize;
  if (config.size_bytes == 0 || config.size_bytes % unit != 0) {
    return Error{what + ": the size has to be a multiple of " + size_text(unit) + ", and more than 0", EINVAL};
  }
  const auto cannot_map = [&](const std::string& reason, int code) {
    return Error{what + ": the host cannot map that much (" + reason + ")", code};
  };
  if (config.size_bytes > kMaximumSize) {
    return cannot_map("at most " + size_text(kMaximumSize) + " in one guest", ENOMEM);
  }
  const auto refused = [&](const Error& error) {
    const std::string hint = reserved_pages && error.code == ENOMEM ? "; see /proc/sys/vm/nr_hugepages" : "";
    return cannot_map(error.message + hint, error.code);
  };

  GuestMemory memory;
  memory.size_bytes_ = config.size_bytes;
  memory.mergeable_ = config.mergeable;
  memory.reserved_pages_ = reserved_pages;
  memory.dirty_ = std::make_unique<DirtyBitmap>();
  if (config.backing == MemoryBacking::memfd) {
    Result<Fd> fd = create_memfd(config);
    if (!fd) return refused(fd.error());
    memory.memfd_ = std::move(*fd);
    memory.base_.push_back({memory.memfd(), 0, 0, config.size_bytes});
  }
  uint64_t offset = 0;
  for (const uint64_t start : {uint64_t{0}, kHoleEnd}) {
    const uint64_t left = config.size_bytes - offset;
    if (left == 0) break;
    const uint64_t size_bytes = start == 0 ? std::min(left, kHoleStart) : left;
    Result<Mapping> mapping = map_region(config, size_bytes, memory.memfd(), offset);
    if (!mapping) return refused(mapping.error());
    memory.regions_.push_back({{start}, size_bytes, mapping->data()});
    memory.mappings_.push_back(std::move(*mapping));
    offset += size_bytes;
  }
  return memory;
}

Result<GuestMemory> GuestMemory::restore(MemoryConfig config, std::span<const MemoryExtent> extents) {
  config.backing = MemoryBacking::anonymous;
  config.huge_pages = HugePages::off;
  GuestMemory memory = TRY(create(config));
  memory.become_restored();
  const auto corrupt = [](const char* what) {
    return Error{std::string("the snapshot's memory: ") + what, EINVAL, CLONE_ERR_CORRUPT};
  };
  const uint64_t smallest_mapped = smallest_to_map(extents);
  std::map<int, int> files;
  uint64_t end = 0;  // of the extent before
  for (const MemoryExtent& extent : extents) {
    if ((extent.memory_offset | extent.fd_offset | extent.size_bytes) % kPageSize != 0)
      return corrupt("an extent is not of whole pages");
    if (extent.memory_offset < end || extent.memory_offset > memory.size_bytes_ ||
        extent.size_bytes > memory.size_bytes_ - extent.memory_offset)
      return corrupt("extents overlap, or lie outside of it");
    end = extent.memory_offset + extent.size_bytes;
    uint64_t region_offset = 0;
    for (const Region& region : memory.regions_) {
      const uint64_t start = std::max(extent.memory_offset, region_offset);
      const uint64_t stop = std::min(end, region_offset + region.size_bytes);
      std::byte* const where = region.host + (start - region_offset);
      const uint64_t offset = extent.fd_offset + (start - extent.memory_offset);
      region_offset += region.size_bytes;
      if (start >= stop) continue;
      if (extent.size_bytes < smallest_mapped) {
        TRY(read_snapshot_memory(extent.fd, offset, {where, stop - start}));
        continue;
      }
      if (::mmap(where, stop - start, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_NORESERVE, extent.fd,
                 static_cast<off_t>(offset)) == MAP_FAILED)
        return errno_error("the snapshot's memory: mmap");
      const int file = TRY(memory.keep_file(extent.fd, files));
      memory.base_.push_back({file, offset, start, stop - start});
      if (config.mergeable) ::madvise(where, stop - start, MADV_MERGEABLE);
    }
  }
  return memory;
}

// The region's pages to another place, by whole tables of them; nothing where the kernel cannot. What stays is mapped as
// it was, so that no other thread's mapping takes the place, but with no page: to map something else over it is quick.
Mapping GuestMemory::move_away(const Region& region) {
  auto place = reserve_aligned(region.size_bytes);
  if (!place.ok()) return {};
  // Wishes for a part have split the mapping; only one is moved.
  ::madvise(region.host, region.size_bytes, MADV_NOHUGEPAGE);
  if (::mremap(region.host, region.size_bytes, region.size_bytes, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP,
               place->data()) == MAP_FAILED)
    return {};
  return std::move(*place);
}

// Of a file that others may close: a descriptor of our own, one for all of its extents.
Result<int> GuestMemory::keep_file(int fd, std::map<int, int>& kept) {
  const auto [file, is_new] = kept.try_emplace(fd, -1);
  if (is_new) {
    Fd own(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
    if (!own) return errno_error("the memory's descriptor");
    file->second = own.get();
    base_files_.push_back(std::move(own));
  }
  return file->second;
}

void GuestMemory::become_restored() {
  restored_ = std::make_unique<Restored>();
  restored_->replaced.resize(size_bytes_ / kPageSize);
}

uint64_t GuestMemory::offset_of(GuestAddress start) const {
  uint64_t offset = 0;
  for (const Region& region : regions_) {
    if (start < region.start + region.size_bytes) return offset + (start.value - region.start.value);
    offset += region.size_bytes;
  }
  return offset;
}

void GuestMemory::set_mergeable(bool wanted) {
  if (std::exchange(mergeable_, wanted) == wanted) return;
  for (const Region& region : regions_)
    ::madvise(region.host, region.size_bytes, wanted ? MADV_MERGEABLE : MADV_UNMERGEABLE);
}

Result<std::vector<Mapping>> GuestMemory::make_private() {
  std::vector<Mapping> left;
  if (!memfd_) return left;
  // A copy of such a page may find none left in the host's pool, and the machine would die of it.
  if (reserved_pages_)
    return Error{"memory in a memfd of reserved huge pages (huge-pages=2M) cannot be copied as it is written"};
  const auto map = [&](const Region& region, int sharing) {
    return ::mmap(region.host, region.size_bytes, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_NORESERVE | sharing,
                  memfd_.get(), static_cast<off_t>(offset_of(region.start))) != MAP_FAILED;
  };
  for (size_t i = 0; i < regions_.size(); ++i) {
    if (Mapping moved = move_away(regions_[i]); moved.data()) left.push_back(std::move(moved));
    if (!map(regions_[i], MAP_PRIVATE)) {
      const Error error = errno_error("memory: mmap");
      // Nothing has been written to those before; this one may be a hole by now.
      for (size_t back = 0; back <= i; ++back) map(regions_[back], MAP_SHARED);
      return error;
    }
    if (mergeable_) ::madvise(regions_[i].host, regions_[i].size_bytes, MADV_MERGEABLE);
  }
  base_files_.push_back(std::move(memfd_));
  become_restored();
  return left;
}

PageSet GuestMemory::base_pages() const {
  PageSet pages;
  for (const MemoryExtent& extent : base_) {
    const auto add = [&](uint64_t start, uint64_t end) {  // in the file
      const uint64_t first = (start - extent.fd_offset) / kPageSize;
      pages.add_run(extent.memory_offset / kPageSize + first, (end - extent.fd_offset + kPageSize - 1) / kPageSize - first);
    };
    const uint64_t file_end = extent.fd_offset + extent.size_bytes;
    for (uint64_t at = extent.fd_offset; at < file_end;) {
      const off_t data = ::lseek(extent.fd, static_cast<off_t>(at), SEEK_DATA);
      if (data < 0 && errno == ENXIO) break;
      const off_t hole = data < 0 ? -1 : ::lseek(extent.fd, data, SEEK_HOLE);
      const uint64_t start = data < 0 ? at : std::min(static_cast<uint64_t>(data), file_end);
      at = hole < 0 ? file_end : std::min(static_cast<uint64_t>(hole), file_end);
      if (start < at) add(start, at);
    }
  }
  return pages;
}

Result<PageSet> GuestMemory::contents() const {
  PageSet pages = base_pages();
  if (memfd_) return pages;
  if (restored_) {
    pages.add(TRY(changed_pages()));
    return pages;
  }
  uint64_t region_page = 0;
  for (const Region& region : regions_) {
    const auto add = [&](uint64_t offset, uint64_t size_bytes) {
      pages.add_run(region_page + offset / kPageSize, size_bytes / kPageSize);
    };
    TRY(find_pages({region.host, region.size_bytes}, PagesOf::process, add));
    region_page += region.size_bytes / kPageSize;
  }
  return pages;
}

void GuestMemory::share_with_children(bool wanted) const {
  for (const Region& region : regions_) ::madvise(region.host, region.size_bytes, wanted ? MADV_DOFORK : MADV_DONTFORK);
}

Result<void> GuestMemory::visit_pages(
    const PageSet& pages, uint64_t most_bytes,
    const std::function<Result<void>(uint64_t, std::span<const std::byte>)>& visit) const {
  uint64_t region_page = 0;
  for (const Region& region : regions_) {
    const uint64_t region_end = region_page + region.size_bytes / kPageSize;
    for (uint64_t page = region_page;;) {
      const auto [first, run_end] = pages.next_run(page, region_end);
      if (first == region_end) break;
      page = std::min(run_end, first + most_bytes / kPageSize);
      TRY(visit(first * kPageSize, {region.host + (first - region_page) * kPageSize, (page - first) * kPageSize}));
    }
    region_page = region_end;
  }
  return {};
}

Result<PageSet> GuestMemory::changed_pages() const {
  if (!restored_) return Error{"memory that was not restored"};
  const std::lock_guard lock(restored_->mutex);
  PageSet changed;
  uint64_t region_page = 0;
  for (const Region& region : regions_) {
    const uint64_t pages = region.size_bytes / kPageSize;
    std::vector<uint64_t> words((pages + kPagesInWord - 1) / kPagesInWord);
    const auto add = [&](uint64_t offset, uint64_t size_bytes) {
      for (uint64_t page = offset / kPageSize; page < (offset + size_bytes) / kPageSize; ++page)
        words[page / kPagesInWord] |= 1ull << page % kPagesInWord;
    };
    TRY(find_pages({region.host, region.size_bytes}, PagesOf::process, add));
    for (uint64_t page = 0; page < pages && restored_->ranges; ++page)
      if (restored_->replaced[region_page + page]) add(page * kPageSize, kPageSize);
    changed.add(region_page, words);
    region_page += pages;
  }
  return changed;
}

size_t GuestMemory::find_region(GuestAddress start, uint64_t size_bytes) const {
  for (size_t index = 0; index < regions_.size(); ++index) {
    const Region& region = regions_[index];
    if (start < region.start) continue;
    const uint64_t offset = start.value - region.start.value;
    if (offset < region.size_bytes && size_bytes <= region.size_bytes - offset) return index;
  }
  return kNoRegion;
}

std::byte* GuestMemory::slice(GuestAddress start, uint64_t size_bytes) const {
  const size_t index = find_region(start, size_bytes);
  if (index == kNoRegion) return nullptr;
  return regions_[index].host + (start.value - regions_[index].start.value);
}

void GuestMemory::prefault(GuestAddress start, uint64_t size_bytes) const {
  std::byte* first = slice(start, size_bytes);
  if (!first) return;
  const uint64_t in_page = reinterpret_cast<uintptr_t>(first) % kPageSize;
  ::madvise(first - in_page, size_bytes + in_page, MADV_POPULATE_WRITE);
}

Result<TouchedPages> GuestMemory::touched() const {
  TouchedPages pages;
  if (!restored_) return pages;
  uint64_t region_page = 0;
  for (const Region& region : regions_) {
    const auto into = [&](std::vector<PageRun>& runs) {
      return [&](uint64_t offset, uint64_t size_bytes) {
        for (uint64_t page = region_page + offset / kPageSize; size_bytes > 0; ++page, size_bytes -= kPageSize)
          if (restored_->replaced[page])
            continue;
          else if (!runs.empty() && runs.back().first + runs.back().count == page)
            ++runs.back().count;
          else
            runs.push_back({page, 1});
      };
    };
    const std::lock_guard lock(restored_->mutex);
    TRY(find_pages({region.host, region.size_bytes}, PagesOf::file, into(pages.read)));
    TRY(find_pages({region.host, region.size_bytes}, PagesOf::process, into(pages.written)));
    region_page += region.size_bytes / kPageSize;
  }
  return pages;
}

bool GuestMemory::populate(PageRun run, Use use) const {
  if (!restored_) return true;
  const std::lock_guard lock(restored_->mutex);  // nothing is given back meanwhile
  const auto& replaced = restored_->replaced;
  const uint64_t end = run.first < replaced.size() ? run.first + std::min(run.count, replaced.size() - run.first) : 0;
  uint64_t region_page = 0;
  for (const Region& region : regions_) {
    const uint64_t region_end = region_page + region.size_bytes / kPageSize;
    for (uint64_t page = std::max(run.first, region_page), next = 0; page < std::min(end, region_end); page = next) {
      for (next = page + 1; next < std::min(end, region_end) && replaced[next] == replaced[page];) ++next;
      if (replaced[page]) continue;
      if (::madvise(region.host + (page - region_page) * kPageSize, (next - page) * kPageSize,
                    use == Use::write ? MADV_POPULATE_WRITE : MADV_POPULATE_READ) != 0 &&
          errno == EINVAL)
        return false;
    }
    region_page = region_end;
  }
  return true;
}

void GuestMemory::prefer_huge_pages(GuestAddress start, uint64_t size_bytes) const {
  for (const Region& region : regions_) {
    if (start < region.start || size_bytes > region.size_bytes ||
        start.value - region.start.value > region.size_bytes - size_bytes)
      continue;
    const uint64_t offset = start.value - region.start.value;
    const uint64_t first = offset / kHugePageSize * kHugePageSize;
    const uint64_t end =
        std::min((offset + size_bytes + kHugePageSize - 1) / kHugePageSize * kHugePageSize, region.size_bytes);
    ::madvise(region.host + first, end - first, MADV_HUGEPAGE);
  }
}

bool GuestMemory::read(GuestAddress start, void* into, uint64_t size_bytes) const {
  const std::byte* from = slice(start, size_bytes);
  if (!from) return false;
  if (size_bytes) std::memcpy(into, from, size_bytes);
  return true;
}

bool GuestMemory::write(GuestAddress start, const void* from, uint64_t size_bytes) {
  std::byte* into = slice(start, size_bytes);
  if (!into) return false;
  if (size_bytes) std::memcpy(into, from, size_bytes);
  mark_dirty(start, size_bytes);
  return true;
}

void GuestMemory::enable_dirty_tracking(bool enabled) {
  if (enabled && dirty_->words.empty()) {
    for (const Region& region : regions_) {
      const uint64_t pages = region.size_bytes / kPageSize;
      const uint64_t words = (pages + kPagesInWord - 1) / kPagesInWord;
      dirty_->words.push_back(std::make_unique<std::atomic<uint64_t>[]>(words));
    }
  } else if (enabled) {
    for (size_t index = 0; index < regions_.size(); ++index) take_dirty(index);
  }
  // Publishes the arrays to whoever sees `enabled`.
  dirty_->enabled.store(enabled, std::memory_order_release);
  // Whoever did not see it yet has written before, and that is seen from here on.
  if (enabled) ::syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0);
}

// What is dropped from a private mapping of a file is the file's again, not zeroes: other memory takes its place, once.
// That takes mappings, of which a guest must not use up the process's: past a number of them pages are only cleared.
void GuestMemory::drop_restored(std::byte* host, uint64_t offset, uint64_t size_bytes) {
  const std::lock_guard lock(restored_->mutex);
  auto& replaced = restored_->replaced;
  const auto first = replaced.begin() + static_cast<ptrdiff_t>(offset / kPageSize);
  const auto last = first + static_cast<ptrdiff_t>(size_bytes / kPageSize);
  if (std::find(first, last, false) == last) {
    ::madvise(host, size_bytes, MADV_DONTNEED);
    return;
  }
  const int flags = MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  if (restored_->ranges == kMostReplacedRanges ||
      ::mmap(host, size_bytes, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED) {
    std::memset(host, 0, size_bytes);
    return;
  }
  ++restored_->ranges;
  std::fill(first, last, true);
  if (mergeable_) ::madvise(host, size_bytes, MADV_MERGEABLE);
}

bool GuestMemory::discard(GuestAddress start, uint64_t size_bytes) {
  std::byte* host = slice(start, size_bytes);
  if (!host || size_bytes == 0 || start.value % kPageSize != 0 || size_bytes % kPageSize != 0) return false;
  if (restored_) {
    drop_restored(host, offset_of(start), size_bytes);
  } else if (::madvise(host, size_bytes, memfd_ ? MADV_REMOVE : MADV_DONTNEED) != 0) {
    return false;  // (MADV_REMOVE punches a hole into the file behind a shared mapping)
  }
  mark_dirty(start, size_bytes);
  return true;
}

void GuestMemory::mark_dirty(GuestAddress start, uint64_t size_bytes) {
  if (!dirty_->enabled.load(std::memory_order_acquire) || size_bytes == 0) return;
  const size_t index = find_region(start, size_bytes);
  if (index == kNoRegion) return;
  const uint64_t offset = start.value - regions_[index].start.value;
  const uint64_t last_page = (offset + size_bytes - 1) / kPageSize;
  for (uint64_t page = offset / kPageSize; page <= last_page;) {
    const uint64_t bit = page % kPagesInWord;
    const uint64_t count = std::min(kPagesInWord - bit, last_page - page + 1);
    const uint64_t mask = (~uint64_t{0} >> (kPagesInWord - count)) << bit;
    dirty_->words[index][page / kPagesInWord].fetch_or(mask, std::memory_order_release);
    page += count;
  }
}

std::vector<uint64_t> GuestMemory::take_dirty(size_t region_index) {
  std::vector<uint64_t> taken;
  if (dirty_->words.empty()) return taken;
  const uint64_t pages = regions_[region_index].size_bytes / kPageSize;
  taken.resize((pages + kPagesInWord - 1) / kPagesInWord);
  for (size_t word = 0; word < taken.size(); ++word) {
    std::atomic<uint64_t>& marks = dirty_->words[region_index][word];
    // Most words are clean: a plain load leaves their cache lines shared.
    if (marks.load(std::memory_order_relaxed)) taken[word] = marks.exchange(0, std::memory_order_acquire);
  }
  return taken;
}

}  // namespace vmm
