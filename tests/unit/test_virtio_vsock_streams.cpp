// SPDX-License-Identifier: Apache-2.0
// The streams of virtio-vsock without queues and sockets: time, counts that wrap around, bounds.
#include <doctest/doctest.h>

#include <cstring>
#include <filesystem>
#include <mutex>
#include <thread>

#include "scratch_dir.hpp"
#include "virtio-vsock/cid.hpp"
#include "virtio-vsock/fair_mutex.hpp"
#include "virtio-vsock/streams.hpp"

using namespace virtio_vsock;

namespace {

constexpr uint32_t kBoth = VIRTIO_VSOCK_SHUTDOWN_RCV | VIRTIO_VSOCK_SHUTDOWN_SEND;

struct Side final : HostSide {
  struct Fake final : Partner {
    explicit Fake(Side& in) : side(in) {}
    void accepted(uint32_t port) override { accepted_port = port; }
    ssize_t read(std::span<const iovec> into) override {
      if (input.empty()) return ended ? 0 : -EAGAIN;
      const size_t count = std::min(input.size(), into[0].iov_len);
      std::memcpy(into[0].iov_base, input.data(), count);
      input.erase(0, count);
      return static_cast<ssize_t>(count);
    }
    ssize_t write(std::span<const iovec> from) override {
      if (blocked) return -EAGAIN;
      size_t count = 0;
      for (const iovec& part : from) {
        const size_t taken = std::min(part.iov_len, room - count);
        if (keeps) output.append(static_cast<const char*>(part.iov_base), taken);
        count += taken;
      }
      if (count == 0 && room == 0) return -EAGAIN;
      room -= count;
      written += count;
      return static_cast<ssize_t>(count);
    }
    void end_writing() override { write_ended = true; }
    void end_reading() override {}
    void watch(bool readable, bool writable) override { watched = {readable, writable}; }
    Side& side;
    std::string input, output;  // output of one that keeps it
    size_t written = 0;
    size_t room = SIZE_MAX;  // for so many bytes more
    bool keeps = false;
    bool ended = false, blocked = false, write_ended = false;
    uint32_t accepted_port = 0;
    std::pair<bool, bool> watched;
  };
  std::unique_ptr<Partner> dial(uint32_t) override { return make(); }
  void retire(std::unique_ptr<Partner>) override { ++retired; }
  std::chrono::milliseconds now() override { return time; }
  std::unique_ptr<Fake> make() {
    auto made = std::make_unique<Fake>(*this);
    last = made.get();
    return made;
  }
  Fake* last = nullptr;
  int retired = 0;
  std::chrono::milliseconds time{1000};
};

struct Machine {
  Packet packet(uint16_t operation, uint32_t host_port, uint32_t guest_port) {
    Packet made;
    made.source_cid = 5;
    made.destination_cid = kHostCid;
    made.source_port = guest_port;
    made.destination_port = host_port;
    made.operation = operation;
    made.buffer_bytes = 1 << 16;
    return made;
  }
  void send(uint16_t operation, uint32_t host_port, uint32_t guest_port, uint32_t size_bytes = 0) {
    Packet made = packet(operation, host_port, guest_port);
    made.size_bytes = size_bytes;
    static char data[kBufferBytes + 1];
    const iovec part = {data, size_bytes};
    streams.receive(made, {&part, 1});
  }
  Packet next() {
    REQUIRE(streams.has_packets());
    const iovec part = {space, sizeof space};
    return streams.next({&part, 1});
  }
  Side side;
  Streams streams{5, side, 2000};
  char space[8192];
};

}  // namespace

TEST_CASE("vsock streams: a request that nobody answers is given up") {
  Machine machine;
  REQUIRE(machine.streams.open(80, machine.side.make(), PortRange::ordinary));
  const Packet request = machine.next();
  CHECK(request.operation == VIRTIO_VSOCK_OP_REQUEST);
  CHECK(request.destination_port == 80);
  CHECK(request.source_port == 2000);
  CHECK(machine.streams.has_deadlines());
  machine.side.time += kPatience - std::chrono::milliseconds(1);
  CHECK(machine.streams.expire());
  CHECK(machine.side.retired == 0);
  machine.side.time += std::chrono::milliseconds(1);
  CHECK(!machine.streams.expire());
  CHECK(machine.side.retired == 1);
  CHECK(machine.next().operation == VIRTIO_VSOCK_OP_RST);
  // One that the guest was never told of needs no reset.
  REQUIRE(machine.streams.open(80, machine.side.make(), PortRange::ordinary));
  machine.side.time += kPatience;
  machine.streams.expire();
  CHECK(machine.side.retired == 2);
  CHECK(!machine.streams.has_packets());
}

