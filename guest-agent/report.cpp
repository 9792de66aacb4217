// SPDX-License-Identifier: Apache-2.0
// Reads /proc for the agent's reports.
#include "report.hpp"

#include <linux/resource.h>
#include <linux/stat.h>

#include <initializer_list>

#include "files.hpp"

namespace {

constexpr uint64_t unknown = ~uint64_t{0};
char text[65536];  // /proc/stat and /proc/diskstats of large machines; more is cut

// What is there, up to the buffer's end; "" if nothing.
const char* read_text(const char* path) {
  size_t used = 0;
  const int fd = sys::open(path, open_read);
  if (fd >= 0) {
    for (long count; used < sizeof text - 1 && (count = sys::read(fd, text + used, sizeof text - 1 - used)) > 0;)
      used += static_cast<size_t>(count);
    sys::close(fd);
  }
  text[used] = 0;
  return text;
}

// Moves past spaces and takes a number; 0 where there is none.
uint64_t take_number(const char*& at) {
  while (*at == ' ') ++at;
  uint64_t number = 0;
  for (; *at >= '0' && *at <= '9'; ++at) number = number * 10 + static_cast<uint64_t>(*at - '0');
  return number;
}

void skip_word(const char*& at) {
  while (*at == ' ') ++at;
  while (*at != 0 && *at != ' ' && *at != '\n') ++at;
}

bool next_line(const char*& at) {
  while (*at != 0 && *at != '\n') ++at;
  if (*at == 0) return false;
  return *++at != 0;
}

// What follows a word at the start of a line, or null.
const char* find_line(const char* start, const char* word) {
  const char* at = start;
  do
    if (const char* rest = after(at, word)) return rest;
  while (next_line(at));
  return nullptr;
}

// "12.34" as 1234.
uint64_t take_hundredths(const char*& at) {
  uint64_t number = take_number(at) * 100;
  if (*at == '.' && at[1] >= '0' && at[1] <= '9') {
    number += static_cast<uint64_t>(at[1] - '0') * 10;
    if (at[2] >= '0' && at[2] <= '9') number += static_cast<uint64_t>(at[2] - '0');
  }
  return number;
}

// Programs that were run are work; this process is not.
uint64_t own_ticks() {
  rusage usage{};
  sys::call(__NR_getrusage, RUSAGE_SELF, sys::word(&usage));
  uint64_t microseconds = 0;
  for (const auto& time : {usage.ru_utime, usage.ru_stime})
    microseconds += static_cast<uint64_t>(time.tv_sec) * 1000000 + static_cast<uint64_t>(time.tv_usec);
  return microseconds / 10000;
}

uint64_t disk_sectors() {
  uint64_t sectors = 0;
  const char* at = read_text("/proc/diskstats");
  if (*at == 0) return 0;
  do {  // major minor name reads merged SECTORS ms writes merged SECTORS …; partitions count twice
    for (int i = 0; i < 5; ++i) skip_word(at);
    sectors += take_number(at);
    for (int i = 0; i < 3; ++i) skip_word(at);
    sectors += take_number(at);
  } while (next_line(at));
  return sectors;
}

// The newest time at which one of the terminals of this machine was read from.
uint64_t newest_input_s() {
  static constexpr const char* consoles[] = {"console", "hvc0", "ttyS0", "ttyS1", "ttyS2", "ttyS3",  "tty1",
                                             "tty2",    "tty3", "tty4",  "tty5",  "tty6",  "ttyAMA0"};
  uint64_t newest = 0;
  const auto look = [&newest](int directory, const char* name) {
    struct stat status;
    if (sys::fstatat(directory, name, &status, 0) == 0 && S_ISCHR(status.st_mode) && status.st_atime > newest)
      newest = status.st_atime;
    return false;
  };
  const int devices = sys::open("/dev", open_read | O_DIRECTORY);
  if (devices >= 0) {
    for (const char* name : consoles) look(devices, name);
    sys::close(devices);
  }
  const int terminals = sys::open("/dev/pts", open_read | O_DIRECTORY);
  if (terminals >= 0) {
    any_entry(terminals, [&](const char* name) { return *name >= '0' && *name <= '9' && look(terminals, name); });
    sys::close(terminals);
  }
  return newest;
}

uint64_t balloon_pages() {
  const char* at = read_text("/proc/vmstat");
  uint64_t pages = 0;
  for (const char* name : {"balloon_inflate ", "balloon_deflate "}) {
    const char* value = find_line(at, name);
    if (value) pages += take_number(value);
  }
  return pages;
}

uint32_t count_processes() {
  const int directory = sys::open("/proc", open_read | O_DIRECTORY);
  if (directory < 0) return static_cast<uint32_t>(unknown);
  uint32_t count = 0;
  any_entry(directory, [&count](const char* name) {
    if (*name >= '0' && *name <= '9') ++count;
    return false;
  });
  sys::close(directory);
  return count;
}

}  // namespace

