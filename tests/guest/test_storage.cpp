// SPDX-License-Identifier: Apache-2.0
// How templates are kept: over the template that a fork came from, compressed, on a full disk, and when the machine goes
// in the middle.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <future>
#include <thread>

#include "changes_stage.hpp"
#include "killed.hpp"
#include "util/fd.hpp"

namespace fs = std::filesystem;
using namespace std::chrono_literals;

namespace {

uint64_t stored_bytes(const Stage& stage, const std::string& name) {
  uint64_t bytes = 0;
  struct stat status {};
  for (const auto& file : fs::directory_iterator(stage.store + "/" + name))
    if (::stat(file.path().c_str(), &status) == 0) bytes += static_cast<uint64_t>(status.st_blocks) * 512;
  return bytes;
}

// Hidden ones, too.
std::vector<std::string> entries(const std::string& folder) {
  std::vector<std::string> names;
  std::error_code missing;
  for (const auto& entry : fs::directory_iterator(folder, missing)) names.push_back(entry.path().filename());
  std::ranges::sort(names);
  return names;
}
using Names = std::vector<std::string>;

// Of a template, without what its forks may have left there.
Names parts(const std::string& folder) {
  Names names = entries(folder);
  std::erase_if(names, [](const std::string& name) { return name.starts_with("note-"); });
  return names;
}

std::vector<std::string> fork_of(const Stage& stage, const std::string& name, const std::string& as) {
  return stage.with_store({"fork", "--template", name, "--name", as});
}

// The machine at its first step, and at the next as what differs.
void keep_base_and_one(const Stage& stage, VmmProcess& source) {
  REQUIRE(source.wait_for("ready\n"));
  stage.succeeds(stage.snapshot("base", "source", false));
  CHECK(stage.ask(source, "+") == 1);
  stage.succeeds(stage.snapshot("one", "source"));
}

// A small file system of its own.
struct FullDisk {
  std::string path;
  explicit FullDisk(const std::string& folder, const char* options) : path(folder + "/disk") {
    fs::create_directory(path);
    REQUIRE(::mount("tmpfs", path.c_str(), "tmpfs", 0, options) == 0);
  }
  FullDisk(const FullDisk&) = delete;
  FullDisk& operator=(const FullDisk&) = delete;
  ~FullDisk() { ::umount2(path.c_str(), MNT_DETACH); }
  void fill() const {
    std::ofstream filler(path + "/filler", std::ios::binary);
    while (filler.write(std::string(4096, 'x').data(), 4096).flush()) {
    }
  }
  void empty() const { fs::remove(path + "/filler"); }
};

}  // namespace

TEST_CASE("a fork's first snapshot is a difference to its template, over generations") {
  const Stage stage;
  VmmProcess source("changes", machine());
  REQUIRE(source.wait_for("ready\n"));
  CHECK(stage.ask(source, "+") == 1);
  stage.succeeds(stage.snapshot("g0", "source", false));
  ends_well(source);
  unsigned step = 1;
  for (unsigned generation = 1; generation <= 3; ++generation) {
    CAPTURE(generation);
    const auto name = [](unsigned number, const char* more = "") { return "g" + std::to_string(number) + more; };
    VmmProcess fork(fork_of(stage, name(generation - 1), "fork"));
    CHECK(stage.ask(fork) == step);
    // Next to nothing at first, what a step has written then: a seventh of 8 MiB, and the guest's own pages.
    const VmmResult idle = stage.command(stage.snapshot(name(generation, "-idle"), "fork"));
    CHECK(idle.errors == "");
    CHECK(idle.output.find(" changed since " + name(generation - 1) + ", 64M of memory") != std::string::npos);
    CHECK(stored_bytes(stage, name(generation, "-idle")) <= 400 << 10);
    CHECK(stage.ask(fork, "+") == ++step);
    stage.succeeds(stage.snapshot(name(generation), "fork"));
    CHECK(stored_bytes(stage, name(generation)) < 2 << 20);
    stage.holds(name(generation, "-idle"), step - 1);
    stage.holds(name(generation), step);
    ends_well(fork);
  }
  // A fork needs all of the chain, and nobody else's.
  const std::string first = stage.store + "/g0", away = stage.dir.path() + "/away";
  fs::rename(first, away);
  stage.fails({"fork", "--template", "g3"}, "its parent 'g0' is missing in " + stage.store);
  stage.fails({"snapshot", "verify", "g3"}, "its parent 'g0' is missing in " + stage.store);
  fs::rename(away, first);
  if (::geteuid() == 0) {
    REQUIRE(::chown(first.c_str(), 1234, 1234) == 0);
    stage.fails({"fork", "--template", "g3"}, first + ": refused: belongs to user 1234; allowed is root");
    REQUIRE(::chown(first.c_str(), 0, 0) == 0);
  }
  stage.succeeds({"template", "verify", "g3"});
  stage.succeeds({"template", "flatten", "g3", "flat"});
  stage.holds("flat", step);
  VmmProcess last(fork_of(stage, "flat", "last"));
  CHECK(stage.ask(last, "+") == step + 1);
  stage.succeeds(stage.snapshot("over-flat", "last"));
  CHECK(stage.command({"template", "list"}).output.find("\nover-flat                flat ") != std::string::npos);
  stage.holds("over-flat", step + 1);
  ends_well(last);
}

