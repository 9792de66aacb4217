// SPDX-License-Identifier: Apache-2.0
// Forks from a pool: begun before anybody asked, and the asker's own in every other way.
#include <doctest/doctest.h>
#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <set>
#include <thread>

#include "scratch_dir.hpp"
#include "util/fd.hpp"
#include "vmm_process.hpp"

namespace {

using namespace std::chrono_literals;

bool comes_true(const std::function<bool()>& condition) {
  const auto end = std::chrono::steady_clock::now() + 20s;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(10ms);
  }
  return true;
}

// Process and parent from /proc/PID/stat, of all that run and are no zombies.
std::set<int> children_of(int parent) {
  std::set<int> children;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    std::ifstream file(entry.path() / "stat");
    std::string text;
    std::getline(file, text);
    int process = 0, of = 0;
    char state = 'Z';
    const size_t name_end = text.rfind(')');
    if (name_end == std::string::npos || std::sscanf(text.c_str(), "%d", &process) != 1 ||
        std::sscanf(text.c_str() + name_end + 1, " %c %d", &state, &of) != 2)
      continue;
    if (of == parent && state != 'Z') children.insert(process);
  }
  return children;
}

bool runs(int process) {
  std::ifstream file("/proc/" + std::to_string(process) + "/stat");
  std::string text;
  std::getline(file, text);
  const size_t name_end = text.rfind(')');
  return name_end != std::string::npos && text.substr(name_end + 2, 1) != "Z";
}

// A template of a program, in a store and a runtime folder of its own.
class Pool {
 public:
  explicit Pool(const std::string& program = "identity", std::vector<std::string> options = {}) {
    ::setenv("CLONE_RUNTIME_DIR", (dir_.path() + "/run").c_str(), 1);
    options.insert(options.end(), {"--mem", "64M", "--name", "source"});
    VmmProcess source(program, options);
    REQUIRE(source.wait_for("ready\n"));
    make_template_of(source, "source");
  }
  ~Pool() {
    prepare(0);
    ::unsetenv("CLONE_RUNTIME_DIR");
  }

  void make_template_of(VmmProcess& vm, const std::string& name) const {
    const VmmResult kept = run_command({"snapshot", "--name", "base", "--store", store(), "--stop", name});
    CHECK(kept.errors == "");
    REQUIRE(kept.status == 0);
    CHECK(vm.finish().status == 6);
  }
  void remove_template() const { REQUIRE(run_command({"template", "rm", "base", "--store", store()}).status == 0); }

  std::vector<std::string> fork(std::vector<std::string> more = {}) const {
    more.insert(more.begin(), {"fork", "--template", "base", "--store", store()});
    return more;
  }
  VmmResult prepare(int count) const { return run_command(fork({"--prepare", std::to_string(count)})); }
  // The keeper's process.
  int start(int count) const {
    const VmmResult result = prepare(count);
    CHECK(result.errors == "");
    REQUIRE(result.status == 0);
    const size_t word = result.output.rfind(' ');
    REQUIRE(word != std::string::npos);
    return std::stoi(result.output.substr(word));
  }
  std::string store() const { return dir_.path() + "/store"; }
  const std::string& folder() const { return dir_.path(); }
  bool has_socket() const {
    for (const auto& entry : std::filesystem::directory_iterator(dir_.path() + "/run"))
      if (entry.path().extension() == ".sock") return true;
    return false;
  }

 private:
  ScratchDir dir_;
};

std::string identity_of(VmmProcess& vm) {
  vm.type("?");
  std::string line;
  REQUIRE(vm.wait_for_line("id ", line));
  return line;
}

bool is_machine(int process) {
  return run_command({"list", "--json"}).output.find("\"pid\":" + std::to_string(process) + ",") != std::string::npos;
}

}  // namespace

TEST_CASE("pool: forks with several processors") {
  const Pool pool("identity", {"--vcpus", "4"});
  const std::set<int> ready = children_of(pool.start(2));
  VmmProcess one(pool.fork()), two(pool.fork());
  for (VmmProcess* vm : {&one, &two}) CHECK(identity_of(*vm).find("generation 2") != std::string::npos);
  for (const int process : ready) CHECK(is_machine(process));
  for (VmmProcess* vm : {&one, &two}) ends_well(*vm);
}

TEST_CASE("pool: what was open where it was started is not kept open") {
  const Pool pool;
  int ends[2];
  REQUIRE(::pipe(ends) == 0);
  const vmm::Fd read_end(ends[0]);
  vmm::Fd write_end(ends[1]);
  (void)pool.start(1);
  write_end.reset();
  pollfd entry{read_end.get(), POLLIN, 0};
  CHECK(::poll(&entry, 1, 5000) == 1);
  CHECK(entry.revents == POLLHUP);
  VmmProcess fork(pool.fork());
  CHECK(identity_of(fork).find("generation 2") != std::string::npos);
  ends_well(fork);
}

TEST_CASE("pool: a fork is one of those kept ready, and another takes its place") {
  const Pool pool;
  const int keeper = pool.start(2);
  const std::set<int> before = children_of(keeper);
  CHECK(before.size() == 2);

  VmmProcess one(pool.fork({"--name", "one"})), two(pool.fork({"--name", "two"}));
  const std::string first = identity_of(one), second = identity_of(two);
  CHECK(first.find("generation 2") != std::string::npos);
  CHECK(first.find("name 'one'") != std::string::npos);
  CHECK(second.find("name 'two'") != std::string::npos);
  CHECK(first.substr(0, first.find("generation")) != second.substr(0, second.find("generation")));
  // Those that were ready are the machines now; two more stand ready.
  const auto refilled = [&] { return children_of(keeper).size() == 4; };
  CHECK(comes_true(refilled));
  for (const int process : before) CHECK(is_machine(process));

  // The pool's end is not theirs.
  CHECK(pool.prepare(0).output == "none of 'base' kept ready any more\n");
  CHECK_FALSE(pool.has_socket());
  const auto only_machines = [&] { return !runs(keeper); };
  CHECK(comes_true(only_machines));
  CHECK(identity_of(one) == first);
  VmmProcess alone(pool.fork({"--name", "alone"}));
  CHECK(identity_of(alone).find("name 'alone'") != std::string::npos);
  for (VmmProcess* vm : {&one, &two, &alone}) ends_well(*vm);
  for (const int process : before) {
    const auto gone = [&] { return !runs(process); };
    CHECK(comes_true(gone));
  }
  CHECK(pool.prepare(0).output == "none of 'base' was kept ready\n");
}

