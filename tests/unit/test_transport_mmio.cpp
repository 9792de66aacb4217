// SPDX-License-Identifier: Apache-2.0
// The mmio transport and virtio-rng as built plugins, driven through their registers, well and badly.
#include <doctest/doctest.h>

#include <numeric>

#include "clone/sdk/plugin.hpp"
#include "fake_driver.hpp"
#include "fake_host.hpp"
#include "fake_plugin.hpp"
#include "virtqueue/virtqueue_service.hpp"

using namespace vmm;
using namespace vmm::test;

namespace {

// A device that a test can look into: four bytes of configuration, two queues, a thread that echoes.
class Probe final : public clone_sdk::VirtioDeviceOf<42> {
 public:
  static Probe* last;
  static const clone_descriptor descriptor;
  explicit Probe(const clone_host* host) : VirtioDeviceOf(host) { last = this; }
  ~Probe() override { reset_queues(); }

  clone_sdk::Result<void> configure(const clone_sdk::Options&) override { return {}; }
  uint64_t features() const override { return device_features; }
  uint64_t ring_features(uint64_t offered) const override { return offered & ring_feature_mask; }
  uint32_t queue_count() const override { return 2; }
  uint32_t queue_max_size(uint32_t) const override { return 16; }
  uint32_t config_size() const override { return 6; }
  void read_config(uint32_t offset, void* data, uint32_t size_bytes) override {
    last_read = uint64_t{offset} << 32 | size_bytes;
    REQUIRE(offset + size_bytes <= 6);
    std::memcpy(data, config + offset, size_bytes);
  }
  void write_config(uint32_t offset, const void* data, uint32_t size_bytes) override {
    REQUIRE(offset + size_bytes <= 6);
    std::memcpy(config + offset, data, size_bytes);
  }
  clone_sdk::Result<void> activate(clone_sdk::Activation activation) override {
    ++activations;
    negotiated = activation.features;
    queues = activation.queues;
    port = activation.port;
    if (fail_activation) return clone_sdk::Error{"no backend"};
    if (take_call && queues[0]) call_fd = queues[0].table()->call_fd(queues[0].raw());
    if (busy) {
      stopping = false;
      worker = std::thread([this] {
        clone_sdk::Chain chain;
        for (; !stopping; std::this_thread::yield())
          while (queues[0].pop(chain) == clone_sdk::Queue::Pop::chain) {
            queues[0].push(chain, 0);
            queues[0].signal();
            port->config_changed(port->context);
          }
      });
    }
    return {};
  }
  void reset_queues() override {
    ++resets;
    stopping = true;
    if (worker.joinable()) worker.join();
    queues.clear();
    port = nullptr;
  }
  clone_sdk::Result<void> quiesce() override { return {}; }
  clone_sdk::Result<void> resume() override { return {}; }
  clone_sdk::Result<void> save(const clone_sdk::Writer&) override { return {}; }
  clone_sdk::Result<void> load(const clone_sdk::Reader&) override { return {}; }

  uint64_t device_features = 1ull << 5 | 1ull << 55 | 1ull << 40;  // bit 40 is not a device's to offer
  uint64_t ring_feature_mask = ~0ull;
  unsigned char config[6] = {1, 2, 3, 4, 5, 6};
  std::atomic<uint64_t> last_read{0};  // offset and size
  bool fail_activation = false, take_call = false, busy = false;
  int activations = 0, resets = 0, call_fd = -1;
  uint64_t negotiated = 0;
  std::vector<clone_sdk::Queue> queues;
  const clone_virtio_port* port = nullptr;
  std::atomic<bool> stopping{false};
  std::thread worker;
};
Probe* Probe::last = nullptr;
constexpr const clone_option* kNoOptions[] = {nullptr};
constexpr clone_descriptor Probe::descriptor = {sizeof(clone_descriptor), CLONE_CAN_SAVE, "probe", "", kNoOptions, ""};

enum Register : uint64_t {
  kMagic = 0x00,
  kVersion = 0x04,
  kDeviceId = 0x08,
  kDeviceFeatures = 0x10,
  kDeviceFeaturesSelect = 0x14,
  kDriverFeatures = 0x20,
  kDriverFeaturesSelect = 0x24,
  kQueueSelect = 0x30,
  kQueueMaximum = 0x34,
  kQueueSize = 0x38,
  kQueueReady = 0x44,
  kQueueNotify = 0x50,
  kInterruptStatus = 0x60,
  kInterruptAck = 0x64,
  kStatus = 0x70,
  kQueueDescriptor = 0x80,
  kQueueDriver = 0x90,
  kQueueDevice = 0xa0,
  kSharedMemoryLength = 0xb0,
  kGeneration = 0xfc,
  kConfig = 0x100
};
constexpr uint32_t kAcknowledge = 1, kDriver = 2, kDriverOk = 4, kFeaturesOk = 8, kNeedsReset = 64, kFailed = 128;
constexpr uint64_t kVersion1 = 1ull << 32;

// One device of a type behind one slot.
struct Rig {
  explicit Rig(const clone_device_type& type, FakeHost& the_host, const char* name = "device.0",
               const std::map<std::string, std::string>& transport_options = {})
      : host(the_host),
        device(type, (host.offer(CLONE_VIRTQUEUE, virtqueue_service()), host.handle(name))),
        transport(PluginFile("transport-mmio").transport("mmio"), host.handle("mmio")) {
    REQUIRE(device.configure() == CLONE_OK);
    REQUIRE(transport.configure(transport_options) == CLONE_OK);
    const auto attachment = device.attachment();
    const auto& mmio = PluginFile("transport-mmio").transport("mmio");
    INFO(transport.error);
    REQUIRE(transport.call([&](clone_err* err) { return mmio.attach(transport.raw(), &attachment, err); }) == CLONE_OK);
    REQUIRE(device.start() == CLONE_OK);
    REQUIRE(transport.start() == CLONE_OK);
    const auto& node = host.acpi_nodes.back();
    REQUIRE(node.hid == "LNRO0005");
    base = node.resources.at(0).start;
    gsi = static_cast<uint32_t>(node.resources.at(1).start);
  }
  ~Rig() { transport.destroy(); }