TEST_CASE("a fork's first snapshot needs its template, that very one, and a machine that runs is none") {
  const Stage stage;
  const std::string elsewhere = stage.dir.path() + "/elsewhere";
  VmmProcess source("changes", machine());
  REQUIRE(source.wait_for("ready\n"));
  stage.succeeds(stage.snapshot("base", "source", false));
  VmmProcess fork(fork_of(stage, "base", "fork"));
  CHECK(stage.ask(fork, "+") == 1);
  const auto in_other_store = [&](std::vector<std::string> words) {
    words.insert(words.end(), {"--store", elsewhere});
    return run_command(words);
  };
  const VmmResult other = in_other_store(stage.snapshot("next", "fork"));
  CHECK(other.status == 1);
  CHECK(other.errors.find("this VM's template 'base' is not in this store: take a full one") != std::string::npos);
  // A name alone is not enough.
  REQUIRE(in_other_store(stage.snapshot("base", "source", false)).status == 0);
  const VmmResult replaced = in_other_store(stage.snapshot("next", "fork"));
  CHECK(replaced.errors.find("this VM's template 'base' was replaced by another one") != std::string::npos);
  CHECK(entries(elsewhere) == Names{"base"});
  // After all that, what is written from the template on is in it.
  CHECK(stage.ask(fork, "+") == 2);
  stage.succeeds(stage.snapshot("next", "fork"));
  stage.holds("next", 2);
  CHECK(stage.ask(fork, "+") == 3);
  stage.succeeds(stage.snapshot("after", "fork"));
  stage.holds("after", 3);
  // With --stop no page is tracked.
  VmmProcess ended(fork_of(stage, "after", "ended"));
  CHECK(stage.ask(ended, "+") == 4);
  std::vector<std::string> stop = stage.snapshot("stopped", "ended");
  stop.push_back("--stop");
  stage.succeeds(stop);
  CHECK(ended.finish().status == 6);
  stage.holds("stopped", 4);
  VmmProcess live({"fork", "--from", "fork", "--name", "live"});
  CHECK(stage.ask(live) == 3);
  stage.fails(stage.snapshot("none", "live"), "this VM has no snapshot yet: take a full one first");
  // What keeps full ones only says so.
  std::vector<std::string> in_memory = stage.snapshot("kept", "fork", false);
  in_memory.insert(in_memory.end(), {"--backend", "memory"});
  REQUIRE(run_command(in_memory).status == 0);
  VmmProcess kept({"fork", "--template", "kept", "--name", "of-kept", "--backend", "memory"});
  CHECK(stage.ask(kept) == 3);
  std::vector<std::string> over_kept = stage.snapshot("more", "of-kept");
  over_kept.insert(over_kept.end(), {"--backend", "memory"});
  CHECK(run_command(over_kept).errors.find("the backend memory keeps full snapshots") != std::string::npos);
  CHECK(run_command({"template", "rm", "kept", "--backend", "memory"}).status == 0);
  for (VmmProcess* vm : {&source, &fork, &live, &kept}) ends_well(*vm);
}

