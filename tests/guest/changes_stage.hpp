// SPDX-License-Identifier: Apache-2.0
// The guest `changes`, whose memory is known page by page at each step, its snapshots and its forks.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "scratch_dir.hpp"
#include "vmm_process.hpp"

// In a runtime directory and a store of its own.
struct Stage {
  ScratchDir dir;
  std::string store = dir.path() + "/store";
  Stage() { ::setenv("CLONE_RUNTIME_DIR", (dir.path() + "/run").c_str(), 1); }
  ~Stage() { ::unsetenv("CLONE_RUNTIME_DIR"); }

  std::vector<std::string> with_store(std::vector<std::string> arguments) const {
    arguments.insert(arguments.end(), {"--store", store});
    return arguments;
  }
  VmmResult command(const std::vector<std::string>& arguments) const { return run_command(with_store(arguments)); }
  void succeeds(const std::vector<std::string>& arguments) const {
    const VmmResult result = command(arguments);
    CHECK(result.errors == "");
    REQUIRE(result.status == 0);
  }
  void fails(const std::vector<std::string>& arguments, const std::string& why) const {
    const VmmResult result = command(arguments);
    CHECK(result.status == 1);
    CHECK_MESSAGE(result.errors.find(why) != std::string::npos, result.errors);
    CHECK(std::count(result.errors.begin(), result.errors.end(), '\n') == 1);
  }
  static std::vector<std::string> snapshot(const std::string& name, const std::string& vm, bool incremental = true) {
    std::vector<std::string> words{"snapshot", "--name", name, vm};
    if (incremental) words.push_back("--incremental");
    return words;
  }

  // '+' or '?': the step that it is at then. None of its pages is another step's.
  static unsigned ask(VmmProcess& vm, const char* what = "?") {
    vm.type(what);
    std::string line;
    REQUIRE(vm.wait_for_line("step ", line));
    unsigned step = 0, damaged = 1;
    REQUIRE(std::sscanf(line.c_str(), "step %u damaged %u", &step, &damaged) == 2);
    CHECK(damaged == 0);
    return step;
  }
  // A fork of that one is where it was, and goes on.
  void holds(const std::string& name, unsigned step) const {
    CAPTURE(name);
    VmmProcess fork(with_store({"fork", "--template", name}));
    CHECK(ask(fork) == step);
    CHECK(ask(fork, "+") == step + 1);
    ends_well(fork);
  }
};

inline std::vector<std::string> machine(const std::string& backing = "anonymous") {
  return {"--mem", "64M", "--mem-backing", backing, "--name", "source", "--cmdline", "mib=8"};
}
