// SPDX-License-Identifier: Apache-2.0
// virtio-vsock under test: the plugin behind real virtqueues, and a guest that speaks the protocol, well or badly.
#pragma once

#include <doctest/doctest.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <chrono>
#include <functional>
#include <map>
#include <string>

#include "clone/abi/control.h"
#include "clone/abi/vsock.h"
#include "fake_driver.hpp"
#include "fake_host.hpp"
#include "fake_plugin.hpp"
#include "virtio-vsock/packet.hpp"
#include "virtqueue/virtqueue_service.hpp"

namespace vmm::test {

using virtio_vsock::Packet;

// A stream as the guest's kernel sees it.
struct GuestStream {
  uint32_t host_port = 0;
  uint32_t guest_port = 0;
  bool open = false, reset = false, answered = false;
  uint32_t shutdown = 0;
  std::string received;
  uint32_t buffer_bytes = 256 << 10;
  uint32_t consumed_bytes = 0;  // of received: what the program took
  uint32_t sent_bytes = 0;
  uint32_t host_buffer_bytes = 0, host_forwarded_bytes = 0;
  int credit_requests = 0;
  uint32_t room_of_host() const { return host_buffer_bytes - (sent_bytes - host_forwarded_bytes); }
};

class VsockRig {
 public:
  static constexpr uint32_t kRing = 64, kRxSlots = 24, kTxSlots = 16, kRxPayload = 4096, kTxSlotBytes = 80 << 10;
  static constexpr uint64_t kRxArea = 0x40'0000, kTxArea = 0x60'0000, kEventArea = 0x3f'0000;

  explicit VsockRig(const std::map<std::string, std::string>& options = {{"backend", "user"}}, bool control = true)
      : host_(32ull << 20), device_(plugin().device("virtio-vsock"), prepare(host_, control)) {
    const clone_status status = device_.configure(options);
    REQUIRE_MESSAGE(status == CLONE_OK, device_.error);
    table_ = device_.extension<clone_virtio_device>(CLONE_VIRTIO_DEVICE);
    port_ = {sizeof port_, 0, this, [](void*) {}, [](void* self) { ++static_cast<VsockRig*>(self)->resets_wanted; }};
    virtio_vsock_config config{};
    table_->read_config(device_.raw(), 0, &config, sizeof config);
    cid = static_cast<uint32_t>(config.guest_cid);
  }
  ~VsockRig() {
    deactivate();
    device_.destroy();
  }
  static const PluginFile& plugin() {
    static const PluginFile file("virtio-vsock");
    return file;
  }

  void start(bool packed = false) {
    activate(packed);
    REQUIRE(device_.start() == CLONE_OK);
  }
  void activate(bool packed = false) {
    const auto* service = virtqueue_service();
    const uint64_t offered = table_->ring_features(device_.raw(), service->ring_features(handle()));
    std::vector<clone_virtqueue*> queues;
    for (uint32_t i = 0; i < table_->queue_count(device_.raw()); ++i) {
      Line& line = lines_.emplace_back();
      line.driver = std::make_unique<FakeDriver>(
          host_.memory(),
          FakeDriverConfig{
              .packed = packed, .size = kRing, .features = offered & ~(1ull << 34), .base = 0x10'0000 + i * 0x8'0000});
      line.kick = clone_sdk::Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
      line.call = clone_sdk::Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
      clone_virtqueue_config config = line.driver->queue_config();
      config.index = i;
      config.kick_fd = line.kick.get();
      config.call_fd = line.call.get();
      clone_err err{sizeof err, 0, {}};
      REQUIRE_MESSAGE(service->create(handle(), &config, &line.queue, &err) == CLONE_OK, err.message);
      queues.push_back(line.queue);
    }
    const clone_virtio_activation activation = {sizeof activation, static_cast<uint32_t>(queues.size()),
                                                table_->features(device_.raw()), queues.data(), &port_};
    clone_err err{sizeof err, 0, {}};
    REQUIRE_MESSAGE(table_->activate(device_.raw(), &activation, &err) == CLONE_OK, err.message);
    for (uint32_t slot = 0; slot < kRxSlots; ++slot) offer_rx(slot);
    free_tx_.clear();
    for (uint32_t slot = 0; slot < kTxSlots; ++slot) free_tx_.push_back(slot);
    streams.clear();
  }
  void deactivate() {
    if (!device_.raw()) return;
    table_->reset(device_.raw());
    for (Line& line : lines_) virtqueue_service()->destroy(line.queue);
    lines_.clear();
  }
  void offer_events() {
    Line& line = lines_[2];
    line.slot_of[*line.driver->add({{kEventArea, 4, true}})] = 0;
    if (line.driver->publish()) signal_event(line.kick.get());
  }
  // The available index jumps further than the ring is long.
  void break_tx() {
    FakeDriver& driver = *lines_[1].driver;
    *driver.at<uint16_t>(driver.driver_address + 2) += 1000;
    signal_event(lines_[1].kick.get());
  }
  clone_virtqueue* queue(uint32_t index) { return lines_[index].queue; }
  FakeDriver& driver(uint32_t index) { return *lines_[index].driver; }
  std::optional<uint32_t> take_event_id() {
    const auto used = lines_[2].driver->take_used();
    if (!used) return std::nullopt;
    CHECK(used->written_bytes == 4);
    return *lines_[2].driver->at<uint32_t>(kEventArea);
  }

