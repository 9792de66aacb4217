// SPDX-License-Identifier: Apache-2.0
// load THREADS KIB FILE: each thread writes to memory of its own again and again, and looks at all of it before it does;
// one more watches the clocks. FILE always has the last line of how that goes.
// load clock: for each line on standard input, the nanoseconds of the clock.
// load random: 16 bytes of getrandom(2).
// load cid: the vsock context id that the guest's kernel knows.
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { kMostThreads = 16, kRestUs = 20000, kPageWords = 512 };

static atomic_ulong passes[kMostThreads], errors, backwards, set_back;
static size_t words;  // of each thread

static uint64_t content(uint64_t thread, uint64_t word, uint64_t pass) {
  return pass == 0 ? 0 : (thread << 56 ^ pass << 24 ^ word) * 0x9e3779b97f4a7c15;
}

static void* write_memory(void* argument) {
  const size_t thread = (size_t)argument;
  volatile uint64_t* const area = calloc(words, sizeof *area);
  if (!area) exit(1);
  for (uint64_t pass = 0;; ++pass) {
    for (size_t word = 0; word < words; ++word) {
      if (area[word] != content(thread, word, pass)) ++errors;
      area[word] = content(thread, word, pass + 1);
    }
    passes[thread] = pass + 1;
    usleep(kRestUs);
  }
  return NULL;
}

static uint64_t now_ns(clockid_t clock) {
  struct timespec now;
  if (clock_gettime(clock, &now) != 0) exit(1);
  return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

// Of those that count from the boot none ever goes back; the wall clock is set.
static void* watch_clocks(void* unused) {
  static const clockid_t clocks[] = {CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_REALTIME};
  enum { kClocks = sizeof clocks / sizeof *clocks };
  uint64_t last[kClocks] = {0};
  for (;;) {
    for (size_t i = 0; i < kClocks; ++i) {
      const uint64_t now = now_ns(clocks[i]);
      if (now < last[i]) ++*(clocks[i] == CLOCK_REALTIME ? &set_back : &backwards);
      last[i] = now;
    }
    usleep(1000);
  }
  return unused;
}

static void start(void* (*run)(void*), size_t number) {
  pthread_t thread;
  if (pthread_create(&thread, NULL, run, (void*)number) != 0) exit(1);
}

static int print_random(void) {
  unsigned char bytes[16];
  if (getrandom(bytes, sizeof bytes, 0) != sizeof bytes) return 1;
  for (size_t i = 0; i < sizeof bytes; ++i) printf("%02x", bytes[i]);
  printf("\n");
  return 0;
}

static int print_cid(void) {
  unsigned cid = 0;
  const int fd = open("/dev/vsock", O_RDONLY);
  if (fd < 0 || ioctl(fd, IOCTL_VM_SOCKETS_GET_LOCAL_CID, &cid) != 0) {
    perror("/dev/vsock");
    return 1;
  }
  printf("%u\n", cid);
  return 0;
}

int main(int count, char** arguments) {
  if (count == 2 && strcmp(arguments[1], "cid") == 0) return print_cid();
  if (count == 2 && strcmp(arguments[1], "random") == 0) return print_random();
  if (count == 2 && strcmp(arguments[1], "clock") == 0) {
    char line[16];
    while (fgets(line, sizeof line, stdin)) {
      printf("%llu\n", (unsigned long long)now_ns(CLOCK_REALTIME));
      fflush(stdout);
    }
    return 0;
  }
  if (count != 4) return 2;
  const size_t threads = (size_t)atoi(arguments[1]);
  words = (size_t)atoi(arguments[2]) * 1024 / sizeof(uint64_t);
  if (threads < 1 || threads > kMostThreads || words < kPageWords) return 2;
  for (size_t thread = 0; thread < threads; ++thread) start(write_memory, thread);
  start(watch_clocks, 0);
  char temporary[256];
  snprintf(temporary, sizeof temporary, "%s.new", arguments[3]);
  for (;;) {
    unsigned long least = passes[0];
    for (size_t thread = 1; thread < threads; ++thread)
      if (passes[thread] < least) least = passes[thread];
    FILE* file = fopen(temporary, "w");
    if (!file) return 1;
    fprintf(file, "passes %lu errors %lu backwards %lu set-back %lu\n", least, (unsigned long)errors,
            (unsigned long)backwards, (unsigned long)set_back);
    fclose(file);
    rename(temporary, arguments[3]);
    usleep(100000);
  }
}
