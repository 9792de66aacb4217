// SPDX-License-Identifier: Apache-2.0
// Snapshots and forks of machines whose memory is written all the time while it is taken: it is of one instant all the
// same, and whatever ends in the middle leaves nothing.
#include <doctest/doctest.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <regex>
#include <string>
#include <thread>

#include "scratch_dir.hpp"
#include "vmm_process.hpp"

namespace {

namespace fs = std::filesystem;
using namespace std::chrono_literals;

// The guest `unrest`, its snapshots and its forks.
struct Stage {
  ScratchDir dir;
  const std::string store = dir.path() + "/store";
  Stage() { ::setenv("CLONE_RUNTIME_DIR", (dir.path() + "/run").c_str(), 1); }
  ~Stage() { ::unsetenv("CLONE_RUNTIME_DIR"); }

  std::vector<std::string> with_store(std::vector<std::string> arguments) const {
    arguments.insert(arguments.end(), {"--store", store});
    return arguments;
  }
  void succeeds(const std::vector<std::string>& arguments) const {
    const VmmResult result = run_command(with_store(arguments));
    CHECK(result.errors == "");
    REQUIRE(result.status == 0);
  }
  static char state_of(pid_t process) {
    std::string id, name;
    char state = '\0';
    std::ifstream("/proc/" + std::to_string(process) + "/stat") >> id >> name >> state;
    return state;
  }
  // Stops the process that writes a snapshot, which is that process then. 0: it had ended before.
  static pid_t stop_writer(const VmmProcess& vm, const VmmProcess& taking) {
    const std::string id = std::to_string(vm.pid());
    pid_t writer = 0;
    wait_until([&] {
      return static_cast<bool>(std::ifstream("/proc/" + id + "/task/" + id + "/children") >> writer) ||
             state_of(taking.pid()) == 'Z';
    });
    if (writer == 0 || ::kill(writer, SIGSTOP) != 0) return 0;
    char state = '\0';
    wait_until([&] {
      state = state_of(writer);
      return state == 'T' || state == 'Z' || state == '\0';
    });
    return state == 'T' ? writer : 0;
  }
  // Until a snapshot under way has begun its files.
  void wait_for_writer() const { wait_until([this] { return !entries().empty(); }); }
  static void wait_until(const std::function<bool()>& condition) {
    const auto limit = std::chrono::steady_clock::now() + 10s;
    while (!condition() && std::chrono::steady_clock::now() < limit) std::this_thread::sleep_for(1ms);
    REQUIRE(condition());
  }
  std::vector<std::string> entries() const {
    std::vector<std::string> names;
    if (fs::exists(store))
      for (const auto& entry : fs::directory_iterator(store)) names.push_back(entry.path().filename());
    std::sort(names.begin(), names.end());
    return names;
  }

  // None of its pages has anything but what was written to it last, and it goes on.
  static unsigned long long ask(VmmProcess& vm) {
    vm.type("?");
    std::string line;
    REQUIRE(vm.wait_for_line("numbers ", line));
    unsigned long long number = 0;
    unsigned damaged = 1;
    REQUIRE(std::sscanf(line.c_str(), "numbers %llu damaged %u", &number, &damaged) == 2);
    CHECK(damaged == 0);
    return number;
  }
  static VmmResult end(VmmProcess& vm) {
    vm.type(".");
    const VmmResult result = vm.finish();
    CHECK(result.output.ends_with("done\n"));
    CHECK(result.output.find("FAILED") == std::string::npos);
    CHECK(result.status == 0);
    return result;
  }
  void is_whole(const std::string& name) const {
    CAPTURE(name);
    succeeds({"template", "verify", name});
    VmmProcess fork(with_store({"fork", "--template", name}));
    ask(fork);
    CHECK(end(fork).errors == "");
  }
};

std::vector<std::string> machine(const std::string& guest, const std::string& memory = "64M",
                                 const std::string& backing = "anonymous") {
  return {"--mem", memory, "--mem-backing", backing, "--vcpus", "2", "--name", "source", "-v", "--cmdline",
          "processors=2 " + guest};
}

// `rest`: how what was newer than the rounds before was taken, at least once.
void ends_having_taken(VmmProcess& source, const char* rest) {
  const std::string errors = Stage::end(source).errors;
  const std::regex taken(std::string("in [1-8] rounds ahead, then [0-9]+") + rest);
  CHECK_MESSAGE(std::regex_search(errors, taken), errors);
}

// Its writer gets no further until all of the guest's memory is another. False: the writer had ended before.
bool is_taken_of_one_instant(unsigned mib, const char* backing) {
  const Stage stage;
  VmmProcess source("unrest", machine("mib=" + std::to_string(mib) + " rest=0", std::to_string(mib + 8) + "M", backing));
  REQUIRE(source.wait_for("ready\n"));
  for (const char* name : {"full", "later"}) {
    std::vector<std::string> words{"snapshot", "--name", name, "source"};
    if (name[0] == 'l') words.push_back("--incremental");
    VmmProcess taking(stage.with_store(words));
    const pid_t writer = stage.stop_writer(source, taking);
    if (writer == 0) return false;
    stage.ask(source);
    REQUIRE(::kill(writer, SIGCONT) == 0);
    CHECK(taking.finish().status == 0);
  }
  stage.ask(source);
  ends_having_taken(source, " pages by a child process");
  for (const char* name : {"full", "later"}) stage.is_whole(name);
  return true;
}

}  // namespace

