// SPDX-License-Identifier: Apache-2.0
// virtio-vsock's user backend through real virtqueues: streams both ways, credit, ends, limits, and a guest that lies.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <ctime>
#include <filesystem>
#include <thread>

#include "scratch_dir.hpp"
#include "vsock_rig.hpp"

using namespace vmm;
using namespace vmm::test;

namespace {

constexpr uint32_t kBoth = VIRTIO_VSOCK_SHUTDOWN_RCV | VIRTIO_VSOCK_SHUTDOWN_SEND;

// TMPDIR is where a FakeHost has its VM's directory: one that is this test's alone, as a VM's root folder is.
class PrivateRoot {
 public:
  PrivateRoot() { ::setenv("TMPDIR", folder_.path().c_str(), 1); }
  ~PrivateRoot() { before_.empty() ? ::unsetenv("TMPDIR") : ::setenv("TMPDIR", before_.c_str(), 1); }
  const std::string& path() const { return folder_.path(); }

 private:
  std::string before_ = ::getenv("TMPDIR") ? ::getenv("TMPDIR") : "";
  ScratchDir folder_;
};

void send_all(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t count = ::send(fd, text.data(), text.size(), MSG_NOSIGNAL);
    if (count <= 0) return;
    text.remove_prefix(static_cast<size_t>(count));
  }
}

std::string receive_all(int fd) {
  std::string all, part(65536, '\0');
  for (ssize_t count; (count = ::recv(fd, part.data(), part.size(), 0)) > 0;)
    all.append(part, 0, static_cast<size_t>(count));
  return all;
}

}  // namespace

TEST_CASE("virtio-vsock: what the guest is told") {
  VsockRig rig({{"backend", "user"}, {"cid", "77"}, {"queue-size", "128"}});
  CHECK(rig.table().device_type == 19);
  CHECK(rig.table().queue_count(rig.device().raw()) == 3);
  CHECK(rig.table().queue_max_size(rig.device().raw(), 1) == 128);
  CHECK(rig.table().features(rig.device().raw()) == 1);
  CHECK(rig.table().config_size(rig.device().raw()) == 8);
  CHECK(rig.cid == 77);
  CHECK(rig.published().cid == 77);
  CHECK(rig.host().call_command("virtio-vsock.0.status", "{}") ==
        R"({"cid": 77, "backend": "user", "connections": 0})");
  CHECK(rig.device().extension<void>("clone.vhost/1") == nullptr);

  FakeHost host;
  DeviceUnderTest odd(VsockRig::plugin().device("virtio-vsock"), host.handle("virtio-vsock.0"));
  CHECK(odd.configure({{"queue-size", "100"}}) == CLONE_ERR_INVALID);
  CHECK(odd.error == "queue-size=100: allowed are the powers of two from 16 to 1024");
}

TEST_CASE("virtio-vsock: vhost that cannot be had is one line") {
  if (::access("/dev/vhost-vsock", F_OK) == 0) return;
  FakeHost host;
  DeviceUnderTest device(VsockRig::plugin().device("virtio-vsock"), host.handle("virtio-vsock.0"));
  CHECK(device.configure({{"backend", "vhost"}}) == CLONE_ERR_SYSTEM);
  CHECK(device.error == "backend=vhost: /dev/vhost-vsock: No such file or directory");
  FakeHost second;
  DeviceUnderTest automatic(VsockRig::plugin().device("virtio-vsock"), second.handle("virtio-vsock.0"));
  CHECK(automatic.configure() == CLONE_OK);
  CHECK(second.call_command("virtio-vsock.0.status", "{}").find("\"user\"") != std::string::npos);
}

TEST_CASE("virtio-vsock: a machine has one") {
  FakeHost host;
  DeviceUnderTest first(VsockRig::plugin().device("virtio-vsock"), host.handle("virtio-vsock.0"));
  DeviceUnderTest second(VsockRig::plugin().device("virtio-vsock"), host.handle("virtio-vsock.1"));
  CHECK(first.configure({{"backend", "user"}}) == CLONE_OK);
  CHECK(second.configure({{"backend", "user"}}) == CLONE_ERR_BUSY);
}

