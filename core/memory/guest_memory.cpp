// SPDX-License-Identifier: Apache-2.0
// TEMPORARY stand-in, not committed.
#include "memory/guest_memory.hpp"
#include <bit>
namespace vmm {
Result<GuestMemory> GuestMemory::create(const MemoryConfig& config) {
  GuestMemory m;
  m.size_bytes_ = config.size_bytes;
  m.dirty_ = std::make_unique<DirtyBitmap>();
  auto add = [&](uint64_t start, uint64_t size) {
    void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    m.mappings_.emplace_back(at, size);
    m.regions_.push_back({{start}, size, static_cast<std::byte*>(at)});
    m.dirty_->words.push_back(std::make_unique<std::atomic<uint64_t>[]>(size / 4096 / 64 + 1));
  };
  add(0, std::min(config.size_bytes, kHoleStart));
  if (config.size_bytes > kHoleStart) add(kHoleEnd, config.size_bytes - kHoleStart);
  return m;
}
std::byte* GuestMemory::slice(GuestAddress start, uint64_t size) const {
  for (const auto& r : regions_) {
    const uint64_t off = start.value - r.start.value;
    if (off < r.size_bytes && size <= r.size_bytes - off) return r.host + off;
  }
  return nullptr;
}
bool GuestMemory::read(GuestAddress s, void* into, uint64_t n) const {
  auto* p = slice(s, n);
  if (p) memcpy(into, p, n);
  return p;
}
bool GuestMemory::write(GuestAddress s, const void* from, uint64_t n) {
  auto* p = slice(s, n);
  if (p) { memcpy(p, from, n); mark_dirty(s, n); }
  return p;
}
void GuestMemory::enable_dirty_tracking(bool e) { dirty_->enabled = e; }
void GuestMemory::mark_dirty(GuestAddress s, uint64_t n) {
  if (!dirty_->enabled.load(std::memory_order_relaxed) || !n) return;
  for (size_t i = 0; i < regions_.size(); ++i) {
    const auto& r = regions_[i];
    const uint64_t off = s.value - r.start.value;
    if (off >= r.size_bytes) continue;
    for (uint64_t p = off / 4096; p <= (off + n - 1) / 4096; ++p) dirty_->words[i][p / 64] |= 1ull << (p % 64);
  }
}
std::vector<uint64_t> GuestMemory::take_dirty(size_t i) {
  std::vector<uint64_t> v;
  for (uint64_t w = 0; w <= regions_[i].size_bytes / 4096 / 64; ++w) v.push_back(dirty_->words[i][w].exchange(0));
  return v;
}
}  // namespace vmm