TEST_CASE("a template that lies compressed is forked, and is a parent, as it was") {
  const Stage stage;
  VmmProcess source("changes", machine());
  keep_base_and_one(stage, source);
  VmmProcess fork(fork_of(stage, "one", "fork"));
  const uint64_t before = stored_bytes(stage, "base");
  for (const char* name : {"base", "one"}) {
    const VmmResult compressed = stage.command({"template", "compress", name});
    CHECK(compressed.errors == "");
    CHECK(compressed.output.find(", before ") != std::string::npos);
    CHECK(parts(stage.store + "/" + name) == Names{"memory.zst", "state"});
    stage.succeeds({"template", "compress", name});
    for (const char* look : {"verify", "inspect"}) stage.succeeds({"template", look, name});
  }
  CHECK(stored_bytes(stage, "base") < before / 8);
  CHECK(stage.ask(fork) == 1);
  stage.holds("base", 0);
  // Over it: the source's next one, and the first one of a fork.
  CHECK(stage.ask(source, "+") == 2);
  stage.succeeds(stage.snapshot("two", "source"));
  CHECK(stage.ask(fork, "+") == 2);
  stage.succeeds(stage.snapshot("of-fork", "fork"));
  for (VmmProcess* vm : {&source, &fork}) ends_well(*vm);
  for (const char* name : {"two", "of-fork"}) stage.holds(name, 2);
  stage.succeeds({"template", "flatten", "two", "flat"});
  const std::string file = stage.dir.path() + "/file";
  stage.succeeds({"template", "export", "one", file});
  stage.succeeds({"template", "import", file, "--name", "imported"});
  for (const char* name : {"base", "one", "flat"}) stage.succeeds({"template", "decompress", name});
  CHECK(parts(stage.store + "/base") == Names{"memory", "state"});
  CHECK(stored_bytes(stage, "base") <= before);
  for (const char* name : {"two", "of-fork", "imported"}) stage.succeeds({"template", "verify", name});
  stage.holds("flat", 2);
  stage.holds("imported", 1);
  stage.succeeds({"template", "compress", "flat"});
  stage.succeeds({"template", "rm", "flat"});
  const VmmResult kept = run_command({"template", "compress", "base", "--backend", "memory"});
  CHECK(kept.errors.find("the snapshot backend memory does not compress templates") != std::string::npos);
  stage.fails({"template", "compress", "nobody"}, "there is no snapshot 'nobody'");
}

