// SPDX-License-Identifier: Apache-2.0
// Settings from the command line and from plugins' short forms become a plan, or an error that says what is allowed.
#include <doctest/doctest.h>

#include <algorithm>

#include "manifest_file.hpp"
#include "plan/settings.hpp"
#include "scratch_dir.hpp"
#include "snapshot/plan_sections.hpp"

using namespace vmm;

namespace {

// Of a plugin that is nothing but the manifest of manifest_file.hpp.
std::vector<Setting> tester_settings(const ScratchDir& folder) {
  const clone_manifest manifest = vmm::test::good_manifest();
  folder.write("tester.so", std::span<const std::byte>(vmm::test::elf_with(&manifest, sizeof manifest)));
  const auto catalogue = Catalogue::scan({folder.path()}, PluginTrust::any);
  REQUIRE(catalogue.ok());
  return all_settings(*catalogue);
}

const Setting& find(const std::vector<Setting>& settings, const std::string& name) {
  const auto found =
      std::find_if(settings.begin(), settings.end(), [&](const Setting& setting) { return setting.name == name; });
  REQUIRE(found != settings.end());
  return *found;
}

Catalogue built_plugins() {
  auto catalogue = Catalogue::scan({CLONE_TEST_PLUGIN_DIR}, PluginTrust::any);
  REQUIRE(catalogue.ok());
  return std::move(catalogue).value();
}

struct Given {
  std::string name, value;
};
Result<Plan> plan_of(const std::vector<Setting>& settings, const std::vector<Given>& profile,
                     const std::vector<Given>& command_line) {
  auto given = [&](const std::vector<Given>& list, const std::string& folder) {
    std::vector<GivenSetting> result;
    for (const Given& one : list)
      result.push_back({&find(settings, one.name),
                        one.value,
                        {folder, folder.empty() ? "" : "vm.yaml:1:1"},
                        (folder.empty() ? "--" : "") + one.name});
    return result;
  };
  return make_plan(given(profile, "/profiles"), given(command_line, ""));
}

}  // namespace

TEST_CASE("settings: every row has what --help needs, and a name of its own") {
  const Catalogue catalogue = built_plugins();
  const auto settings = all_settings(catalogue);
  std::vector<std::string> names;
  for (const Setting& setting : settings) {
    CAPTURE(setting.name);
    CHECK(!setting.help.empty());
    CHECK(!setting.group.empty());
    CHECK(setting.value_name.empty() == (setting.kind == SettingKind::toggle));
    CHECK(std::count(names.begin(), names.end(), setting.name) == 0);
    names.push_back(setting.name);
  }
  CHECK(std::count(names.begin(), names.end(), "rootfs") == 1);
}

TEST_CASE("settings: a fork takes what adds a device, or sets one that is there") {
  const auto settings = all_settings(built_plugins());
  for (const char* name : {"device", "block", "overlay", "name", "cid", "vsock", "balloon"})
    CHECK(is_setting_of_forks(find(settings, name)));
  for (const char* name : {"transport", "without", "mem", "vcpus", "kernel"})
    CHECK(!is_setting_of_forks(find(settings, name)));

  const auto given = [&](const char* name, const char* value, const char* where = "") {
    return GivenSetting{&find(settings, name), value, {"", where}, std::string("--") + name};
  };
  const std::vector<GivenSetting> profile = {given("device", "virtio-vsock,cid=5,backend=user", "1:1"),
                                             given("device", "virtio-rng", "2:1")};
  const auto plan = plan_of_fork(profile, {given("cid", "7"), given("block", "/disk")});
  REQUIRE(plan.ok());
  REQUIRE(plan->devices.size() == 3);
  CHECK(plan->devices[0].options == KeyValues{{"backend", "user"}, {"cid", "7"}});
  CHECK_FALSE(plan->devices[0].is_new);
  CHECK(plan->devices[2].type == "virtio-blk");
  CHECK(plan->devices[2].is_new);
  const auto without = plan_of_fork({given("device", "virtio-rng", "2:1")}, {given("cid", "7")});
  REQUIRE(!without.ok());
  CHECK(without.error().message == "--cid: the machine that is forked has no virtio-vsock");
}