  // --- Packets ---
  void send_raw(const std::vector<uint8_t>& bytes) {
    const uint32_t slot = free_tx();
    const uint64_t at = kTxArea + slot * kTxSlotBytes;
    std::memcpy(host_.memory().slice({at}, bytes.size()), bytes.data(), bytes.size());
    submit_tx(slot, {{at, static_cast<uint32_t>(bytes.size()), false}});
  }
  void send(const Packet& packet, std::string_view payload = {}) {
    const uint32_t slot = free_tx();
    const uint64_t at = kTxArea + slot * kTxSlotBytes;
    const virtio_vsock_hdr wire = virtio_vsock::encode(packet);
    std::memcpy(host_.memory().slice({at}, sizeof wire), &wire, sizeof wire);
    std::vector<FakeDriver::Buffer> buffers = {{at, sizeof wire, false}};
    if (!payload.empty()) {
      std::memcpy(host_.memory().slice({at + 64}, payload.size()), payload.data(), payload.size());
      buffers.push_back({at + 64, static_cast<uint32_t>(payload.size()), false});
    }
    submit_tx(slot, buffers);
  }
  Packet packet(const GuestStream& stream, uint16_t operation, uint32_t size_bytes = 0) const {
    Packet made;
    made.source_cid = cid;
    made.destination_cid = virtio_vsock::kHostCid;
    made.source_port = stream.guest_port;
    made.destination_port = stream.host_port;
    made.size_bytes = size_bytes;
    made.operation = operation;
    made.buffer_bytes = stream.buffer_bytes;
    made.forwarded_bytes = stream.consumed_bytes;
    return made;
  }
  void send(const GuestStream& stream, uint16_t operation, uint32_t flags = 0) {
    Packet made = packet(stream, operation);
    made.flags = flags;
    send(made);
  }
  // As much of the text as the host has room for; what was sent is cut off.
  void write(GuestStream& stream, std::string& text, size_t most = 64 << 10) {
    const size_t count = std::min<size_t>({text.size(), stream.room_of_host(), most});
    if (count == 0) return;
    send(packet(stream, VIRTIO_VSOCK_OP_RW, static_cast<uint32_t>(count)), std::string_view(text).substr(0, count));
    stream.sent_bytes += static_cast<uint32_t>(count);
    text.erase(0, count);
  }

  // Takes what came, for every stream; waits up to timeout_ms for the first packet. False when there was none.
  bool pump(int timeout_ms = 0) {
    Line& line = lines_[0];
    bool any = false;
    for (int round = 0; round < 2 && !any; ++round) {
      while (const auto used = line.driver->take_used()) {
        any = true;
        const uint32_t slot = line.slot_of.at(used->id);
        line.slot_of.erase(used->id);
        take_packet(slot, used->written_bytes);
        if (rx_offered) offer_rx(slot);
      }
      if (any || round || timeout_ms == 0) break;
      if (line.driver->enable_interrupts()) continue;
      pollfd entry{line.call.get(), POLLIN, 0};
      ::poll(&entry, 1, timeout_ms);
      take_event(line.call.get());
    }
    return any;
  }
  bool wait(const std::function<bool()>& done, int timeout_ms = 5000) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
    while (!done()) {
      if (std::chrono::steady_clock::now() > end) return false;
      pump(10);
      host_.run_main_loop();
    }
    return true;
  }
  // Until nothing came for a while.
  void settle(int quiet_ms = 50) {
    while (pump(quiet_ms)) {
    }
  }

