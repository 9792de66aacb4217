// SPDX-License-Identifier: Apache-2.0
// Both ends of the benchmark of a VM's services. In the guest `vsock serve`; on the host `vsock TARGET WHAT…`, where
// TARGET is a CID or the path of a vsock.sock (`exec`: of a control.sock), and WHAT is
//   echo            a stream, a byte and its echo, once
//   echoes N        the same N times; prints the milliseconds of each
//   pings N         a byte and its echo on one stream N times; prints the milliseconds of each
//   put MIB         sends as much and waits until the guest has it all; prints MiB/s
//   get MIB         asks for as much; prints MiB/s
//   exec N          has the agent run `true` N times, each on a stream of its own; prints the milliseconds of each
//   start N CMD…    (TARGET is not used) starts CMD N times and waits for its end; prints the milliseconds of each
//   answer VM… [-- ASK…]
//                   (TARGET is the runtime directory, with no VM in it) starts VM and, once it has a control socket,
//                   ASK or the agent's `true`; prints the milliseconds until that has ended, and without ASK those until
//                   the agent's first frame; ends VM
#include <fcntl.h>
#include <glob.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <initializer_list>

#include "protocol.hpp"

namespace {

constexpr unsigned kEchoPort = 6000, kSinkPort = 6001, kSourcePort = 6002;
char block[65536];

[[noreturn]] void die(const char* what) {
  perror(what);
  exit(1);
}

double now_ms() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) * 1e3 + static_cast<double>(now.tv_nsec) / 1e6;
}

void put(int stream, const void* data, size_t size) {
  for (const char* at = static_cast<const char*>(data); size;) {
    const ssize_t count = write(stream, at, size);
    if (count <= 0) die("write");
    at += count;
    size -= static_cast<size_t>(count);
  }
}

void get(int stream, void* data, size_t size) {
  for (char* at = static_cast<char*>(data); size;) {
    const ssize_t count = read(stream, at, size);
    if (count <= 0) die("read");
    at += count;
    size -= static_cast<size_t>(count);
  }
}