TEST_CASE("settings: values that are taken and values that are not") {
  const Catalogue catalogue = built_plugins();
  const auto settings = all_settings(catalogue);
  struct Case {
    Given given;
    const char* message;  // "" for none
  };
  for (const Case& c : {
           Case{{"mem", "512"}, ""},
           {{"mem", "512M"}, ""},
           {{"mem", "1T"}, ""},
           {{"mem", "15"},
            "--mem: '15' given; allowed is a size from 16M to 1T in steps of 4K (a bare number counts in MiB)"},
           {{"mem", "2T"},
            "--mem: '2T' given; allowed is a size from 16M to 1T in steps of 4K (a bare number counts in MiB)"},
           {{"mem", "16777220K"}, ""},
           {{"mem", "16777217K"},
            "--mem: '16777217K' given; allowed is a size from 16M to 1T in steps of 4K (a bare number counts in MiB)"},
           {{"mem", "33554433"},
            "--mem: '33554433' given; allowed is a size from 16M to 1T in steps of 4K (a bare number counts in MiB)"},
           {{"mem", "99999999999999999999"},
            "--mem: '99999999999999999999' given; allowed is a size from 16M to 1T in steps of 4K (a bare number "
            "counts in MiB)"},
           {{"vcpus", "32"}, ""},
           {{"vcpus", "0"}, "--vcpus: '0' given; allowed is a number from 1 to 32"},
           {{"vcpus", "33"}, "--vcpus: '33' given; allowed is a number from 1 to 32"},
           {{"vcpus", "two"}, "--vcpus: 'two' given; allowed is a number from 1 to 32"},
           {{"boot-protocol", "pvh"}, ""},
           {{"boot-protocol", "bios"}, "--boot-protocol: 'bios' given; allowed are auto, linux64, pvh"},
           {{"kernel", ""}, "--kernel: '' is not a path"},
           {{"ksm", "off"}, ""},
           {{"ksm", "maybe"}, "--ksm: 'maybe' given; allowed are on, off, true, false, yes, no"},
           {{"device", ""}, "--device: '': a name is missing before the first comma"},
           {{"device", "virtio-rng,=x"}, "--device: 'virtio-rng,=x': a key is missing before '='"},
       }) {
    CAPTURE(c.given.name);
    CAPTURE(c.given.value);
    const auto plan = plan_of(settings, {}, {c.given});
    CHECK((plan.ok() ? "" : plan.error().message) == c.message);
  }
  CHECK(plan_of(settings, {}, {{"mem", "512"}})->memory.size_bytes == 512ull << 20);
}

TEST_CASE("settings: the command line wins over a profile, devices add up") {
  const Catalogue catalogue = built_plugins();
  const auto settings = all_settings(catalogue);
  const auto plan = plan_of(
      settings, {{"mem", "1G"}, {"kernel", "vmlinuz"}, {"device", "virtio-rng"}, {"rootfs", "a.img"}, {"vcpus", "4"}},
      {{"mem", "2G"}, {"device", "serial,irq=3"}, {"rootfs", "b.img"}});
  REQUIRE(plan.ok());
  CHECK(plan->memory.size_bytes == 2ull << 30);
  CHECK(plan->vcpus == 4);
  CHECK(plan->kernel == "/profiles/vmlinuz");
  REQUIRE(plan->devices.size() == 3);
  CHECK(plan->devices[0].type == "virtio-rng");
  CHECK(plan->devices[0].base_folder == "/profiles");
  CHECK(plan->devices[1].type == "serial");
  CHECK(plan->devices[1].base_folder.empty());
  CHECK(plan->devices[2].type == "virtio-blk");
  CHECK(std::count(plan->devices[2].options.begin(), plan->devices[2].options.end(),
                   std::pair<std::string, std::string>("path", "b.img")) == 1);
}

TEST_CASE("settings: all mistakes are reported, a line each") {
  const Catalogue catalogue = built_plugins();
  const auto settings = all_settings(catalogue);
  const auto plan = plan_of(settings, {}, {{"mem", "1"}, {"vcpus", "99"}, {"ksm", "?"}});
  REQUIRE(!plan.ok());
  CHECK(std::count(plan.error().message.begin(), plan.error().message.end(), '\n') == 2);
}

TEST_CASE("settings: a short form expands, what follows its value is added or replaces") {
  const Catalogue catalogue = built_plugins();
  const auto settings = all_settings(catalogue);
  const auto plan = plan_of(settings, {}, {{"rootfs", "my,,disk.img,readonly=on"}});
  REQUIRE(plan.ok());
  REQUIRE(plan->devices.size() == 1);
  const KeyValues& options = plan->devices[0].options;
  CHECK(std::count(options.begin(), options.end(), std::pair<std::string, std::string>("path", "my,disk.img")) == 1);
  CHECK(std::count(options.begin(), options.end(), std::pair<std::string, std::string>("readonly", "on")) == 1);
  const auto twice = plan_of(settings, {}, {{"rootfs", "a.img,path=b.img"}});
  REQUIRE(twice.ok());
  CHECK(std::count_if(twice->devices[0].options.begin(), twice->devices[0].options.end(),
                      [](const auto& option) { return option.first == "path"; }) == 1);
}

TEST_CASE("settings: a short form whose value may be left out leaves the device's default then") {
  const ScratchDir folder;
  const auto settings = tester_settings(folder);  // --test [KIND] is kind=%
  CHECK(find(settings, "test").kind == SettingKind::optional_value);
  CHECK(plan_of(settings, {}, {{"test", "odd"}})->devices[0].options == KeyValues{{"kind", "odd"}});
  const auto plan = plan_of(settings, {}, {{"test", ""}});
  REQUIRE(plan.ok());
  REQUIRE(plan->devices.size() == 1);
  CHECK(plan->devices[0].type == "tester");
  CHECK(plan->devices[0].options.empty());
}

