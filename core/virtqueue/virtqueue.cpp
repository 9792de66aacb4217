// SPDX-License-Identifier: Apache-2.0
// Split and packed rings: walking chains, giving them back, and the two handshakes about who needs to be told.
#include "virtqueue/virtqueue.hpp"

#include <fcntl.h>

#include <algorithm>
#include <bit>
#include <limits>

namespace vmm {
namespace {

// Descriptor flags (virtio 1.2 §2.7.5, §2.8.1).
constexpr uint16_t kNext = 1;
constexpr uint16_t kWrite = 2;
constexpr uint16_t kIndirect = 4;
constexpr uint16_t kAvailable = 1 << 7;
constexpr uint16_t kUsed = 1 << 15;

constexpr uint64_t kDescriptorBytes = 16;
constexpr uint32_t kIndirectEntriesMax = 65536;  // `next` has 16 bits

// Split rings: `uint16_t flags, index` and the entries; then the event index (virtio 1.2 §2.7.6, §2.7.8).
constexpr uint64_t kIndexOffset = 2;
constexpr uint64_t kEntriesOffset = 4;
constexpr uint64_t kUsedEntryBytes = 8;
constexpr uint16_t kNoInterrupt = 1;  // avail.flags
constexpr uint16_t kNoNotify = 1;     // used.flags

// Packed rings: event suppression structures, here read and written as one word (virtio 1.2 §2.8.10).
constexpr uint32_t kEventEnable = 0;
constexpr uint32_t kEventDisable = 1;
constexpr uint32_t kEventDescriptor = 2;

constexpr uint32_t kWrapShift = 15;
constexpr uint16_t kPlaceMask = 0x7fff;

// Indirect tables need no alignment. Volatile: read exactly once.
typedef uint64_t UnalignedWord __attribute__((aligned(1), may_alias));

uint64_t read_word(const std::byte* at) { return *reinterpret_cast<const volatile UnalignedWord*>(at); }

template <typename T>
T load(const std::byte* at) {
  return __atomic_load_n(reinterpret_cast<const T*>(at), __ATOMIC_RELAXED);
}
template <typename T>
T load_acquire(const std::byte* at) {
  return __atomic_load_n(reinterpret_cast<const T*>(at), __ATOMIC_ACQUIRE);
}
template <typename T>
void store(std::byte* at, T value) {
  __atomic_store_n(reinterpret_cast<T*>(at), value, __ATOMIC_RELAXED);
}
template <typename T>
void store_release(std::byte* at, T value) {
  __atomic_store_n(reinterpret_cast<T*>(at), value, __ATOMIC_RELEASE);
}

// Between our write and our look at what the guest wrote; the guest does the same the other way round. The thread
// sanitizer knows no fences and sees no guest either.
void full_fence() {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wtsan"
  std::atomic_thread_fence(std::memory_order_seq_cst);
#pragma GCC diagnostic pop
}

// virtio 1.2 §2.7.10: was `event` among the `count` entries that end before `next`?
bool passed(uint16_t event, uint16_t next, uint16_t count) { return static_cast<uint16_t>(next - event - 1) < count; }

Error guest_error(const std::string& message) { return Error{message, 0, CLONE_ERR_GUEST}; }

struct Area {
  const char* name;
  uint64_t address;
  uint64_t size_bytes;
  uint64_t alignment;
};

Result<std::byte*> resolve(const GuestMemory& memory, const Area& area) {
  if (area.address % area.alignment)
    return guest_error(std::string(area.name) + " area is not aligned to " + std::to_string(area.alignment));
  std::byte* host = memory.slice({area.address}, area.size_bytes);
  if (!host) return guest_error(std::string(area.name) + " area is not in guest memory");
  return host;
}

Result<Fd> duplicate(int fd) {
  if (fd < 0) return Fd();
  Fd copy(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
  if (!copy) return errno_error("eventfd of a queue");
  return copy;
}

}  // namespace

Virtqueue::Virtqueue(GuestMemory& memory, const clone_virtqueue_config& config)
    : memory_(memory),
      size_(config.layout.queue_size),
      packed_(config.layout.features & kFeaturePackedRing),
      event_index_(config.layout.features & kFeatureEventIndex),
      indirect_(config.layout.features & kFeatureIndirectDescriptors),
      layout_(config.layout),
      index_(config.index),
      interrupt_(config.interrupt),
      interrupt_context_(config.context) {
  layout_.size = sizeof layout_;
}

Result<std::unique_ptr<Virtqueue>> Virtqueue::create(GuestMemory& memory, const clone_virtqueue_config& config) {
  std::unique_ptr<Virtqueue> queue(new Virtqueue(memory, config));
  const clone_virtqueue_layout& layout = queue->layout_;
  const uint64_t size = layout.queue_size;
  const bool packed = queue->packed_;
  if (size == 0 || size > kQueueSizeMax || (!packed && !std::has_single_bit(size)))
    return guest_error("queue size " + std::to_string(size) + " is not " + (packed ? "" : "a power of two ") +
                       "from 1 to " + std::to_string(kQueueSizeMax));
  // virtio 1.2 §2.7 and §2.8.10.1. The event index is counted in whether negotiated or not.
  const uint64_t driver_bytes = packed ? 4 : kEntriesOffset + 2 * size + 2;
  const uint64_t device_bytes = packed ? 4 : kEntriesOffset + kUsedEntryBytes * size + 2;
  queue->descriptors_ =
      TRY(resolve(memory, {"descriptor", layout.descriptor_address, kDescriptorBytes * size, kDescriptorBytes}));
  queue->driver_area_ = TRY(resolve(memory, {"driver", layout.driver_address, driver_bytes, packed ? 4u : 2u}));
  queue->device_area_ = TRY(resolve(memory, {"device", layout.device_address, device_bytes, 4}));
  queue->kick_fd_ = TRY(duplicate(config.kick_fd));
  queue->call_fd_ = TRY(duplicate(config.call_fd));
  return queue;
}

bool Virtqueue::fail(const char* reason) {
  broken_ = reason;
  return false;
}

// --- Walking chains ---

inline Virtqueue::Descriptor Virtqueue::read_split(const std::byte* table, uint32_t index) {
  const uint64_t address = read_word(table + kDescriptorBytes * index);
  const uint64_t rest = read_word(table + kDescriptorBytes * index + 8);
  return {address, static_cast<uint32_t>(rest), static_cast<uint16_t>(rest >> 32), static_cast<uint16_t>(rest >> 48)};
}

inline Virtqueue::Descriptor Virtqueue::read_packed(const std::byte* table, uint32_t index) {
  const uint64_t address = read_word(table + kDescriptorBytes * index);
  const uint64_t rest = read_word(table + kDescriptorBytes * index + 8);
  return {address, static_cast<uint32_t>(rest), static_cast<uint16_t>(rest >> 48), static_cast<uint16_t>(rest >> 32)};
}

inline std::byte* Virtqueue::translate(uint64_t address, uint64_t size_bytes) const {
  for (const GuestMemory::Region& region : memory_.regions()) {
    const uint64_t offset = address - region.start.value;
    if (offset < region.size_bytes && size_bytes <= region.size_bytes - offset) return region.host + offset;
  }
  return nullptr;
}

inline bool Virtqueue::begin(clone_chain& chain) {
  chain.readable_count = chain.writable_count = 0;
  chain.readable_bytes = chain.writable_bytes = 0;
  return chain.size >= sizeof chain && chain.capacity >= size_;
}

// Each call adds a segment, and the count is bounded by the queue's size: so every loop of descriptors ends here.
inline bool Virtqueue::append(clone_chain& chain, const Descriptor& descriptor) {
  const uint32_t count = chain.readable_count + chain.writable_count;
  if (count == size_) return fail("a chain is longer than the queue");
  std::byte* host = translate(descriptor.address, descriptor.size_bytes);
  if (!host) return fail("a buffer is not in guest memory");
  const uint64_t total = uint64_t{chain.readable_bytes} + chain.writable_bytes + descriptor.size_bytes;
  if (total > std::numeric_limits<uint32_t>::max()) return fail("a chain has 4 GiB or more");
  if (descriptor.flags & kWrite) {
    ++chain.writable_count;
    chain.writable_bytes += descriptor.size_bytes;
  } else {
    if (chain.writable_count) return fail("a readable buffer follows a writable one");
    ++chain.readable_count;
    chain.readable_bytes += descriptor.size_bytes;
  }
  chain.segments[count] = {host, descriptor.address, descriptor.size_bytes, 0};
  return true;
}

// virtio 1.2 §2.7.5.3 and §2.8.7. The descriptor's own write flag is to be ignored.
bool Virtqueue::open_indirect(const Descriptor& descriptor, Table& table) {
  if (!indirect_) return fail("an indirect table without that feature");
  if (descriptor.flags & kNext) return fail("an indirect table in the middle of a chain");
  if (descriptor.size_bytes == 0 || descriptor.size_bytes % kDescriptorBytes)
    return fail("an indirect table's size is not a multiple of 16");
  if (descriptor.size_bytes / kDescriptorBytes > kIndirectEntriesMax) return fail("an indirect table is too long");
  table = {translate(descriptor.address, descriptor.size_bytes),
           static_cast<uint32_t>(descriptor.size_bytes / kDescriptorBytes)};
  return table.start || fail("an indirect table is not in guest memory");
}

clone_status Virtqueue::pop_split(clone_chain& chain) {
  if (broken_) return CLONE_ERR_GUEST;
  if (next_available_ == seen_available_) {
    if (!available() && (!kick_wanted_ || !arm_and_look())) return CLONE_EMPTY;
    const uint16_t index = load_acquire<uint16_t>(driver_area_ + kIndexOffset);
    if (static_cast<uint16_t>(index - next_available_) > size_) {
      fail("the available index jumped further than the queue is long");
      return CLONE_ERR_GUEST;
    }
    if (index == next_available_) return CLONE_EMPTY;
    seen_available_ = index;
  }
  if (!begin(chain)) return CLONE_ERR_INVALID;
  if (in_flight_ == size_) {
    fail("more chains are available than the queue holds");
    return CLONE_ERR_GUEST;
  }

  Table table{descriptors_, size_};
  const uint16_t head = load<uint16_t>(driver_area_ + kEntriesOffset + 2 * (next_available_ & (size_ - 1)));
  for (uint32_t index = head;;) {
    if (index >= table.entries) {
      fail("a descriptor's number is beyond the table");
      return CLONE_ERR_GUEST;
    }
    const Descriptor descriptor = read_split(table.start, index);
    if (descriptor.flags & kIndirect) {
      if (table.start != descriptors_) fail("an indirect table in an indirect table");
      if (broken_ || !open_indirect(descriptor, table)) return CLONE_ERR_GUEST;
      index = 0;
      continue;
    }
    if (!append(chain, descriptor)) return CLONE_ERR_GUEST;
    if (!(descriptor.flags & kNext)) break;
    index = descriptor.link;
  }
  chain.head = head;
  chain.descriptors = 1;
  ++next_available_;
  ++in_flight_;
  return CLONE_OK;
}

clone_status Virtqueue::pop_packed(clone_chain& chain) {
  if (broken_) return CLONE_ERR_GUEST;
  if (!available() && (!kick_wanted_ || !arm_and_look())) return CLONE_EMPTY;
  if (!begin(chain)) return CLONE_ERR_INVALID;

  // The driver makes the first descriptor available last: the others need no look at their bits.
  uint32_t place = next_available_;
  uint32_t entries = 0;
  for (;;) {
    const Descriptor descriptor = read_packed(descriptors_, place);
    if (++place == size_) place = 0;
    if (++entries > size_ - in_flight_) {
      fail("more descriptors are available than the queue holds");
      return CLONE_ERR_GUEST;
    }
    chain.head = descriptor.link;
    if (descriptor.flags & kIndirect) {
      Table table;
      if (!open_indirect(descriptor, table)) return CLONE_ERR_GUEST;
      for (uint32_t i = 0; i < table.entries; ++i) {
        const Descriptor entry = read_packed(table.start, i);
        if (entry.flags & kIndirect) fail("an indirect table in an indirect table");
        if (broken_ || !append(chain, entry)) return CLONE_ERR_GUEST;
      }
      break;
    }
    if (!append(chain, descriptor)) return CLONE_ERR_GUEST;
    if (!(descriptor.flags & kNext)) break;
  }
  chain.descriptors = entries;
  available_wrap_ ^= place <= next_available_;
  next_available_ = static_cast<uint16_t>(place);
  in_flight_ += entries;
  return CLONE_OK;
}

// --- Giving chains back ---

clone_status Virtqueue::push(const clone_chain& chain, uint32_t written_bytes) {
  if (broken_) return CLONE_ERR_GUEST;
  if (chain.descriptors == 0 || chain.descriptors > in_flight_ || chain.head >= (packed_ ? 65536 : size_))
    return CLONE_ERR_INVALID;
  written_bytes = std::min(written_bytes, chain.writable_bytes);

  uint32_t left_bytes = written_bytes;
  for (const clone_segment* segment = chain.segments + chain.readable_count; left_bytes; ++segment) {
    const uint32_t filled_bytes = std::min(left_bytes, segment->size_bytes);
    memory_.mark_dirty({segment->guest_address}, filled_bytes);
    left_bytes -= filled_bytes;
  }
  packed_ ? push_packed(chain, written_bytes) : push_split(chain, written_bytes);
  in_flight_ -= chain.descriptors;
  pushed_ += chain.descriptors;
  return CLONE_OK;
}

inline void Virtqueue::push_split(const clone_chain& chain, uint32_t written_bytes) {
  const uint64_t offset = kEntriesOffset + kUsedEntryBytes * (next_used_ & (size_ - 1));
  store<uint32_t>(device_area_ + offset, chain.head);
  store<uint32_t>(device_area_ + offset + 4, written_bytes);
  ++next_used_;
  store_release<uint16_t>(device_area_ + kIndexOffset, next_used_);
  mark_device_area(offset, kUsedEntryBytes);
  mark_device_area(0, kEntriesOffset);
}

inline void Virtqueue::push_packed(const clone_chain& chain, uint32_t written_bytes) {
  const uint64_t offset = kDescriptorBytes * next_used_;
  const uint16_t flags = (used_wrap_ ? kAvailable | kUsed : 0) | (written_bytes ? kWrite : 0);
  store<uint32_t>(descriptors_ + offset + 8, written_bytes);
  store<uint16_t>(descriptors_ + offset + 12, static_cast<uint16_t>(chain.head));
  store_release<uint16_t>(descriptors_ + offset + 14, flags);
  memory_.mark_dirty({layout_.descriptor_address + offset}, kDescriptorBytes);
  uint32_t place = next_used_ + chain.descriptors;
  if (place >= size_) {
    place -= size_;
    used_wrap_ = !used_wrap_;
  }
  next_used_ = static_cast<uint16_t>(place);
}

// --- Who needs to be told ---

void Virtqueue::signal() {
  if (pushed_ == 0 || broken_) return;
  full_fence();
  if (driver_wants_interrupt()) {
    if (interrupt_) {
      interrupt_(interrupt_context_, index_);
    } else {
      const uint64_t one = 1;
      // An eventfd refuses only when its count is full: the driver has then been told often enough.
      [[maybe_unused]] const ssize_t written = ::write(call_fd_.get(), &one, sizeof one);
    }
  }
  pushed_ = 0;
}

// Once more was pushed than the ring holds, the arithmetic of event indices says nothing any more: then rather yes.
inline bool Virtqueue::driver_wants_interrupt() const {
  if (packed_) {
    const uint32_t event = load<uint32_t>(driver_area_);
    const uint32_t mode = event >> 16 & 3;
    if (mode == kEventDisable) return false;
    if (mode != kEventDescriptor || !event_index_ || pushed_ > size_) return true;
    // A wrap counter other than ours: the place lies in the lap before.
    const bool other_lap = (event >> kWrapShift & 1) != used_wrap_;
    const auto place = static_cast<uint16_t>((event & kPlaceMask) - (other_lap ? size_ : 0));
    return passed(place, next_used_, static_cast<uint16_t>(pushed_));
  }
  if (!event_index_) return !(load<uint16_t>(driver_area_) & kNoInterrupt);
  if (pushed_ > size_) return true;
  return passed(load<uint16_t>(driver_area_ + kEntriesOffset + 2 * size_), next_used_, static_cast<uint16_t>(pushed_));
}

// Acquire: what the driver wrote before is seen after.
inline bool Virtqueue::available() const {
  if (!packed_) return load_acquire<uint16_t>(driver_area_ + kIndexOffset) != next_available_;
  const uint16_t flags = load_acquire<uint16_t>(descriptors_ + kDescriptorBytes * next_available_ + 14);
  return !!(flags & kAvailable) == available_wrap_ && !!(flags & kUsed) != available_wrap_;
}

bool Virtqueue::arm_and_look() {
  // Without event index the driver notifies of every chain unless told not to, and there is nothing to do.
  if (!event_index_) return false;
  const uint32_t place = packed_ ? next_available_ | uint32_t{available_wrap_} << kWrapShift : next_available_;
  if (armed_at_ == place) return false;
  armed_at_ = place;
  if (packed_) {
    store<uint32_t>(device_area_, kEventDescriptor << 16 | place);
    mark_device_area(0, 4);
  } else {
    const uint64_t offset = kEntriesOffset + kUsedEntryBytes * size_;
    store<uint16_t>(device_area_ + offset, static_cast<uint16_t>(place));
    mark_device_area(offset, 2);
  }
  full_fence();
  return available();
}

void Virtqueue::disable_kick() {
  if (!kick_wanted_ || broken_) return;
  kick_wanted_ = false;
  if (packed_) {
    store<uint32_t>(device_area_, kEventDisable << 16);
    armed_at_ = ~0u;
  } else if (!event_index_) {
    store<uint16_t>(device_area_, kNoNotify);
  } else {
    return;  // the event index stays behind: that is enough
  }
  mark_device_area(0, 4);
}

bool Virtqueue::enable_kick() {
  if (broken_) return false;
  kick_wanted_ = true;
  if (event_index_) return arm_and_look() || available();
  if (packed_)
    store<uint32_t>(device_area_, kEventEnable << 16);
  else
    store<uint16_t>(device_area_, 0);
  mark_device_area(0, 4);
  full_fence();
  return available();
}

// --- Positions, for saving ---

clone_virtqueue_position Virtqueue::position() const {
  const auto with_wrap = [this](uint16_t place, bool wrap) {
    return static_cast<uint16_t>(packed_ ? place | uint32_t{wrap} << kWrapShift : place);
  };
  return {sizeof(clone_virtqueue_position), with_wrap(next_available_, available_wrap_),
          with_wrap(next_used_, used_wrap_)};
}

Result<void> Virtqueue::set_position(const clone_virtqueue_position& position) {
  uint16_t available = position.next_available;
  uint16_t used = position.next_used;
  bool available_wrap = true;
  bool used_wrap = true;
  uint32_t in_flight = static_cast<uint16_t>(available - used);
  if (packed_) {
    available_wrap = available >> kWrapShift;
    used_wrap = used >> kWrapShift;
    available &= kPlaceMask;
    used &= kPlaceMask;
    in_flight = available + (available_wrap != used_wrap ? size_ : 0) - used;
  }
  if (in_flight > size_ || (packed_ && (available >= size_ || used >= size_)))
    return Error{"queue position " + std::to_string(position.next_available) + ", " +
                     std::to_string(position.next_used) + " cannot be in a ring of " + std::to_string(size_),
                 0, CLONE_ERR_CORRUPT};
  next_available_ = seen_available_ = available;
  next_used_ = used;
  available_wrap_ = available_wrap;
  used_wrap_ = used_wrap;
  in_flight_ = in_flight;
  pushed_ = 0;
  armed_at_ = ~0u;
  return {};
}

}  // namespace vmm
