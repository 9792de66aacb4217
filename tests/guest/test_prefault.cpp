// SPDX-License-Identifier: Apache-2.0
// What the first fork of a template touches, the next ones have before they run.
#include <doctest/doctest.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <fstream>
#include <functional>
#include <sstream>

#include "scratch_dir.hpp"
#include "vmm_process.hpp"

namespace {

// A step of the guest `changes` writes to every seventh of its pages.
constexpr uint64_t kMib = 8;
constexpr uint64_t kWrittenKib = kMib * 1024 / 7;

// Of its whole process.
uint64_t anonymous_kib(const VmmProcess& vm) {
  std::ifstream file("/proc/" + std::to_string(vm.pid()) + "/smaps_rollup");
  for (std::string line; std::getline(file, line);)
    if (unsigned long kib = 0; std::sscanf(line.c_str(), "Anonymous: %lu kB", &kib) == 1) return kib;
  return 0;
}
uint64_t minor_faults(const VmmProcess& vm) {
  std::ifstream file("/proc/" + std::to_string(vm.pid()) + "/stat");
  std::string line;
  std::getline(file, line);
  std::istringstream fields(line.substr(line.rfind(')') + 2));
  std::string field;
  for (int number = 3; number <= 10; ++number) fields >> field;  // proc(5): minflt is the tenth
  return std::stoull(field);
}

bool soon(const std::function<bool()>& condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    ::usleep(10'000);
  }
  return true;
}

void asks(VmmProcess& vm, const char* what, unsigned expected_step) {
  vm.type(what);
  std::string line;
  REQUIRE(vm.wait_for_line("step ", line));
  CHECK(line.starts_with("step " + std::to_string(expected_step) + " damaged 0"));
}

void ends(VmmProcess& vm) {
  vm.type(".");
  const VmmResult result = vm.finish();
  CHECK(result.errors == "");
  CHECK(result.status == 0);
}

}  // namespace

TEST_CASE("what the first fork of a template touches, the next ones have before they run") {
  const ScratchDir dir;
  const std::string store = dir.path() + "/store", note = store + "/base/note-touched-pages";
  ::setenv("CLONE_RUNTIME_DIR", (dir.path() + "/run").c_str(), 1);
  VmmProcess source("changes", {"--mem", "64M", "--name", "source", "--cmdline", "mib=" + std::to_string(kMib)});
  REQUIRE(source.wait_for("ready\n"));
  REQUIRE(run_command({"snapshot", "--name", "base", "--store", store, "--stop", "source"}).status == 0);
  const auto fork_with = [&](const std::string& prefault) {
    return std::vector<std::string>{"fork", "--template", "base", "--store", store, "--prefault", prefault};
  };

  VmmProcess without(fork_with("none"));
  asks(without, "?", 0);
  const uint64_t own_kib = anonymous_kib(without);
  uint64_t faults_without = minor_faults(without);
  asks(without, "+", 1);
  faults_without = minor_faults(without) - faults_without;
  ends(without);
  CHECK(::access(note.c_str(), F_OK) != 0);

  VmmProcess first(fork_with("recorded"));
  asks(first, "+", 1);
  REQUIRE(soon([&] { return ::access(note.c_str(), F_OK) == 0; }));
  ends(first);
  const VmmResult inspected = run_command({"template", "inspect", "base", "--store", store, "--json"});
  CHECK(inspected.output.find("\"prefault\":{\"read_bytes\":") != std::string::npos);

  // Its guest sleeps: nobody but the host has written to its memory.
  VmmProcess next(fork_with("recorded"));
  CHECK(soon([&] { return anonymous_kib(next) >= own_kib + kWrittenKib * 9 / 10; }));
  asks(next, "?", 0);
  uint64_t faults = minor_faults(next);
  asks(next, "+", 1);
  faults = minor_faults(next) - faults;
  CHECK(faults + kWrittenKib / 4 * 9 / 10 <= faults_without);  // one a page
  ends(next);

  VmmProcess all(fork_with("all"));
  asks(all, "+", 1);
  ends(all);
  const VmmResult wrong = run_command(fork_with("some"));
  CHECK(wrong.status == 2);
  CHECK(wrong.errors.find("--prefault") != std::string::npos);
  CHECK(wrong.errors.find("some") != std::string::npos);

  // A hint that makes no sense is none.
  std::ofstream(note, std::ios::binary | std::ios::trunc) << "nonsense";
  VmmProcess last(fork_with("recorded"));
  asks(last, "?", 0);
  ends(last);
  ::unsetenv("CLONE_RUNTIME_DIR");
}
