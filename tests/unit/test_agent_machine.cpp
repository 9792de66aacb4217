// SPDX-License-Identifier: Apache-2.0
// What clone-agent does to a machine, done to namespaces with a root file system of their own. Needs root.
#include <linux/magic.h>
#include <sys/vfs.h>

#include <fstream>
#include <sstream>

#include "agent_client.hpp"

using namespace agent_test;

namespace {

// Namespaces of mounts, processes, network and name, in which process 1 is a shell and "/" a small ext4 image: nothing
// of this machine's is to be seen but a directory in its /dev/shm, for the socket.
constexpr const char* kMachine = R"sh(
set -e
cd "$1"
mkdir root socket
truncate -s 24M image
mkfs.ext4 -q image
mount --make-rprivate /
mount -o loop image root
cd root
mkdir bin dev etc proc socket
cp "$2" bin/clone-agent
cp "$(command -v busybox)" bin/busybox
ln -s busybox bin/sh
mknod -m 666 dev/null c 1 3
mknod -m 666 dev/urandom c 1 9
mount -t proc proc proc
mount --bind ../socket socket
ip link add eth0 type veth peer name peer0
ip link set peer0 up
hostname before
exec chroot . /bin/sh -c '/bin/clone-agent --machine --listen-unix /socket/agent & while :; do /bin/busybox sleep 100; done'
)sh";

bool is_possible() {
  struct statfs status {};
  const bool possible =
      ::geteuid() == 0 && ::access("/dev/loop-control", F_OK) == 0 && ::statfs("/dev/shm", &status) == 0 &&
      status.f_type == TMPFS_MAGIC &&
      ::system(
          "unshare -m -n -p -f true 2>/dev/null && unshare -n ip link add v0 type veth 2>/dev/null && "
          "command -v busybox mkfs.ext4 >/dev/null") == 0;
  if (!possible) MESSAGE("needs root, loop devices, namespaces, busybox and mkfs.ext4: not tested");
  return possible;
}

struct Machine {
  ScratchDir scratch{"/dev/shm"};
  AgentProcess process{scratch.path() + "/socket/agent",
                       {"unshare", "-m", "-n", "-u", "-p", "-f", "--kill-child", "sh", "-c", kMachine, "sh",
                        scratch.path(), program_path()}};
  const std::string& socket() const { return process.socket(); }
  ~Machine() {
    process.kill();
    ::usleep(100000);  // its mounts go with its last process
  }
};

Outcome ask(Client& client, const std::string& script) {
  return run(client, {.arguments = {"/bin/busybox", "sh", "-c", script}, .environment = {"PATH=/bin"}});
}

}  // namespace

TEST_CASE("agent: gives a machine its name, address, route and randomness") {
  if (!is_possible()) return;
  Machine machine;
  Client client(machine.socket());
  CHECK(ask(client, "busybox hostname").output == "before\n");
  client.send(Type::identity, Payload()
                                  .u32(kIdentityHostname | kIdentityAddress | kIdentityCid | kIdentityEntropy)
                                  .text("after")
                                  .text("192.0.2.5/27")
                                  .text("192.0.2.1")
                                  .u64(77)
                                  .text(std::string(1000, '\x5a'))
                                  .bytes);
  auto answer = client.receive();
  REQUIRE(answer);
  if (answer->type == Type::error) FAIL(Client::failure_of(*answer).message);
  CHECK(ask(client, "busybox hostname; busybox cat /etc/hostname").output == "after\nafter\n");
  CHECK(ask(client, "busybox ip -4 -o addr show scope global").output.find(" 192.0.2.5/27 ") != std::string::npos);
  CHECK(ask(client, "busybox ip route show default").output.starts_with("default via 192.0.2.1 dev "));

  // Again, as a copy of this machine would be told: the old address and route are gone.
  client.send(Type::identity, Payload().u32(kIdentityAddress).text("198.51.100.9/24").text("198.51.100.1").bytes);
  answer = client.receive();
  REQUIRE(answer);
  CHECK(answer->type == Type::done);
  CHECK(ask(client, "busybox ip -4 -o addr show scope global | busybox grep -c inet").output == "1\n");
  CHECK(ask(client, "busybox ip route show default").output.starts_with("default via 198.51.100.1 dev "));
  CHECK(ask(client, "busybox ip route show | busybox grep -c default").output == "1\n");

  for (const char* address : {"192.0.2.5", "192.0.2.256/24", "192.0.2.5/33", "2001:db8::1/64", "", "192.0.2.5/24x"}) {
    client.send(Type::identity, Payload().u32(kIdentityAddress).text(address).text("").bytes);
    const Failure failure = client.receive_failure();
    CHECK(failure.code == EINVAL);
    CHECK(failure.message.find("allowed are IPv4 addresses") != std::string::npos);
  }
  client.send(Type::identity, Payload().u32(1u << 20).bytes);
  CHECK(client.receive_failure().code == EINVAL);
}