TEST_CASE("virtio-vsock: streams that begin on the host, and their data") {
  for (const bool packed : {false, true}) {
    CAPTURE(packed);
    VsockRig rig;
    rig.start(packed);
    auto ends = rig.open_from_host(5000);
    send_all(ends.client.get(), "hello, guest");
    REQUIRE(rig.wait([&] { return ends.guest->received.size() >= 12; }));
    CHECK(ends.guest->received == "hello, guest");
    std::string answer = "hello, host";
    rig.write(*ends.guest, answer);
    CHECK(rig.receive(ends.client.get()) == "hello, host");
    CHECK(rig.host().metric("virtio-vsock.0.vsock_connections") == 1);
    CHECK(rig.host().metric("virtio-vsock.0.vsock_to_guest_bytes_total") == 12);
    CHECK(rig.host().metric("virtio-vsock.0.vsock_from_guest_bytes_total") == 11);

    // What follows the greeting at once belongs to the stream.
    const clone_sdk::Fd eager = rig.client("CONNECT 5001\nnot a greeting\n");
    REQUIRE(rig.wait([&] { return rig.find(5001); }));
    rig.send(*rig.find(5001), VIRTIO_VSOCK_OP_RESPONSE);
    REQUIRE(rig.wait([&] { return rig.find(5001)->received.size() >= 15; }));
    CHECK(rig.find(5001)->received == "not a greeting\n");
    // A greeting in pieces.
    const clone_sdk::Fd slow = rig.client("CONN");
    ::usleep(20'000);
    send_all(slow.get(), "ECT 5002");
    ::usleep(20'000);
    send_all(slow.get(), "\n");
    CHECK(rig.wait([&] { return rig.find(5002); }));
  }
}

TEST_CASE("virtio-vsock: greetings that are none, and a guest that refuses") {
  VsockRig rig;
  rig.start();
  for (const char* greeting :
       {"CONNECT\n", "CONNECT x\n", "CONNECT 4294967295\n", "CONNECT 4294967296\n", "CONNECT -1\n", "HELLO 5\n",
        "CONNECT 5 6\n", "\n", "CONNECT 1000000000000000000000000000000000000"}) {
    CAPTURE(greeting);
    const clone_sdk::Fd client = rig.client(greeting);
    CHECK(rig.receive(client.get()) == "EOF");
  }
  CHECK(rig.streams.empty());

  const clone_sdk::Fd refused = rig.client("CONNECT 9\n");
  REQUIRE(rig.wait([&] { return rig.find(9); }));
  rig.send(*rig.find(9), VIRTIO_VSOCK_OP_RST);
  CHECK(rig.receive(refused.get()) == "EOF");
  CHECK(rig.host().metric("virtio-vsock.0.vsock_connections") == 0);

  // Without a driver there is nobody to ask.
  rig.deactivate();
  const clone_sdk::Fd early = rig.client("CONNECT 9\n");
  char byte;
  CHECK(::recv(early.get(), &byte, 1, 0) <= 0);
}

TEST_CASE("virtio-vsock: streams that begin in the guest") {
  VsockRig rig;
  rig.start();
  GuestStream& nobody = rig.dial(80, 40000);
  REQUIRE(rig.wait([&] { return nobody.reset; }));

  const clone_sdk::Fd listener = rig.listen(80);
  auto ends = rig.open_from_guest(listener.get(), 80, 40001);
  std::string text = "from the guest";
  rig.write(*ends.guest, text);
  CHECK(rig.receive(ends.client.get()) == "from the guest");
  send_all(ends.client.get(), "from the host");
  CHECK(rig.wait([&] { return ends.guest->received == "from the host"; }));
  // A second request for the same ports is against the rules.
  rig.send(*ends.guest, VIRTIO_VSOCK_OP_REQUEST);
  CHECK(rig.wait([&] { return ends.guest->reset; }));
  CHECK(rig.receive(ends.client.get()) == "EOF");
}

TEST_CASE("virtio-vsock: megabytes both ways at once through small windows") {
  for (const uint32_t window : {1500u, 5000u, 256u << 10}) {
    CAPTURE(window);
    VsockRig rig;
    rig.start(window == 5000);
    const clone_sdk::Fd listener = rig.listen(1);
    GuestStream& stream = rig.streams[{1, 7}];
    stream.host_port = 1;
    stream.guest_port = 7;
    stream.buffer_bytes = window;
    rig.send(stream, VIRTIO_VSOCK_OP_REQUEST);
    REQUIRE(rig.wait([&] { return stream.answered; }));
    const clone_sdk::Fd client(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    const std::string down = noise(3 << 20, 1), up = noise(3 << 20, 2);
    std::string came_up;
    std::thread writer([&] {
      send_all(client.get(), down);
      ::shutdown(client.get(), SHUT_WR);
    });
    std::thread reader([&] { came_up = receive_all(client.get()); });
    std::string left = up;
    REQUIRE(rig.wait(
        [&] {
          rig.write(stream, left, 30'000);
          return left.empty() && stream.received.size() >= down.size() && stream.shutdown;
        },
        60'000));
    rig.send(stream, VIRTIO_VSOCK_OP_SHUTDOWN, kBoth);
    CHECK(rig.wait([&] { return stream.reset; }));
    writer.join();
    reader.join();
    CHECK(stream.shutdown == VIRTIO_VSOCK_SHUTDOWN_SEND);
    CHECK((stream.received == down));
    CHECK((came_up == up));
    CHECK(rig.host().metric("virtio-vsock.0.vsock_connections") == 0);
  }
}

TEST_CASE("virtio-vsock: each direction ends for itself") {
  VsockRig rig;
  rig.start();
  const clone_sdk::Fd listener = rig.listen(2);
  SUBCASE("the guest's first") {
    auto ends = rig.open_from_guest(listener.get(), 2, 1);
    std::string text = "last words";
    rig.write(*ends.guest, text);
    rig.send(*ends.guest, VIRTIO_VSOCK_OP_SHUTDOWN, VIRTIO_VSOCK_SHUTDOWN_SEND);
    CHECK(rig.receive(ends.client.get()) == "last words");
    CHECK(rig.receive(ends.client.get()) == "EOF");
    send_all(ends.client.get(), "still talking");
    CHECK(rig.wait([&] { return ends.guest->received == "still talking"; }));
    // Data after that is against the rules.
    text = "more";
    rig.write(*ends.guest, text);
    CHECK(rig.wait([&] { return ends.guest->reset; }));
  }
  SUBCASE("the host's first") {
    auto ends = rig.open_from_guest(listener.get(), 2, 1);
    send_all(ends.client.get(), "over");
    ::shutdown(ends.client.get(), SHUT_WR);
    CHECK(rig.wait([&] { return ends.guest->shutdown == VIRTIO_VSOCK_SHUTDOWN_SEND; }));
    CHECK(ends.guest->received == "over");
    std::string text = "answer";
    rig.write(*ends.guest, text);
    CHECK(rig.receive(ends.client.get()) == "answer");
    ends.client.reset();
    CHECK(rig.wait([&] { return ends.guest->shutdown == kBoth; }));
    rig.send(*ends.guest, VIRTIO_VSOCK_OP_RST);
    CHECK(rig.wait([&] { return rig.host().metric("virtio-vsock.0.vsock_connections") == 0; }));
    CHECK(!ends.guest->reset);
  }
  SUBCASE("a client that goes away, after its data") {
    auto ends = rig.open_from_guest(listener.get(), 2, 1);
    send_all(ends.client.get(), noise(100'000, 3));
    ends.client.reset();
    CHECK(rig.wait([&] { return ends.guest->shutdown == kBoth; }));
    CHECK((ends.guest->received == noise(100'000, 3)));
  }
  SUBCASE("a guest that closes while the host is slow loses nothing") {
    auto ends = rig.open_from_guest(listener.get(), 2, 1);
    const std::string all = noise(400'000, 4);  // more than a socket holds, less than that and the stream's buffer
    std::string left = all;
    REQUIRE(rig.wait([&] {
      rig.write(*ends.guest, left);
      return left.empty();
    }));
    rig.send(*ends.guest, VIRTIO_VSOCK_OP_SHUTDOWN, kBoth);
    CHECK(rig.wait([&] { return ends.guest->reset; }));
    CHECK(rig.host().metric("virtio-vsock.0.vsock_connections") == 1);
    // The ports can be used again meanwhile.
    auto again = rig.open_from_guest(listener.get(), 2, 1);
    CHECK((receive_all(ends.client.get()) == all));
    std::string text = "second";
    rig.write(*again.guest, text);
    CHECK(rig.receive(again.client.get()) == "second");
  }
  SUBCASE("a reset by the guest") {
    auto ends = rig.open_from_guest(listener.get(), 2, 1);
    rig.send(*ends.guest, VIRTIO_VSOCK_OP_RST);
    CHECK(rig.receive(ends.client.get()) == "EOF");
    rig.settle();
    CHECK(!ends.guest->reset);
    CHECK(rig.strangers.empty());
  }
}

TEST_CASE("virtio-vsock: a host that does not read is given no more than the buffer") {
  VsockRig rig;
  rig.start();
  const clone_sdk::Fd listener = rig.listen(3);
  auto ends = rig.open_from_guest(listener.get(), 3, 1);
  std::string left = noise(8 << 20, 5);
  const size_t all = left.size();
  rig.wait(
      [&] {
        rig.write(*ends.guest, left);
        return false;
      },
      500);
  const size_t taken = all - left.size();
  CHECK(taken >= 256 << 10);
  CHECK(taken <= (256 << 10) + (512 << 10));  // and what the sockets hold
  CHECK(ends.guest->room_of_host() == 0);
  // Another stream is not held up by it.
  auto other = rig.open_from_guest(listener.get(), 3, 2);
  std::string text = "quick";
  rig.write(*other.guest, text);
  CHECK(rig.receive(other.client.get()) == "quick");
  // Once it reads, room is announced without being asked for.
  std::string got;
  while (got.size() < taken) got += rig.receive(ends.client.get());
  CHECK(rig.wait([&] { return ends.guest->room_of_host() > 0; }));
  CHECK((got == noise(8 << 20, 5).substr(0, taken)));

  SUBCASE("more than there is room for resets the stream") {
    ends.guest->sent_bytes += 1;
    const uint32_t room = ends.guest->room_of_host() + 1;
    for (uint32_t sent = 0; sent <= room; sent += 60'000)
      rig.send(rig.packet(*ends.guest, VIRTIO_VSOCK_OP_RW, 60'000), noise(60'000, 1));
    // A reader as slow as before.
    for (int i = 0; i < 20 && !ends.guest->reset; ++i)
      rig.send(rig.packet(*ends.guest, VIRTIO_VSOCK_OP_RW, 65'536), noise(65'536, 1));
    CHECK(rig.wait([&] { return ends.guest->reset; }));
    CHECK(rig.find(2)->open);
  }
}

TEST_CASE("virtio-vsock: a guest that does not read holds up its stream only") {
  VsockRig rig;
  rig.start();
  const clone_sdk::Fd listener = rig.listen(3);
  auto ends = rig.open_from_guest(listener.get(), 3, 1);
  rig.reads_at_once = false;
  ::fcntl(ends.client.get(), F_SETFL, O_NONBLOCK);
  size_t taken = 0;
  const std::string block = noise(65536, 1);
  for (int quiet = 0; quiet < 20;) {
    const ssize_t count = ::send(ends.client.get(), block.data(), block.size(), MSG_NOSIGNAL);
    quiet = count > 0 ? 0 : quiet + 1;
    taken += count > 0 ? static_cast<size_t>(count) : 0;
    rig.pump(10);
  }
  CHECK(ends.guest->received.size() == 256 << 10);
  CHECK(taken < 1 << 20);
  CHECK(ends.guest->credit_requests == 1);
  rig.reads_at_once = true;
  auto other = rig.open_from_host(50);
  send_all(other.client.get(), "x");
  CHECK(rig.wait([&] { return other.guest->received == "x"; }));
  rig.consume(*ends.guest);
  CHECK(rig.wait([&] { return ends.guest->received.size() == taken; }));
}

TEST_CASE("virtio-vsock: a guest without room learns that the client is gone, and the stream ends") {
  VsockRig rig;
  rig.start();
  rig.reads_at_once = false;
  // As the VMM's own: accepted, and never given room.
  int32_t fd = -1;
  REQUIRE(rig.published().connect(rig.published().context, 40, &fd, nullptr) == CLONE_OK);
  clone_sdk::Fd hostile(fd);
  REQUIRE(rig.wait([&] { return rig.find(40); }));
  rig.find(40)->buffer_bytes = 0;
  rig.send(*rig.find(40), VIRTIO_VSOCK_OP_RESPONSE);
  pollfd entry{fd, POLLOUT, 0};
  REQUIRE(::poll(&entry, 1, 3000) == 1);
  send_all(fd, "never taken");
  // And a program that takes nothing more.
  auto ends = rig.open_from_host(41);
  send_all(ends.client.get(), noise(200'000, 1));
  REQUIRE(rig.wait([&] { return ends.guest->received.size() == 200'000; }));
  send_all(ends.client.get(), noise(150'000, 2));
  REQUIRE(rig.wait([&] { return ends.guest->received.size() == 256 << 10; }));

  hostile.reset();
  ends.client.reset();
  for (GuestStream* stream : {rig.find(40), ends.guest}) {
    CHECK(rig.wait([&] { return stream->shutdown == VIRTIO_VSOCK_SHUTDOWN_RCV; }));
    CHECK(!stream->reset);
  }
  CHECK(rig.wait([&] { return rig.find(40)->reset && ends.guest->reset; }, 12'000));
  CHECK(rig.find(40)->received.empty());
  CHECK(ends.guest->received.size() == 256 << 10);
  CHECK(rig.host().metric("virtio-vsock.0.vsock_connections") == 0);
  CHECK(rig.strangers.empty());
}

TEST_CASE("virtio-vsock: hundreds of streams at once, and no more than there may be") {
  VsockRig rig;
  rig.start(true);
  const clone_sdk::Fd listener = rig.listen(4);
  std::vector<VsockRig::Ends> all;
  for (uint32_t i = 0; i < 150; ++i) {
    all.push_back(rig.open_from_guest(listener.get(), 4, 10'000 + i));
    all.push_back(rig.open_from_host(20'000 + i));
  }
  CHECK(rig.host().metric("virtio-vsock.0.vsock_connections") == 300);
  for (size_t i = 0; i < all.size(); ++i) {
    std::string text = "up " + std::to_string(i);
    rig.write(*all[i].guest, text);
    send_all(all[i].client.get(), "down " + std::to_string(i));
  }
  for (size_t i = 0; i < all.size(); ++i) {
    CHECK(rig.receive(all[i].client.get()) == "up " + std::to_string(i));
    CHECK(rig.wait([&] { return all[i].guest->received == "down " + std::to_string(i); }));
  }
  std::set<uint32_t> ports;
  for (size_t i = 1; i < all.size(); i += 2) ports.insert(all[i].guest->host_port);
  CHECK(ports.size() == 150);
  for (auto& ends : all) ends.client.reset();
  REQUIRE(rig.wait([&] {
    for (auto& ends : all)
      if (ends.guest->shutdown != kBoth) return false;
    return true;
  }));
  for (auto& ends : all) rig.send(*ends.guest, VIRTIO_VSOCK_OP_RST);
  CHECK(rig.wait([&] { return rig.host().metric("virtio-vsock.0.vsock_connections") == 0; }));

  std::vector<clone_sdk::Fd> accepted;
  for (uint32_t i = 0; i < 960; ++i) {
    GuestStream& stream = rig.dial(4, 30'000 + i);
    REQUIRE(rig.wait([&] { return stream.answered || stream.reset; }));
    REQUIRE(stream.answered);
    accepted.emplace_back(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
  }
  GuestStream& beyond = rig.dial(4, 60'000);
  CHECK(rig.wait([&] { return beyond.reset; }));
  CHECK(!beyond.answered);
  CHECK(rig.receive(rig.client("").get()) == "EOF");
  // The VMM gets through nevertheless.
  int32_t fd = -1;
  CHECK(rig.published().connect(rig.published().context, 61'000, &fd, nullptr) == CLONE_OK);
  const clone_sdk::Fd ours(fd);
  CHECK(rig.wait([&] { return rig.find(61'000); }));
  accepted.clear();
}

TEST_CASE("virtio-vsock: a client for whom there is no descriptor waits, and the loop does not spin") {
  VsockRig rig;
  rig.start();
  const clone_sdk::Fd client(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strcpy(address.sun_path, rig.socket_path().c_str());
  rlimit before{};
  REQUIRE(::getrlimit(RLIMIT_NOFILE, &before) == 0);
  const int lowest_free = clone_sdk::Fd(::dup(client.get())).get();
  const rlimit none = {static_cast<rlim_t>(lowest_free), before.rlim_max};
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &none) == 0);
  const int connected = ::connect(client.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address);
  const std::clock_t start = std::clock();
  ::usleep(400'000);
  const double busy_seconds = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &before) == 0);
  REQUIRE(connected == 0);
  CHECK(busy_seconds < 0.1);
  send_all(client.get(), "CONNECT 70\n");
  CHECK(rig.wait([&] { return rig.find(70); }));
}

TEST_CASE("virtio-vsock: packets that break the rules") {
  VsockRig rig;
  rig.start();
  const clone_sdk::Fd listener = rig.listen(5);
  auto good = rig.open_from_guest(listener.get(), 5, 1);
  uint32_t guest_port = 100;
  // A stream of its own is reset by the packet; the good one lives on.
  const auto breaks = [&](const std::function<void(Packet&)>& change, std::string_view payload = {}) {
    auto ends = rig.open_from_guest(listener.get(), 5, ++guest_port);
    Packet packet = rig.packet(*ends.guest, VIRTIO_VSOCK_OP_RW, static_cast<uint32_t>(payload.size()));
    change(packet);
    rig.send(packet, payload);
    return rig.wait([&] { return ends.guest->reset; }) && rig.receive(ends.client.get()) == "EOF";
  };
  CHECK(breaks([](Packet& packet) { packet.size_bytes = 10; }, "nine char"));
  CHECK(breaks([](Packet& packet) { packet.size_bytes = UINT32_MAX; }));
  CHECK(breaks([](Packet& packet) { packet.size_bytes = 1; }));
  CHECK(breaks([](Packet& packet) { packet.operation = VIRTIO_VSOCK_OP_INVALID; }));
  CHECK(breaks([](Packet& packet) { packet.operation = 77; }));
  CHECK(breaks([](Packet& packet) { packet.operation = VIRTIO_VSOCK_OP_RESPONSE; }));
  CHECK(breaks([](Packet& packet) { packet.operation = VIRTIO_VSOCK_OP_REQUEST; }));
  CHECK(breaks([](Packet& packet) { packet.type = VIRTIO_VSOCK_TYPE_SEQPACKET; }));
  CHECK(breaks([](Packet& packet) { packet.type = 0; }));

  // From or to others: nobody is asked, nobody answers.
  const auto ignored = [&](const std::function<void(Packet&)>& change) {
    Packet packet = rig.packet(*good.guest, VIRTIO_VSOCK_OP_RW, 4);
    change(packet);
    rig.send(packet, "evil");
    rig.settle();
    return rig.strangers.empty() && good.guest->open && rig.receive(good.client.get(), 10, 20).empty();
  };
  CHECK(ignored([](Packet& packet) { packet.source_cid = 99; }));
  CHECK(ignored([&](Packet& packet) { packet.source_cid |= uint64_t{1} << 32; }));
  CHECK(ignored([](Packet& packet) { packet.source_cid = 2; }));
  CHECK(ignored([](Packet& packet) { packet.destination_cid = 1; }));
  CHECK(ignored([](Packet& packet) { packet.destination_cid = 3; }));

  // Streams that are not there.
  GuestStream unknown;
  unknown.guest_port = 1;
  unknown.host_port = 6;
  for (const uint16_t operation : {VIRTIO_VSOCK_OP_RW, VIRTIO_VSOCK_OP_RESPONSE, VIRTIO_VSOCK_OP_SHUTDOWN,
                                   VIRTIO_VSOCK_OP_CREDIT_REQUEST, VIRTIO_VSOCK_OP_CREDIT_UPDATE}) {
    rig.send(unknown, operation);
    REQUIRE(rig.wait([&] { return !rig.strangers.empty(); }));
    CHECK(rig.strangers.back().operation == VIRTIO_VSOCK_OP_RST);
    rig.strangers.clear();
  }
  Packet wrong_type = rig.packet(unknown, VIRTIO_VSOCK_OP_REQUEST);
  wrong_type.type = VIRTIO_VSOCK_TYPE_SEQPACKET;
  wrong_type.destination_port = 5;
  rig.send(wrong_type);
  REQUIRE(rig.wait([&] { return good.guest->reset; }));  // it names the ports of the good one
  auto next = rig.open_from_guest(listener.get(), 5, 2);
  rig.send(unknown, VIRTIO_VSOCK_OP_RST);
  // Too short for a header.
  rig.send_raw({1, 2, 3});
  rig.send_raw(std::vector<uint8_t>(43, 0xff));
  rig.settle();
  CHECK(rig.strangers.empty());
  // Counts that cannot be are passed over: nothing is sent beyond the room that there was.
  next.guest->buffer_bytes = 1000;
  Packet count = rig.packet(*next.guest, VIRTIO_VSOCK_OP_CREDIT_UPDATE);
  count.forwarded_bytes = 0x8000'0000;
  rig.send(count);
  rig.reads_at_once = false;
  send_all(next.client.get(), noise(5000, 1));
  CHECK(rig.wait([&] { return next.guest->received.size() == 1000; }));
  CHECK(rig.resets_wanted == 0);
}

TEST_CASE("virtio-vsock: answers that the guest does not take hold up its packets, not the host's memory") {
  VsockRig rig;
  rig.start();
  rig.rx_offered = false;
  rig.settle();
  GuestStream unknown;
  unknown.guest_port = 1;
  unknown.host_port = 6;
  // The first are answered into the buffers that are there; then 256 wait, then the queue is left alone.
  const size_t most = VsockRig::kRxSlots + 256 + VsockRig::kTxSlots;
  for (size_t sent = 0; sent < most; ++sent) rig.send(unknown, VIRTIO_VSOCK_OP_RW);
  rig.settle();
  CHECK(rig.strangers.size() == VsockRig::kRxSlots);
  CHECK(rig.resets_wanted == 0);
}

TEST_CASE("virtio-vsock: a queue that the driver broke asks for a reset, and after it all is well") {
  VsockRig rig;
  rig.start();
  auto ends = rig.open_from_host(1);
  rig.break_tx();
  CHECK(rig.wait([&] { return rig.resets_wanted == 1; }));
  CHECK(rig.receive(ends.client.get()) == "EOF");
  rig.deactivate();
  rig.activate();
  CHECK(rig.open_from_host(2).guest);
}

TEST_CASE("virtio-vsock: a reset by the driver ends the streams") {
  VsockRig rig;
  rig.start();
  auto ends = rig.open_from_host(1);
  rig.deactivate();
  char byte;
  CHECK(::recv(ends.client.get(), &byte, 1, 0) <= 0);
  CHECK(rig.host().metric("virtio-vsock.0.vsock_connections") == 0);
  rig.activate();
  CHECK(rig.open_from_host(1).guest);
}

TEST_CASE("virtio-vsock: clone.vsock/1") {
  VsockRig rig;
  rig.device().start();
  int32_t fd = -1;
  clone_err err{sizeof err, 0, {}};
  CHECK(rig.published().connect(rig.published().context, 10, &fd, &err) == CLONE_ERR_STATE);
  CHECK(std::string(err.message) == "the guest's vsock driver is not there (yet)");
  rig.activate();
  std::set<uint32_t> ports;
  for (uint32_t i = 0; i < 20; ++i) {
    REQUIRE(rig.published().connect(rig.published().context, 100 + i, &fd, &err) == CLONE_OK);
    const clone_sdk::Fd stream(fd);
    CHECK((::fcntl(fd, F_GETFL) & O_NONBLOCK) != 0);
    REQUIRE(rig.wait([&] { return rig.find(100 + i); }));
    GuestStream& guest = *rig.find(100 + i);
    ports.insert(guest.host_port);
    CHECK(guest.host_port >= 1);
    CHECK(guest.host_port < 1024);
    pollfd entry{fd, POLLOUT, 0};
    CHECK(::poll(&entry, 1, 20) == 0);
    rig.send(guest, VIRTIO_VSOCK_OP_RESPONSE);
    CHECK(::poll(&entry, 1, 3000) == 1);
    CHECK(entry.revents == POLLOUT);
    // Nothing comes of what held it back.
    send_all(fd, "first");
    CHECK(rig.wait([&] { return guest.received == "first"; }));
    std::string text = "second";
    rig.write(guest, text);
    CHECK(rig.receive(fd) == "second");
  }
  CHECK(ports.size() == 20);

  REQUIRE(rig.published().connect(rig.published().context, 200, &fd, &err) == CLONE_OK);
  const clone_sdk::Fd refused(fd);
  REQUIRE(rig.wait([&] { return rig.find(200); }));
  rig.send(*rig.find(200), VIRTIO_VSOCK_OP_RST);
  pollfd entry{fd, POLLOUT, 0};
  CHECK(::poll(&entry, 1, 3000) == 1);
  CHECK((entry.revents & POLLHUP) != 0);
}

TEST_CASE("virtio-vsock: the command that connects") {
  VsockRig rig;
  rig.start();
  BenchHost::Answer answer;
  rig.host().begin_command("virtio-vsock.0.connect", R"({"port": 300})", answer);
  REQUIRE(rig.wait([&] { return rig.find(300); }));
  rig.host().run_main_loop(20);
  CHECK(answer.text.empty());
  rig.send(*rig.find(300), VIRTIO_VSOCK_OP_RESPONSE);
  REQUIRE(rig.wait([&] { return !answer.text.empty(); }));
  CHECK(answer.text == R"({"port": 300})");
  REQUIRE(answer.fd);
  send_all(answer.fd.get(), "through a duplicate");
  CHECK(rig.wait([&] { return rig.find(300)->received == "through a duplicate"; }));

  BenchHost::Answer refused;
  rig.host().begin_command("virtio-vsock.0.connect", R"( { "port" : 301 } )", refused);
  REQUIRE(rig.wait([&] { return rig.find(301); }));
  rig.send(*rig.find(301), VIRTIO_VSOCK_OP_RST);
  CHECK(rig.wait([&] { return !refused.text.empty(); }));
  CHECK(refused.text == "error: connect: the guest does not accept streams to port 301");
  CHECK(!refused.fd);

  for (const char* json : {"{}", "[]", R"({"port": -1})", R"({"port": 4294967295})", R"({"port": 1, "x": 2})", ""})
    CHECK(rig.host().call_command("virtio-vsock.0.connect", json) ==
          "error: connect: allowed is {\"port\": N}, N being a port of the guest from 0 to 4294967294");

  BenchHost::Answer pending;
  rig.host().begin_command("virtio-vsock.0.connect", R"({"port": 302})", pending);
  rig.deactivate();
  rig.device().destroy();
  CHECK(pending.text == "error: connect: the machine ended");
}

TEST_CASE("virtio-vsock: pausing keeps streams, loading ends them and tells the guest") {
  VsockRig rig;
  rig.start();
  auto ends = rig.open_from_host(1);
  REQUIRE(rig.device().quiesce() == CLONE_OK);
  send_all(ends.client.get(), "while it is paused");
  rig.settle(100);
  CHECK(ends.guest->received.empty());
  SavedState state;
  REQUIRE(rig.device().save(state) == CLONE_OK);
  REQUIRE(rig.device().resume() == CLONE_OK);
  CHECK(rig.wait([&] { return ends.guest->received == "while it is paused"; }));
  CHECK(!rig.take_event_id());

  SUBCASE("into itself") {
    rig.offer_events();
    REQUIRE(rig.device().quiesce() == CLONE_OK);
    REQUIRE(rig.device().load(state) == CLONE_OK);
    REQUIRE(rig.device().resume() == CLONE_OK);
    std::optional<uint32_t> event;
    CHECK(rig.wait([&] { return (event = rig.take_event_id()).has_value(); }));
    CHECK(event == uint32_t{VIRTIO_VSOCK_EVENT_TRANSPORT_RESET});
    CHECK(rig.receive(ends.client.get()) == "EOF");
    CHECK(rig.open_from_host(2).guest);
  }
  SUBCASE("into a machine of its own, active before it starts") {
    VsockRig restored;
    REQUIRE(restored.device().load(state) == CLONE_OK);
    restored.start();
    restored.host().run_main_loop(20);
    restored.offer_events();  // the buffer may come later
    std::optional<uint32_t> event;
    CHECK(restored.wait([&] { return (event = restored.take_event_id()).has_value(); }));
    CHECK(event == uint32_t{VIRTIO_VSOCK_EVENT_TRANSPORT_RESET});
    // Once.
    restored.offer_events();
    restored.wait([] { return false; }, 50);
    CHECK(!restored.take_event_id());
    CHECK(restored.open_from_host(2).guest);
    CHECK(rig.open_from_host(2).guest);
  }
  SUBCASE("not what does not fit") {
    VsockRig other({{"backend", "user"}, {"queue-size", "64"}});
    CHECK(other.device().load(state) == CLONE_ERR_INVALID);
    CHECK(other.device().error == "queue-size is 64, of the saved device 256");
    SavedState nothing;
    CHECK(other.device().load(nothing) == CLONE_ERR_CORRUPT);
  }
}

TEST_CASE("virtio-vsock: the time of a pause is nobody's") {
  VsockRig rig;
  rig.start();
  const clone_sdk::Fd slow = rig.client("CONN");  // it has 5 s
  rig.settle();
  REQUIRE(rig.device().quiesce() == CLONE_OK);
  ::usleep(5'100'000);
  REQUIRE(rig.device().resume() == CLONE_OK);
  rig.settle();
  send_all(slow.get(), "ECT 90\n");
  CHECK(rig.wait([&] { return rig.find(90); }));
}

TEST_CASE("virtio-vsock: without a VM directory there are no sockets, and all else works") {
  VsockRig rig({{"backend", "user"}}, false);
  rig.start();
  CHECK(rig.cid >= 3);
  int32_t fd = -1;
  REQUIRE(rig.published().connect(rig.published().context, 5, &fd, nullptr) == CLONE_OK);
  const clone_sdk::Fd stream(fd);
  REQUIRE(rig.wait([&] { return rig.find(5); }));
  GuestStream& refused = rig.dial(80, 9);
  CHECK(rig.wait([&] { return refused.reset; }));
}

TEST_CASE("virtio-vsock: another user is sent away") {
  if (::geteuid() != 0) return;
  const PrivateRoot root;
  VsockRig rig;
  rig.start();
  std::filesystem::permissions(root.path(), std::filesystem::perms(0755));
  std::filesystem::permissions(rig.host().directory(), std::filesystem::perms(0755));
  std::filesystem::permissions(rig.socket_path(), std::filesystem::perms(0777));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strcpy(address.sun_path, rig.socket_path().c_str());
  const pid_t child = ::fork();
  if (child == 0) {
    char byte;
    if (::setuid(65534) != 0) ::_exit(2);
    const int fd = ::socket(AF_UNIX, SOCK_STREAM, 0);
    if (::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) ::_exit(3);
    [[maybe_unused]] const ssize_t sent = ::send(fd, "CONNECT 1\n", 10, MSG_NOSIGNAL);
    ::_exit(::recv(fd, &byte, 1, 0) <= 0 ? 0 : 4);
  }
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(WEXITSTATUS(status) == 0);
  rig.settle();
  CHECK(rig.find(1) == nullptr);
}

TEST_CASE("virtio-vsock: machines of one root folder have CIDs of their own") {
  const PrivateRoot root;
  auto first = std::make_unique<VsockRig>();
  VsockRig second;
  CHECK(first->cid == 3);
  CHECK(second.cid == 4);
  FakeHost host;
  DeviceUnderTest third(VsockRig::plugin().device("virtio-vsock"), host.handle("virtio-vsock.0"));
  CHECK(third.configure({{"backend", "user"}, {"cid", "3"}}) == CLONE_ERR_BUSY);
  CHECK(third.error == "cid=3: in use by another machine");
  struct stat status {};
  REQUIRE(::stat((root.path() + "/.cid").c_str(), &status) == 0);
  CHECK((status.st_mode & 0777) == 0700);
  first.reset();
  VsockRig again;
  CHECK(again.cid == 3);
}