  uint32_t read(uint64_t offset) { return host.read<uint32_t>(CLONE_BUS_MMIO, base + offset); }
  void write(uint64_t offset, uint32_t value) { host.write<uint32_t>(CLONE_BUS_MMIO, base + offset, value); }
  void write64(uint64_t offset, uint64_t value) {
    write(offset, static_cast<uint32_t>(value));
    write(offset + 4, static_cast<uint32_t>(value >> 32));
  }
  uint64_t offered() {
    write(kDeviceFeaturesSelect, 0);
    const uint64_t low = read(kDeviceFeatures);
    write(kDeviceFeaturesSelect, 1);
    return low | uint64_t{read(kDeviceFeatures)} << 32;
  }
  // Up to FEATURES_OK; what the status register says then.
  uint32_t negotiate(uint64_t features) {
    write(kStatus, 0);
    write(kStatus, kAcknowledge);
    write(kStatus, kAcknowledge | kDriver);
    for (const uint32_t half : {0, 1}) {
      write(kDriverFeaturesSelect, half);
      write(kDriverFeatures, static_cast<uint32_t>(features >> (32 * half)));
    }
    write(kStatus, kAcknowledge | kDriver | kFeaturesOk);
    return read(kStatus);
  }
  bool enable_queue(uint32_t index, const FakeDriver& driver) {
    write(kQueueSelect, index);
    write(kQueueSize, driver.config().size);
    write64(kQueueDescriptor, driver.descriptor_address);
    write64(kQueueDriver, driver.driver_address);
    write64(kQueueDevice, driver.device_address);
    write(kQueueReady, 1);
    return read(kQueueReady) == 1;
  }
  void driver_ok() { write(kStatus, read(kStatus) | kDriverOk); }
  void bring_up(const FakeDriver& driver) {
    REQUIRE(negotiate(driver.config().features | kVersion1 | (driver.config().packed ? kFeaturePackedRing : 0)) ==
            (kAcknowledge | kDriver | kFeaturesOk));
    REQUIRE(enable_queue(0, driver));
    driver_ok();
    REQUIRE(read(kStatus) == (kAcknowledge | kDriver | kFeaturesOk | kDriverOk));
  }
  void publish(FakeDriver& driver) {
    if (driver.publish()) write(kQueueNotify, 0);
  }

  FakeHost& host;
  DeviceUnderTest device;
  DeviceUnderTest transport;
  uint64_t base = 0;
  uint32_t gsi = 0;
};

const clone_device_type& probe_type() { return clone_sdk::detail::device_type<Probe>; }
const clone_device_type& rng_type() { return PluginFile("virtio-rng").device("virtio-rng"); }

}  // namespace

TEST_CASE("mmio: a driver reads randomness through either ring, interrupted for each answer") {
  for (const bool packed : {false, true}) {
    for (const uint64_t features : {uint64_t{0}, kFeatureEventIndex | kFeatureIndirectDescriptors}) {
      CAPTURE(packed);
      CAPTURE(features);
      FakeHost host;
      Rig rig(rng_type(), host, "virtio-rng.0");
      CHECK(rig.read(kDeviceId) == 4);
      CHECK(rig.offered() == (kRingFeatures | kVersion1));
      FakeDriver driver(host.memory(), {packed, 8, features, 0x10000, 0});
      rig.bring_up(driver);
      for (int round = 0; round < 20; ++round) {
        std::memset(host.memory().slice({0x100000}, 100), 0, 100);
        REQUIRE(driver.add({{0x100000, 60, true}, {0x100040, 36, true}}, features && round % 2));
        driver.enable_interrupts();
        rig.publish(driver);
        host.run_main_loop();
        const auto used = driver.take_used();
        REQUIRE(used);
        CHECK(used->written_bytes == 96);
        const auto* bytes = reinterpret_cast<unsigned char*>(host.memory().slice({0x100000}, 100));
        CHECK(std::accumulate(bytes, bytes + 60, 0) > 0);
        CHECK(std::accumulate(bytes + 64, bytes + 100, 0) > 0);
        CHECK(std::accumulate(bytes + 60, bytes + 64, 0) == 0);
        CHECK(host.interrupts(rig.gsi) == 1);
        CHECK(rig.read(kInterruptStatus) == 1);
        rig.write(kInterruptAck, 1);
        CHECK(rig.read(kInterruptStatus) == 0);
      }
    }
  }
}

TEST_CASE("virtio-rng: one wake-up fills a bounded amount, the rest follows") {
  FakeHost host(64 << 20);
  Rig rig(rng_type(), host);
  FakeDriver driver(host.memory(), {false, 64, 0, 0x10000, 0});
  rig.bring_up(driver);
  REQUIRE(driver.add({{0x100000, 32 << 20, true}}));  // 32 MiB at once
  for (int i = 0; i < 20; ++i) REQUIRE(driver.add({{0x100000, 40 << 10, true}}));
  REQUIRE(driver.add({{0x100000, 100, false}}));  // nothing to write to
  rig.publish(driver);
  host.run_main_loop(0, 1);
  const auto first = driver.take_used();
  REQUIRE(first);
  CHECK(first->written_bytes == 64 << 10);
  CHECK(!driver.take_used());
  host.run_main_loop();
  int more = 0;
  while (const auto used = driver.take_used()) {
    ++more;
    CHECK((more == 21 ? used->written_bytes == 0 : used->written_bytes > 0));
  }
  CHECK(more == 21);
}

