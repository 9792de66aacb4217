// SPDX-License-Identifier: Apache-2.0
// The rules for virtio devices: their table, their configuration space, and queues whose driver is hostile.
#include <unistd.h>

#include <algorithm>
#include <atomic>

#include "plugin/check_subject.hpp"
#include "virtqueue/virtqueue.hpp"
#include "virtqueue/virtqueue_service.hpp"

namespace vmm {
namespace {

constexpr uint64_t kVersion1 = 1ull << 32;
// Reserved for the transport and the rings (virtio 1.2 §2.2).
constexpr uint64_t kReservedFeatures = ((1ull << 50) - 1) & ~((1ull << 24) - 1);
constexpr uint64_t kMemoryBytes = 16ull << 20;
constexpr uint64_t kRingArea = 1ull << 20;
constexpr uint64_t kRingAreas = 8;

std::string table_mistake(const clone_virtio_device& table, void* device) {
  if (!table.features || !table.queue_count || !table.queue_max_size || !table.config_size || !table.read_config ||
      !table.write_config || !table.activate || !table.reset)
    return "a function is missing";
  if (table.device_type == 0) return "the device type is 0";
  if (const uint64_t bits = table.features(device) & kReservedFeatures)
    return "it offers reserved features, the lowest is bit " + std::to_string(__builtin_ctzll(bits));
  const uint32_t count = table.queue_count(device);
  if (count == 0 || count > 65536) return "it has " + std::to_string(count) + " queues";
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t size = table.queue_max_size(device, i);
    if (size == 0 || size > kQueueSizeMax || (size & (size - 1)) != 0)
      return "queue " + std::to_string(i) + " has size " + std::to_string(size);
  }
  if (table.config_size(device) > 4096) return "its configuration space is larger than 4096 bytes";
  return {};
}

// A driver that breaks rules, and the queues that it broke them in.
class HostileDriver {
 public:
  HostileDriver(CheckInstance& instance, const clone_virtio_device& table, CheckRandom& random)
      : instance_(instance), table_(table), random_(random), service_(*virtqueue_service()) {
    // Small numbers, so that some of them mean something to the device.
    for (uint64_t offset = 0; offset < kMemoryBytes; offset += kPageSize) {
      uint32_t words[kPageSize / 4];
      for (uint32_t& word : words) word = static_cast<uint32_t>(random_.one_in(2) ? random_.below(20) : random_.next());
      (void)memory().write({offset}, words, sizeof words);
    }
  }
  ~HostileDriver() { deactivate(); }

