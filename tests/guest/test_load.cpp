// SPDX-License-Identifier: Apache-2.0
// Bare guests that work hard while they are kept and forked: all of their processors write to memory and check it, or
// their disk's queue is never empty.
#include <doctest/doctest.h>

#include <cstdio>
#include <thread>

#include "scratch_dir.hpp"
#include "vmm_process.hpp"

using namespace std::chrono_literals;

namespace {

// The guest `writers` and its forks.
struct Stage {
  struct Answer {
    unsigned writers;
    unsigned long long passes, errors, generation;
  };

  ScratchDir dir;
  Stage() { ::setenv("CLONE_RUNTIME_DIR", (dir.path() + "/run").c_str(), 1); }
  ~Stage() { ::unsetenv("CLONE_RUNTIME_DIR"); }

  std::vector<std::string> with_store(std::vector<std::string> arguments) const {
    arguments.insert(arguments.end(), {"--store", dir.path() + "/store"});
    return arguments;
  }
  void succeeds(const std::vector<std::string>& arguments) const {
    const VmmResult result = run_command(with_store(arguments));
    CHECK(result.errors == "");
    REQUIRE(result.status == 0);
  }

  static Answer ask(VmmProcess& vm, const char* how = "?") {
    vm.type(how);
    std::string line;
    REQUIRE(vm.wait_for_line("writers ", line));
    Answer answer{};
    REQUIRE(std::sscanf(line.c_str(), "writers %u passes %llu errors %llu generation 0x%llx", &answer.writers,
                        &answer.passes, &answer.errors, &answer.generation) == 4);
    CHECK(answer.errors == 0);
    return answer;
  }
  // Each of its processors wrote to all of its pages, and found there what it had written before, at least twice since.
  static Answer goes_on(VmmProcess& vm) {
    const Answer before = ask(vm);
    for (;;) {
      std::this_thread::sleep_for(10ms);
      if (const Answer now = ask(vm); now.passes >= before.passes + 3) return now;
    }
  }
  static void ends_well(VmmProcess& vm) {
    (void)ask(vm, ".");
    const VmmResult result = vm.finish();
    CHECK(result.output.find("FAILED") == std::string::npos);
    CHECK(result.errors == "");
    CHECK(result.status == 0);
  }
};

std::vector<std::string> machine(const std::string& backing, const std::string& processors) {
  return {"--mem",    "64M",    "--mem-backing", backing,     "--vcpus",
          processors, "--name", "source",        "--cmdline", "processors=" + processors};
}

// Again and again: its child and its child's child go on beside it.
void fork_while_it_writes(const std::string& backing, const std::string& processors, int rounds) {
  CAPTURE(backing);
  const Stage stage;
  VmmProcess source("writers", machine(backing, processors));
  REQUIRE(source.wait_for("ready\n"));
  const Stage::Answer first = stage.goes_on(source);
  CHECK(std::to_string(first.writers) == processors);
  for (int round = 0; round < rounds; ++round) {
    CAPTURE(round);
    VmmProcess child({"fork", "--from", "source", "--name", "child"});
    const Stage::Answer forked = stage.goes_on(child);
    VmmProcess grandchild({"fork", "--from", "child"});
    const Stage::Answer forked_again = stage.goes_on(grandchild);
    CHECK(forked.writers == first.writers);
    CHECK(forked.generation != first.generation);
    CHECK(forked_again.generation != forked.generation);
    for (VmmProcess* vm : {&source, &child}) (void)stage.goes_on(*vm);
    for (VmmProcess* vm : {&child, &grandchild}) stage.ends_well(*vm);
  }
  CHECK(stage.ask(source).generation == first.generation);
  stage.ends_well(source);
}

}  // namespace

TEST_CASE("two processors that write all the time are forked again and again") {
  for (const std::string backing : {"anonymous", "memfd"}) fork_while_it_writes(backing, "2", 3);
}

TEST_CASE("four processors that write all the time are forked again and again") {
  for (const std::string backing : {"anonymous", "memfd"}) fork_while_it_writes(backing, "4", 2);
}

TEST_CASE("snapshots of a machine that writes all the time, full and of what changed") {
  for (const std::string backing : {"anonymous", "memfd"}) {
    CAPTURE(backing);
    const Stage stage;
    VmmProcess source("writers", machine(backing, "2"));
    REQUIRE(source.wait_for("ready\n"));
    (void)stage.goes_on(source);
    std::vector<std::pair<std::string, Stage::Answer>> kept;
    for (const std::string name : {"full", "second", "third"}) {
      std::vector<std::string> words{"snapshot", "--name", name, "source"};
      if (!kept.empty()) words.push_back("--incremental");
      stage.succeeds(words);
      kept.emplace_back(name, stage.goes_on(source));
    }
    unsigned long long passes = 0;
    for (const auto& [name, later] : kept) {
      CAPTURE(name);
      VmmProcess fork(stage.with_store({"fork", "--template", name}));
      const Stage::Answer forked = stage.ask(fork);
      CHECK(forked.passes >= passes);  // it stood where its snapshot was taken
      passes = forked.passes;
      (void)stage.goes_on(fork);
      stage.ends_well(fork);
    }
    stage.ends_well(source);
  }
}

TEST_CASE("what waits in a disk's queue when its machine is kept is done in each fork") {
  const Stage stage;
  ::setenv("HOME", stage.dir.path().c_str(), 1);  // of temporary layers
  const std::string disk = stage.dir.write("disk", std::string(1 << 20, '\0'));
  const auto writes = [](VmmProcess& vm, const char* how) {
    vm.type(how);
    std::string line;
    REQUIRE(vm.wait_for_line("writes ", line));
    unsigned long long count = 0;
    unsigned damaged = 0;
    REQUIRE(std::sscanf(line.c_str(), "writes %llu damaged %u", &count, &damaged) >= 1);
    CHECK(damaged == 0);
    return count;
  };
  unsigned long long before = 0;
  {
    VmmProcess source("inflight", {"--mem", "64M", "--name", "source", "--block", disk + ",iops=100,iops-burst=1"});
    REQUIRE(source.wait_for("ready\n"));
    while (before < 10) {
      std::this_thread::sleep_for(20ms);
      before = writes(source, "?");
    }
    stage.succeeds({"snapshot", "--name", "base", "--stop", "source"});
    CHECK(source.finish().status == 6);
  }
  const std::vector<std::string> fork = stage.with_store({"fork", "--template", "base"});
  VmmProcess one(fork), two(fork);
  for (VmmProcess* vm : {&one, &two}) {
    const unsigned long long now = writes(*vm, "?");
    CHECK(now >= before);
    while (writes(*vm, "?") < now + 10) std::this_thread::sleep_for(20ms);
    CHECK(writes(*vm, ".") >= now + 10);
    const VmmResult result = vm->finish();
    CHECK(result.output.find("FAILED") == std::string::npos);
    CHECK(result.errors == "");
    CHECK(result.status == 0);
  }
}
