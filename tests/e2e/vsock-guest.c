// SPDX-License-Identifier: Apache-2.0
// vsock-guest serve | dial PORT MIB: the guest's end of tests/e2e/cases/vsock.sh.
//   serve  port 5000 echoes; 5001 reads to the end, then answers with its CRC-32 and length; 5002 sends 4 MiB; 5003 answers
//          with the caller's port; 5099 ends the program
//   dial   sends as many MiB to a port of the host, ends that direction, and prints what comes back
#include <linux/vm_sockets.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static char block[65536];

static void fill(uint64_t at) {
  for (size_t i = 0; i < sizeof block; ++i) block[i] = (char)(i * 7 + i / 256 + at / sizeof block);
}
static void send_all(int fd, const char *data, size_t size) {
  while (size) {
    const ssize_t count = write(fd, data, size);
    if (count <= 0) exit(1);
    data += count;
    size -= (size_t)count;
  }
}
static void send_pattern(int fd, uint64_t bytes) {
  for (uint64_t at = 0; at < bytes; at += sizeof block) {
    fill(at);
    send_all(fd, block, sizeof block);
  }
}
static void answer_sum(int fd) {
  uint32_t sum = UINT32_MAX;  // CRC-32
  uint64_t total = 0;
  for (ssize_t count; (count = read(fd, block, sizeof block)) > 0; total += (uint64_t)count)
    for (ssize_t i = 0; i < count; ++i) {
      sum ^= (unsigned char)block[i];
      for (int bit = 0; bit < 8; ++bit) sum = sum >> 1 ^ (sum & 1 ? 0xedb88320u : 0);
    }
  char text[64];
  send_all(fd, text, (size_t)snprintf(text, sizeof text, "%08x %llu\n", ~sum, (unsigned long long)total));
}
static int dial(unsigned port, unsigned mib) {
  const struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port};
  for (int tries = 0; tries < 100; ++tries, usleep(100000)) {
    const int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (fd < 0) return 1;
    if (connect(fd, (const struct sockaddr *)&address, sizeof address) == 0) {
      send_pattern(fd, (uint64_t)mib << 20);
      shutdown(fd, SHUT_WR);
      for (ssize_t count; (count = read(fd, block, sizeof block)) > 0;) fwrite(block, 1, (size_t)count, stdout);
      return 0;
    }
    close(fd);
  }
  perror("connect");
  return 1;
}
static void serve_one(int fd, unsigned port, unsigned peer) {
  char text[32];
  switch (port) {
    case 5000:
      for (ssize_t count; (count = read(fd, block, sizeof block)) > 0;) send_all(fd, block, (size_t)count);
      break;
    case 5001:
      answer_sum(fd);
      break;
    case 5002:
      send_pattern(fd, 4 << 20);
      break;
    default:
      send_all(fd, text, (size_t)snprintf(text, sizeof text, "%u\n", peer));
  }
}
static int serve(void) {
  static const unsigned ports[] = {5000, 5001, 5002, 5003, 5099};
  enum { count = sizeof ports / sizeof *ports };
  struct pollfd listeners[count];
  signal(SIGCHLD, SIG_IGN);
  for (int i = 0; i < count; ++i) {
    const struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = ports[i]};
    listeners[i] = (struct pollfd){socket(AF_VSOCK, SOCK_STREAM, 0), POLLIN, 0};
    if (bind(listeners[i].fd, (const struct sockaddr *)&address, sizeof address) || listen(listeners[i].fd, 200)) {
      perror("listen");
      return 1;
    }
  }
  puts("vsock: listening");
  fflush(stdout);
  for (;;) {
    poll(listeners, count, -1);
    for (int i = 0; i < count; ++i) {
      if (!listeners[i].revents) continue;
      struct sockaddr_vm peer = {0};
      socklen_t size = sizeof peer;
      const int fd = accept(listeners[i].fd, (struct sockaddr *)&peer, &size);
      if (fd < 0) continue;
      if (ports[i] == 5099) return 0;
      if (fork() == 0) {
        serve_one(fd, ports[i], peer.svm_port);
        _exit(0);
      }
      close(fd);
    }
  }
}
int main(int argc, char **argv) {
  if (argc == 4 && strcmp(argv[1], "dial") == 0) return dial((unsigned)atoi(argv[2]), (unsigned)atoi(argv[3]));
  return argc == 2 && strcmp(argv[1], "serve") == 0 ? serve() : 2;
}