  Outcome activate(bool packed) {
    const uint64_t offered = kRingFeatures & (packed ? ~uint64_t{0} : ~kFeaturePackedRing);
    uint64_t ring = table_.ring_features ? table_.ring_features(instance_.device(), offered) & offered : offered;
    packed_ = (ring & kFeaturePackedRing) != 0;
    features_ =
        (table_.features(instance_.device()) & (random_.one_in(2) ? ~uint64_t{0} : random_.next())) | ring | kVersion1;
    const uint32_t count = table_.queue_count(instance_.device());
    for (uint32_t i = 0; i < count; ++i) {
      const uint32_t size = std::min(table_.queue_max_size(instance_.device(), i), random_.one_in(4) ? 256u : 16u);
      const uint64_t base = (1 + i % kRingAreas) * kRingArea;
      clone_virtqueue_config config{};
      config.size = sizeof config;
      config.index = i;
      config.layout = {sizeof config.layout, size, features_, base, base + 0x10000, base + 0x20000};
      const clone_sdk::Fd kick(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
      config.kick_fd = kick.get();
      config.call_fd = -1;
      config.interrupt = [](void*, uint32_t) {};
      clone_virtqueue* queue = nullptr;
      clone_err err{sizeof err, 0, {}};
      const uint64_t nothing[2] = {};
      (void)memory().write({base + 0x10000}, nothing, sizeof nothing);
      (void)memory().write({base + 0x20000}, nothing, sizeof nothing);
      if (const clone_status status = service_.create(instance_.host(), &config, &queue, &err); status != CLONE_OK)
        return {status, err.message};
      queues_.push_back(queue);
      bases_.push_back(base);
    }
    port_ = {sizeof port_, 0, &needs_reset_, [](void*) {},
             [](void* flag) { static_cast<std::atomic<bool>*>(flag)->store(true); }};
    needs_reset_ = false;
    const clone_virtio_activation activation{sizeof activation, count, features_, queues_.data(), &port_};
    clone_err err{sizeof err, 0, {}};
    active_ = true;
    const clone_status status = table_.activate(instance_.device(), &activation, &err);
    return {status, err.message};
  }

  void deactivate() {
    if (std::exchange(active_, false)) table_.reset(instance_.device());
    for (clone_virtqueue* queue : queues_) service_.destroy(queue);
    queues_.clear();
    bases_.clear();
  }

  bool needs_reset() const { return needs_reset_; }

  // Some chains, good and bad, in every queue; the device is told.
  void provoke() {
    for (size_t i = 0; i < queues_.size(); ++i) {
      const uint32_t size = service_.queue_size(queues_[i]);
      if (packed_)
        provoke_packed(bases_[i], size);
      else
        provoke_split(bases_[i], size);
      const uint64_t one = 1;
      [[maybe_unused]] const ssize_t written = ::write(service_.kick_fd(queues_[i]), &one, sizeof one);
    }
    instance_.bench().run_main_loop(0, 20);
  }

 private:
  enum : uint16_t { kNext = 1, kWrite = 2, kIndirect = 4, kAvailable = 0x80, kUsed = 0x8000 };
  struct Descriptor {
    uint64_t address;
    uint32_t size_bytes;
    uint16_t third, fourth;
  };

  GuestMemory& memory() { return instance_.bench().memory(); }

  Descriptor random_buffer() {
    Descriptor made{};
    made.address = random_.one_in(12) ? random_.next() : kRingArea * (1 + kRingAreas) + random_.below(4ull << 20);
    made.size_bytes = static_cast<uint32_t>(random_.one_in(20)  ? random_.next()
                                            : random_.one_in(2) ? 1 + random_.below(32)
                                                                : 512 * (1 + random_.below(16)));
    return made;
  }

  void provoke_split(uint64_t base, uint32_t size) {
    const bool evil = random_.one_in(4);
    for (uint32_t i = 0; i < size; ++i) {
      Descriptor made = random_buffer();
      // Chains of four: readable ones, then writable ones.
      const bool last = i % 4 == 3 || i + 1 == size;
      made.third = static_cast<uint16_t>((last ? 0 : kNext) | (i % 4 >= 1 + random_.below(3) ? kWrite : 0));
      made.fourth = static_cast<uint16_t>(i + 1);
      if (evil && random_.one_in(3)) {
        made.third = static_cast<uint16_t>(random_.below(8));
        made.fourth = static_cast<uint16_t>(random_.one_in(4) ? random_.next() : random_.below(size));
      }
      (void)memory().write({base + 16 * i}, &made, sizeof made);
    }
    uint16_t index = memory().load<uint16_t>({base + 0x10002}).value_or(0);
    const uint64_t added = evil && random_.one_in(4) ? random_.next() : 1 + random_.below(std::max(1u, size / 4));
    for (uint64_t i = 0; i < std::min<uint64_t>(added, size); ++i) {
      const uint16_t head =
          static_cast<uint16_t>(evil && random_.one_in(8) ? random_.next() : random_.below(size) & ~3u);
      (void)memory().store<uint16_t>({base + 0x10004 + 2ull * ((index + i) % size)}, head);
    }
    (void)memory().store<uint16_t>({base + 0x10000}, static_cast<uint16_t>(random_.below(2)));
    (void)memory().store<uint16_t>({base + 0x10002}, static_cast<uint16_t>(index + added));
  }

  void provoke_packed(uint64_t base, uint32_t size) {
    const bool evil = random_.one_in(4);
    const uint16_t lap = random_.one_in(2) ? kAvailable : kUsed;
    for (uint32_t i = 0; i < size; ++i) {
      Descriptor made = random_buffer();
      const bool last = i % 4 == 3 || i + 1 == size;
      made.third = static_cast<uint16_t>(evil && random_.one_in(8) ? random_.next() : random_.below(size));
      made.fourth = static_cast<uint16_t>((last ? 0 : kNext) | (i % 4 >= 1 + random_.below(3) ? kWrite : 0) | lap);
      if (evil && random_.one_in(3)) made.fourth = static_cast<uint16_t>(random_.next());
      (void)memory().write({base + 16 * i}, &made, sizeof made);
    }
    (void)memory().store<uint32_t>({base + 0x10000}, static_cast<uint32_t>(random_.next()));
  }

  CheckInstance& instance_;
  const clone_virtio_device& table_;
  CheckRandom& random_;
  const clone_host_virtqueue& service_;
  std::vector<clone_virtqueue*> queues_;
  std::vector<uint64_t> bases_;
  clone_virtio_port port_{};
  std::atomic<bool> needs_reset_{false};
  uint64_t features_ = 0;
  bool packed_ = false;
  bool active_ = false;
};

}  // namespace

void check_virtio(CheckRecorder& recorder, const CheckSubject& subject) {
  if (subject.is_transport()) return;
  CheckStage stage;
  bool there = false;
  recorder.rule("is configured for its queues", [&] {
    const Outcome outcome = CheckStage::set_up(subject, stage);
    there = outcome.ok();
    return there                    ? Verdict()
           : outcome.is_the_hosts() ? Verdict::skipped(outcome.text())
                                    : Verdict::failed(outcome.text());
  });
  if (!there) return;
  CheckInstance& instance = *stage.instance;
  const auto table = instance.extension<clone_virtio_device>(CLONE_VIRTIO_DEVICE);
  if (!table) return;
  void* device = instance.device();
  if (!recorder.rule("clone.virtio-device/1 is complete and consistent", [&] {
        const std::string mistake = table_mistake(*table, device);
        return Verdict::when(mistake.empty(), mistake);
      }))
    return;
  CheckRandom random(10);
  recorder.rule("its configuration space is read and written at every offset", [&] {
    const uint32_t config_bytes = table->config_size(device);
    for (uint32_t size_bytes : {1u, 2u, 4u, 8u})
      for (uint32_t offset = 0; offset + size_bytes <= config_bytes; ++offset) {
        // Behind the bytes asked for, nothing may be written.
        uint8_t bytes[16];
        std::memset(bytes, 0xa5, sizeof bytes);
        table->read_config(device, offset, bytes, size_bytes);
        if (std::any_of(bytes + size_bytes, std::end(bytes), [](uint8_t byte) { return byte != 0xa5; }))
          return Verdict::failed("a read of " + std::to_string(size_bytes) + " bytes at " + std::to_string(offset) +
                                 " wrote more");
        const uint64_t value = random.next();
        table->write_config(device, offset, &value, size_bytes);
      }
    return Verdict();
  });
  if (table->ring_features)
    recorder.rule("ring_features chooses of what is offered", [&] {
      for (uint64_t offered : {uint64_t{0}, kRingFeatures, kFeatureIndirectDescriptors})
        if (const uint64_t chosen = table->ring_features(device, offered); chosen & ~offered)
          return Verdict::failed("it chose a feature that was not offered");
      return Verdict();
    });
  recorder.rule("reset without activate is harmless", [&] {
    table->reset(device);
    table->reset(device);
    return Verdict();
  });
  if (const Outcome started = instance.start(); !started.ok()) return;
  HostileDriver driver(instance, *table, random);
  bool active = false;
  recorder.rule("is activated with its queues", [&] {
    const Outcome outcome = driver.activate(false);
    active = outcome.ok();
    return active                   ? Verdict()
           : outcome.is_the_hosts() ? Verdict::skipped(outcome.text())
                                    : Verdict::failed(outcome.text());
  });
  if (!active) return;
  recorder.rule("queues with random contents are survived", [&] {
    for (int round = 0; round < 200; ++round) {
      driver.provoke();
      if (round % 16 == 0) ::usleep(2000);
      if (round % 10 != 9 && !driver.needs_reset()) continue;
      driver.deactivate();
      if (const Outcome again = driver.activate(random.one_in(2)); !again.ok())
        return Verdict::failed("it cannot be activated again: " + again.text());
    }
    return Verdict();
  });
  recorder.rule("is quiesced and resumed while its queues are in use", [&] {
    for (int round = 0; round < 10; ++round) {
      driver.provoke();
      for (const Outcome& outcome : {instance.quiesce(), instance.resume()})
        if (!outcome.ok()) return Verdict::failed(outcome.text());
    }
    return Verdict();
  });
  if (subject.can_save())
    recorder.rule("saves the same bytes twice while its queues are in use", [&] {
      driver.provoke();
      CheckState first, second;
      for (const Outcome& outcome :
           {instance.quiesce(), instance.save(first), instance.save(second), instance.resume()})
        if (!outcome.ok()) return Verdict::failed(outcome.text());
      const std::string difference = first.difference(second);
      return Verdict::when(difference.empty(), difference);
    });
  recorder.rule("leaves its queues alone after reset", [&] {
    driver.provoke();
    driver.deactivate();
    instance.bench().run_main_loop();
    ::usleep(5000);
    return Verdict();
  });
  recorder.rule("is destroyed after its queues went", [&] {
    instance.destroy();
    return Verdict();
  });
}

}  // namespace vmm