bool Reporter::sample() {
  const char* at = find_line(read_text("/proc/stat"), "cpu ");
  // user nice system idle iowait irq softirq steal; guest time is within user
  uint64_t ticks[8] = {}, all = 0;
  if (at)
    for (auto& field : ticks) all += field = take_number(at);
  busy_ticks_ = ticks[0] + ticks[1] + ticks[2] + ticks[5] + ticks[6];
  all_ticks_ = all;
  at = find_line(text, "procs_running ");
  const auto running = static_cast<uint32_t>(at ? take_number(at) : 0);
  run_queue_ = running > 0 ? running - 1 : 0;

  const uint64_t own = own_ticks();
  Sample sample{};
  sample.busy_ticks = busy_ticks_ > own ? busy_ticks_ - own : 0;
  sample.kernel_ticks = ticks[2] + ticks[5] + ticks[6];
  sample.balloon_pages = balloon_pages();
  sample.run_queue = run_queue_;
  sample.io_sectors = disk_sectors();
  sample.newest_input_s = newest_input_s();
  sample.time_ms = sys::monotonic_ms();
  return activity_.add(sample);
}

void Reporter::fill(agent_protocol::Report& report) {
  report = {};
  report.activity = activity_.is_active() ? 2 : 1;
  report.process_count = count_processes();
  report.run_queue = run_queue_;
  const uint64_t all = all_ticks_ - reported_all_ticks_;
  const bool has_last = reported_all_ticks_ != 0;
  report.cpu_permille =
      static_cast<uint32_t>(has_last && all > 0 ? (busy_ticks_ - reported_busy_ticks_) * 1000 / all : unknown);
  reported_busy_ticks_ = busy_ticks_;
  reported_all_ticks_ = all_ticks_;

  const char* at = read_text("/proc/loadavg");
  report.load_permille = static_cast<uint32_t>(*at ? take_hundredths(at) * 10 : unknown);

  read_text("/proc/pressure/memory");
  const auto pressure = [](const char* line) {
    const char* value = find_line(text, line);
    return static_cast<uint32_t>(value ? take_hundredths(value) / 10 : unknown);
  };
  report.pressure_some_permille = pressure("some avg10=");
  report.pressure_full_permille = pressure("full avg10=");

  read_text("/proc/meminfo");
  const auto bytes = [](const char* line) {
    const char* value = find_line(text, line);
    return value ? take_number(value) * 1024 : unknown;
  };
  report.total_bytes = bytes("MemTotal:");
  report.free_bytes = bytes("MemFree:");
  report.available_bytes = bytes("MemAvailable:");

  __kernel_timespec time{};
  sys::call(__NR_clock_gettime, 7 /* CLOCK_BOOTTIME */, sys::word(&time));
  report.uptime_ms = static_cast<uint64_t>(time.tv_sec) * 1000 + static_cast<uint64_t>(time.tv_nsec) / 1000000;
}
