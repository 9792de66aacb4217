// SPDX-License-Identifier: Apache-2.0
// The registers, the driver's way through the device status, and the state that is saved.
#include "slot.hpp"

#include <sys/eventfd.h>

#include <algorithm>
#include <cstring>

namespace transport_mmio {
namespace {

using clone_sdk::Error;
using clone_sdk::ErrorBuffer;

// virtio 1.2 §4.2.2
enum Register : uint64_t {
  kMagicValue = 0x000,
  kVersion = 0x004,
  kDeviceId = 0x008,
  kVendorId = 0x00c,
  kDeviceFeatures = 0x010,
  kDeviceFeaturesSelect = 0x014,
  kDriverFeatures = 0x020,
  kDriverFeaturesSelect = 0x024,
  kQueueSelect = 0x030,
  kQueueSizeMax = 0x034,
  kQueueSize = 0x038,
  kQueueReady = 0x044,
  kQueueNotify = 0x050,
  kInterruptStatus = 0x060,
  kInterruptAck = 0x064,
  kStatus = 0x070,
  kQueueDescriptorLow = 0x080,
  kQueueDescriptorHigh = 0x084,
  kQueueDriverLow = 0x090,
  kQueueDriverHigh = 0x094,
  kQueueDeviceLow = 0x0a0,
  kQueueDeviceHigh = 0x0a4,
  kSharedMemoryLengthLow = 0x0b0,
  kSharedMemoryLengthHigh = 0x0b4,
  kSharedMemoryBaseLow = 0x0b8,
  kSharedMemoryBaseHigh = 0x0bc,
  kConfigGeneration = 0x0fc,
};

constexpr uint32_t kMagic = 0x74726976;   // "virt"
constexpr uint32_t kVendor = 0x4e4f4c43;  // "CLON"

// virtio 1.2 §2.1
constexpr uint32_t kAcknowledge = 1;
constexpr uint32_t kDriver = 2;
constexpr uint32_t kDriverOk = 4;
constexpr uint32_t kFeaturesOk = 8;
constexpr uint32_t kNeedsReset = 64;
constexpr uint32_t kFailed = 128;
constexpr uint32_t kDriverBits = kAcknowledge | kDriver | kDriverOk | kFeaturesOk | kFailed;

constexpr uint32_t kInterruptQueue = 1;
constexpr uint32_t kInterruptConfig = 2;

// virtio 1.2 §2.2: bits 0 to 23 and 50 and up are the device's.
constexpr uint64_t kDeviceFeatureBits = ~((1ull << 50) - 1) | ((1ull << 24) - 1);
constexpr uint64_t kFeatureVersion1 = 1ull << 32;
constexpr uint32_t kQueueCountMax = 1024;

constexpr uint32_t kSaveVersion = 1;

// A section is one of these, followed by a SavedQueue for each queue.
struct SavedSlot {
  uint32_t device_type;
  uint32_t queue_count;
  uint64_t driver_features;
  uint32_t status;
  uint32_t interrupt_status;
  uint32_t config_generation;
  uint32_t device_features_select;
  uint32_t driver_features_select;
  uint32_t queue_select;
  uint32_t unknown_features;
  uint32_t reserved;
};
struct SavedQueue {
  uint64_t descriptor_address;
  uint64_t driver_address;
  uint64_t device_address;
  uint32_t size;
  uint32_t ready;
  uint16_t next_available;
  uint16_t next_used;
  uint32_t reserved;
};
static_assert(std::has_unique_object_representations_v<SavedSlot>);
static_assert(std::has_unique_object_representations_v<SavedQueue>);

void signal(const clone_sdk::Fd& event) {
  const uint64_t one = 1;
  // Refused only when the count is full: then it is signalled.
  [[maybe_unused]] const ssize_t written = ::write(event.get(), &one, sizeof one);
}

Result<clone_sdk::Fd> make_event() {
  clone_sdk::Fd event(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!event) return clone_sdk::errno_error("eventfd");
  return event;
}

void set_low(uint64_t& address, uint32_t value) { address = (address & ~0xffff'ffffull) | value; }
void set_high(uint64_t& address, uint32_t value) { address = (address & 0xffff'ffffull) | uint64_t{value} << 32; }

uint32_t half(uint64_t features, uint32_t select) {
  return select < 2 ? static_cast<uint32_t>(features >> (32 * select)) : 0;
}

std::string hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

Error corrupt(const std::string& message) { return Error{message, 0, CLONE_ERR_CORRUPT}; }

}  // namespace

Slot::Slot(const clone_virtio_attachment& attachment, const clone_host* host)
    : attachment_(attachment),
      device_(*attachment.table),
      host_(host),
      port_{sizeof port_, 0, this,
            [](void* context) {
              auto* slot = static_cast<Slot*>(context);
              slot->config_generation_.fetch_add(1);
              if (slot->status_.load() & kDriverOk) slot->raise(kInterruptConfig);
            },
            [](void* context) { static_cast<Slot*>(context)->needs_reset(); }} {}

Result<Place> claim_place(const clone_sdk::Host& host) {
  Place place;
  place.base = CLONE_TRY(host.allocate_mmio(kWindowBytes, kWindowBytes));
  place.gsi = CLONE_TRY(host.allocate_gsi());
  return place;
}

Result<std::unique_ptr<Slot>> Slot::create(const clone_virtio_attachment& attachment, uint64_t ring_features,
                                           std::optional<Place> prepared) {
  std::unique_ptr<Slot> slot(new Slot(attachment, attachment.host));
  if (auto result = slot->set_up(ring_features, prepared); !result.ok())
    return std::move(result).error().context(attachment.name);
  return slot;
}

Result<void> Slot::set_up(uint64_t ring_features, std::optional<Place> prepared) {
  bus_ = CLONE_TRY(host_.service<clone_host_bus>(CLONE_HOST_BUS));
  irq_ = CLONE_TRY(host_.service<clone_host_irq>(CLONE_HOST_IRQ));
  virtqueue_ = CLONE_TRY(host_.service<clone_host_virtqueue>(CLONE_VIRTQUEUE));

  ring_features &= virtqueue_->ring_features(host_.raw());
  if (device_.ring_features) ring_features &= device_.ring_features(attachment_.device, ring_features);
  offered_features_ = (device_.features(attachment_.device) & kDeviceFeatureBits) | ring_features | kFeatureVersion1;
  config_bytes_ = device_.config_size(attachment_.device);
  if (config_bytes_ > kWindowBytes - kConfigOffset)
    return Error{"a configuration space of " + std::to_string(config_bytes_) + " bytes, the window has room for " +
                 std::to_string(kWindowBytes - kConfigOffset)};
  const uint32_t queue_count = device_.queue_count(attachment_.device);
  if (queue_count > kQueueCountMax)
    return Error{std::to_string(queue_count) + " queues, at most " + std::to_string(kQueueCountMax) + " are allowed"};

  place_ = prepared ? *prepared : CLONE_TRY(claim_place(host_));
  claim_ = CLONE_TRY((host_.claim<&Slot::read, &Slot::write>(CLONE_BUS_MMIO, place_.base, kWindowBytes, this)));

  call_ = CLONE_TRY(make_event());
  ErrorBuffer error;
  CLONE_TRY(error.result(irq_->irqfd(host_.raw(), place_.gsi, call_.get(), -1, error)));
  call_wired_ = true;
  queues_.resize(queue_count);
  for (uint32_t i = 0; i < queue_count; ++i) {
    Queue& queue = queues_[i];
    queue.size_max = device_.queue_max_size(attachment_.device, i);
    queue.kick = CLONE_TRY(make_event());
    CLONE_TRY(error.result(
        bus_->ioeventfd(host_.raw(), CLONE_BUS_MMIO, place_.base + kQueueNotify, 4, 1, i, queue.kick.get(), error)));
    queue.notified_by_kernel = true;
  }
  if (prepared) return {};
  // Edge-triggered, active high, exclusive.
  return host_.add_acpi_node("LNRO0005",
                             {clone_sdk::acpi_memory(place_.base, kWindowBytes), clone_sdk::acpi_irq(place_.gsi)});
}

Slot::~Slot() {
  claim_.release();
  reset();
  for (uint32_t i = 0; i < queues_.size(); ++i)
    if (queues_[i].notified_by_kernel)
      bus_->ioeventfd_remove(host_.raw(), CLONE_BUS_MMIO, place_.base + kQueueNotify, 4, 1, i, queues_[i].kick.get(),
                             nullptr);
  if (call_wired_) irq_->irqfd_remove(host_.raw(), place_.gsi, call_.get(), nullptr);
}

// --- What the device calls ---

void Slot::raise(uint32_t interrupt) {
  interrupt_status_.fetch_or(interrupt);
  signal(call_);
}

// virtio 1.2 §2.1.2: a driver that is at work is told.
void Slot::needs_reset() {
  if (status_.fetch_or(kNeedsReset) & kDriverOk) raise(kInterruptConfig);
}

// --- What the guest does ---

void Slot::read(uint64_t offset, void* data, uint32_t size_bytes) {
  std::memset(data, 0, size_bytes);
  if (offset >= kConfigOffset) {
    const auto at = static_cast<uint32_t>(offset - kConfigOffset);
    if (at < config_bytes_) device_.read_config(attachment_.device, at, data, std::min(size_bytes, config_bytes_ - at));
    return;
  }
  if (size_bytes != 4 || offset % 4) return;
  const uint32_t value = read_register(offset);
  std::memcpy(data, &value, sizeof value);
}

void Slot::write(uint64_t offset, const void* data, uint32_t size_bytes) {
  if (offset >= kConfigOffset) {
    const auto at = static_cast<uint32_t>(offset - kConfigOffset);
    if (at < config_bytes_ && size_bytes <= config_bytes_ - at)
      device_.write_config(attachment_.device, at, data, size_bytes);
    return;
  }
  if (size_bytes != 4 || offset % 4) return;
  uint32_t value;
  std::memcpy(&value, data, sizeof value);
  write_register(offset, value);
}

uint32_t Slot::read_register(uint64_t offset) {
  switch (offset) {
    case kMagicValue:
      return kMagic;
    case kVersion:
      return 2;
    case kDeviceId:
      return device_.device_type;
    case kVendorId:
      return kVendor;
    case kInterruptStatus:
      return interrupt_status_.load() | (interrupts_from_elsewhere_.load() ? kInterruptQueue : 0);
    case kStatus:
      return status_.load();
    case kConfigGeneration:
      return config_generation_.load();
    // There is no shared memory: length and base of every region are -1 (virtio 1.2 §4.2.2).
    case kSharedMemoryLengthLow:
    case kSharedMemoryLengthHigh:
    case kSharedMemoryBaseLow:
    case kSharedMemoryBaseHigh:
      return 0xffff'ffff;
    default:
      break;
  }
  std::lock_guard lock(mutex_);
  switch (offset) {
    case kDeviceFeatures:
      return half(offered_features_, device_features_select_);
    case kQueueSizeMax:
      return selected() ? selected()->size_max : 0;
    case kQueueReady:
      return selected() && selected()->queue;
    default:
      return 0;
  }
}

void Slot::write_register(uint64_t offset, uint32_t value) {
  if (offset == kInterruptAck) {
    interrupt_status_.fetch_and(~value);
    return;
  }
  if (offset == kQueueNotify) {  // where no ioeventfd took it
    if (value < queues_.size()) signal(queues_[value].kick);
    return;
  }
  std::lock_guard lock(mutex_);
  switch (offset) {
    case kDeviceFeaturesSelect:
      device_features_select_ = value;
      break;
    case kDriverFeaturesSelect:
      driver_features_select_ = value;
      break;
    case kDriverFeatures:
      write_driver_features(value);
      break;
    case kQueueSelect:
      queue_select_ = value;
      break;
    case kStatus:
      write_status(value);
      break;
    default:
      write_queue(offset, value);
  }
}

void Slot::write_driver_features(uint32_t value) {
  if (status_.load() & kFeaturesOk) return;
  if (driver_features_select_ == 0)
    set_low(driver_features_, value);
  else if (driver_features_select_ == 1)
    set_high(driver_features_, value);
  else
    unknown_features_ |= value != 0;
}

// A queue can be set up between FEATURES_OK and DRIVER_OK, and not while it is ready.
void Slot::write_queue(uint64_t offset, uint32_t value) {
  const uint32_t status = status_.load();
  Queue* queue = selected();
  if (!queue || !(status & kFeaturesOk) || status & kDriverOk) return;
  if (offset == kQueueReady) {
    // A queue that cannot be stays not ready, which the driver can read.
    if (value == 0) drop(*queue);
    if (value == 1 && !queue->queue) (void)make_ready(*queue, queue_select_);
    return;
  }
  if (queue->queue) return;
  switch (offset) {
    case kQueueSize:
      queue->size = value;
      break;
    case kQueueDescriptorLow:
      set_low(queue->descriptor_address, value);
      break;
    case kQueueDescriptorHigh:
      set_high(queue->descriptor_address, value);
      break;
    case kQueueDriverLow:
      set_low(queue->driver_address, value);
      break;
    case kQueueDriverHigh:
      set_high(queue->driver_address, value);
      break;
    case kQueueDeviceLow:
      set_low(queue->device_address, value);
      break;
    case kQueueDeviceHigh:
      set_high(queue->device_address, value);
      break;
    default:
      break;
  }
}

Result<void> Slot::make_ready(Queue& queue, uint32_t index) {
  if (queue.size > queue.size_max)
    return Error{"queue " + std::to_string(index) + " has size " + std::to_string(queue.size) + ", at most " +
                     std::to_string(queue.size_max) + " is allowed",
                 0, CLONE_ERR_GUEST};
  const clone_virtqueue_config config = {
      sizeof config,
      index,
      {sizeof(clone_virtqueue_layout), queue.size, driver_features_, queue.descriptor_address, queue.driver_address,
       queue.device_address},
      queue.kick.get(),
      call_.get(),
      [](void* context, uint32_t) { static_cast<Slot*>(context)->raise(kInterruptQueue); },
      this};
  ErrorBuffer error;
  return error.result(virtqueue_->create(host_.raw(), &config, &queue.queue, error));
}

void Slot::drop(Queue& queue) {
  if (queue.queue) virtqueue_->destroy(std::exchange(queue.queue, nullptr));
}

// Bits are only ever added, in the order of virtio 1.2 §3.1.1; 0 resets.
void Slot::write_status(uint32_t value) {
  if (value == 0) return reset_locked();
  const uint32_t before = status_.load();
  value &= kDriverBits;
  if ((before & kDriverBits) & ~value) return;
  uint32_t added = value & ~before;

  if (added & kFeaturesOk) {
    const bool introduced = (value & (kAcknowledge | kDriver)) == (kAcknowledge | kDriver);
    const bool acceptable =
        driver_features_ & kFeatureVersion1 && !(driver_features_ & ~offered_features_) && !unknown_features_;
    if (!introduced || !acceptable) added &= ~kFeaturesOk;
  }
  if (!((before | added) & kFeaturesOk)) added &= ~kDriverOk;
  status_.fetch_or(added);
  if (!(added & kDriverOk)) return;
  if (auto result = activate(); !result.ok()) {
    if (!std::exchange(warned_, true))
      host_.log(CLONE_LOG_WARNING, "the driver cannot use this device: " + result.error().message);
    needs_reset();
  }
}

Result<void> Slot::activate() {
  std::vector<clone_virtqueue*> queues;
  for (const Queue& queue : queues_) queues.push_back(queue.queue);
  const clone_virtio_activation activation = {sizeof activation, static_cast<uint32_t>(queues.size()), driver_features_,
                                              queues.data(), &port_};
  active_ = true;  // even a failed activate() is followed by reset()
  ErrorBuffer error;
  CLONE_TRY(error.result(device_.activate(attachment_.device, &activation, error)));
  for (clone_virtqueue* queue : queues)
    if (queue && virtqueue_->call_fd_taken(queue)) interrupts_from_elsewhere_ = true;
  return {};
}

void Slot::reset() {
  std::lock_guard lock(mutex_);
  reset_locked();
}

void Slot::reset_locked() {
  if (std::exchange(active_, false)) device_.reset(attachment_.device);
  for (Queue& queue : queues_) {
    drop(queue);
    queue.size = 0;
    queue.descriptor_address = queue.driver_address = queue.device_address = 0;
  }
  driver_features_ = 0;
  unknown_features_ = false;
  device_features_select_ = driver_features_select_ = queue_select_ = 0;
  interrupts_from_elsewhere_ = false;
  interrupt_status_ = 0;
  status_ = 0;
}

// --- Saved state ---

void Slot::wake() {
  std::lock_guard lock(mutex_);
  if (!active_) return;
  for (const Queue& queue : queues_)
    if (queue.queue) signal(queue.kick);
  if (interrupt_status_.load() || interrupts_from_elsewhere_.load()) signal(call_);
}

Result<void> Slot::save(const clone_sdk::Writer& writer) {
  std::lock_guard lock(mutex_);
  const SavedSlot slot = {device_.device_type,
                          static_cast<uint32_t>(queues_.size()),
                          driver_features_,
                          status_.load(),
                          interrupt_status_.load(),
                          config_generation_.load(),
                          device_features_select_,
                          driver_features_select_,
                          queue_select_,
                          unknown_features_,
                          0};
  std::vector<std::byte> bytes(sizeof slot + queues_.size() * sizeof(SavedQueue));
  std::memcpy(bytes.data(), &slot, sizeof slot);
  for (size_t i = 0; i < queues_.size(); ++i) {
    const Queue& queue = queues_[i];
    clone_virtqueue_position position{sizeof position, 0, 0};
    if (queue.queue) virtqueue_->get_position(queue.queue, &position);
    const SavedQueue saved = {queue.descriptor_address, queue.driver_address,    queue.device_address, queue.size,
                              queue.queue ? 1u : 0u,    position.next_available, position.next_used,   0};
    std::memcpy(bytes.data() + sizeof slot + i * sizeof saved, &saved, sizeof saved);
  }
  return writer.put_bytes(name(), kSaveVersion, bytes);
}

Result<void> Slot::load(const clone_sdk::Reader& reader) {
  std::lock_guard lock(mutex_);
  reset_locked();
  const auto section = CLONE_TRY(reader.section(name(), kSaveVersion));
  SavedSlot slot;
  if (section.bytes.size() != sizeof slot + queues_.size() * sizeof(SavedQueue))
    return corrupt(std::string("section ") + name() + " has " + std::to_string(section.bytes.size()) + " bytes, not " +
                   std::to_string(sizeof slot + queues_.size() * sizeof(SavedQueue)));
  std::memcpy(&slot, section.bytes.data(), sizeof slot);
  if (slot.device_type != device_.device_type || slot.queue_count != queues_.size())
    return corrupt(std::string(name()) + " was saved as device type " + std::to_string(slot.device_type) + " with " +
                   std::to_string(slot.queue_count) + " queues");
  if (const uint64_t missing = slot.driver_features & ~offered_features_; slot.status & kFeaturesOk && missing)
    return corrupt(std::string(name()) + " was saved with features that it does not have now: " + hex(missing));
  const bool in_order = !(slot.status & ~(kDriverBits | kNeedsReset)) &&
                        (!(slot.status & kDriverOk) || slot.status & kFeaturesOk) &&
                        (!(slot.status & kFeaturesOk) || slot.driver_features & kFeatureVersion1);
  if (!in_order) return corrupt(std::string(name()) + " was saved with status " + hex(slot.status));

  driver_features_ = slot.driver_features;
  unknown_features_ = slot.unknown_features != 0;
  device_features_select_ = slot.device_features_select;
  driver_features_select_ = slot.driver_features_select;
  queue_select_ = slot.queue_select;
  const auto load_queue = [&](uint32_t index) -> Result<void> {
    SavedQueue saved;
    std::memcpy(&saved, section.bytes.data() + sizeof slot + index * sizeof saved, sizeof saved);
    Queue& queue = queues_[index];
    queue.descriptor_address = saved.descriptor_address;
    queue.driver_address = saved.driver_address;
    queue.device_address = saved.device_address;
    queue.size = saved.size;
    if (!saved.ready) return {};
    if (!(slot.status & kFeaturesOk)) return Error{"ready without FEATURES_OK"};
    CLONE_TRY(make_ready(queue, index));
    const clone_virtqueue_position position = {sizeof position, saved.next_available, saved.next_used};
    ErrorBuffer error;
    return error.result(virtqueue_->set_position(queue.queue, &position, error));
  };
  for (uint32_t i = 0; i < queues_.size(); ++i) {
    if (auto result = load_queue(i); !result.ok()) {
      reset_locked();
      return corrupt(std::string(name()) + ": queue " + std::to_string(i) + ": " + result.error().message);
    }
  }
  config_generation_ = slot.config_generation;
  interrupt_status_ = slot.interrupt_status & (kInterruptQueue | kInterruptConfig);
  status_ = slot.status;
  // A device that waits for its reset has nothing to do until then.
  if (!(slot.status & kDriverOk) || slot.status & kNeedsReset) return {};
  if (auto result = activate(); !result.ok()) {
    reset_locked();
    return std::move(result).error().context(name());
  }
  return {};
}

}  // namespace transport_mmio
