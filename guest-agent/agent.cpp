// SPDX-License-Identifier: Apache-2.0
// clone-agent: serves the host from within a virtual machine (docs/agent.md). Listens, and gives each connection a
// process of its own.
#include <asm/errno.h>
#include <linux/fcntl.h>
#include <linux/stat.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <new>

#include "conversation.hpp"
#include "files.hpp"

using namespace agent_protocol;

namespace {

constexpr int most_connections = 256;
constexpr int backlog = 64;

struct VsockAddress {  // struct sockaddr_vm, <linux/vm_sockets.h>
  uint16_t family;
  uint16_t reserved;
  uint32_t port;
  uint32_t cid;
  uint8_t zero[4];
};
static_assert(sizeof(VsockAddress) == sizeof(sockaddr));
constexpr uint32_t any_cid = ~0u;

struct Options {
  const char* unix_path = nullptr;
  Machine machine = Machine::ours;
};

void print(int fd, const char* text) { sys::write(fd, text, length(text)); }

[[noreturn]] void refuse(const char* what, const char* given) {
  Message message;
  message << "clone-agent: " << what << given << "; see clone-agent --help\n";
  print(2, message.c_str());
  sys::exit(2);
}

constexpr const char* help =
    "usage: clone-agent [OPTION]...\n"
    "Serves the host from within a virtual machine, on port 1000 of its vsock.\n"
    "\n"
    "      --listen-unix PATH  serve this user and root on a Unix socket instead, and leave\n"
    "                          the machine's power, identity and file systems alone\n"
    "      --machine           do not leave them alone: the machine is a container of its own\n"
    "  -h, --help              print this and end\n"
    "  -V, --version           print the version and end\n";

Options parse(const char* const* arguments) {
  Options options;
  bool is_machine = false;
  for (; *arguments; ++arguments) {
    const char* const argument = *arguments;
    if (equal(argument, "--help") || equal(argument, "-h")) {
      print(1, help);
      sys::exit(0);
    } else if (equal(argument, "--version") || equal(argument, "-V")) {
      print(1, "clone-agent " CLONE_VERSION "\n");
      sys::exit(0);
    } else if (equal(argument, "--machine")) {
      is_machine = true;
    } else if (equal(argument, "--listen-unix")) {
      if (!arguments[1]) refuse("a path has to follow ", argument);
      options.unix_path = *++arguments;
    } else {
      refuse("unknown argument ", argument);
    }
  }
  if (options.unix_path && !is_machine) options.machine = Machine::not_ours;
  return options;
}

int open_socket(int family) {
  return static_cast<int>(sys::call(__NR_socket, family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
}

long bind_and_listen(int fd, const void* address, size_t size_bytes) {
  const long result = sys::call(__NR_bind, fd, sys::word(address), static_cast<long>(size_bytes));
  return result < 0 ? result : sys::call(__NR_listen, fd, backlog);
}

int finish(int fd, long result) {
  if (result >= 0) return fd;
  sys::close(fd);
  return static_cast<int>(result);
}

int listen_vsock() {
  const int fd = open_socket(AF_VSOCK);
  if (fd < 0) return fd;
  const VsockAddress address{AF_VSOCK, 0, kPort, any_cid, {}};
  return finish(fd, bind_and_listen(fd, &address, sizeof address));
}

int listen_unix(const char* path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const size_t size_bytes = length(path);
  if (size_bytes == 0 || size_bytes >= sizeof address.sun_path) refuse("not a path for a socket: ", path);
  __builtin_memcpy(address.sun_path, path, size_bytes);
  const int fd = open_socket(AF_UNIX);
  if (fd < 0) return fd;
  long result = bind_and_listen(fd, &address, sizeof address);
  if (result == -EADDRINUSE) {
    // A socket whose agent is gone is a name only.
    const int probe = open_socket(AF_UNIX);
    if (sys::call(__NR_connect, probe, sys::word(&address), sizeof address) == -ECONNREFUSED) {
      sys::unlinkat(AT_FDCWD, path, 0);
      result = bind_and_listen(fd, &address, sizeof address);
    }
    sys::close(probe);
  }
  return finish(fd, result);
}

// Waits for vsock, whose module may be loaded later, and for an agent that is already there to end. Each try may make
// the kernel look for the module, so they become rare.
int listen(const Options& options) {
  unsigned pause_ms = 20;
  for (unsigned tries = 0;; ++tries) {
    const unsigned longest_ms = tries < 60 ? 1000 : 10000;
    pause_ms = pause_ms * 2 < longest_ms ? pause_ms * 2 : longest_ms;
    const int fd = options.unix_path ? listen_unix(options.unix_path) : listen_vsock();
    if (fd >= 0) return fd;
    if (options.unix_path && fd != -EADDRINUSE) {
      Message message;
      message << "clone-agent: " << options.unix_path << ": " << static_cast<long>(fd);
      print(2, (message << "\n").c_str());
      sys::exit(1);
    }
    if (fd == -EADDRINUSE) pause_ms = 1000;
    sys::sleep_ms(pause_ms);
  }
}

// Only the host, and of it only who may use such a port, is served.
bool is_trusted(const Options& options, int fd, const VsockAddress& peer) {
  if (!options.unix_path) return peer.family == AF_VSOCK && peer.cid == kHostCid && peer.port < kFirstUnprivilegedPort;
  struct {
    int process;
    unsigned user, group;
  } credentials{};
  int size_bytes = sizeof credentials;
  if (sys::call(__NR_getsockopt, fd, SOL_SOCKET, SO_PEERCRED, sys::word(&credentials), sys::word(&size_bytes)) < 0)
    return false;
  return credentials.user == 0 || credentials.user == sys::call(__NR_geteuid);
}

[[noreturn]] void converse(int fd, const Options& options) {
  static char storage[sizeof(Conversation)] __attribute__((aligned(alignof(Conversation))));
  sys::block_signals(0);
  auto* conversation = new (storage) Conversation(fd, options.machine);
  conversation->run();
  sys::exit(0);
}

[[noreturn]] void serve(int listener, const Options& options) {
  const unsigned long mask = sys::signal_mask(sys::signal_child);
  sys::block_signals(mask);
  const int signals = sys::signal_descriptor(mask);
  int connections = 0;
  for (;;) {
    sys::Poll polls[2] = {{listener, sys::poll_in, 0}, {signals, sys::poll_in, 0}};
    sys::poll(polls, 2, -1);
    if (polls[1].returned) {
      sys::drain_signals(signals);
      while (sys::call(__NR_wait4, -1, 0, 1 /* WNOHANG */, 0) > 0) --connections;
    }
    if (!polls[0].returned) continue;
    VsockAddress peer{};
    int size_bytes = sizeof peer;
    const int fd = static_cast<int>(
        sys::call(__NR_accept4, listener, sys::word(&peer), sys::word(&size_bytes), SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (fd < 0) {
      if (fd == -EMFILE || fd == -ENFILE || fd == -ENOMEM) sys::sleep_ms(100);  // what is to be had later
      continue;
    }
    if (connections < most_connections && is_trusted(options, fd, peer)) {
      const long child = sys::fork();
      if (child == 0) {
        sys::close(listener);
        sys::close(signals);
        converse(fd, options);
      }
      if (child > 0) ++connections;
    }
    sys::close(fd);
  }
}

// Of who started the agent nothing but the three standard files is kept.
void close_others() {
  constexpr int no_such_call = -ENOSYS;
  if (sys::call(__NR_close_range, 3, ~0u, 0) != no_such_call) return;
  for (int fd = 3; fd < 1024; ++fd) sys::close(fd);
}

// Standard files that are closed would have their numbers taken by others.
void fill_standard_files() {
  for (;;) {
    const int fd = sys::open("/dev/null", O_RDWR);
    if (fd < 0) return;
    if (fd <= 2) continue;
    sys::close(fd);
    return;
  }
}

}  // namespace

// `stack`: the argument count, the arguments, NULL (x86-64 psABI 3.4.1).
extern "C" [[noreturn]] void clone_agent_main(const long* stack) {
  const auto* arguments = reinterpret_cast<const char* const*>(stack + 1);
  const Options options = parse(arguments + (stack[0] > 0 ? 1 : 0));
  close_others();
  fill_standard_files();
  sys::chdir("/");
  sys::call(__NR_umask, 0);
  for (int signal = 1; signal <= sys::last_signal; ++signal) sys::set_disposition(signal, sys::Disposition::standard);
  sys::set_disposition(sys::signal_pipe, sys::Disposition::ignored);
  set_oom_score("-1000");
  serve(listen(options), options);
}

asm(R"(
  .globl _start
_start:
  xor %ebp, %ebp
  mov %rsp, %rdi
  and $-16, %rsp
  call clone_agent_main
)");
