// SPDX-License-Identifier: Apache-2.0
// until [--pss MIB] MARKER COMMAND…: starts COMMAND, waits until MARKER is seen in its output, prints the milliseconds
// from before the start until then, and ends COMMAND. With --pss it prints in a second column the KiB of memory (PSS)
// that COMMAND then has besides MIB of guest memory.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { kLongestWaitMs = 120000, kSettleUs = 1000000, kMostMappings = 4096 };

static void die(const char* what) {
  fprintf(stderr, "until: %s\n", what);
  exit(1);
}

static double now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
}

struct Range {
  unsigned long start, end, pss_kib;
};

// The guest's memory is told by its size: adjacent mappings (VMMs split it with madvise()) that are exactly as large.
// -1: no such mappings.
static long pss_without(pid_t process, unsigned long guest_bytes) {
  static struct Range ranges[kMostMappings];
  char path[64], line[4096];
  snprintf(path, sizeof path, "/proc/%d/smaps", (int)process);
  FILE* file = fopen(path, "re");
  if (!file) return -1;
  size_t count = 0;
  unsigned long total_kib = 0, kib;
  while (fgets(line, sizeof line, file)) {
    struct Range* next = &ranges[count < kMostMappings ? count : kMostMappings - 1];
    if (sscanf(line, "%lx-%lx ", &next->start, &next->end) == 2) {
      next->pss_kib = 0;
      ++count;
    } else if (sscanf(line, "Pss: %lu kB", &kib) == 1 && count > 0 && count <= kMostMappings) {
      ranges[count - 1].pss_kib = kib;
      total_kib += kib;
    }
  }
  fclose(file);
  if (count > kMostMappings) return -1;
  for (size_t first = 0; first < count; ++first) {
    unsigned long guest_kib = 0;
    for (size_t last = first; last < count && (last == first || ranges[last].start == ranges[last - 1].end); ++last) {
      guest_kib += ranges[last].pss_kib;
      if (ranges[last].end - ranges[first].start == guest_bytes) return (long)(total_kib - guest_kib);
    }
  }
  return -1;
}

int main(int count, char** arguments) {
  unsigned long guest_mib = 0;
  int at = 1;
  if (count > 2 && strcmp(arguments[1], "--pss") == 0) {
    guest_mib = strtoul(arguments[2], NULL, 10);
    at = 3;
  }
  if (count < at + 2) die("usage: until [--pss MIB] MARKER COMMAND…");
  const char* marker = arguments[at];
  const size_t marker_bytes = strlen(marker);

  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) die("pipe");
  posix_spawn_file_actions_t files;
  posix_spawn_file_actions_init(&files);
  posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&files, ends[1], 1);

  char seen[1 << 16];
  size_t seen_bytes = 0;
  pid_t process;
  const double start = now_ms();
  if (posix_spawnp(&process, arguments[at + 1], &files, NULL, arguments + at + 1, environ) != 0) die("cannot start it");
  close(ends[1]);
  double taken = -1;
  while (taken < 0 && seen_bytes < sizeof seen) {
    struct pollfd output = {.fd = ends[0], .events = POLLIN};
    const double left = start + kLongestWaitMs - now_ms();
    if (left <= 0 || poll(&output, 1, (int)left) <= 0) break;
    const ssize_t got = read(ends[0], seen + seen_bytes, sizeof seen - seen_bytes);
    if (got <= 0) break;
    seen_bytes += (size_t)got;
    if (memmem(seen, seen_bytes, marker, marker_bytes)) taken = now_ms() - start;
  }
  long pss_kib = 0;
  if (taken >= 0 && guest_mib) {
    usleep(kSettleUs);
    pss_kib = pss_without(process, guest_mib << 20);
  }
  kill(process, SIGKILL);
  waitpid(process, NULL, 0);
  if (taken < 0) {
    fwrite(seen, 1, seen_bytes, stderr);
    die("the marker never came");
  }
  if (pss_kib < 0) die("the guest's memory is not among the mappings");
  printf("%.3f %ld\n", taken, pss_kib);
  return 0;
}