TEST_CASE("vsock streams: an answer before the request, and a late one") {
  Machine machine;
  REQUIRE(machine.streams.open(80, machine.side.make(), PortRange::reserved));
  const uint32_t port = 1 + 2000 % 1023;
  machine.send(VIRTIO_VSOCK_OP_RESPONSE, port, 80);
  CHECK(machine.side.retired == 1);
  REQUIRE(machine.streams.open(80, machine.side.make(), PortRange::reserved));
  CHECK(machine.next().source_port == port + 1);
  machine.send(VIRTIO_VSOCK_OP_RESPONSE, port + 1, 80);
  CHECK(machine.side.last->accepted_port == port + 1);
  machine.side.time += 2 * kPatience;
  CHECK(!machine.streams.expire());
  CHECK(machine.side.retired == 1);
}

TEST_CASE("vsock streams: an end of both directions is given up when the guest does not answer") {
  Machine machine;
  machine.send(VIRTIO_VSOCK_OP_REQUEST, 1, 1);
  CHECK(machine.next().operation == VIRTIO_VSOCK_OP_RESPONSE);
  machine.side.last->ended = true;
  machine.streams.ready(*machine.side.last->stream, true, false, true);
  const Packet shutdown = machine.next();
  CHECK(shutdown.operation == VIRTIO_VSOCK_OP_SHUTDOWN);
  CHECK(shutdown.flags == kBoth);
  CHECK(!machine.streams.has_packets());
  machine.side.time += kPatience;
  machine.streams.expire();
  CHECK(machine.side.retired == 1);
  CHECK(machine.next().operation == VIRTIO_VSOCK_OP_RST);
}

TEST_CASE("vsock streams: a host that hangs up on a guest that reads nothing more ends both directions") {
  for (const bool guest_first : {true, false}) {
    CAPTURE(guest_first);
    Machine machine;
    machine.send(VIRTIO_VSOCK_OP_REQUEST, 1, 1);
    machine.next();
    Packet shutdown = machine.packet(VIRTIO_VSOCK_OP_SHUTDOWN, 1, 1);
    shutdown.flags = VIRTIO_VSOCK_SHUTDOWN_RCV;
    machine.side.last->input = "never read";
    if (guest_first) machine.streams.receive(shutdown, {});
    machine.streams.ready(*machine.side.last->stream, true, false, true);
    if (!guest_first) machine.streams.receive(shutdown, {});
    const Packet end = machine.next();
    CHECK(end.operation == VIRTIO_VSOCK_OP_SHUTDOWN);
    CHECK(end.flags == kBoth);
    CHECK(machine.streams.has_deadlines());
  }
}