  // The guest connects to a port of the host.
  GuestStream& dial(uint32_t host_port, uint32_t guest_port) {
    GuestStream& stream = streams[{host_port, guest_port}];
    stream = {};
    stream.host_port = host_port;
    stream.guest_port = guest_port;
    send(stream, VIRTIO_VSOCK_OP_REQUEST);
    return stream;
  }
  GuestStream* find(uint32_t guest_port) {
    for (auto& [ports, stream] : streams)
      if (ports.second == guest_port) return &stream;
    return nullptr;
  }

  // --- The host's side ---
  std::string socket_path(const std::string& name = "vsock.sock") { return host_.directory() + "/" + name; }
  clone_sdk::Fd client(const std::string& greeting) {
    clone_sdk::Fd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strcpy(address.sun_path, socket_path().c_str());
    REQUIRE(::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
    // One that says nothing may be turned away before it could.
    if (!greeting.empty())
      REQUIRE(::send(fd.get(), greeting.data(), greeting.size(), MSG_NOSIGNAL) ==
              static_cast<ssize_t>(greeting.size()));
    return fd;
  }
  clone_sdk::Fd listen(uint32_t port) {
    clone_sdk::Fd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strcpy(address.sun_path, socket_path("vsock.sock_" + std::to_string(port)).c_str());
    REQUIRE(::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
    REQUIRE(::listen(fd.get(), 1024) == 0);
    return fd;
  }
  // What is there to be read within a time: "" for nothing, "EOF" at the end.
  std::string receive(int fd, size_t most = 65536, int timeout_ms = 3000) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
    while (std::chrono::steady_clock::now() < end) {
      pollfd entry{fd, POLLIN, 0};
      if (::poll(&entry, 1, 5) == 1) {
        std::string text(most, '\0');
        const ssize_t count = ::recv(fd, text.data(), text.size(), MSG_DONTWAIT);
        if (count <= 0) return "EOF";
        text.resize(static_cast<size_t>(count));
        return text;
      }
      pump();
    }
    return "";
  }

  struct Ends {
    clone_sdk::Fd client;
    GuestStream* guest;
  };
  // A stream that begins on the host, accepted by the guest.
  Ends open_from_host(uint32_t guest_port) {
    Ends ends{client("CONNECT " + std::to_string(guest_port) + "\n"), nullptr};
    REQUIRE(wait([&] { return find(guest_port) != nullptr; }));
    ends.guest = find(guest_port);
    CHECK(ends.guest->host_port >= 1024);
    ends.guest->open = true;
    send(*ends.guest, VIRTIO_VSOCK_OP_RESPONSE);
    CHECK(receive(ends.client.get()) == "OK " + std::to_string(ends.guest->host_port) + "\n");
    return ends;
  }
  // And one that begins in the guest.
  Ends open_from_guest(int listener, uint32_t host_port, uint32_t guest_port) {
    Ends ends{{}, &dial(host_port, guest_port)};
    REQUIRE(wait([&] { return ends.guest->answered; }));
    ends.client = clone_sdk::Fd(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
    REQUIRE(ends.client);
    return ends;
  }

  const clone_host* handle() { return host_.handle("virtio-vsock.0"); }
  FakeHost& host() { return host_; }
  DeviceUnderTest& device() { return device_; }
  const clone_virtio_device& table() { return *table_; }
  const clone_vsock& published() {
    return *static_cast<const clone_vsock*>(handle()->get_extension(handle(), CLONE_VSOCK));
  }

  uint32_t cid = 0;
  std::map<std::pair<uint32_t, uint32_t>, GuestStream> streams;
  std::vector<Packet> strangers;  // packets of streams that the guest does not know
  bool rx_offered = true;
  bool reads_at_once = true;  // the guest's programs take what comes
  std::atomic<int> resets_wanted{0};

 private:
  struct Line {
    std::unique_ptr<FakeDriver> driver;
    clone_sdk::Fd kick, call;
    clone_virtqueue* queue = nullptr;
    std::map<uint16_t, uint32_t> slot_of;
  };

  static const clone_host* prepare(FakeHost& host, bool control) {
    host.offer(CLONE_VIRTQUEUE, virtqueue_service());
    if (!control) host.offer(CLONE_HOST_CONTROL, nullptr);
    return host.handle("virtio-vsock.0");
  }
  void offer_rx(uint32_t slot) {
    Line& line = lines_[0];
    const uint64_t at = kRxArea + slot * 0x2000;
    const auto id = line.driver->add({{at, sizeof(virtio_vsock_hdr), true}, {at + 64, kRxPayload, true}});
    REQUIRE(id);
    line.slot_of[*id] = slot;
    if (line.driver->publish()) signal_event(line.kick.get());
  }
  uint32_t free_tx() {
    Line& line = lines_[1];
    for (int tries = 0; free_tx_.empty() || tries == 0; ++tries) {
      while (const auto used = line.driver->take_used()) {
        CHECK(used->written_bytes == 0);
        free_tx_.push_back(line.slot_of.at(used->id));
        line.slot_of.erase(used->id);
      }
      if (!free_tx_.empty()) break;
      REQUIRE(tries < 5000);
      pump();
      ::usleep(1000);
    }
    const uint32_t slot = free_tx_.back();
    free_tx_.pop_back();
    return slot;
  }
  void submit_tx(uint32_t slot, const std::vector<FakeDriver::Buffer>& buffers) {
    Line& line = lines_[1];
    const auto id = line.driver->add(buffers);
    REQUIRE(id);
    line.slot_of[*id] = slot;
    if (line.driver->publish()) signal_event(line.kick.get());
  }
  void take_packet(uint32_t slot, uint32_t written_bytes) {
    const uint64_t at = kRxArea + slot * 0x2000;
    virtio_vsock_hdr wire;
    REQUIRE(written_bytes >= sizeof wire);
    std::memcpy(&wire, host_.memory().slice({at}, sizeof wire), sizeof wire);
    const Packet packet = virtio_vsock::decode(wire);
    CHECK(written_bytes == sizeof wire + packet.size_bytes);
    CHECK(packet.source_cid == 2);
    CHECK(packet.destination_cid == cid);
    CHECK(packet.type == VIRTIO_VSOCK_TYPE_STREAM);
    const std::pair ports(packet.source_port, packet.destination_port);
    if (packet.operation == VIRTIO_VSOCK_OP_REQUEST) {
      GuestStream& stream = streams[ports];
      stream = {};
      stream.host_port = packet.source_port;
      stream.guest_port = packet.destination_port;
    }
    const auto found = streams.find(ports);
    if (found == streams.end()) {
      strangers.push_back(packet);
      return;
    }
    GuestStream& stream = found->second;
    stream.host_buffer_bytes = packet.buffer_bytes;
    stream.host_forwarded_bytes = packet.forwarded_bytes;
    switch (packet.operation) {
      case VIRTIO_VSOCK_OP_RESPONSE:
        stream.answered = stream.open = true;
        break;
      case VIRTIO_VSOCK_OP_RST:
        stream.reset = true;
        stream.open = false;
        break;
      case VIRTIO_VSOCK_OP_SHUTDOWN:
        stream.shutdown |= packet.flags;
        break;
      case VIRTIO_VSOCK_OP_CREDIT_REQUEST:
        ++stream.credit_requests;
        break;
      case VIRTIO_VSOCK_OP_RW: {
        const auto* payload = reinterpret_cast<const char*>(host_.memory().slice({at + 64}, packet.size_bytes));
        stream.received.append(payload, packet.size_bytes);
        // The host may not send more than there is room for.
        CHECK(stream.received.size() - stream.consumed_bytes <= stream.buffer_bytes);
        if (reads_at_once) consume(stream);
        break;
      }
    }
  }

 public:
  void consume(GuestStream& stream) {
    stream.consumed_bytes = static_cast<uint32_t>(stream.received.size());
    send(stream, VIRTIO_VSOCK_OP_CREDIT_UPDATE);
  }

 private:
  FakeHost host_;
  DeviceUnderTest device_;
  const clone_virtio_device* table_ = nullptr;
  clone_virtio_port port_{};
  std::vector<Line> lines_;
  std::vector<uint32_t> free_tx_;
};

inline std::string noise(size_t size, uint32_t seed) {
  std::string text(size, '\0');
  for (char& c : text) c = static_cast<char>((seed = seed * 1664525 + 1013904223) >> 24);
  return text;
}

}  // namespace vmm::test
