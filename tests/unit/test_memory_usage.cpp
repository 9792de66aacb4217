// SPDX-License-Identifier: Apache-2.0
// Effective memory: the sums over smaps, checked against the kernel's own rows.
#include <doctest/doctest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <map>
#include <sstream>

#include "memory/guest_memory.hpp"
#include "memory/usage.hpp"

using namespace vmm;

namespace {

constexpr uint64_t kMiB = 1 << 20;

// The plain way: every row of the file by its key.
std::map<std::string, uint64_t> rows_of(const std::string& path) {
  std::map<std::string, uint64_t> rows;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string key, unit;
    uint64_t kib = 0;
    if (words >> key >> kib >> unit && unit == "kB" && key.back() == ':') rows[key] += kib << 10;
  }
  return rows;
}

// The test's own work between two looks moves a few pages.
void close_to(uint64_t value, uint64_t expected) {
  CAPTURE(value);
  CAPTURE(expected);
  CHECK((value > expected ? value - expected : expected - value) < 2 * kMiB);
}

}  // namespace

TEST_CASE("memory usage: what is told is the sum of the rows of smaps") {
  GuestMemory memory = GuestMemory::create({.size_bytes = 64 * kMiB}).value();
  std::memset(memory.slice({0}, 24 * kMiB), 7, 24 * kMiB);
  const auto usage = memory_usage(::getpid());
  REQUIRE(usage.ok());
  auto rows = rows_of("/proc/self/smaps");
  close_to(usage->resident_bytes, rows["Rss:"]);
  close_to(usage->private_bytes, rows["Private_Clean:"] + rows["Private_Dirty:"]);
  close_to(usage->shared_bytes + usage->merged_bytes.value_or(0), rows["Shared_Clean:"] + rows["Shared_Dirty:"]);
  close_to(usage->swapped_bytes, rows["Swap:"]);
  close_to(own_resident_bytes().value_or(0), rows["Rss:"]);
  CHECK(usage->private_bytes >= 24 * kMiB);
}

TEST_CASE("memory usage: pages that a child maps too are shared, not private") {
  GuestMemory memory = GuestMemory::create({.size_bytes = 64 * kMiB}).value();
  std::memset(memory.slice({0}, 32 * kMiB), 7, 32 * kMiB);
  const auto before = memory_usage(::getpid()).value();
  int stop[2];
  REQUIRE(::pipe(stop) == 0);
  const pid_t child = ::fork();
  if (child == 0) {
    char byte;
    ::close(stop[1]);
    (void)!::read(stop[0], &byte, 1);
    ::_exit(0);
  }
  const auto during = memory_usage(::getpid()).value();
  ::close(stop[0]);
  ::close(stop[1]);
  ::waitpid(child, nullptr, 0);
  CHECK(during.private_bytes + 30 * kMiB <= before.private_bytes);
  CHECK(during.shared_bytes >= before.shared_bytes + 30 * kMiB);
}

TEST_CASE("memory usage: the guest's memory alone") {
  for (const MemoryBacking backing : {MemoryBacking::anonymous, MemoryBacking::memfd}) {
#ifdef __SANITIZE_ADDRESS__
    // Where the kernel names no anonymous mapping, the largest one is AddressSanitizer's shadow.
    if (backing == MemoryBacking::anonymous) continue;
#endif
    // Larger than any other mapping of the tests, so that a kernel without names finds it too.
    GuestMemory memory = GuestMemory::create({.size_bytes = 2048 * kMiB, .backing = backing}).value();
    std::memset(memory.slice({0}, 8 * kMiB), 7, 8 * kMiB);
    const auto usage = guest_memory_usage(::getpid()).value();
    CHECK(usage.resident_bytes >= 8 * kMiB);
    CHECK(usage.resident_bytes <= 10 * kMiB);  // a huge page may be the last
    CHECK(memory.discard({0}, 4 * kMiB));
    CHECK(guest_memory_usage(::getpid())->resident_bytes <= 6 * kMiB);
    // Of a file, what is discarded is gone for everybody: a hole.
    if (struct stat file; memory.memfd() >= 0) {
      REQUIRE(::fstat(memory.memfd(), &file) == 0);
      CHECK(static_cast<uint64_t>(file.st_blocks) * 512 <= 6 * kMiB);
    }
  }
}

TEST_CASE("memory usage: memory is open to KSM if the machine's setting says so, and only then") {
  if (::access("/sys/kernel/mm/ksm/run", F_OK) != 0) return;  // a kernel without it
  for (const bool mergeable : {true, false}) {
    const GuestMemory memory = GuestMemory::create({.size_bytes = 64 * kMiB, .mergeable = mergeable}).value();
    // The flags of the mapping that begins at this address.
    std::ostringstream start;
    start << std::hex << reinterpret_cast<uintptr_t>(memory.slice({0}, 1)) << '-';
    std::ifstream smaps("/proc/self/smaps");
    std::string line;
    while (std::getline(smaps, line) && !line.starts_with(start.str())) {
    }
    while (std::getline(smaps, line) && !line.starts_with("VmFlags:")) {
    }
    REQUIRE(line.starts_with("VmFlags:"));
    CHECK((line.find(" mg") != std::string::npos) == mergeable);
  }
}

TEST_CASE("memory usage: rows, names and what is missing") {
  const std::string two =
      "7f0000000000-7f0020000000 rw-p 00000000 00:00 0    [anon:clone-guest-memory]\n"
      "Size:             524288 kB\nRss:                 100 kB\nShared_Clean:          1 kB\nShared_Dirty:          2 "
      "kB\n"
      "Private_Clean:         3 kB\nPrivate_Dirty:        94 kB\nKSM:                  40 kB\nSwap:                  5 "
      "kB\n"
      "VmFlags: rd wr mr mw me mg\n"
      "7f0030000000-7f0070000000 rw-p 00000000 00:00 0\n"
      "Size:            1048576 kB\nRss:                  10 kB\nPrivate_Dirty:        10 kB\nKSM:                   0 "
      "kB\n"
      "Private_Hugetlb:    2048 kB\n";
  const MemoryUsage all = sum_smaps(two, SmapsPart::everything);
  CHECK(all.resident_bytes == (100 + 10 + 2048) << 10);
  CHECK(all.private_bytes == (3 + 94 + 10 + 2048) << 10);
  CHECK(all.shared_bytes == 3 << 10);
  CHECK(all.swapped_bytes == 5 << 10);
  CHECK(all.merged_bytes == 40 << 10);
  // The named mapping wins over the larger one.
  CHECK(sum_smaps(two, SmapsPart::guest_memory).resident_bytes == 100 << 10);
  std::string unnamed = two;
  unnamed.replace(unnamed.find("[anon"), std::strlen("[anon:clone-guest-memory]"), "");
  CHECK(sum_smaps(unnamed, SmapsPart::guest_memory).resident_bytes == (10 + 2048) << 10);
  CHECK_FALSE(sum_smaps("1-2 rw-p 0 0 0\nRss: 4 kB\n", SmapsPart::everything).merged_bytes.has_value());
  CHECK(sum_smaps("", SmapsPart::guest_memory).resident_bytes == 0);
  CHECK(sum_smaps("Rss:\nRss: kB\nRss: x kB\n", SmapsPart::everything).resident_bytes == 0);
}

TEST_CASE("memory usage: no such process is an error that names it") {
  const auto usage = memory_usage(0x3fffff);
  REQUIRE_FALSE(usage.ok());
  CHECK(usage.error().message.find("4194303") != std::string::npos);
}