TEST_CASE("vsock streams: what a host left that hung up goes when the guest takes nothing of it") {
  using std::chrono::milliseconds;
  Machine machine;
  REQUIRE(machine.streams.open(80, machine.side.make(), PortRange::reserved));
  const uint32_t port = machine.next().source_port;
  Packet credit = machine.packet(VIRTIO_VSOCK_OP_RESPONSE, port, 80);
  const auto room = [&](uint32_t taken_bytes, uint32_t more_bytes) {
    credit.forwarded_bytes += taken_bytes;
    credit.buffer_bytes = more_bytes;
    machine.streams.receive(credit, {});
    credit.operation = VIRTIO_VSOCK_OP_CREDIT_UPDATE;
  };
  Side::Fake& partner = *machine.side.last;
  partner.input.assign(5000, 'x');
  partner.ended = true;
  const auto told = [&] {  // flags of SHUTDOWN, and no reset
    uint32_t flags = 0;
    while (machine.streams.has_packets()) {
      const Packet packet = machine.next();
      CHECK(packet.operation != VIRTIO_VSOCK_OP_RST);
      flags |= packet.flags;
    }
    return flags;
  };
  const auto goes_after = [&](milliseconds time) {
    machine.side.time += time - milliseconds(1);
    CHECK(machine.streams.expire());
    CHECK(machine.side.retired == 0);
    machine.side.time += milliseconds(1);
    CHECK(!machine.streams.expire());
    CHECK(machine.side.retired == 1);
    CHECK(machine.streams.counters().streams == 0);
    CHECK(machine.next().operation == VIRTIO_VSOCK_OP_RST);
    CHECK(!machine.streams.has_packets());
  };
  SUBCASE("it never had room") {
    room(0, 0);
    machine.streams.ready(*partner.stream, true, false, true);
    CHECK(told() == VIRTIO_VSOCK_SHUTDOWN_RCV);
    goes_after(kPatience);
  }
  SUBCASE("it has no room left") {
    room(0, 1000);
    machine.streams.ready(*partner.stream, true, false, true);
    CHECK(told() == VIRTIO_VSOCK_SHUTDOWN_RCV);
    CHECK(partner.input.size() == 4000);
    machine.side.time += kPatience - milliseconds(1);
    room(0, 1000);  // what makes no room gives no time
    CHECK(told() == 0);
    CHECK(machine.streams.expire());
    goes_after(milliseconds(1));
  }
  SUBCASE("it has no buffers for packets") {
    room(0, 1000);
    machine.streams.ready(*partner.stream, true, false, true);
    goes_after(kPatience);
  }
  SUBCASE("it takes all, slowly, and then has its time to answer") {
    room(0, 1000);
    machine.streams.ready(*partner.stream, true, false, true);
    uint32_t flags = told();
    for (int i = 0; i < 5; ++i) {
      CHECK(flags == (i ? 0u : uint32_t{VIRTIO_VSOCK_SHUTDOWN_RCV}));
      machine.side.time += kPatience - milliseconds(1);
      CHECK(machine.streams.expire());
      room(1000, 1000);
      flags = told();
    }
    CHECK(partner.input.empty());
    CHECK(flags == kBoth);
    goes_after(kPatience);
  }
  SUBCASE("it takes a byte now and then") {
    room(0, 1);
    machine.streams.ready(*partner.stream, true, false, true);
    told();
    milliseconds waited{0};
    for (; waited + kPatience / 2 < kLingerPatience; waited += kPatience / 2) {
      machine.side.time += kPatience / 2;
      CHECK(machine.streams.expire());
      room(1, 1);
      CHECK(told() == 0);
    }
    goes_after(kLingerPatience - waited);
  }
}

TEST_CASE("vsock streams: counts go on past 4 GiB") {
  Machine machine;
  machine.send(VIRTIO_VSOCK_OP_REQUEST, 1, 1);
  machine.next();
  uint64_t sent = 0, heard = 0;
  uint32_t room_seen = kBufferBytes;
  Side::Fake& partner = *machine.side.last;
  while (sent < (uint64_t{4} << 30) + (1 << 20)) {
    machine.send(VIRTIO_VSOCK_OP_RW, 1, 1, 128 << 10);
    sent += 128 << 10;
    const Packet update = machine.next();
    REQUIRE(update.operation == VIRTIO_VSOCK_OP_CREDIT_UPDATE);
    REQUIRE(update.forwarded_bytes == static_cast<uint32_t>(sent));
    room_seen = std::min(room_seen, update.buffer_bytes);
  }
  CHECK(partner.written == sent);
  CHECK(room_seen == kBufferBytes);
  CHECK(machine.streams.counters().from_guest_bytes == sent);
  // To the guest, whose count of taken bytes follows.
  while (heard < (uint64_t{4} << 30) + (1 << 20)) {
    partner.input.assign(8192, 'x');
    for (int i = 0; i < 8; ++i) {
      partner.input.assign(8192, 'x');
      machine.streams.ready(*partner.stream, true, false, false);
      const Packet data = machine.next();
      REQUIRE(data.operation == VIRTIO_VSOCK_OP_RW);
      REQUIRE(data.size_bytes == 8192);
      heard += data.size_bytes;
    }
    Packet credit = machine.packet(VIRTIO_VSOCK_OP_CREDIT_UPDATE, 1, 1);
    credit.forwarded_bytes = static_cast<uint32_t>(heard);
    machine.streams.receive(credit, {});
  }
  CHECK(machine.streams.counters().to_guest_bytes == heard);
}

