// SPDX-License-Identifier: Apache-2.0
// A small driver for virtio devices on MMIO.
#include "virtio.hpp"

namespace {

// What one device's interrupt acknowledges; each sleeping device has its own number.
uint64_t interrupting_base[2];

void acknowledge(uint64_t base) {
  at<uint32_t>(base + reg::kInterruptAck) = at<uint32_t>(base + reg::kInterruptStatus);
}

}  // namespace

Device Device::find(uint32_t device_id, unsigned nth) {
  constexpr uint32_t magic = 0x74726976;
  for (unsigned index = 0; index < sizeof kGsis / sizeof kGsis[0]; ++index) {
    const Device device(index);
    if (device.read(reg::kMagic) != magic) break;
    if (device.read(reg::kDeviceId) == device_id && nth-- == 0) {
      CHECK_EQUAL(device.read(reg::kVersion), 2);
      return device;
    }
  }
  print("FAILED no virtio device ", device_id, "\n");
  power_off();
}

void Device::write64(uint32_t offset, uint64_t value) const {
  write(offset, static_cast<uint32_t>(value));
  write(offset + 4, static_cast<uint32_t>(value >> 32));
}

uint64_t Device::features() const {
  write(reg::kDeviceFeaturesSelect, 0);
  const uint64_t low = read(reg::kDeviceFeatures);
  write(reg::kDeviceFeaturesSelect, 1);
  return low | uint64_t{read(reg::kDeviceFeatures)} << 32;
}

void Device::write_features(uint64_t value) const {
  write(reg::kDriverFeaturesSelect, 0);
  write(reg::kDriverFeatures, static_cast<uint32_t>(value));
  write(reg::kDriverFeaturesSelect, 1);
  write(reg::kDriverFeatures, static_cast<uint32_t>(value >> 32));
}

bool Device::negotiate(uint64_t features) const {
  reset();
  add_status(kAcknowledge);
  add_status(kDriver);
  write_features(kVersion1 | features);
  add_status(kFeaturesOk);
  return status() == (kAcknowledge | kDriver | kFeaturesOk);
}

bool Device::set_queue(uint32_t queue, uint32_t entries, uint64_t descriptors, uint64_t driver, uint64_t device) const {
  write(reg::kQueueSelect, queue);
  write(reg::kQueueSize, entries);
  write64(reg::kQueueDescriptor, descriptors);
  write64(reg::kQueueDriver, driver);
  write64(reg::kQueueDevice, device);
  write(reg::kQueueReady, 1);
  return read(reg::kQueueReady) == 1;
}

bool Device::set_queue(uint32_t queue, Rings& rings) const {
  return set_queue(queue, kQueueEntries, reinterpret_cast<uint64_t>(rings.descriptors),
                   reinterpret_cast<uint64_t>(&rings.available), reinterpret_cast<uint64_t>(&rings.used));
}

bool Device::start(Rings& rings, uint64_t features) {
  rings_ = &rings;
  taken_ = 0;
  memset(&rings, 0, sizeof rings);
  if (!negotiate(features) || !set_queue(0, rings)) return false;
  add_status(kDriverOk);
  return status() == (kAcknowledge | kDriver | kFeaturesOk | kDriverOk);
}

void Device::offer(uint16_t first, const Buffer* buffers, unsigned count) {
  for (unsigned i = 0; i < count; ++i) {
    const bool last = i + 1 == count;
    const auto flags = static_cast<uint16_t>((last ? 0 : kNext) | (buffers[i].writable ? kWrite : 0));
    rings_->descriptors[first + i] = {reinterpret_cast<uint64_t>(buffers[i].start), buffers[i].size_bytes, flags,
                                      static_cast<uint16_t>(first + i + 1)};
  }
  const uint16_t index = rings_->available.index;
  rings_->available.ring[index % kQueueEntries] = first;
  full_fence();
  at<uint16_t>(reinterpret_cast<uint64_t>(&rings_->available.index)) = static_cast<uint16_t>(index + 1);
  full_fence();
}

uint32_t Device::take() {
  full_fence();
  return rings_->used.ring[taken_++ % kQueueEntries].size_bytes;
}

uint32_t Device::request(const Buffer* buffers, unsigned count) {
  offer(0, buffers, count);
  notify();
  if (asleep_)
    sleep_until([this] { return returned(); });
  else if (!CHECK(poll_until([this] { return returned(); })))
    power_off();
  return take();
}

void Device::sleep_while_waiting(unsigned interrupt_number) {
  interrupting_base[interrupt_number] = base_;
  handle_with(interrupt_number, interrupt_number == 0 ? Handler([] { acknowledge(interrupting_base[0]); })
                                                      : Handler([] { acknowledge(interrupting_base[1]); }));
  route(gsi_, interrupt_number);
  asleep_ = true;
}
