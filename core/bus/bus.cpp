// SPDX-License-Identifier: Apache-2.0
// Claims on the ports and addresses of a guest, and the dispatch of its accesses.
#include "bus/bus.hpp"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>

#include "util/log.hpp"

namespace vmm {
namespace {

constexpr uint64_t kLastPort = 0xffff;

const char* name_of(BusSpace space) { return space == BusSpace::pio ? "pio" : "mmio"; }

std::string range_text(uint64_t first, uint64_t last) {
  char text[48];
  std::snprintf(text, sizeof text, "%#llx-%#llx", static_cast<unsigned long long>(first),
                static_cast<unsigned long long>(last));
  return text;
}

}  // namespace

struct Bus::Entry {
  // The number of handlers that run, and kReleased once no more may begin.
  static constexpr uint32_t kReleased = 1u << 31;

  Entry(uint64_t first_address, uint64_t last_address, std::string claimant, BusHandler functions)
      : first(first_address), last(last_address), name(std::move(claimant)), handler(functions) {}

  bool enter() {
    if (!(running.fetch_add(1, std::memory_order_acquire) & kReleased)) return true;
    leave();
    return false;
  }
  void leave() {
    if (running.fetch_sub(1, std::memory_order_release) == kReleased + 1) running.notify_all();
  }
  void drain() {
    uint32_t now = running.fetch_or(kReleased, std::memory_order_acq_rel) | kReleased;
    for (; now != kReleased; now = running.load(std::memory_order_acquire)) {
      running.wait(now, std::memory_order_acquire);
    }
  }

  const uint64_t first;
  const uint64_t last;  // inclusive: a claim may end at the top of the address space
  const std::string name;
  const BusHandler handler;
  std::atomic<uint32_t> running{0};
};

Result<Bus::Claim> Bus::claim(uint64_t start, uint64_t size_bytes, std::string name, BusHandler handler) {
  const uint64_t limit = space_ == BusSpace::pio ? kLastPort : UINT64_MAX;
  if (size_bytes == 0 || start > limit || size_bytes - 1 > limit - start) {
    char text[128];
    std::snprintf(text, sizeof text, "%s %#llx: %llu bytes wanted by ", name_of(space_),
                  static_cast<unsigned long long>(start), static_cast<unsigned long long>(size_bytes));
    return Error{text + name + ": at least 1, ending at " + range_text(0, limit).substr(4) + " or below", EINVAL};
  }
  auto entry = std::make_shared<Entry>(start, start + size_bytes - 1, std::move(name), handler);

  std::lock_guard lock(mutex_);
  const auto next = std::lower_bound(table_->begin(), table_->end(), start,
                                     [](const auto& other, uint64_t address) { return other->last < address; });
  if (next != table_->end() && (*next)->first <= entry->last) {
    return Error{std::string(name_of(space_)) + " " + range_text((*next)->first, (*next)->last) + ": claimed by " +
                     (*next)->name + ", wanted by " + entry->name + " (" + range_text(start, entry->last) + ")",
                 EBUSY};
  }
  auto table = std::make_shared<Table>(*table_);
  table->insert(table->begin() + (next - table_->begin()), entry);
  publish(std::move(table));
  return Claim(*this, std::move(entry));
}

void Bus::release(const std::shared_ptr<Entry>& entry) {
  {
    std::lock_guard lock(mutex_);
    auto table = std::make_shared<Table>(*table_);
    std::erase(*table, entry);
    publish(std::move(table));
  }
  entry->drain();
}

void Bus::publish(std::shared_ptr<const Table> table) {
  table_ = std::move(table);
  generation_.fetch_add(1, std::memory_order_release);
}

void Bus::log_unclaimed(const char* what, uint64_t address, uint32_t size_bytes) {
  // A guest that probes must not flood the log: the first 64, then ever fewer.
  const uint64_t count = unclaimed_accesses_.fetch_add(1, std::memory_order_relaxed) + 1;
  if (log_level() < LogLevel::debug || (count > 64 && !std::has_single_bit(count))) return;
  char text[128];
  std::snprintf(text, sizeof text, "%s %#llx: %s of %u bytes that nobody claimed (%llu so far)", name_of(space_),
                static_cast<unsigned long long>(address), what, size_bytes, static_cast<unsigned long long>(count));
  log_debug(text);
}

// The claim that holds the whole access, with its handler counted as running; nullptr if there is none.
Bus::Entry* Bus::View::enter(uint64_t address, uint32_t size_bytes) {
  if (bus_.generation_.load(std::memory_order_acquire) != generation_) {
    std::lock_guard lock(bus_.mutex_);
    table_ = bus_.table_;
    generation_ = bus_.generation_.load(std::memory_order_relaxed);
  }
  if (!std::has_single_bit(size_bytes) || size_bytes > 8) return nullptr;
  const auto found = std::lower_bound(table_->begin(), table_->end(), address,
                                      [](const auto& entry, uint64_t wanted) { return entry->last < wanted; });
  if (found == table_->end()) return nullptr;
  Entry& entry = **found;
  if (address < entry.first || entry.last - address < size_bytes - 1) return nullptr;
  return entry.enter() ? &entry : nullptr;
}

void Bus::View::read(uint64_t address, void* data, uint32_t size_bytes) {
  // Also what a handler leaves untouched.
  std::memset(data, 0xff, size_bytes);
  if (Entry* entry = enter(address, size_bytes)) {
    if (entry->handler.read) entry->handler.read(entry->handler.context, address - entry->first, data, size_bytes);
    entry->leave();
  } else {
    bus_.log_unclaimed("read", address, size_bytes);
  }
}

void Bus::View::write(uint64_t address, const void* data, uint32_t size_bytes) {
  if (Entry* entry = enter(address, size_bytes)) {
    if (entry->handler.write) entry->handler.write(entry->handler.context, address - entry->first, data, size_bytes);
    entry->leave();
  } else {
    bus_.log_unclaimed("write", address, size_bytes);
  }
}

}  // namespace vmm