TEST_CASE("vsock streams: the buffer is the credit, to the byte") {
  Machine machine;
  machine.send(VIRTIO_VSOCK_OP_REQUEST, 1, 1);
  machine.next();
  Side::Fake& partner = *machine.side.last;
  partner.blocked = true;
  machine.send(VIRTIO_VSOCK_OP_RW, 1, 1, kBufferBytes - 1);
  machine.streams.settle();
  CHECK(partner.watched == std::pair(true, true));
  machine.send(VIRTIO_VSOCK_OP_RW, 1, 1, 1);
  CHECK(machine.side.retired == 0);
  SUBCASE("a byte more is too much") {
    machine.send(VIRTIO_VSOCK_OP_RW, 1, 1, 1);
    CHECK(machine.side.retired == 1);
    CHECK(machine.next().operation == VIRTIO_VSOCK_OP_RST);
  }
  SUBCASE("room counts once the guest was told of it") {
    partner.blocked = false;
    machine.streams.ready(*partner.stream, false, true, false);
    CHECK(partner.written == kBufferBytes);
    machine.streams.settle();
    CHECK(partner.watched == std::pair(true, false));
    const Packet update = machine.next();
    CHECK(update.operation == VIRTIO_VSOCK_OP_CREDIT_UPDATE);
    CHECK(update.forwarded_bytes == kBufferBytes);
    machine.send(VIRTIO_VSOCK_OP_RW, 1, 1, kBufferBytes);
    CHECK(machine.side.retired == 0);
  }
  SUBCASE("before it was told, none") {
    partner.blocked = false;
    machine.streams.ready(*partner.stream, false, true, false);
    machine.send(VIRTIO_VSOCK_OP_RW, 1, 1, 1);
    CHECK(machine.side.retired == 1);
  }
}