int dial_path(const char* path) {
  sockaddr_un address{AF_UNIX, {}};
  snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
  const int stream = socket(AF_UNIX, SOCK_STREAM, 0);
  if (connect(stream, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) die(path);
  return stream;
}

int dial(const char* target, unsigned port) {
  if (target[0] == '/') {
    const int stream = dial_path(target);
    dprintf(stream, "CONNECT %u\n", port);
    char answer[64], *end = answer;
    do get(stream, end, 1);
    while (*end++ != '\n' && end < answer + sizeof answer);
    return stream;
  }
  sockaddr_vm address{};
  address.svm_family = AF_VSOCK;
  address.svm_port = port;
  address.svm_cid = static_cast<unsigned>(atoi(target));
  const int stream = socket(AF_VSOCK, SOCK_STREAM, 0);
  if (connect(stream, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) die("connect");
  return stream;
}

void ping(int stream) {
  char byte = 'x';
  put(stream, &byte, 1);
  get(stream, &byte, 1);
}

void echo(const char* target) {
  const int stream = dial(target, kEchoPort);
  ping(stream);
  close(stream);
}

double megabytes(const char* target, unsigned mib, bool to_guest) {
  const int stream = dial(target, to_guest ? kSinkPort : kSourcePort);
  put(stream, &mib, sizeof mib);
  const double start = now_ms();
  for (unsigned i = 0; i < mib * 16; ++i)
    to_guest ? put(stream, block, sizeof block) : get(stream, block, sizeof block);
  get(stream, block, 1);  // the other end has it all, or has sent it all
  return mib / ((now_ms() - start) / 1e3);
}

// A stream to the agent, which the VM hands out on its control socket.
int dial_agent(int control) {
  static const char request[] =
      R"({"jsonrpc":"2.0","id":1,"method":"guest-agent.connect","params":{"timeout_ms":60000}})"
      "\n";
  put(control, request, sizeof request - 1);
  int stream = -1;
  for (bool whole = false; !whole;) {
    iovec part{block, sizeof block};
    alignas(cmsghdr) char ancillary[CMSG_SPACE(sizeof(int))];
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = ancillary;
    message.msg_controllen = sizeof ancillary;
    const ssize_t count = recvmsg(control, &message, 0);
    if (count <= 0) die("control.sock");
    if (const cmsghdr* header = CMSG_FIRSTHDR(&message)) memcpy(&stream, CMSG_DATA(header), sizeof stream);
    whole = block[count - 1] == '\n';
  }
  if (stream < 0 || fcntl(stream, F_SETFL, 0) != 0) die("no stream");
  return stream;
}

// Gives the moment at which the agent answered first; at its end the program has ended.
double exec_true(int control) {
  using namespace agent_protocol;
  const int stream = dial_agent(control);
  Writer frames(block, sizeof block);
  frames.begin(Type::hello);
  frames.u32(kMagic);
  frames.u16(kMajor);
  frames.u16(kMinor);
  frames.text("bench", 5);
  frames.end();
  frames.begin(Type::exec);
  frames.u32(0);
  frames.u32(0);  // rows, columns
  frames.text("", 0);
  frames.text("/", 1);
  frames.u32(1);
  frames.text("true", 4);
  frames.u32(0);
  frames.end();
  put(stream, frames.data(), frames.size_bytes());
  double answered_ms = 0;
  for (Header header{};;) {
    get(stream, &header, sizeof header);
    if (answered_ms == 0) answered_ms = now_ms();
    get(stream, block, header.length_bytes);
    if (header.type == static_cast<uint16_t>(Type::error)) die("the agent refuses");
    if (header.type == static_cast<uint16_t>(Type::exited)) break;
  }
  close(stream);
  return answered_ms;
}

void start(char** command) {
  pid_t process;
  int status = 0;
  if (posix_spawnp(&process, command[0], nullptr, nullptr, command, environ) != 0) die(command[0]);
  if (waitpid(process, &status, 0) < 0 || status != 0) die("a command failed");
}

void answer(const char* directory, char** vm) {
  char** ask = vm;
  while (*ask && strcmp(*ask, "--") != 0) ++ask;
  const bool given = *ask != nullptr;
  if (given) *ask++ = nullptr;
  glob_t found{};
  const auto there_is = [&](const char* socket) {
    char pattern[4096];
    snprintf(pattern, sizeof pattern, "%s/*/%s", directory, socket);
    return glob(pattern, 0, nullptr, &found) == 0;
  };
  posix_spawn_file_actions_t files;
  posix_spawn_file_actions_init(&files);
  posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_addopen(&files, 1, "/dev/null", O_WRONLY, 0);
  static pid_t process;
  mkdir(directory, 0700);
  const int watcher = inotify_init1(IN_NONBLOCK);
  if (inotify_add_watch(watcher, directory, IN_CREATE) < 0) die(directory);
  const double before = now_ms();
  if (posix_spawnp(&process, vm[0], &files, nullptr, vm, environ) != 0) die(vm[0]);
  atexit([] {
    kill(process, SIGKILL);
    waitpid(process, nullptr, 0);
  });
  // Looking again and again would take the only processor from the VM.
  const auto watch_vms = [&] {
    if (there_is(".")) inotify_add_watch(watcher, found.gl_pathv[0], IN_CREATE);
  };
  while (watch_vms(), !there_is("console.sock")) {  // which is made when control.sock listens
    pollfd change{watcher, POLLIN, 0};
    poll(&change, 1, 100);
    while (read(watcher, block, sizeof block) > 0) {
    }
    if (waitpid(process, nullptr, WNOHANG) != 0) die("the VM has ended");
  }
  if (!there_is("control.sock")) die("control.sock");
  if (given) {
    start(ask);
    printf("%.4f\n", now_ms() - before);
  } else {
    const double answered_ms = exec_true(dial_path(found.gl_pathv[0]));
    printf("%.4f %.4f\n", now_ms() - before, answered_ms - before);
  }
}

template <typename Once>
void repeat(const char* count, Once once) {
  once();  // warm
  for (int left = atoi(count); left > 0; --left) {
    const double before = now_ms();
    once();
    printf("%.4f\n", now_ms() - before);
  }
}

void serve_one(int stream, unsigned port) {
  unsigned mib = 0;
  if (port == kEchoPort) {
    for (ssize_t count; (count = read(stream, block, sizeof block)) > 0;)
      put(stream, block, static_cast<size_t>(count));
    return;
  }
  get(stream, &mib, sizeof mib);
  for (unsigned i = 0; i < mib * 16; ++i)
    port == kSinkPort ? get(stream, block, sizeof block) : put(stream, block, sizeof block);
  put(stream, "!", 1);
}

// One stream after another at each port: no process is started for one.
[[noreturn]] void serve() {
  for (unsigned port : {kEchoPort, kSinkPort, kSourcePort}) {
    if (port != kSourcePort && fork() != 0) continue;
    sockaddr_vm address{};
    address.svm_family = AF_VSOCK;
    address.svm_port = port;
    address.svm_cid = VMADDR_CID_ANY;
    const int listener = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0 || listen(listener, 64) != 0)
      die("listen");
    if (port == kSourcePort) puts("VSOCK-SERVES");
    fflush(stdout);
    for (int stream; (stream = accept(listener, nullptr, nullptr)) >= 0; close(stream)) serve_one(stream, port);
    die("accept");
  }
  exit(1);
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 2 && strcmp(arguments[1], "serve") == 0) serve();
  if (count < 3) return 2;
  const char *target = arguments[1], *what = arguments[2], *number = count > 3 ? arguments[3] : "0";
  if (strcmp(what, "echo") == 0) {
    echo(target);
  } else if (strcmp(what, "echoes") == 0) {
    repeat(number, [&] { echo(target); });
  } else if (strcmp(what, "pings") == 0) {
    const int stream = dial(target, kEchoPort);
    repeat(number, [&] { ping(stream); });
  } else if (strcmp(what, "put") == 0 || strcmp(what, "get") == 0) {
    printf("%.4f\n", megabytes(target, static_cast<unsigned>(atoi(number)), what[0] == 'p'));
  } else if (strcmp(what, "exec") == 0) {
    const int control = dial_path(target);
    repeat(number, [&] { exec_true(control); });
  } else if (strcmp(what, "start") == 0 && count > 4) {
    repeat(number, [&] { start(arguments + 4); });
  } else if (strcmp(what, "answer") == 0 && count > 3) {
    answer(target, arguments + 3);
  } else {
    return 2;
  }
  return 0;
}