TEST_CASE("a disk that is full in the middle of it leaves nothing, and the machine runs on") {
  if (::geteuid() != 0) {
    MESSAGE("only root can mount a small disk: not tested");
    return;
  }
  Stage stage;
  const FullDisk disk(stage.dir.path(), "size=24M,mode=0700");
  stage.store = disk.path + "/store";
  VmmProcess source("changes", {"--mem", "64M", "--name", "source", "--cmdline", "mib=32"});
  REQUIRE(source.wait_for("ready\n"));
  const auto no_room = [&](const std::vector<std::string>& words) {
    CAPTURE(words[1]);
    const Names before = entries(stage.store);
    stage.fails(words, "No space left on device");
    CHECK(entries(stage.store) == before);
  };
  // 32 MiB do not fit at all; 8 do.
  no_room(stage.snapshot("large", "source", false));
  CHECK(stage.ask(source, "+") == 1);
  stage.fails(stage.snapshot("next", "source"), "this VM has no snapshot yet");
  ends_well(source);
  VmmProcess small("changes", {"--mem", "64M", "--name", "small", "--cmdline", "mib=8"});
  REQUIRE(small.wait_for("ready\n"));
  stage.succeeds(stage.snapshot("base", "small", false));
  CHECK(stage.ask(small, "+") == 1);
  stage.succeeds(stage.snapshot("one", "small"));
  const std::string file = stage.dir.path() + "/file";
  stage.succeeds({"template", "export", "one", file});
  stage.succeeds({"template", "compress", "one"});
  disk.fill();
  CHECK(stage.ask(small, "+") == 2);
  no_room(stage.snapshot("two", "small"));
  no_room({"template", "import", file, "--name", "imported"});
  no_room({"template", "flatten", "one", "flat"});
  no_room({"template", "compress", "base"});
  no_room({"template", "decompress", "one"});
  no_room({"template", "export", "one", disk.path + "/exported"});
  CHECK(entries(disk.path) == Names{"filler", "store"});
  CHECK(entries(stage.store) == Names{"base", "one"});
  CHECK(parts(stage.store + "/base") == Names{"memory", "state"});
  CHECK(stage.ask(small, "+") == 3);
  disk.empty();  // reading a hole takes room of a tmpfs
  stage.holds("one", 1);
  stage.succeeds(stage.snapshot("two", "small"));
  stage.succeeds({"template", "import", file, "--name", "imported"});
  stage.holds("two", 3);
  stage.holds("imported", 1);
  ends_well(small);
}

TEST_CASE("a command that is killed at any step leaves each template as it was or as it should be") {
  const Stage stage;
  VmmProcess source("changes", machine());
  keep_base_and_one(stage, source);
  ends_well(source);
  const std::string file = stage.dir.path() + "/exported";
  stage.succeeds({"template", "export", "one", file});
  struct Command {
    std::vector<std::string> words, undo;
    unsigned step;  // of the guest in the last of its words
  };
  for (const Command& command : {Command{{"template", "flatten", "one", "new"}, {"template", "rm", "new"}, 1},
                                 Command{{"template", "import", file, "--name", "new"}, {"template", "rm", "new"}, 1},
                                 Command{{"template", "compress", "base"}, {"template", "decompress", "base"}, 0},
                                 Command{{"template", "decompress", "base"}, {"template", "compress", "base"}, 0}}) {
    const std::string& name = command.words.back();
    CAPTURE(command.words[1]);
    if (command.words[1] == "decompress") stage.succeeds(command.undo);
    const size_t steps = steps_of(stage.with_store(command.words));
    stage.holds(name, command.step);
    stage.succeeds(command.undo);
    for (size_t killed = 1; killed < steps; killed += steps / 25) {
      CAPTURE(killed);
      (void)killed_after(killed, stage.with_store(command.words));
      for (const std::string& there : entries(stage.store))
        if (!there.starts_with(".")) stage.succeeds({"template", "verify", there});
      (void)stage.command(command.undo);  // where it was done
    }
    // What the killed left is cleared by the next.
    stage.succeeds(command.words);
    CHECK(entries(stage.store) == (name == "new" ? Names{"base", "new", "one"} : Names{"base", "one"}));
    CHECK(parts(stage.store + "/" + name).size() == 2);
    if (name == "new") stage.succeeds(command.undo);
  }
  stage.holds("one", 1);
}

TEST_CASE("an export that is killed at any step leaves a whole file or none") {
  const Stage stage;
  VmmProcess source("changes", machine());
  keep_base_and_one(stage, source);
  ends_well(source);
  const std::string folder = stage.dir.path() + "/files", file = folder + "/one";
  fs::create_directory(folder);
  const auto words = stage.with_store({"template", "export", "one", file});
  const size_t steps = steps_of(words);
  for (size_t killed = 1; killed < steps; killed += steps / 25) {
    CAPTURE(killed);
    fs::remove(file);
    (void)killed_after(killed, words);
    const Names left = entries(folder);
    CHECK((left.empty() || left == Names{"one"}));
    if (left.empty()) continue;
    stage.succeeds({"template", "import", file, "--name", "new"});
    stage.succeeds({"template", "rm", "new"});
  }
}