TEST_CASE("settings: a flag that sets an option of a device which another one made") {
  const ScratchDir folder;
  const auto settings = tester_settings(folder);  // --spare [WHERE] is spare=WHERE on the tester with main=on
  CHECK(find(settings, "spare").kind == SettingKind::optional_value);
  CHECK(find(settings, "depth").kind == SettingKind::value);
  using List = std::vector<Given>;
  const auto option = [](const PlannedDevice& device, const std::string& key) -> std::string {
    std::string values;
    for (const auto& [name, value] : device.options)
      if (name == key) values += (values.empty() ? "" : "+") + value;
    return values;
  };
  // On whichever side of its device it stands, on the command line and in a profile.
  for (const auto& [profile, line] : {std::pair{List{}, List{{"main", "a"}, {"spare", ""}}},
                                      {List{}, List{{"spare", ""}, {"main", "a"}}},
                                      {List{{"spare", ""}}, List{{"main", "a"}}},
                                      {List{{"main", "a"}}, List{{"spare", ""}}},
                                      {List{{"spare", ""}, {"main", "a"}}, List{}}}) {
    const auto plan = plan_of(settings, profile, line);
    REQUIRE_MESSAGE(plan.ok(), (plan.ok() ? "" : plan.error().message));
    REQUIRE(plan->devices.size() == 1);
    CHECK(option(plan->devices[0], "spare") == "memory");
  }
  // Only on the device that is meant, however its mark is written.
  const auto two = plan_of(settings, {}, {{"test", "odd"}, {"device", "tester,main=yes"}, {"spare", "x,y"}});
  REQUIRE(two.ok());
  CHECK(option(two->devices[0], "spare").empty());
  CHECK(option(two->devices[1], "spare") == "x,y");
  const auto every = plan_of(settings, {}, {{"test", "odd"}, {"main", "a"}, {"depth", "3"}});
  REQUIRE(every.ok());
  for (const PlannedDevice& device : every->devices) CHECK(option(device, "depth") == "3");

  // The command line wins over a profile; on one side the flag wins over the device's own words.
  const auto wins = [&](const List& profile, const List& line) {
    const auto plan = plan_of(settings, profile, line);
    REQUIRE(plan.ok());
    REQUIRE(plan->devices.size() == 1);
    return option(plan->devices[0], "spare");
  };
  CHECK(wins({{"main", "a,spare=device"}}, {{"spare", "flag"}}) == "flag");
  CHECK(wins({{"spare", "flag"}}, {{"main", "a,spare=device"}}) == "device");
  CHECK(wins({{"spare", "profile"}, {"main", "a"}}, {{"spare", "line"}}) == "line");
  CHECK(wins({}, {{"spare", "flag"}, {"main", "a,spare=device"}}) == "flag");

  const auto refusal = [&](const List& profile, const List& line) {
    const auto plan = plan_of(settings, profile, line);
    return plan.ok() ? "" : plan.error().message;
  };
  CHECK(refusal({}, {{"spare", ""}}) == "--spare: needs --main FILE or --device tester,main=on");
  CHECK(refusal({{"spare", ""}}, {{"device", "tester,main=off"}}) ==
        "spare: needs --main FILE or --device tester,main=on");
  CHECK(refusal({}, {{"depth", "1"}}) == "--depth: needs --test [KIND] or --main FILE or --device tester");
}

TEST_CASE(
    "settings: a path that a flag gives to another's device starts from where the flag stands; words are no paths") {
  const Catalogue catalogue = built_plugins();
  const auto settings = all_settings(catalogue);
  PluginLibrary library(catalogue);
  const auto option = [&](const std::vector<Given>& profile, const std::vector<Given>& line, std::string_view key) {
    const auto plan = plan_of(settings, profile, line);
    REQUIRE_MESSAGE(plan.ok(), (plan.ok() ? "" : plan.error().message));
    const auto checked = check_plan(*plan, library);
    REQUIRE_MESSAGE(checked.ok(), (checked.ok() ? "" : checked.error().message));
    const clone_options& options = checked->devices[0].options.raw();
    for (uint32_t i = 0; i < options.count; ++i)
      if (key == options.values[i]->name) return std::string(options.values[i]->text);
    return std::string("unset");
  };
  CHECK(option({{"rootfs", "a"}}, {{"overlay", "o"}}, "path") == "/profiles/a");
  CHECK(option({{"rootfs", "a"}}, {{"overlay", "o"}}, "overlay") == "o");
  CHECK(option({{"overlay", "o"}}, {{"rootfs", "a"}}, "path") == "a");
  CHECK(option({{"overlay", "o"}}, {{"rootfs", "a"}}, "overlay") == "/profiles/o");
  CHECK(option({{"rootfs", "a,overlay=o"}}, {}, "overlay") == "/profiles/o");
  CHECK(option({{"rootfs", "a"}}, {{"overlay", ""}}, "overlay") == "tmpfs");
  for (const char* word : {"off", "on", "tmpfs"}) {
    CHECK(option({{"overlay", word}, {"rootfs", "a"}}, {}, "overlay") == word);
    CHECK(option({{"rootfs", "a,overlay=" + std::string(word)}}, {}, "overlay") == word);
  }
  CHECK(option({{"rootfs", "a"}}, {}, "overlay") == "off");
}
