// SPDX-License-Identifier: Apache-2.0
// Snapshots that are differences to others: what a guest and its devices wrote since then is in them, and nothing is
// lost.
#include <doctest/doctest.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>

#include "changes_stage.hpp"

namespace fs = std::filesystem;

TEST_CASE("each link of a chain of five holds its own memory") {
  for (const std::string backing : {"anonymous", "memfd"}) {
    CAPTURE(backing);
    const Stage stage;
    VmmProcess source("changes", machine(backing));
    REQUIRE(source.wait_for("ready\n"));
    stage.fails(stage.snapshot("early", "source"), "this VM has no snapshot yet: take a full one first");
    CHECK(stage.ask(source, "+") == 1);
    stage.succeeds(stage.snapshot("link1", "source", false));
    for (unsigned step = 2; step <= 6; ++step) {
      CHECK(stage.ask(source, "+") == step);
      const VmmResult kept = stage.command(stage.snapshot("link" + std::to_string(step), "source"));
      CHECK(kept.errors == "");
      CHECK(kept.output.find(" changed since link" + std::to_string(step - 1) + ", 64M of memory") !=
            std::string::npos);
    }
    CHECK(stage.ask(source, "+") == 7);
    for (unsigned step = 1; step <= 6; ++step) stage.holds("link" + std::to_string(step), step);
    VmmProcess fork(stage.with_store({"fork", "--template", "link6", "--name", "fork"}));
    CHECK(stage.ask(fork) == 6);
    stage.succeeds(stage.snapshot("branch1", "fork", false));
    CHECK(stage.ask(fork, "+") == 7);
    stage.succeeds(stage.snapshot("branch2", "fork"));
    stage.holds("branch2", 7);
    ends_well(fork);
    stage.succeeds({"snapshot", "verify", "link6"});
    ends_well(source);
  }
}

TEST_CASE("an incremental snapshot has what changed, much or next to nothing") {
  const Stage stage;
  // A step changes 9 MiB: too much to be copied in the pause.
  VmmProcess source("changes", {"--mem", "128M", "--name", "source", "--cmdline", "mib=64"});
  REQUIRE(source.wait_for("ready\n"));
  const auto stored_bytes = [&](const std::string& name) {
    uint64_t bytes = 0;
    struct stat status {};
    for (const char* file : {"/memory", "/state"}) {
      REQUIRE(::stat((stage.store + "/" + name + file).c_str(), &status) == 0);
      bytes += static_cast<uint64_t>(status.st_blocks) * 512;
    }
    return bytes;
  };
  stage.succeeds(stage.snapshot("base", "source", false));
  stage.succeeds(stage.snapshot("idle", "source"));
  CHECK(stored_bytes("idle") <= 200 << 10);
  CHECK(stage.ask(source, "+") == 1);
  stage.succeeds(stage.snapshot("changed", "source"));
  CHECK(stored_bytes("changed") > 7 << 20);
  CHECK(stored_bytes("changed") < 12 << 20);
  stage.succeeds(stage.snapshot("idle-again", "source"));
  CHECK(stored_bytes("idle-again") <= 200 << 10);
  stage.holds("idle", 0);
  stage.holds("idle-again", 1);
  // The machine itself is forked whole all the same.
  VmmProcess fork({"fork", "--from", "source"});
  CHECK(stage.ask(fork, "+") == 2);
  for (VmmProcess* vm : {&source, &fork}) ends_well(*vm);
}

TEST_CASE("an incremental snapshot needs the one before it, that very one") {
  const Stage stage;
  VmmProcess source("changes", machine());
  REQUIRE(source.wait_for("ready\n"));
  stage.succeeds(stage.snapshot("base", "source", false));
  VmmProcess other(stage.with_store({"fork", "--template", "base", "--name", "other"}));
  CHECK(stage.ask(other) == 0);
  stage.succeeds({"template", "rm", "base"});
  CHECK(stage.ask(source, "+") == 1);
  stage.fails(stage.snapshot("next", "source"), "last snapshot 'base' is not there any more: take a full one");
  stage.succeeds(stage.snapshot("base", "other", false));
  stage.fails(stage.snapshot("next", "source"), "last snapshot 'base' was replaced by another one: take a full one");
  CHECK(!fs::exists(stage.store + "/next"));
  // A full one is a new beginning.
  stage.succeeds(stage.snapshot("next", "source", false));
  CHECK(stage.ask(source, "+") == 2);
  stage.succeeds(stage.snapshot("last", "source"));
  stage.holds("next", 1);
  stage.holds("last", 2);
  for (VmmProcess* vm : {&source, &other}) ends_well(*vm);
}

TEST_CASE("what a snapshot that failed would have held is in the next one") {
  if (::geteuid() != 0) {
    MESSAGE("only root can mount a small disk: not tested");
    return;
  }
  Stage stage;
  const std::string disk = stage.dir.path() + "/disk";
  fs::create_directory(disk);
  REQUIRE(::mount("tmpfs", disk.c_str(), "tmpfs", 0, "size=16M,mode=0700") == 0);
  {
    stage.store = disk + "/store";
    VmmProcess source("changes", machine());
    REQUIRE(source.wait_for("ready\n"));
    stage.succeeds(stage.snapshot("base", "source", false));
    CHECK(stage.ask(source, "+") == 1);
    {
      std::ofstream filler(disk + "/filler", std::ios::binary);
      while (filler.write(std::string(65536, 'x').data(), 65536).flush()) {
      }
    }
    stage.fails(stage.snapshot("full", "source"), "No space left on device");
    stage.fails(stage.snapshot("full", "source", false), "No space left on device");
    CHECK(!fs::exists(stage.store + "/full"));
    fs::remove(disk + "/filler");
    CHECK(stage.ask(source, "+") == 2);
    stage.succeeds(stage.snapshot("next", "source"));
    stage.holds("base", 0);
    stage.holds("next", 2);
    ends_well(source);
  }
  CHECK(::umount2(disk.c_str(), MNT_DETACH) == 0);
}

TEST_CASE("a chain becomes one full snapshot, and goes elsewhere as a file") {
  const Stage stage;
  const std::string file = stage.dir.path() + "/file";
  VmmProcess source("changes", machine());
  REQUIRE(source.wait_for("ready\n"));
  stage.succeeds(stage.snapshot("base", "source", false));
  for (const char* name : {"one", "two"}) {
    (void)stage.ask(source, "+");
    stage.succeeds(stage.snapshot(name, "source"));
  }
  stage.succeeds({"snapshot", "flatten", "two", "flat"});
  stage.succeeds({"template", "export", "two", file});
  stage.fails({"template", "export", "two", file}, "is there already");
  for (const char* name : {"two", "one", "base"}) stage.succeeds({"template", "rm", name});
  stage.holds("flat", 2);
  stage.succeeds({"template", "import", file});
  stage.holds("two", 2);
  stage.succeeds({"template", "import", file, "--name", "again"});
  stage.succeeds({"template", "verify", "again"});
  // The source's last snapshot is there again, and no other than before.
  CHECK(stage.ask(source, "+") == 3);
  stage.succeeds(stage.snapshot("three", "source"));
  stage.holds("three", 3);
  ends_well(source);
}