TEST_CASE("virtio-rng: a broken ring asks for a reset, and after it all is well") {
  FakeHost host;
  Rig rig(rng_type(), host);
  FakeDriver driver(host.memory(), {false, 8, 0, 0x10000, 0});
  rig.bring_up(driver);
  driver.offer_head(99);
  rig.write(kQueueNotify, 0);
  host.run_main_loop();
  CHECK(rig.read(kStatus) == (kAcknowledge | kDriver | kFeaturesOk | kDriverOk | kNeedsReset));
  CHECK(rig.read(kInterruptStatus) == 2);
  CHECK(host.interrupts(rig.gsi) == 1);
  rig.write(kQueueNotify, 0);
  host.run_main_loop();
  CHECK(host.interrupts(rig.gsi) == 0);  // said once
  FakeDriver again(host.memory(), {true, 8, 0, 0x10000, 0});
  rig.bring_up(again);
  CHECK(rig.read(kInterruptStatus) == 0);
  REQUIRE(again.add({{0x100000, 16, true}}));
  rig.publish(again);
  host.run_main_loop();
  CHECK(again.take_used()->written_bytes == 16);
}

TEST_CASE("virtio-rng: a source must be a character device that can be opened") {
  FakeHost host;
  host.offer(CLONE_VIRTQUEUE, virtqueue_service());
  const auto configure = [&](const char* source) {
    DeviceUnderTest rng(rng_type(), host.handle("virtio-rng.0"));
    rng.configure({{"source", source}});
    return rng.error;
  };
  CHECK(configure("/no/such/file") == "source=/no/such/file: No such file or directory");
  CHECK(configure("/etc/passwd") == "source=/etc/passwd is not a character device");
  CHECK(configure("/dev/urandom") == "");
}