TEST_CASE("vsock streams: what is buffered keeps its order however it is taken") {
  Machine machine;
  machine.send(VIRTIO_VSOCK_OP_REQUEST, 1, 1);
  machine.next();
  Side::Fake& partner = *machine.side.last;
  partner.keeps = true;
  partner.room = 0;
  std::string sent;
  uint32_t told = 0;
  // Six times around the ring, in pieces that never fit its end.
  for (uint32_t step = 0; sent.size() < 6 * kBufferBytes; ++step) {
    const uint32_t size_bytes = std::min<uint32_t>(40'009, kBufferBytes - (static_cast<uint32_t>(sent.size()) - told));
    std::string piece(size_bytes, '\0');
    for (size_t i = 0; i < piece.size(); ++i) piece[i] = static_cast<char>((sent.size() + i) * 2654435761u >> 13);
    Packet data = machine.packet(VIRTIO_VSOCK_OP_RW, 1, 1);
    data.size_bytes = size_bytes;
    const iovec parts[] = {{piece.data(), size_bytes / 3},
                           {piece.data() + size_bytes / 3, size_bytes - size_bytes / 3}};
    machine.streams.receive(data, parts);
    sent += piece;
    if (step >= 5) {
      partner.room = 37'003;
      machine.streams.ready(*partner.stream, false, true, false);
      partner.room = 0;
    }
    while (machine.streams.has_packets()) told = machine.next().forwarded_bytes;
  }
  CHECK(machine.side.retired == 0);
  CHECK(sent.size() - partner.written > kBufferBytes / 2);
  partner.room = SIZE_MAX;
  machine.streams.ready(*partner.stream, false, true, false);
  CHECK((partner.output == sent));
}

TEST_CASE("vsock streams: the guest's programs leave some to the VMM") {
  Machine machine;
  for (uint32_t port = 1; port <= kMostStreams - kReservedStreams; ++port)
    machine.send(VIRTIO_VSOCK_OP_REQUEST, 2, port);
  CHECK(machine.side.retired == 0);
  CHECK(machine.streams.counters().streams == kMostStreams - kReservedStreams);
  machine.send(VIRTIO_VSOCK_OP_REQUEST, 2, 5000);
  CHECK(machine.next().operation == VIRTIO_VSOCK_OP_RST);
  CHECK(!machine.streams.open(80, machine.side.make(), PortRange::ordinary));
  for (size_t i = 0; i < kReservedStreams; ++i)
    CHECK(machine.streams.open(80, machine.side.make(), PortRange::reserved));
  CHECK(!machine.streams.open(80, machine.side.make(), PortRange::reserved));
}

TEST_CASE("vsock streams: what a program left behind goes when nobody takes it") {
  for (const bool guest_began : {true, false}) {
    CAPTURE(guest_began);
    Machine machine;
    uint32_t port = 1;
    if (guest_began) {
      machine.send(VIRTIO_VSOCK_OP_REQUEST, port, 1);
      machine.next();
    } else {
      REQUIRE(machine.streams.open(1, machine.side.make(), PortRange::reserved));
      port = machine.next().source_port;
      machine.send(VIRTIO_VSOCK_OP_RESPONSE, port, 1);
    }
    Side::Fake& partner = *machine.side.last;
    partner.room = 0;
    machine.send(VIRTIO_VSOCK_OP_RW, port, 1, 1000);
    Packet shutdown = machine.packet(VIRTIO_VSOCK_OP_SHUTDOWN, port, 1);
    shutdown.flags = kBoth;
    machine.streams.receive(shutdown, {});
    CHECK(machine.next().operation == VIRTIO_VSOCK_OP_RST);
    CHECK(machine.streams.has_deadlines() == guest_began);
    machine.side.time += kLingerPatience - std::chrono::milliseconds(1);
    machine.streams.expire();
    CHECK(machine.side.retired == 0);
    // What the host takes gives it more time.
    partner.room = 10;
    machine.streams.ready(*partner.stream, false, true, false);
    machine.side.time += kLingerPatience - std::chrono::milliseconds(1);
    CHECK(machine.streams.expire() == guest_began);
    CHECK(machine.side.retired == 0);
    machine.side.time += std::chrono::milliseconds(1);
    CHECK(!machine.streams.expire());
    CHECK(machine.side.retired == (guest_began ? 1 : 0));
    CHECK(machine.streams.counters().streams == (guest_began ? 0 : 1));
    CHECK(!machine.streams.has_packets());
  }
}

TEST_CASE("vsock streams: resets of strangers wait in a bounded queue") {
  Machine machine;
  size_t taken = 0;
  for (; machine.streams.takes_packets(); ++taken) machine.send(VIRTIO_VSOCK_OP_RW, 9, static_cast<uint32_t>(taken));
  CHECK(taken == kMostResets);
  for (uint32_t i = 0; i < taken; ++i) {
    const Packet packet = machine.next();
    CHECK(packet.operation == VIRTIO_VSOCK_OP_RST);
    CHECK(packet.destination_port == i);
  }
  CHECK(!machine.streams.has_packets());
  CHECK(machine.streams.takes_packets());
}

TEST_CASE("vsock: a thread that takes the mutex again at once lets the one before it in") {
  for (int round = 0; round < 100; ++round) {
    FairMutex mutex;
    std::string order;
    std::unique_lock mine(mutex);
    CHECK(!mutex.contended());
    std::thread other([&] {
      std::lock_guard lock(mutex);
      order += "other ";
    });
    while (!mutex.contended()) std::this_thread::yield();
    mine.unlock();
    mine.lock();
    order += "mine";
    mine.unlock();
    other.join();
    REQUIRE(order == "other mine");
  }
}

TEST_CASE("vsock CIDs: the next that is free, for the kernel too") {
  const ScratchDir folder;
  std::filesystem::permissions(folder.path(), std::filesystem::perms(0700));
  const auto any = [](uint32_t) -> clone_sdk::Result<bool> { return true; };
  const auto not_below_6 = [](uint32_t cid) -> clone_sdk::Result<bool> { return cid >= 6; };
  auto first = take_cid(folder.path(), std::nullopt, any);
  auto second = take_cid(folder.path(), std::nullopt, any);
  auto third = take_cid(folder.path(), std::nullopt, not_below_6);
  REQUIRE(first.ok());
  REQUIRE(second.ok());
  REQUIRE(third.ok());
  CHECK(first->number == 3);
  CHECK(second->number == 4);
  CHECK(third->number == 6);
  CHECK(!take_cid(folder.path(), 4, any).ok());
  CHECK(!take_cid(folder.path(), 5, not_below_6).ok());
  const auto failing = take_cid(folder.path(), std::nullopt,
                                [](uint32_t) -> clone_sdk::Result<bool> { return clone_sdk::Error{"broken"}; });
  CHECK(failing.error().message == "broken");
  second->lock.reset();
  CHECK(take_cid(folder.path(), 4, any).ok());
  // Where others may write there is nothing to rely on.
  std::filesystem::permissions(folder.path(), std::filesystem::perms(0777));
  auto random = take_cid(folder.path(), std::nullopt, any);
  REQUIRE(random.ok());
  CHECK(!random->lock);
  CHECK(random->number >= kFirstGuestCid);
  CHECK(take_cid("/nowhere/at/all", std::nullopt, any).error().message == "/nowhere/at/all: No such file or directory");
}
