// SPDX-License-Identifier: Apache-2.0
// Fuzzes the streams of virtio-vsock: the input is what a guest sends, what hosts do, and how much either takes. Beside
// what the sanitizers see, these hold: there is a partner for each stream and no more than there may be, no partner is
// called after it ended, and every packet makes sense.
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "streams.hpp"

using namespace virtio_vsock;

namespace {

constexpr uint32_t kCid = 3;

void require(bool holds, int line = __builtin_LINE()) {
  if (holds) return;
  std::fprintf(stderr, "%s:%d does not hold\n", __FILE__, line);
  std::abort();
}

class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), left_(size) {}
  bool empty() const { return left_ == 0; }
  uint8_t byte() {
    if (left_ == 0) return 0;
    --left_;
    return *data_++;
  }
  uint32_t word() {
    uint32_t value = 0;
    for (int i = 0; i < 4; ++i) value = value << 8 | byte();
    return value;
  }

 private:
  const uint8_t* data_;
  size_t left_;
};

struct Host;

struct FuzzPartner final : Partner {
  explicit FuzzPartner(Host& in) : host(in) {}
  void accepted(uint32_t) override { live(); }
  ssize_t read(std::span<const iovec> into) override;
  ssize_t write(std::span<const iovec> from) override;
  void end_writing() override { live(); }
  void end_reading() override { live(); }
  void watch(bool, bool) override { live(); }
  void live() const { require(!retired); }

  Host& host;
  bool retired = false;
  bool hung_up = false;
};

struct Host final : HostSide {
  explicit Host(Input& from) : input(from) {}
  std::unique_ptr<Partner> dial(uint32_t port) override {
    if (port % 4 == 3) return nullptr;
    return make();
  }
  void retire(std::unique_ptr<Partner> partner) override {
    auto& fuzz = static_cast<FuzzPartner&>(*partner);
    fuzz.live();
    fuzz.retired = true;
    std::erase(partners, &fuzz);
    graveyard.push_back(std::move(partner));
  }
  std::chrono::milliseconds now() override { return time; }
  std::unique_ptr<FuzzPartner> make() {
    auto made = std::make_unique<FuzzPartner>(*this);
    partners.push_back(made.get());
    return made;
  }

  Input& input;
  std::chrono::milliseconds time{0};
  std::vector<FuzzPartner*> partners;
  std::vector<std::unique_ptr<Partner>> graveyard;
};

size_t total(std::span<const iovec> parts) {
  size_t size = 0;
  for (const iovec& part : parts) size += part.iov_len;
  return size;
}

ssize_t FuzzPartner::read(std::span<const iovec> into) {
  live();
  const size_t room = total(into);
  require(room > 0 && room <= kMostPayloadBytes);
  const uint8_t what = host.input.byte();
  if (what < 16) return 0;
  if (what < 32) return -EAGAIN;
  if (what < 40) return -ECONNRESET;
  const size_t count = what < 128 ? 1 + what % room : room;
  size_t left = count;
  for (const iovec& part : into) {
    const size_t n = std::min(left, part.iov_len);
    std::memset(part.iov_base, what, n);
    left -= n;
  }
  return static_cast<ssize_t>(count);
}

ssize_t FuzzPartner::write(std::span<const iovec> from) {
  live();
  const size_t size = total(from);
  require(size <= kBufferBytes);
  const uint8_t what = host.input.byte();
  if (what < 64) return -EAGAIN;
  if (what < 80) return -EPIPE;
  return static_cast<ssize_t>(what < 128 ? size / 2 : size);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  Host host(input);
  Streams streams(kCid, host, input.word());
  static std::byte memory[1 << 17];
  static std::byte space[1 << 13];

  while (!input.empty()) {
    const uint8_t step = input.byte();
    switch (step % 8) {
      case 0:
      case 1:
      case 2:
      case 3: {
        if (!streams.takes_packets()) break;
        Packet packet;
        const uint8_t oddities = input.byte();
        packet.source_cid = oddities & 1 && oddities & 2 ? input.word() : kCid;
        packet.destination_cid = oddities & 4 && oddities & 8 ? input.word() : kHostCid;
        // Few ports, so that packets meet streams.
        packet.source_port = input.byte() % 4;
        packet.destination_port = step & 8 ? input.byte() % 4 : input.byte() % 4 + 1024;
        packet.operation = input.byte() % 10;
        packet.type = oddities & 16 && oddities & 32 ? input.byte() : VIRTIO_VSOCK_TYPE_STREAM;
        packet.flags = oddities & 64 ? input.word() : input.byte() % 4;
        packet.size_bytes = oddities & 128 ? input.word() : uint32_t{input.byte()} << (input.byte() % 10);
        packet.buffer_bytes = step & 16 ? input.word() : 1 << 16;
        packet.forwarded_bytes = step & 32 ? input.word() : input.byte();
        const size_t given = oddities & 128 ? input.word() % sizeof memory : packet.size_bytes;
        const iovec parts[] = {
            {memory, std::min<size_t>(given, sizeof memory) / 2},
            {memory + 5, std::min<size_t>(given, sizeof memory - 5) - std::min<size_t>(given, sizeof memory) / 2}};
        streams.receive(packet, parts);
        break;
      }
      case 4: {
        for (unsigned budget = input.byte() % 32; budget && streams.has_packets(); --budget) {
          const size_t room = input.byte() * 32;
          const iovec parts[] = {{space, room / 3}, {space + room / 3, room - room / 3}};
          const Packet packet = streams.next(parts);
          require(packet.source_cid == kHostCid && packet.destination_cid == kCid);
          require(packet.type == VIRTIO_VSOCK_TYPE_STREAM);
          require(packet.operation >= VIRTIO_VSOCK_OP_REQUEST && packet.operation <= VIRTIO_VSOCK_OP_CREDIT_REQUEST);
          require(packet.buffer_bytes == kBufferBytes);
          require((packet.size_bytes > 0) == (packet.operation == VIRTIO_VSOCK_OP_RW) && packet.size_bytes <= room);
          require((packet.flags != 0) == (packet.operation == VIRTIO_VSOCK_OP_SHUTDOWN) && packet.flags <= 3);
        }
        break;
      }
      case 5:
        if (!host.partners.empty()) {
          FuzzPartner& partner = *host.partners[input.byte() % host.partners.size()];
          const bool hangs_up = step & 8 && step & 16 && step & 32;
          if (!partner.hung_up) streams.ready(*partner.stream, step & 64, step & 128, partner.hung_up = hangs_up);
        }
        break;
      case 6:
        static_cast<void>(
            streams.open(input.byte() % 4, host.make(), step & 8 ? PortRange::reserved : PortRange::ordinary));
        break;
      case 7:
        host.time += std::chrono::milliseconds(uint32_t{input.byte()} * 64);
        streams.expire();
        if (step == 255) streams.drop_all();
        break;
    }
    streams.settle();
    host.graveyard.clear();
    require(streams.counters().streams == host.partners.size() && host.partners.size() <= kMostStreams);
  }
  streams.drop_all();
  require(host.partners.empty() && !streams.has_packets() && !streams.has_deadlines());
  return 0;
}