TEST_CASE("a machine that goes in the middle of its snapshot leaves no process, and nothing that is not cleared") {
  const Stage stage;
  unsigned halfway = 0;
  for (const bool killed : {true, false}) {
    for (unsigned round = 0; round < 3; ++round) {
      CAPTURE(killed);
      CAPTURE(round);
      VmmProcess source("changes", {"--mem", "128M", "--name", "source", "--cmdline", "mib=96"});
      REQUIRE(source.wait_for("ready\n"));
      auto told = std::async(std::launch::async, [&] { return stage.command(stage.snapshot("x", "source", false)); });
      const auto limit = std::chrono::steady_clock::now() + 10s;
      const auto hidden = [&] {
        const Names names = entries(stage.store);
        return !names.empty() && names.front().starts_with(".x.") ? names.front() : "";
      };
      while (hidden().empty() && told.wait_for(0s) != std::future_status::ready &&
             std::chrono::steady_clock::now() < limit)
        std::this_thread::sleep_for(1ms);
      const std::string process = std::to_string(source.pid());
      pid_t child = 0;
      std::ifstream("/proc/" + process + "/task/" + process + "/children") >> child;
      const bool seen = !hidden().empty();
      if (seen) REQUIRE(child > 0);
      if (killed)
        source.signal(SIGKILL);
      else
        source.type(".");
      const VmmResult end = source.finish();
      CHECK(end.status == (killed ? 128 + SIGKILL : 0));
      const bool succeeded = told.get().status == 0;
      const bool whole = fs::exists(stage.store + "/x");  // which nobody may have lived to tell
      CHECK((whole || !succeeded));
      halfway += !whole;
      // None that could still write; whoever adopts it may not have waited for it yet.
      const auto lives = [&] {
        std::string id, name, state;
        std::ifstream("/proc/" + std::to_string(child) + "/stat") >> id >> name >> state;
        return child && !state.empty() && state != "Z";
      };
      const auto longest = std::chrono::steady_clock::now() + 10s;
      while (lives() && std::chrono::steady_clock::now() < longest) std::this_thread::sleep_for(1ms);
      CHECK(!lives());
      VmmProcess other("changes", {"--mem", "64M", "--name", "other", "--cmdline", "mib=1"});
      REQUIRE(other.wait_for("ready\n"));
      stage.succeeds(stage.snapshot("next", "other", false));
      CHECK(entries(stage.store) == (whole ? Names{"next", "x"} : Names{"next"}));
      ends_well(other);
      fs::remove_all(stage.store);
    }
  }
  MESSAGE(halfway << " of 6 in the middle");
  CHECK(halfway > 0);
}

TEST_CASE("memory that another process can write to is not handed to a fork") {
  const Stage stage;
  VmmProcess source("changes", machine("memfd"));
  REQUIRE(source.wait_for("ready\n"));
  vmm::Fd memory;
  for (const auto& entry : fs::directory_iterator("/proc/" + std::to_string(source.pid()) + "/fd")) {
    std::error_code gone;
    if (fs::read_symlink(entry, gone).string().starts_with("/memfd:clone-guest"))
      memory = vmm::Fd(::open(entry.path().c_str(), O_RDWR | O_CLOEXEC));
  }
  REQUIRE(static_cast<bool>(memory));
  constexpr size_t mapped_bytes = 1 << 20;
  void* const mapped = ::mmap(nullptr, mapped_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory.get(), 0);
  REQUIRE(mapped != MAP_FAILED);
  stage.fails({"fork", "--from", "source"}, "another process can write to this VM's memory");
  ::munmap(mapped, mapped_bytes);
  // It goes on, with memory of its own.
  CHECK(stage.ask(source, "+") == 1);
  VmmProcess fork({"fork", "--from", "source", "--name", "fork"});
  CHECK(stage.ask(fork, "+") == 2);
  for (VmmProcess* vm : {&source, &fork}) ends_well(*vm);
}