TEST_CASE("pool: more forks than are ready wait for the next, or begin by themselves") {
  const Pool pool;
  pool.start(1);
  std::vector<std::unique_ptr<VmmProcess>> forks;
  for (int i = 0; i < 6; ++i) forks.push_back(std::make_unique<VmmProcess>(pool.fork()));
  std::set<std::string> ids;
  for (auto& fork : forks) ids.insert(identity_of(*fork));
  CHECK(ids.size() == forks.size());
  for (auto& fork : forks) ends_well(*fork);
}

TEST_CASE("pool: signals, the asker's death and mistakes reach whom they concern") {
  const Pool pool;
  const int keeper = pool.start(1);
  const auto ready = [&] { return children_of(keeper).size() == 1; };

  const VmmResult wrong = run_command(pool.fork({"--no-such-flag"}));
  CHECK(wrong.status == 2);
  CHECK(wrong.errors.find("--no-such-flag") != std::string::npos);
  const VmmResult help = run_command(pool.fork({"--help"}));
  CHECK(help.status == 0);
  CHECK(help.output.find("--prepare") != std::string::npos);
  CHECK(comes_true(ready));

  // The program has no power button: the second signal ends it.
  VmmProcess stopped(pool.fork({"--grace", "60"}));
  identity_of(stopped);
  stopped.signal(SIGTERM);
  stopped.signal(SIGINT);
  CHECK(stopped.finish().status == 6);
  CHECK(comes_true(ready));

  const std::set<int> next = children_of(keeper);
  {
    VmmProcess killed(pool.fork());
    identity_of(killed);
    killed.signal(SIGKILL);
    CHECK(killed.finish().status == 128 + SIGKILL);
  }
  for (const int process : next) {
    const auto gone = [&] { return !runs(process); };
    CHECK(comes_true(gone));
  }
  CHECK(comes_true(ready));

  // Without its keeper a pool is gone, and forks begin by themselves.
  const std::set<int> last = children_of(keeper);
  ::kill(keeper, SIGKILL);
  for (const int process : last) {
    const auto gone = [&] { return !runs(process); };
    CHECK(comes_true(gone));
  }
  VmmProcess alone(pool.fork());
  identity_of(alone);
  ends_well(alone);
  CHECK(pool.prepare(0).output == "none of 'base' was kept ready\n");
}

TEST_CASE("pool: --prepare again replaces it") {
  const Pool pool;
  const int first = pool.start(1);
  const std::set<int> before = children_of(first);
  const int second = pool.start(2);
  CHECK(second != first);
  const auto ended = [&] { return !runs(first) && std::none_of(before.begin(), before.end(), runs); };
  CHECK(comes_true(ended));
  const std::set<int> ready = children_of(second);
  CHECK(ready.size() == 2);
  VmmProcess one(pool.fork());
  identity_of(one);
  CHECK(std::any_of(ready.begin(), ready.end(), is_machine));
  ends_well(one);
}

TEST_CASE("pool: a fork has the working directory and the devices of who asks") {
  const Pool pool("slots", {"--transport", "mmio,slots=3", "--without", "virtio-balloon", "--without", "virtio-vsock",
                            "--without", "guest-agent"});
  const std::set<int> ready = children_of(pool.start(1));
  REQUIRE(ready.size() == 1);
  const std::string content(20, 'x');
  std::ofstream(pool.folder() + "/disk") << content;
  std::filesystem::resize_file(pool.folder() + "/disk", 64 << 10);
  const auto here = std::filesystem::current_path();
  std::filesystem::current_path(pool.folder());
  VmmProcess one(pool.fork({"--block", "disk"}));
  std::filesystem::current_path(here);
  one.type("?");
  std::string line;
  REQUIRE(one.wait_for_line("slots ", line));
  CHECK(line == "slots 0x3 events 1 disk 1 " + content + ".");
  CHECK(is_machine(*ready.begin()));
  ends_well(one);
}

TEST_CASE("pool: a new template of that name is what is forked, and ends the pool") {
  const Pool pool;
  const int keeper = pool.start(2);
  // One whose forks are known by their generation.
  VmmProcess fork(pool.fork({"--name", "fork"}));
  CHECK(identity_of(fork).find("generation 2 ") != std::string::npos);
  pool.remove_template();
  pool.make_template_of(fork, "fork");
  VmmProcess one(pool.fork());
  CHECK(identity_of(one).find("generation 3 ") != std::string::npos);
  ends_well(one);
  const auto ended = [&] { return !runs(keeper) && !pool.has_socket(); };
  CHECK(comes_true(ended));
}

TEST_CASE("pool: without its template it ends") {
  const Pool pool;
  const int keeper = pool.start(2);
  pool.remove_template();
  const VmmResult gone = run_command(pool.fork());
  CHECK(gone.status == 1);
  CHECK(gone.errors.find("base") != std::string::npos);
  const auto ended = [&] { return !runs(keeper) && !pool.has_socket(); };
  CHECK(comes_true(ended));
}
