// SPDX-License-Identifier: Apache-2.0
// virtio-vsock's vhost backend: the kernel's vhost-vsock serves rings in a FakeHost's memory. Only where there is one,
// which is the test host (tests/e2e/cases/vsock.sh).
#include <doctest/doctest.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>

#include "clone/abi/vhost.h"
#include "vsock_rig.hpp"

using namespace vmm;
using namespace vmm::test;

namespace {

const std::map<std::string, std::string> kVhost = {{"backend", "vhost"}};

bool unavailable() {
  if (::access("/dev/vhost-vsock", R_OK | W_OK) == 0) return false;
  MESSAGE("skipped: there is no /dev/vhost-vsock");
  return true;
}

clone_sdk::Fd connect(VsockRig& rig, uint32_t port) {
  int32_t fd = -1;
  clone_err err{sizeof err, 0, {}};
  const clone_status status = rig.published().connect(rig.published().context, port, &fd, &err);
  REQUIRE_MESSAGE(status == CLONE_OK, err.message);
  return clone_sdk::Fd(fd);
}

// A stream from the host that the guest accepted.
VsockRig::Ends open_stream(VsockRig& rig, uint32_t port) {
  VsockRig::Ends ends{connect(rig, port), nullptr};
  REQUIRE(rig.wait([&] { return rig.find(port); }));
  ends.guest = rig.find(port);
  pollfd entry{ends.client.get(), POLLOUT, 0};
  CHECK(::poll(&entry, 1, 0) == 0);
  rig.send(*ends.guest, VIRTIO_VSOCK_OP_RESPONSE);
  CHECK(::poll(&entry, 1, 3000) == 1);
  CHECK(entry.revents == POLLOUT);
  return ends;
}

void say(VsockRig& rig, VsockRig::Ends& ends, const std::string& text) {
  REQUIRE(::send(ends.client.get(), text.data(), text.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(text.size()));
  const size_t before = ends.guest->received.size();
  CHECK(rig.wait([&] { return ends.guest->received.size() == before + text.size(); }));
  CHECK(ends.guest->received.substr(before) == text);
}

void hear(VsockRig& rig, VsockRig::Ends& ends, std::string text) {
  const std::string all = text;
  rig.wait([&] { return ends.guest->room_of_host() >= text.size(); });
  rig.write(*ends.guest, text);
  CHECK(rig.receive(ends.client.get()) == all);
}

}  // namespace

TEST_CASE("vhost-vsock: streams both ways, and no packed ring") {
  if (unavailable()) return;
  VsockRig rig(kVhost);
  CHECK((rig.table().ring_features(rig.device().raw(), UINT64_MAX) >> 34 & 1) == 0);
  CHECK(rig.host().call_command("virtio-vsock.0.status", "{}").find("\"vhost\"") != std::string::npos);
  rig.start();
  for (uint32_t port = 1; port < 20; ++port) {
    auto ends = open_stream(rig, port);
    CHECK(ends.guest->host_port >= 1);
    CHECK(ends.guest->host_port < 1024);
    say(rig, ends, "to the guest");
    hear(rig, ends, "to the host");
  }
  const clone_sdk::Fd listener(::socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_vm address{};
  address.svm_family = AF_VSOCK;
  address.svm_cid = VMADDR_CID_ANY;
  address.svm_port = 4321;
  REQUIRE(::bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
  REQUIRE(::listen(listener.get(), 5) == 0);
  auto ends = rig.open_from_guest(listener.get(), 4321, 9);
  say(rig, ends, "accepted");
  hear(rig, ends, "dialled");
  GuestStream& nobody = rig.dial(4322, 10);
  CHECK(rig.wait([&] { return nobody.reset; }));

  const clone_sdk::Fd refused = connect(rig, 77);
  REQUIRE(rig.wait([&] { return rig.find(77); }));
  rig.send(*rig.find(77), VIRTIO_VSOCK_OP_RST);
  pollfd entry{refused.get(), POLLOUT, 0};
  CHECK(::poll(&entry, 1, 3000) == 1);
  int error = 0;
  socklen_t size = sizeof error;
  CHECK(::getsockopt(refused.get(), SOL_SOCKET, SO_ERROR, &error, &size) == 0);
  CHECK(error == ECONNRESET);
}

TEST_CASE("vhost-vsock: pausing keeps streams and positions, loading ends the streams") {
  if (unavailable()) return;
  VsockRig rig(kVhost);
  rig.start();
  auto ends = open_stream(rig, 1);
  say(rig, ends, "before");
  REQUIRE(rig.device().quiesce() == CLONE_OK);
  for (const uint32_t index : {0u, 1u}) {
    clone_virtqueue_position position{sizeof position, 0, 0};
    REQUIRE(virtqueue_service()->get_position(rig.queue(index), &position) == CLONE_OK);
    CHECK(position.next_available == position.next_used);
    CHECK(position.next_available > 0);
    if (index == 1) CHECK(position.next_available == rig.driver(1).position(rig.driver(1).available_count()));
  }
  SavedState state;
  REQUIRE(rig.device().save(state) == CLONE_OK);
  const std::string text = "while it is paused";
  REQUIRE(::send(ends.client.get(), text.data(), text.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(text.size()));
  rig.settle(100);
  CHECK(ends.guest->received == "before");
  REQUIRE(rig.device().resume() == CLONE_OK);
  CHECK(rig.wait([&] { return ends.guest->received == "before" + text; }));
  hear(rig, ends, "after");

  rig.offer_events();
  REQUIRE(rig.device().quiesce() == CLONE_OK);
  REQUIRE(rig.device().load(state) == CLONE_OK);
  REQUIRE(rig.device().resume() == CLONE_OK);
  std::optional<uint32_t> event;
  CHECK(rig.wait([&] { return (event = rig.take_event_id()).has_value(); }));
  CHECK(event == uint32_t{VIRTIO_VSOCK_EVENT_TRANSPORT_RESET});
  CHECK(rig.receive(ends.client.get()) == "EOF");
  auto again = open_stream(rig, 2);
  say(rig, again, "again");
}

TEST_CASE("vhost-vsock: a reset by the driver ends the streams") {
  if (unavailable()) return;
  VsockRig rig(kVhost);
  rig.start();
  auto ends = open_stream(rig, 1);
  rig.deactivate();
  char byte;
  CHECK(::recv(ends.client.get(), &byte, 1, MSG_DONTWAIT) <= 0);
  CHECK(errno != EAGAIN);
  rig.activate();
  auto again = open_stream(rig, 2);
  say(rig, again, "again");
}

// The kernel logs the used rings only, not what it writes into buffers (README.md).
TEST_CASE("vhost-vsock: the rings that the kernel writes are logged") {
  if (unavailable()) return;
  VsockRig rig(kVhost);
  const auto* vhost = rig.device().extension<clone_vhost>(CLONE_VHOST);
  REQUIRE(vhost);
  std::set<uint64_t> pages;
  const auto take = [&] {
    pages.clear();
    REQUIRE(vhost->take_log(
                rig.device().raw(),
                [](void* context, uint64_t address, uint64_t size_bytes) {
                  for (uint64_t page = address; page < address + size_bytes; page += 4096)
                    static_cast<std::set<uint64_t>*>(context)->insert(page);
                },
                &pages, nullptr) == CLONE_OK);
  };
  rig.start();
  auto ends = open_stream(rig, 1);
  say(rig, ends, "unseen");
  take();
  CHECK(pages.empty());
  REQUIRE(vhost->start_log(rig.device().raw(), nullptr) == CLONE_OK);
  say(rig, ends, "seen");
  take();
  const uint64_t used_ring = rig.driver(0).device_address / 4096 * 4096;
  CHECK(pages.contains(used_ring));
  CHECK(pages.size() < 20);
  rig.settle();
  take();
  take();
  CHECK(pages.empty());
  // The log goes on over a pause.
  REQUIRE(rig.device().quiesce() == CLONE_OK);
  REQUIRE(rig.device().resume() == CLONE_OK);
  say(rig, ends, "seen again");
  take();
  CHECK(pages.contains(used_ring));
  REQUIRE(vhost->stop_log(rig.device().raw(), nullptr) == CLONE_OK);
  say(rig, ends, "unseen again");
  take();
  CHECK(pages.empty());
  CHECK(vhost->memory_changed(rig.device().raw(), nullptr) == CLONE_OK);
  say(rig, ends, "still there");
}

TEST_CASE("vhost-vsock: a CID is one machine's") {
  if (unavailable()) return;
  VsockRig first({{"backend", "vhost"}, {"cid", "4000"}});
  FakeHost host;
  DeviceUnderTest second(VsockRig::plugin().device("virtio-vsock"), host.handle("virtio-vsock.0"));
  CHECK(second.configure({{"backend", "vhost"}, {"cid", "4000"}}) == CLONE_ERR_BUSY);
  CHECK(second.error == "cid=4000: in use by another machine");
  VsockRig third(kVhost), fourth(kVhost);
  CHECK(third.cid != fourth.cid);
}