TEST_CASE("mmio: registers say who is there, and odd accesses do nothing") {
  FakeHost host;
  Rig rig(probe_type(), host, "probe.0");
  CHECK(rig.read(kMagic) == 0x74726976);
  CHECK(rig.read(kVersion) == 2);
  CHECK(rig.read(kDeviceId) == 42);
  CHECK(rig.base % 0x200 == 0);
  CHECK(host.acpi_nodes[0].owner == "probe.0");
  CHECK(host.acpi_nodes[0].resources[0].length == 0x200);
  CHECK(host.acpi_nodes[0].resources[1].flags == 0);
  CHECK(rig.offered() == (1ull << 5 | 1ull << 55 | kRingFeatures | kVersion1));
  rig.write(kDeviceFeaturesSelect, 2);
  CHECK(rig.read(kDeviceFeatures) == 0);
  for (const uint64_t offset : {0u, 4u, 8u, 12u}) CHECK(rig.read(kSharedMemoryLength + offset) == 0xffff'ffff);
  rig.write(kQueueSelect, 1);
  CHECK(rig.read(kQueueMaximum) == 16);
  for (const uint32_t index : {2u, 0xffffu, 0xffff'ffffu}) {
    rig.write(kQueueSelect, index);
    CHECK(rig.read(kQueueMaximum) == 0);
    rig.write(kQueueReady, 1);
    CHECK(rig.read(kQueueReady) == 0);
  }
  CHECK(host.read<uint8_t>(CLONE_BUS_MMIO, rig.base) == 0);
  CHECK(host.read<uint16_t>(CLONE_BUS_MMIO, rig.base + 2) == 0);
  CHECK(host.read<uint64_t>(CLONE_BUS_MMIO, rig.base) == 0);
  CHECK(host.read<uint32_t>(CLONE_BUS_MMIO, rig.base + 1) == 0);
  host.write<uint8_t>(CLONE_BUS_MMIO, rig.base + kStatus, 1);
  CHECK(rig.read(kStatus) == 0);
  for (uint64_t offset = 0; offset < 0x200; offset += 4) {  // every register, readable or not
    rig.write(offset, 0xffff'ffff);
    rig.read(offset);
  }
  CHECK(Probe::last->activations == 0);
}

TEST_CASE("mmio: configuration space, within its bounds only") {
  FakeHost host;
  Rig rig(probe_type(), host);
  CHECK(rig.read(kConfig) == 0x04030201);
  CHECK(host.read<uint8_t>(CLONE_BUS_MMIO, rig.base + kConfig + 5) == 6);
  CHECK(host.read<uint16_t>(CLONE_BUS_MMIO, rig.base + kConfig + 3) == 0x0504);
  CHECK(host.read<uint64_t>(CLONE_BUS_MMIO, rig.base + kConfig) == 0x060504030201);
  CHECK(Probe::last->last_read == 6);
  CHECK(rig.read(kConfig + 4) == 0x0605);
  CHECK(rig.read(kConfig + 6) == 0);
  CHECK(rig.read(kConfig + 0xfc) == 0);
  host.write<uint16_t>(CLONE_BUS_MMIO, rig.base + kConfig + 4, 0x0908);
  CHECK(Probe::last->config[5] == 9);
  rig.write(kConfig + 4, 0x11111111);  // across the end: not at all
  CHECK(Probe::last->config[5] == 9);
  rig.write(kConfig + 8, 0x11111111);
}

TEST_CASE("mmio: features that were not offered, or without VERSION_1, are not accepted") {
  FakeHost host;
  Rig rig(probe_type(), host);
  constexpr uint32_t kRefused = kAcknowledge | kDriver;
  CHECK(rig.negotiate(0) == kRefused);
  CHECK(rig.negotiate(1ull << 5) == kRefused);
  CHECK(rig.negotiate(kVersion1 | 1ull << 6) == kRefused);
  CHECK(rig.negotiate(kVersion1 | 1ull << 40) == kRefused);
  CHECK(rig.negotiate(kVersion1 | 1ull << 55) == (kRefused | kFeaturesOk));

  // Beyond the 64 bits.
  rig.write(kStatus, 0);
  rig.write(kStatus, kAcknowledge | kDriver);
  rig.write(kDriverFeaturesSelect, 1);
  rig.write(kDriverFeatures, 1);
  rig.write(kDriverFeaturesSelect, 2);
  rig.write(kDriverFeatures, 1);
  rig.write(kStatus, kRefused | kFeaturesOk);
  CHECK(rig.read(kStatus) == kRefused);

  // Without introducing itself; and DRIVER_OK without FEATURES_OK.
  rig.write(kStatus, 0);
  rig.write(kDriverFeaturesSelect, 1);
  rig.write(kDriverFeatures, 1);
  rig.write(kStatus, kFeaturesOk);
  CHECK(rig.read(kStatus) == 0);
  rig.write(kStatus, kRefused | kDriverOk);
  CHECK(rig.read(kStatus) == kRefused);
  CHECK(Probe::last->activations == 0);

  // Once accepted they stand.
  REQUIRE(rig.negotiate(kVersion1) == (kRefused | kFeaturesOk));
  rig.write(kDriverFeaturesSelect, 0);
  rig.write(kDriverFeatures, 1u << 5);
  rig.driver_ok();
  CHECK(Probe::last->activations == 1);
  CHECK(Probe::last->negotiated == kVersion1);

  // Bits cannot be taken away except by a reset; FAILED can be added.
  rig.write(kStatus, kAcknowledge);
  CHECK(rig.read(kStatus) == (kRefused | kFeaturesOk | kDriverOk));
  rig.write(kStatus, rig.read(kStatus) | kFailed | kNeedsReset | 16);
  CHECK(rig.read(kStatus) == (kRefused | kFeaturesOk | kDriverOk | kFailed));
  CHECK(Probe::last->activations == 1);
}

TEST_CASE("mmio: ring features are what host, device and options have in common") {
  FakeHost host;
  Rig split_only(probe_type(), host, "probe.0", {{"packed", "off"}});
  CHECK((split_only.offered() & kRingFeatures) == (kRingFeatures & ~kFeaturePackedRing));

  FakeHost other;
  other.offer(CLONE_VIRTQUEUE, virtqueue_service());
  DeviceUnderTest device(probe_type(), other.handle("probe.0"));
  Probe::last->ring_feature_mask = kFeatureEventIndex;
  DeviceUnderTest transport(PluginFile("transport-mmio").transport("mmio"), other.handle("mmio"));
  REQUIRE(transport.configure() == CLONE_OK);
  const auto attachment = device.attachment();
  REQUIRE(PluginFile("transport-mmio").transport("mmio").attach(transport.raw(), &attachment, nullptr) == CLONE_OK);
  const uint64_t base = other.acpi_nodes[0].resources[0].start;
  CHECK(other.read<uint32_t>(CLONE_BUS_MMIO, base + kDeviceFeatures) == (1u << 5 | kFeatureEventIndex));
  transport.destroy();
}

TEST_CASE("mmio: a queue that cannot be does not become ready") {
  FakeHost host;
  Rig rig(probe_type(), host);
  FakeDriver driver(host.memory(), {false, 16, 0, 0x10000, 0});
  const auto ready_with = [&](uint32_t size, uint64_t descriptors, uint64_t driver_area, uint64_t device_area,
                              uint64_t features = kVersion1) {
    rig.negotiate(features);
    rig.write(kQueueSelect, 0);
    rig.write(kQueueSize, size);
    rig.write64(kQueueDescriptor, descriptors);
    rig.write64(kQueueDriver, driver_area);
    rig.write64(kQueueDevice, device_area);
    rig.write(kQueueReady, 1);
    return rig.read(kQueueReady) == 1;
  };
  CHECK(ready_with(16, 0x1000, 0x2000, 0x3000));
  for (const uint32_t size : {0u, 12u, 17u, 32u, 0xffffu, 0x10010u, 0xffff'ffffu})
    CHECK(!ready_with(size, 0x1000, 0x2000, 0x3000));
  CHECK(ready_with(12, 0x1000, 0x2000, 0x3000, kVersion1 | kFeaturePackedRing));
  CHECK(!ready_with(17, 0x1000, 0x2000, 0x3000, kVersion1 | kFeaturePackedRing));
  CHECK(!ready_with(16, 0x1001, 0x2000, 0x3000));
  CHECK(!ready_with(16, 1ull << 40, 0x2000, 0x3000));
  CHECK(!ready_with(16, 0x1000, ~0ull - 1, 0x3000));
  CHECK(!ready_with(16, 0x1000, 0x2000, rig.base));

  // Before FEATURES_OK.
  rig.write(kStatus, 0);
  rig.write(kStatus, kAcknowledge | kDriver);
  CHECK(!rig.enable_queue(0, driver));
  // Registers of a ready queue stand still; not ready again, they move.
  REQUIRE(ready_with(16, 0x1000, 0x2000, 0x3000));
  rig.write(kQueueSize, 0);
  rig.write(kQueueReady, 2);
  CHECK(rig.read(kQueueReady) == 1);
  rig.write(kQueueReady, 0);
  CHECK(rig.read(kQueueReady) == 0);
  rig.write(kQueueReady, 1);
  CHECK(rig.read(kQueueReady) == 1);
  rig.driver_ok();
  CHECK(Probe::last->queues.at(0));
  CHECK(!Probe::last->queues.at(1));
  // At work nothing moves.
  rig.write(kQueueReady, 0);
  CHECK(rig.read(kQueueReady) == 1);
  CHECK(!rig.enable_queue(1, driver));
}

TEST_CASE("mmio: notifications reach their queue, before activation nothing") {
  FakeHost host;
  Rig rig(probe_type(), host);
  for (const uint32_t value : {0u, 1u, 2u, 0xffff'ffffu}) rig.write(kQueueNotify, value);
  FakeDriver driver(host.memory(), {false, 8, 0, 0x10000, 0});
  rig.bring_up(driver);
  Probe::last->queues[0].clear_kick();
  rig.write(kQueueNotify, 1);
  rig.write(kQueueNotify, 7);
  CHECK(!take_event(Probe::last->queues[0].kick_fd()));
  rig.write(kQueueNotify, 0);
  CHECK(take_event(Probe::last->queues[0].kick_fd()));
}

TEST_CASE("mmio: a device that fails to activate, or breaks later, needs a reset") {
  FakeHost host;
  Rig rig(probe_type(), host);
  Probe::last->fail_activation = true;
  REQUIRE((rig.negotiate(kVersion1) & kFeaturesOk) != 0);
  rig.driver_ok();
  CHECK(rig.read(kStatus) == (kAcknowledge | kDriver | kFeaturesOk | kDriverOk | kNeedsReset));
  CHECK(rig.read(kInterruptStatus) == 2);
  CHECK(host.interrupts(rig.gsi) == 1);
  CHECK(host.log_lines().back().find("no backend") != std::string::npos);
  rig.driver_ok();
  CHECK(Probe::last->activations == 1);

  Probe::last->fail_activation = false;
  FakeDriver driver(host.memory(), {false, 8, 0, 0x10000, 0});
  rig.bring_up(driver);
  CHECK(Probe::last->resets == 1);
  CHECK(Probe::last->activations == 2);
  Probe::last->port->needs_reset(Probe::last->port->context);
  CHECK((rig.read(kStatus) & kNeedsReset) != 0);
  CHECK(host.interrupts(rig.gsi) == 1);
  rig.write(kStatus, 0);
  CHECK(rig.read(kStatus) == 0);
  CHECK(rig.read(kInterruptStatus) == 0);
  CHECK(rig.read(kQueueReady) == 0);
  CHECK(Probe::last->resets == 2);
  rig.write(kStatus, 0);
  CHECK(Probe::last->resets == 2);
}

TEST_CASE("mmio: configuration changes count up the generation and interrupt") {
  FakeHost host;
  Rig rig(probe_type(), host);
  FakeDriver driver(host.memory(), {false, 8, 0, 0x10000, 0});
  rig.bring_up(driver);
  const uint32_t before = rig.read(kGeneration);
  CHECK(rig.read(kGeneration) == before);
  Probe::last->port->config_changed(Probe::last->port->context);
  CHECK(rig.read(kGeneration) == before + 1);
  CHECK(rig.read(kInterruptStatus) == 2);
  CHECK(host.interrupts(rig.gsi) == 1);
  rig.write(kInterruptAck, 1);
  CHECK(rig.read(kInterruptStatus) == 2);
  rig.write(kInterruptAck, 0xffff'ffff);
  CHECK(rig.read(kInterruptStatus) == 0);
}

TEST_CASE("mmio: with a kernel backend every interrupt may be a queue's") {
  FakeHost host;
  Rig rig(probe_type(), host);
  Probe::last->take_call = true;
  FakeDriver driver(host.memory(), {false, 8, 0, 0x10000, 0});
  rig.bring_up(driver);
  CHECK(rig.read(kInterruptStatus) == 1);
  rig.write(kInterruptAck, 1);
  CHECK(rig.read(kInterruptStatus) == 1);
  signal_event(Probe::last->call_fd);
  CHECK(host.interrupts(rig.gsi) == 1);
  rig.write(kStatus, 0);
  CHECK(rig.read(kInterruptStatus) == 0);
}

TEST_CASE("mmio: resets while the device is at work, with other vCPUs at the registers") {
  FakeHost host;
  Rig rig(probe_type(), host);
  Probe::last->busy = true;
  std::atomic<bool> done{false};
  std::vector<std::thread> vcpus;
  for (uint32_t seed = 0; seed < 2; ++seed)
    vcpus.emplace_back([&, seed] {
      for (uint32_t i = seed; !done; ++i) {
        rig.write(kQueueNotify, i % 4);
        rig.write(kInterruptAck, rig.read(kInterruptStatus));
        rig.write(kDeviceFeaturesSelect, i);
        rig.read(i * 4 % 0x200);
        std::this_thread::yield();
      }
    });
  int answered = 0;
  for (int round = 0; round < 24; ++round) {
    rig.write(kStatus, 0);  // in the middle of its work; the memory is the driver's again
    FakeDriver driver(host.memory(), {round % 2 == 1, 16, 0, 0x10000, 0});
    rig.negotiate(kVersion1 | (round % 2 ? kFeaturePackedRing : 0));
    REQUIRE(rig.enable_queue(0, driver));
    rig.driver_ok();
    // Every other round waits for its answers; the rest are cut off.
    const bool wait = round % 4 < 2;
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(5);
    for (int sent = 0, received = 0; sent < 50 || (wait && received < 50);) {
      if (sent < 50 && driver.add({{0x100000, 16, false}})) ++sent;
      rig.publish(driver);
      while (driver.take_used()) ++received, ++answered;
      std::this_thread::yield();
      if (std::chrono::steady_clock::now() > deadline) break;
    }
  }
  rig.write(kStatus, 0);
  done = true;
  for (auto& vcpu : vcpus) vcpu.join();
  CHECK(answered >= 12 * 50);
  CHECK(Probe::last->resets == Probe::last->activations);
}

TEST_CASE("mmio: saved in the middle, loaded into another machine, the driver notices nothing") {
  for (const bool packed : {false, true}) {
    CAPTURE(packed);
    FakeHost source;
    Rig before(rng_type(), source, "virtio-rng.0");
    FakeDriver driver(source.memory(), {packed, 8, kFeatureEventIndex, 0x10000, 0});
    before.bring_up(driver);
    for (int i = 0; i < 11; ++i) {
      REQUIRE(driver.add({{0x100000, 16, true}}));
      driver.enable_interrupts();
      before.publish(driver);
      source.run_main_loop();
      REQUIRE(driver.take_used());
    }
    // A request whose notification has not been served yet.
    REQUIRE(driver.add({{0x100000, 24, true}}));
    driver.enable_interrupts();
    before.publish(driver);
    REQUIRE(before.device.quiesce() == CLONE_OK);
    REQUIRE(before.transport.quiesce() == CLONE_OK);
    source.run_main_loop();
    CHECK(!driver.used_pending());
    SavedState state, again;
    REQUIRE(before.device.save(state) == CLONE_OK);
    REQUIRE(before.transport.save(state) == CLONE_OK);
    REQUIRE(before.transport.save(again) == CLONE_OK);
    CHECK(state.sections == again.sections);

    FakeHost target;
    std::memcpy(target.memory().slice({0}, 1 << 20), source.memory().slice({0}, 1 << 20), 1 << 20);
    target.offer(CLONE_VIRTQUEUE, virtqueue_service());
    DeviceUnderTest device(rng_type(), target.handle("virtio-rng.0"));
    DeviceUnderTest transport(PluginFile("transport-mmio").transport("mmio"), target.handle("mmio"));
    REQUIRE(device.configure() == CLONE_OK);
    REQUIRE(transport.configure() == CLONE_OK);
    const auto attachment = device.attachment();
    REQUIRE(PluginFile("transport-mmio").transport("mmio").attach(transport.raw(), &attachment, nullptr) == CLONE_OK);
    REQUIRE(device.load(state) == CLONE_OK);
    REQUIRE(transport.load(state) == CLONE_OK);
    REQUIRE(device.start() == CLONE_OK);
    REQUIRE(transport.start() == CLONE_OK);
    target.run_main_loop();
    CHECK(target.read<uint32_t>(CLONE_BUS_MMIO, before.base + kStatus) ==
          (kAcknowledge | kDriver | kFeaturesOk | kDriverOk));
    CHECK(target.interrupts(before.gsi) >= 1);
    // The used entry stands in the target's memory, and not in the source's.
    std::memcpy(source.memory().slice({0x10000}, 0x1000), target.memory().slice({0x10000}, 0x1000), 0x1000);
    const auto used = driver.take_used();
    REQUIRE(used);
    CHECK(used->written_bytes == 24);
    // The source goes on, too.
    REQUIRE(before.transport.resume() == CLONE_OK);
    REQUIRE(before.device.resume() == CLONE_OK);
    source.run_main_loop();
    transport.destroy();
  }
}

TEST_CASE("mmio: hostile saved state is refused by name, and the slot is as after a reset") {
  FakeHost host;
  Rig rig(probe_type(), host, "probe.0");
  FakeDriver driver(host.memory(), {false, 8, 0, 0x10000, 0});
  rig.bring_up(driver);
  SavedState good;
  REQUIRE(rig.transport.save(good) == CLONE_OK);
  REQUIRE(rig.transport.load(good) == CLONE_OK);
  CHECK(rig.read(kStatus) == (kAcknowledge | kDriver | kFeaturesOk | kDriverOk));
  CHECK(Probe::last->activations == 2);

  const auto refused = [&](const std::function<void(SavedState::Section&)>& spoil, const std::string& why) {
    SavedState bad = good;
    spoil(bad.sections.at("probe.0"));
    CHECK(rig.transport.load(bad) == CLONE_ERR_CORRUPT);
    INFO(rig.transport.error);
    CHECK(rig.transport.error.find(why) != std::string::npos);
    CHECK(rig.transport.error.find("probe.0") != std::string::npos);
    CHECK(rig.read(kStatus) == 0);
    CHECK(Probe::last->queues.empty());
  };
  const auto set = [](size_t offset, auto value) {
    return [=](SavedState::Section& section) { std::memcpy(section.bytes.data() + offset, &value, sizeof value); };
  };
  constexpr size_t kSlot = 48;  // bytes before the first queue
  refused([](auto& section) { section.bytes.pop_back(); }, "bytes, not");
  refused([](auto& section) { section.bytes.clear(); }, "0 bytes");
  refused([](auto& section) { section.bytes.resize(1 << 20); }, "bytes, not");
  refused([](auto& section) { section.version = 2; }, "version 2");
  refused([](auto& section) { section.version = 0; }, "version 0");
  refused(set(0, uint32_t{4}), "device type 4");
  refused(set(4, uint32_t{3}), "3 queues");
  refused(set(8, kVersion1 | 1ull << 40), "0x10000000000");
  refused(set(8, uint64_t{0}), "status 0xf");
  refused(set(16, uint32_t{kDriverOk}), "status 0x4");
  refused(set(16, uint32_t{0x1000f}), "status 0x1000f");
  refused(set(16, uint32_t{kAcknowledge}), "ready without FEATURES_OK");
  refused(set(kSlot, uint64_t{1} << 50), "descriptor area");
  refused(set(kSlot + 8, uint64_t{1}), "driver area");
  refused(set(kSlot + 24, uint32_t{0}), "size 0");
  refused(set(kSlot + 24, uint32_t{0x8000'0000}), "at most 16");
  refused(set(kSlot + 32, uint16_t{9}), "position");
  SavedState empty;
  CHECK(rig.transport.load(empty) == CLONE_ERR_CORRUPT);
  CHECK(rig.transport.error.find("section probe.0 is missing") != std::string::npos);

  // Still waiting for its reset: not activated again.
  SavedState waiting = good;
  set(16, uint32_t{kAcknowledge | kDriver | kFeaturesOk | kDriverOk | kNeedsReset})(waiting.sections.at("probe.0"));
  const int activations = Probe::last->activations;
  REQUIRE(rig.transport.load(waiting) == CLONE_OK);
  CHECK((rig.read(kStatus) & kNeedsReset) != 0);
  CHECK(Probe::last->activations == activations);
  Probe::last->fail_activation = true;
  CHECK(rig.transport.load(good) == CLONE_ERR_INVALID);
  CHECK(rig.transport.error == "probe.0: no backend");
}

TEST_CASE("mmio: a machine reset is a device reset") {
  FakeHost host;
  Rig rig(probe_type(), host);
  FakeDriver driver(host.memory(), {false, 8, 0, 0x10000, 0});
  rig.bring_up(driver);
  REQUIRE(rig.device.quiesce() == CLONE_OK);
  REQUIRE(rig.device.reset() == CLONE_OK);
  REQUIRE(rig.transport.reset() == CLONE_OK);
  REQUIRE(rig.device.resume() == CLONE_OK);
  CHECK(rig.read(kStatus) == 0);
  CHECK(Probe::last->resets == 1);
  rig.bring_up(driver);
  CHECK(Probe::last->activations == 2);
}

TEST_CASE("mmio: as many devices as there are lines, then a clear error; everything is given back") {
  FakeHost host;
  host.offer(CLONE_VIRTQUEUE, virtqueue_service());
  const auto& type = PluginFile("transport-mmio").transport("mmio");
  DeviceUnderTest transport(type, host.handle("mmio"));
  REQUIRE(transport.configure() == CLONE_OK);
  std::vector<std::unique_ptr<DeviceUnderTest>> devices;
  const size_t lines = host.free_gsis.size();
  for (size_t i = 0; i <= lines; ++i) {
    devices.push_back(std::make_unique<DeviceUnderTest>(rng_type(), host.handle("virtio-rng." + std::to_string(i))));
    REQUIRE(devices.back()->configure() == CLONE_OK);
    const auto attachment = devices.back()->attachment();
    const clone_status status =
        transport.call([&](clone_err* err) { return type.attach(transport.raw(), &attachment, err); });
    CHECK(status == (i < lines ? CLONE_OK : CLONE_ERR_BUSY));
  }
  CHECK(transport.error.find("virtio-rng." + std::to_string(lines) + ": ") == 0);
  CHECK(transport.error.find("interrupt line") != std::string::npos);
  CHECK(host.acpi_nodes.size() == lines);
  CHECK(host.claim_count() == lines);
  CHECK(host.irqfd_count() == lines);
  CHECK(host.ioeventfd_count() == lines);
  transport.destroy();
  CHECK(host.claim_count() == 0);
  CHECK(host.irqfd_count() == 0);
  CHECK(host.ioeventfd_count() == 0);
}

namespace {

constexpr uint16_t kTakenPort = 0x680;

// A machine with prepared slots: any number of devices, of which some may be added to it.
struct Slots {
  FakeHost host;
  const clone_transport_type& type = PluginFile("transport-mmio").transport("mmio");
  DeviceUnderTest transport{type, host.handle("mmio")};
  std::vector<std::unique_ptr<DeviceUnderTest>> devices;

  Slots(const char* slots, const std::set<std::string>& saved = {}) {
    host.saved_instances = saved;
    host.offer(CLONE_VIRTQUEUE, virtqueue_service());
    REQUIRE_MESSAGE(transport.configure({{"slots", slots}}) == CLONE_OK, transport.error);
  }
  ~Slots() { transport.destroy(); }
  clone_status attach(const clone_device_type& device, const std::string& name) {
    devices.push_back(std::make_unique<DeviceUnderTest>(device, host.handle(name)));
    REQUIRE(devices.back()->configure() == CLONE_OK);
    const auto attachment = devices.back()->attachment();
    return transport.call([&](clone_err* err) { return type.attach(transport.raw(), &attachment, err); });
  }
  // Where the n-th slot's resources are in its ACPI description.
  uint64_t window(unsigned index) { return dword_after("\x86\x09\x00\x01", 4, index); }
  uint32_t line(unsigned index) { return dword_after("\x89\x06\x00\x03\x01", 5, index); }
  uint32_t dword_after(const char* descriptor, size_t size, unsigned index) {
    const auto* bytes = reinterpret_cast<const char*>(host.acpi_aml.data());
    std::string_view rest(bytes, host.acpi_aml.size());
    for (unsigned i = 0; i <= index; ++i) {
      const size_t found = rest.find({descriptor, size});
      REQUIRE(found != rest.npos);
      rest.remove_prefix(found + size);
    }
    uint32_t value;
    std::memcpy(&value, rest.data(), sizeof value);
    return value;
  }
  uint32_t taken() { return host.read<uint32_t>(CLONE_BUS_PIO, kTakenPort); }
  uint32_t read(unsigned slot, uint64_t offset) { return host.read<uint32_t>(CLONE_BUS_MMIO, window(slot) + offset); }
};

}  // namespace

TEST_CASE("mmio: without slots of its own making the guest is told of the devices that there are") {
  FakeHost host;
  Rig rig(rng_type(), host);
  CHECK(host.acpi_nodes.size() == 1);
  CHECK(host.acpi_aml.empty());
  CHECK(host.claim_count() == 1);
  CHECK(host.read<uint32_t>(CLONE_BUS_PIO, kTakenPort) == ~0u);
}

TEST_CASE("mmio: prepared slots are described, taken in order, and no more than there are") {
  Slots m("3");
  REQUIRE(m.attach(rng_type(), "virtio-rng.0") == CLONE_OK);
  REQUIRE(m.transport.start() == CLONE_OK);
  CHECK(m.host.acpi_nodes.empty());
  CHECK(m.taken() == 1);
  m.host.write<uint32_t>(CLONE_BUS_PIO, kTakenPort, 7);
  CHECK(m.taken() == 1);
  CHECK(m.host.read<uint8_t>(CLONE_BUS_PIO, kTakenPort) == 1);
  CHECK(m.host.read<uint16_t>(CLONE_BUS_PIO, kTakenPort + 2) == 0);
  CHECK(m.read(0, kMagic) == 0x74726976);
  CHECK(m.read(1, kMagic) == ~0u);  // nobody is there
  CHECK(std::set{m.window(0), m.window(1), m.window(2)}.size() == 3);
  CHECK(std::set{m.line(0), m.line(1), m.line(2), m.line(3)}.size() == 4);  // and the event's
  CHECK(m.host.interrupts(m.line(3)) == 0);
  REQUIRE(m.attach(rng_type(), "virtio-rng.1") == CLONE_OK);
  REQUIRE(m.attach(rng_type(), "virtio-rng.2") == CLONE_OK);
  CHECK(m.taken() == 7);
  CHECK(m.attach(rng_type(), "virtio-rng.3") == CLONE_ERR_INVALID);
  CHECK(m.transport.error == "virtio-rng.3: slots=3: no slot is left, allowed are up to 15");
}

TEST_CASE("mmio: a device that is added to a saved machine is in reset, and the guest is told once") {
  const std::set<std::string> known = {"mmio", "virtio-rng.0"};
  Slots source("3");
  REQUIRE(source.attach(rng_type(), "virtio-rng.0") == CLONE_OK);
  REQUIRE(source.transport.start() == CLONE_OK);
  SavedState state;
  REQUIRE(source.transport.save(state) == CLONE_OK);

  Slots fork("3", known);
  REQUIRE(fork.attach(rng_type(), "virtio-rng.0") == CLONE_OK);
  REQUIRE(fork.attach(probe_type(), "probe.0") == CLONE_OK);
  const uint32_t event = fork.line(3);
  REQUIRE_MESSAGE(fork.transport.load(state) == CLONE_OK, fork.transport.error);
  CHECK(fork.host.interrupts(event) == 0);  // the interrupt controllers come later
  REQUIRE(fork.transport.start() == CLONE_OK);
  CHECK(fork.host.interrupts(event) == 1);
  CHECK(fork.taken() == 3);
  CHECK(fork.window(1) == source.window(1));
  CHECK(fork.line(1) == source.line(1));
  CHECK(fork.read(1, kDeviceId) == 42);
  CHECK(fork.read(1, kStatus) == 0);
  CHECK(Probe::last->activations == 0);
  REQUIRE(fork.transport.quiesce() == CLONE_OK);
  REQUIRE(fork.transport.resume() == CLONE_OK);
  CHECK(fork.host.interrupts(event) == 0);
  SavedState again;
  REQUIRE(fork.transport.save(again) == CLONE_OK);

  // It is one of those that a fork of the fork's machine has from the beginning.
  Slots second("3", {"mmio", "virtio-rng.0", "probe.0"});
  REQUIRE(second.attach(rng_type(), "virtio-rng.0") == CLONE_OK);
  REQUIRE(second.attach(probe_type(), "probe.0") == CLONE_OK);
  CHECK(second.transport.load(state) == CLONE_ERR_CORRUPT);
  CHECK(second.transport.error == "section probe.0 is missing");
  REQUIRE(second.transport.load(again) == CLONE_OK);
  REQUIRE(second.transport.start() == CLONE_OK);
  CHECK(second.host.interrupts(event) == 0);
  CHECK(second.taken() == 3);

  Slots none("0", known);
  REQUIRE(none.attach(rng_type(), "virtio-rng.0") == CLONE_OK);
  CHECK(none.attach(probe_type(), "probe.0") == CLONE_ERR_INVALID);
  CHECK(none.transport.error.starts_with("probe.0: no slot was prepared for it: "));
  CHECK(none.transport.error.find("--transport mmio,slots=N") != std::string::npos);
  CHECK(none.transport.error.find('\n') == std::string::npos);
}