TEST_CASE("memory that is written while it is copied is taken as of one instant") {
  for (const char* backing : {"anonymous", "memfd"}) {
    CAPTURE(backing);
    const Stage stage;
    VmmProcess source("unrest", machine("mib=3 rest=100", "64M", backing));
    REQUIRE(source.wait_for("ready\n"));
    stage.succeeds({"snapshot", "--name", "full", "source"});
    stage.succeeds({"snapshot", "--name", "later", "--incremental", "source"});
    VmmProcess fork({"fork", "--from", "source"});
    stage.ask(fork);
    CHECK(stage.end(fork).errors == "");
    stage.succeeds({"snapshot", "--name", "last", "--incremental", "source"});
    stage.ask(source);
    ends_having_taken(source, " pages in the pause");
    for (const char* name : {"full", "later", "last"}) stage.is_whole(name);
  }
}

TEST_CASE("memory that is written faster than it is copied is taken as of one instant") {
  for (const char* backing : {"anonymous", "memfd"}) {
    CAPTURE(backing);
    bool is_taken = false;
    for (unsigned mib = 12; !is_taken && mib < 200; mib *= 4) is_taken = is_taken_of_one_instant(mib, backing);
    CHECK(is_taken);
  }
}

TEST_CASE("a fork of anonymous memory needs no snapshot before it, and one after it starts anew") {
  const Stage stage;
  VmmProcess source("unrest", {"--mem", "64M", "--name", "source", "--cmdline", "processors=1 mib=8 rest=0"});
  REQUIRE(source.wait_for("ready\n"));
  {
    VmmProcess one({"fork", "--from", "source", "--name", "one"});
    stage.ask(one);
    VmmProcess two({"fork", "--from", "one", "--name", "two"});
    for (VmmProcess* vm : {&one, &two}) {
      stage.ask(*vm);
      CHECK(stage.end(*vm).errors == "");
    }
  }
  stage.succeeds({"snapshot", "--name", "base", "source"});
  stage.ask(source);
  stage.succeeds({"snapshot", "--name", "next", "--incremental", "source"});
  CHECK(stage.end(source).errors == "");
  for (const char* name : {"base", "next"}) stage.is_whole(name);
}

TEST_CASE("one snapshot at a time, and a machine that ends in the middle of it leaves nothing or a whole one") {
  const Stage stage;
  VmmProcess source("unrest", machine("mib=96 rest=0", "128M"));
  REQUIRE(source.wait_for("ready\n"));
  VmmProcess first(stage.with_store({"snapshot", "--name", "first", "source"}));
  const pid_t writer = stage.stop_writer(source, first);
  REQUIRE(writer > 0);
  for (const std::vector<std::string>& second :
       {stage.with_store({"snapshot", "--name", "second", "source"}), {"fork", "--from", "source"}}) {
    const VmmResult refused = run_command(second);
    CHECK(refused.status == 1);
    CHECK_MESSAGE(refused.errors.find("this VM is busy with a snapshot") != std::string::npos, refused.errors);
  }
  REQUIRE(::kill(writer, SIGCONT) == 0);
  CHECK(first.finish().status == 0);
  stage.succeeds({"template", "rm", "first"});
  VmmProcess last(stage.with_store({"snapshot", "--name", "last", "source"}));
  stage.wait_for_writer();
  stage.end(source);
  const VmmResult ended = last.finish();
  stage.wait_until([&] { return stage.entries().empty() || stage.entries().front() == "last"; });
  if (ended.status == 0 || !stage.entries().empty()) stage.is_whole("last");
}

TEST_CASE("a machine that is killed while it is taken leaves nothing or a whole snapshot") {
  for (const auto delay : {0ms, 50ms, 250ms}) {
    CAPTURE(delay.count());
    const Stage stage;
    VmmProcess source("unrest", machine("mib=64 rest=0", "100M"));
    REQUIRE(source.wait_for("ready\n"));
    VmmProcess taking(stage.with_store({"snapshot", "--name", "base", "source"}));
    stage.wait_for_writer();
    std::this_thread::sleep_for(delay);
    source.signal(SIGKILL);
    CHECK(source.finish().status == 128 + SIGKILL);
    (void)taking.finish();
    stage.wait_until([&] { return stage.entries().empty() || stage.entries().front() == "base"; });
    if (!stage.entries().empty()) stage.is_whole("base");
  }
}
