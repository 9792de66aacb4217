// SPDX-License-Identifier: Apache-2.0
// Fuzzes the streams of virtio-vsock: the input is what a guest sends, in chains of segments that it chose, what hosts
// do, and how much either takes. Beside what the sanitizers see, these hold: there is a partner for each stream and no
// more than there may be, no partner is called after it ended, one that hung up ends in its time, every packet makes
// sense, and none of its bytes is lost or taken twice between segments.
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "clone/sdk/virtio.hpp"
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
  std::chrono::milliseconds hung_up_at{0};
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

// Of one chain, which is made of memory in a row: what lies behind one segment is the next.
struct clone_virtqueue {
  static const clone_host_virtqueue* table() {
    static const auto made = [] {
      clone_host_virtqueue functions{};
      functions.queue_size = [](clone_virtqueue*) -> uint32_t { return kMostSegments; };
      functions.pop = [](clone_virtqueue* self, clone_chain* chain, clone_err*) {
        std::copy_n(self->segments, self->count, chain->segments);
        (self->readable ? chain->readable_count : chain->writable_count) = self->count;
        (self->readable ? chain->readable_bytes : chain->writable_bytes) = self->size_bytes;
        return CLONE_OK;
      };
      functions.push = [](clone_virtqueue*, const clone_chain*, uint32_t) { return CLONE_OK; };
      return functions;
    }();
    return &made;
  }
  // Lengths that the input tells; the last segment is the rest.
  void cut(std::byte* memory, uint32_t all_bytes, Input& input) {
    count = 0;
    size_bytes = all_bytes;
    for (unsigned cuts = input.byte() % kMostSegments; all_bytes > 0; --cuts) {
      const uint32_t part_bytes = cuts ? std::min<uint32_t>(1 + input.byte() % 64, all_bytes) : all_bytes;
      segments[count++] = {memory, 0, part_bytes, 0};
      memory += part_bytes;
      all_bytes -= part_bytes;
    }
  }

  static constexpr uint32_t kMostSegments = 8;
  bool readable = true;
  clone_segment segments[kMostSegments];
  uint32_t count = 0;
  uint32_t size_bytes = 0;
};

namespace {

constexpr size_t kHeaderBytes = sizeof(virtio_vsock_hdr);

// All bytes behind the header, each once.
void require_payload(std::span<const iovec> parts, const std::byte* at, size_t size_bytes) {
  for (const iovec& part : parts) {
    require(part.iov_base == at && part.iov_len > 0);
    at += part.iov_len;
  }
  require(total(parts) == size_bytes);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  Host host(input);
  Streams streams(kCid, host, input.word());
  static std::byte memory[kHeaderBytes + (1 << 17)];
  static std::byte space[kHeaderBytes + (1 << 13)];
  clone_virtqueue tx, rx;
  rx.readable = false;
  const clone_sdk::Queue from_guest(clone_virtqueue::table(), &tx), to_guest(clone_virtqueue::table(), &rx);
  clone_sdk::Chain chain;
  std::vector<iovec> parts;

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
        const uint32_t given = std::min<uint32_t>(oddities & 128 ? input.word() : packet.size_bytes, 1 << 17);
        virtio_vsock_hdr wire = encode(packet);
        std::memcpy(memory, &wire, sizeof wire);
        tx.cut(memory, kHeaderBytes + given, input);
        require(from_guest.pop(chain) == clone_sdk::Queue::Pop::chain);
        wire = {};
        require(chain.read(0, &wire, sizeof wire) && std::memcmp(memory, &wire, sizeof wire) == 0);
        payload_of(chain.readable(), parts);
        require_payload(parts, memory + kHeaderBytes, given);
        streams.receive(decode(wire), parts);
        from_guest.push(chain, 0);
        break;
      }
      case 4: {
        for (unsigned budget = input.byte() % 32; budget && streams.has_packets(); --budget) {
          const uint32_t room = input.byte() * 32u;
          rx.cut(space, kHeaderBytes + room, input);
          require(to_guest.pop(chain) == clone_sdk::Queue::Pop::chain);
          payload_of(chain.writable(), parts);
          require_payload(parts, space + kHeaderBytes, room);
          Packet packet = streams.next(parts);
          virtio_vsock_hdr wire = encode(packet);
          require(chain.write(0, &wire, sizeof wire) && std::memcmp(space, &wire, sizeof wire) == 0);
          to_guest.push(chain, static_cast<uint32_t>(sizeof wire) + packet.size_bytes);
          packet = decode(wire);
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
          if (partner.hung_up) break;
          if (hangs_up) partner.hung_up_at = host.time;
          streams.ready(*partner.stream, step & 64, step & 128, partner.hung_up = hangs_up);
        }
        break;
      case 6:
        static_cast<void>(
            streams.open(input.byte() % 4, host.make(), step & 8 ? PortRange::reserved : PortRange::ordinary));
        break;
      case 7:
        host.time += std::chrono::milliseconds(uint32_t{input.byte()} * 64);
        streams.expire();
        for (const FuzzPartner* partner : host.partners)
          require(!partner->hung_up || host.time < partner->hung_up_at + kLingerPatience + kPatience);
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
