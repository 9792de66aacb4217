// SPDX-License-Identifier: Apache-2.0
// diskload DEVICE: loads a disk with direct I/O, one pattern after another, and prints "NAME MIB_PER_SECOND" for each.
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { kDeepest = 16, kLargestBytes = 1 << 20 };
static const double kSeconds = 1.0;

struct Pattern {
  const char* name;
  int write, random, depth;
  uint64_t block_bytes;
};
// On an image that grows as it is written: first reads of what is not there yet, then writes that allocate most of what
// they touch, last what finds nearly everything allocated.
static const struct Pattern kPatterns[] = {
    {"read-4k", 0, 0, 1, 4096},      {"randread-4k", 0, 1, 1, 4096},     {"write-4k", 1, 0, 1, 4096},
    {"randwrite-4k", 1, 1, 1, 4096}, {"randread-4k-16", 0, 1, 16, 4096}, {"randwrite-4k-16", 1, 1, 16, 4096},
    {"write-1m", 1, 0, 1, 1 << 20},  {"read-1m", 0, 0, 1, 1 << 20},
};

static void die(const char* what) {
  perror(what);
  exit(1);
}

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static uint64_t random_number(void) {  // xorshift
  static uint64_t state = 88172645463325252u;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

static double load(int disk, uint64_t disk_bytes, const struct Pattern* pattern, char* buffers) {
  aio_context_t context = 0;
  if (syscall(SYS_io_setup, kDeepest, &context) != 0) die("io_setup");
  const uint64_t blocks = disk_bytes / pattern->block_bytes;
  struct iocb requests[kDeepest];
  struct io_event events[kDeepest];
  struct iocb* to_submit[kDeepest];
  int ready = pattern->depth;
  for (int i = 0; i < ready; ++i) {
    requests[i] = (struct iocb){.aio_lio_opcode = pattern->write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD,
                                .aio_fildes = (uint32_t)disk,
                                .aio_buf = (uint64_t)(buffers + (uint64_t)i * kLargestBytes),
                                .aio_nbytes = pattern->block_bytes};
    to_submit[i] = &requests[i];
  }
  uint64_t begun = 0, done = 0;
  double end;
  const double start = now();
  do {
    for (int i = 0; i < ready; ++i)
      to_submit[i]->aio_offset =
          (int64_t)((pattern->random ? random_number() : begun + (uint64_t)i) % blocks * pattern->block_bytes);
    if (syscall(SYS_io_submit, context, ready, to_submit) != ready) die("io_submit");
    begun += (uint64_t)ready;
    ready = (int)syscall(SYS_io_getevents, context, 1, kDeepest, events, NULL);
    if (ready < 1) die("io_getevents");
    for (int i = 0; i < ready; ++i) {
      if (events[i].res != (int64_t)pattern->block_bytes) die("a request failed");
      to_submit[i] = (struct iocb*)events[i].obj;
    }
    done += (uint64_t)ready;
    end = now();
  } while (end - start < kSeconds);
  syscall(SYS_io_destroy, context);  // waits for what is in flight
  return (double)(done * pattern->block_bytes) / (end - start) / (1 << 20);
}

int main(int count, char** arguments) {
  if (count != 2) return 2;
  const int disk = open(arguments[1], O_RDWR | O_DIRECT);
  if (disk < 0) die(arguments[1]);
  uint64_t disk_bytes;
  if (ioctl(disk, BLKGETSIZE64, &disk_bytes) != 0) die("BLKGETSIZE64");
  char* buffers;
  if (posix_memalign((void**)&buffers, 4096, (size_t)kDeepest * kLargestBytes) != 0) return 1;
  memset(buffers, 0x5a, (size_t)kDeepest * kLargestBytes);
  for (size_t i = 0; i < sizeof kPatterns / sizeof *kPatterns; ++i)
    printf("%s %.3f\n", kPatterns[i].name, load(disk, disk_bytes, &kPatterns[i], buffers));
  return 0;
}
