// SPDX-License-Identifier: Apache-2.0
// Who a bare guest is told that it is: at its boot, and as a fork.
#include <doctest/doctest.h>

#include <array>
#include <cstdio>
#include <set>

#include "scratch_dir.hpp"
#include "vmm_process.hpp"

namespace {

struct Identity {
  unsigned long long low, high, generation, seed, notified_of;
  unsigned notifications;
  std::string name;
};

Identity ask(VmmProcess& vm) {
  vm.type("?");
  std::string line;
  REQUIRE(vm.wait_for_line("id ", line));
  Identity identity{};
  std::array<char, 64> name{};
  const int fields =
      std::sscanf(line.c_str(), "id %llx %llx generation %llu seed %llx notifications %u of %llx name '%63[^']",
                  &identity.low, &identity.high, &identity.generation, &identity.seed, &identity.notifications,
                  &identity.notified_of, name.data());
  REQUIRE(fields >= 6);
  identity.name = name.data();
  return identity;
}

}  // namespace

TEST_CASE("a fork is told that it is another machine, and who, before it goes on") {
  const ScratchDir dir;
  ::setenv("CLONE_RUNTIME_DIR", (dir.path() + "/run").c_str(), 1);
  const std::string store = dir.path() + "/store";
  const auto keep = [&](const char* vm, const char* name) {
    const VmmResult result = run_command({"snapshot", "--name", name, "--store", store, vm});
    CHECK(result.errors == "");
    REQUIRE(result.status == 0);
  };
  const auto fork_of = [&](const char* name) {
    return std::vector<std::string>{"fork", "--template", name, "--store", store};
  };
  const auto named = [](std::vector<std::string> arguments, const char* name) {
    arguments.insert(arguments.end(), {"--name", name});
    return arguments;
  };

  VmmProcess source("identity", {"--mem", "64M", "--name", "source"});
  REQUIRE(source.wait_for("ready\n"));
  const Identity booted = ask(source);
  CHECK(booted.generation == 1);
  CHECK(booted.notifications == 0);
  CHECK(booted.name == "source");
  keep("source", "base");

  VmmProcess one(named(fork_of("base"), "one"));
  VmmProcess two(named(fork_of("base"), "two"));
  const Identity first = ask(one), second = ask(two);
  keep("one", "again");
  VmmProcess third(fork_of("again"));
  const Identity nameless = ask(third);
  CHECK(first.name == "one");
  CHECK(second.name == "two");
  CHECK(nameless.name == "");
  CHECK(nameless.generation == 3);
  CHECK(nameless.notifications == 2);
  for (const Identity& fork : {first, second}) {
    CHECK(fork.generation == 2);
    CHECK(fork.notifications == 1);
  }
  // The id was there when it was told of.
  for (const Identity& fork : {first, second, nameless}) CHECK(fork.notified_of == fork.low);
  CHECK(std::set{booted.low, first.low, second.low, nameless.low}.size() == 4);
  CHECK(std::set{booted.high, first.high, second.high, nameless.high}.size() == 4);
  CHECK(std::set{booted.seed, first.seed, second.seed, nameless.seed}.size() == 4);

  // Who was copied stays who he is.
  for (const auto& [vm, was] : {std::pair(&source, booted), {&one, first}}) {
    const Identity is = ask(*vm);
    CHECK(is.low == was.low);
    CHECK(is.high == was.high);
    CHECK(is.generation == was.generation);
    CHECK(is.notifications == was.notifications);
  }
  for (VmmProcess* vm : {&source, &one, &two, &third}) ends_well(*vm);
  ::unsetenv("CLONE_RUNTIME_DIR");
}