TEST_CASE("agent: freezes the file systems on disks, and thaws them") {
  if (!is_possible()) return;
  Machine machine;
  Client client(machine.socket());
  // No disk of this machine may be in reach.
  std::istringstream mounts(ask(client, "busybox cat /proc/mounts").output);
  int on_disk = 0;
  for (std::string line; std::getline(mounts, line);) {
    const bool is_ours = line.starts_with("/dev/loop") && line.find(" / ext4 rw") != line.npos;
    REQUIRE_MESSAGE((is_ours || line.starts_with("tmpfs /socket") || line.starts_with("proc /proc")), line);
    on_disk += is_ours ? 1 : 0;
  }
  REQUIRE(on_disk == 1);

  const auto number_of = [](const std::optional<Message>& message) {
    REQUIRE(message);
    REQUIRE(message->type == Type::done);
    return message->reader().u32();
  };
  Client writer(machine.socket());
  const auto start_writing = [&] {
    writer.send(Type::exec, Exec{.arguments = {"/bin/busybox", "touch", "/mark"}}.payload());
    const auto started = writer.receive();
    REQUIRE(started);
    REQUIRE(started->type == Type::started);
    CHECK_FALSE(writer.receive(500));  // it waits
  };
  client.send(Type::freeze);
  CHECK(number_of(client.receive()) == 1);
  start_writing();
  client.send(Type::exec, Exec{.arguments = {"true"}}.payload());
  CHECK(client.receive_failure().code == EBUSY);
  client.send(Type::watch, Payload().u32(100).bytes);
  client.send(static_cast<Type>(0x7777));
  CHECK(client.receive_failure().code == EBUSY);
  client.send(Type::thaw);
  CHECK(number_of(client.receive()) == 1);
  CHECK(finish(writer, 3000).has_exited);
  SUBCASE("when the connection ends") {
    Client other(machine.socket());
    other.send(Type::freeze);
    CHECK(number_of(other.receive()) == 1);
    start_writing();
    other.close();
    CHECK(finish(writer, 3000).has_exited);
  }
  SUBCASE("by themselves after the time that was given, and the host is told") {
    Client other(machine.socket());
    other.send(Type::freeze, Payload().u32(1000).bytes);
    CHECK(number_of(other.receive()) == 1);
    const int64_t frozen_ms = now_ms();
    start_writing();
    const Failure failure = other.receive_failure();
    CHECK(failure.code == ETIMEDOUT);
    CHECK(failure.answered == Type::freeze);
    CHECK(now_ms() - frozen_ms >= 900);
    CHECK(now_ms() - frozen_ms < 10000);
    CHECK(other.ends_within_ms(3000));
    CHECK(finish(writer, 3000).has_exited);
  }
  SUBCASE("twice frozen is told, and the first still thaws") {
    Client other(machine.socket()), another(machine.socket());
    other.send(Type::freeze);
    CHECK(number_of(other.receive()) == 1);
    another.send(Type::freeze);
    CHECK(another.receive_failure().code == EBUSY);
    other.send(Type::thaw);
    CHECK(number_of(other.receive()) == 1);
  }
  SUBCASE("a thaw of nothing") {
    Client other(machine.socket());
    other.send(Type::thaw);
    CHECK(number_of(other.receive()) == 0);
  }
}

TEST_CASE("agent: ends a machine whose init does not know how to") {
  if (!is_possible()) return;
  Machine machine;
  Client client(machine.socket());
  client.send(Type::power, Payload().u32(2).bytes);
  CHECK(client.receive_failure().code == EINVAL);
  Client other(machine.socket());
  other.send(
      Type::exec,
      Exec{.arguments = {"/bin/busybox", "sh", "-c", "trap '' TERM; while :; do busybox sleep 1; done"}}.payload());
  REQUIRE(other.receive());
  client.send(Type::power, Payload().u32(static_cast<uint32_t>(Power::off)).bytes);
  const auto answer = client.receive();
  REQUIRE(answer);
  CHECK(answer->type == Type::done);
  // reboot(2) within a namespace of processes ends its first by a signal: SIGINT for a power-off.
  int status = 0;
  CHECK(within_ms(10000, [&] { return ::waitpid(machine.process.process(), &status, WNOHANG) != 0; }));
  CHECK((WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status) - 128) == SIGINT);
}
