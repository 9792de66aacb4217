// SPDX-License-Identifier: Apache-2.0
// Profiles: what a YAML file says, where it is wrong, and a plan written as one and read again.
#include <doctest/doctest.h>

#include <algorithm>

#include "plan/profile.hpp"
#include "scratch_dir.hpp"

using namespace vmm;

namespace {

struct Plugins {
  Plugins() : catalogue(scan()), settings(all_settings(catalogue)), library(catalogue) {}
  static Catalogue scan() {
    auto scanned = Catalogue::scan({CLONE_TEST_PLUGIN_DIR}, PluginTrust::any);
    if (!scanned.ok()) throw std::runtime_error(scanned.error().message);
    return std::move(scanned).value();
  }
  Catalogue catalogue;
  std::vector<Setting> settings;
  PluginLibrary library;
};

// The messages of a profile, with the file's name left out.
std::string mistakes(const std::string& yaml) {
  Plugins plugins;
  const ScratchDir folder;
  const std::string path = folder.write("vm.yaml", yaml);
  const auto read = read_profile(path, plugins.settings);
  std::string message;
  if (!read.ok()) {
    message = read.error().message;
  } else if (const auto plan = make_plan(*read, {}); !plan.ok()) {
    message = plan.error().message;
  }
  for (size_t at; (at = message.find(path + ":")) != std::string::npos;) message.erase(at, path.size() + 1);
  return message;
}

bool begins(const std::string& text, const std::string& start) { return text.compare(0, start.size(), start) == 0; }

}  // namespace

TEST_CASE("profile: values of every kind, paths from the profile's folder") {
  Plugins plugins;
  const ScratchDir folder;
  const std::string path = folder.write("vm.yaml",
                                        "# a machine\n"
                                        "kernel: boot/vmlinuz\n"
                                        "mem: 1G\n"
                                        "vcpus: 2\n"
                                        "no-reboot: yes\n"
                                        "rootfs: 'disk, with comma.img'\n"
                                        "transport: mmio\n"
                                        "device:\n"
                                        "  - virtio-rng\n"
                                        "  - serial: {port: 0x2f8, irq: 3, console: off}\n"
                                        "  - virtio-blk,path=data.img,readonly=on\n"
                                        "without: [i8042, rtc]\n");
  const auto read = read_profile(path, plugins.settings);
  REQUIRE(read.ok());
  // A comma that is not doubled starts an option, in YAML's quotes too.
  const auto plan = make_plan(*read, {});
  REQUIRE(plan.ok());
  CHECK(check_plan(*plan, plugins.library).error().message.find("unknown option ' with comma.img'") !=
        std::string::npos);

  const std::string fixed = folder.write("fixed.yaml",
                                         "kernel: boot/vmlinuz\nmem: 1G\nvcpus: 2\nno-reboot: yes\nrootfs: disk.img\n"
                                         "transport: mmio\ndevice:\n  - virtio-rng\n"
                                         "  - serial: {port: 0x2f8, irq: 3, console: off}\n"
                                         "  - virtio-blk: {path: 'a, b.img', readonly: on}\n"
                                         "without: [i8042, rtc]\n");
  const auto good = read_profile(fixed, plugins.settings);
  REQUIRE(good.ok());
  const auto machine = make_plan(*good, {});
  REQUIRE(machine.ok());
  CHECK(machine->kernel == folder.path() + "/boot/vmlinuz");
  CHECK(machine->memory.size_bytes == 1ull << 30);
  CHECK(machine->vcpus == 2);
  CHECK(machine->on_reboot == OnReboot::exit);
  CHECK(machine->without == std::vector<std::string>{"i8042", "rtc"});
  REQUIRE(machine->devices.size() == 4);
  CHECK(machine->devices[2].type == "serial");
  CHECK(machine->devices[2].options == KeyValues{{"port", "0x2f8"}, {"irq", "3"}, {"console", "off"}});
  const auto checked = check_plan(*machine, plugins.library);
  REQUIRE(checked.ok());
  // In the table's order: path is the first.
  CHECK(checked->devices[3].options.raw().values[0]->text == folder.path() + "/a, b.img");
}

TEST_CASE("profile: mistakes are told with line and column") {
  struct Case {
    const char* yaml;
    const char* message;
  };
  for (const Case& c : {
           Case{"kernel: a\nkernal: b\n", "2:1: unknown key 'kernal'; allowed are kernel, initrd, "},
           {"mem: 1G\nvcpus: 1\nmem: 2G\n", "3:1: key 'mem' is given twice"},
           {"vcpus: [1, 2]\n", "1:8: vcpus: a single value is expected here"},
           {"kernel: {a: b}\n", "1:9: kernel: a single value is expected here"},
           {"vcpus: 64\n", "1:8: vcpus: '64' given; allowed is a number from 1 to 32"},
           {"device:\n  - [a]\n", "2:5: device: `NAME: {key: value, …}` or a text is expected here"},
           {"device:\n  - serial: 5\n", "2:13: options of 'serial' are a list of `key: value`"},
           {"device:\n  - serial: {irq: [1]}\n", "2:14: an option is `key: value`, the value a single word or text"},
           {"- a\n- b\n", "1:1: a profile is a list of `key: value` lines"},
           {"just words\n", "1:1: a profile is a list of `key: value` lines"},
           {"[a]: b\n", "1:1: a key must be a word"},
           {"kernel: [open\n", "2:1: "},
           {"a: b: c\n", "1:5: "},
           {"kernel:\n\t- tab\n", "2:2: "},
           {"kernel: *nowhere\n", "1:"},
       }) {
    CAPTURE(std::string(c.yaml));
    const std::string message = mistakes(c.yaml);
    CAPTURE(message);
    CHECK(begins(message, c.message));
  }
  const std::string all = mistakes("one: 1\ntwo: 2\nvcpus: []\nvcpus: {}\n");
  CHECK(all.find("1:1: ") != std::string::npos);
  CHECK(all.find("2:1: ") != std::string::npos);
  CHECK(all.find("4:8: ") != std::string::npos);
}

TEST_CASE("profile: files that are none") {
  Plugins plugins;
  const ScratchDir folder;
  CHECK(begins(read_profile(folder.path() + "/missing.yaml", plugins.settings).error().message, "profile: "));
  CHECK(!read_profile(folder.path(), plugins.settings).ok());
  const std::string large = folder.write("large.yaml", std::string((1 << 20) + 1, '#'));
  CHECK(read_profile(large, plugins.settings).error().message == "profile: " + large + ": larger than 1 MiB");
  CHECK(read_profile(folder.write("empty.yaml", "# nothing\n"), plugins.settings)->empty());
  // Nested deeper than any profile; an error, not a stack overflow.
  CHECK(!read_profile(folder.write("deep.yaml", std::string(500'000, '[')), plugins.settings).ok());
}

TEST_CASE("profile: the command line wins") {
  Plugins plugins;
  const ScratchDir folder;
  const auto read = read_profile(folder.write("vm.yaml", "kernel: a\nmem: 1G\n"), plugins.settings);
  REQUIRE(read.ok());
  const auto mem = std::find_if(plugins.settings.begin(), plugins.settings.end(),
                                [](const Setting& setting) { return setting.name == "mem"; });
  const auto plan = make_plan(*read, {{&*mem, "256M", {}, "--mem"}});
  REQUIRE(plan.ok());
  CHECK(plan->memory.size_bytes == 256ull << 20);
  CHECK(plan->kernel == folder.path() + "/a");
}

TEST_CASE("profile: mistakes in a plan name each device and option") {
  Plugins plugins;
  Plan plan;
  plan.kernel = "k";
  plan.transport = {"mmio", {{"packed", "perhaps"}}, {}};
  plan.devices = {{"virtio-blk", {}, {}}, {"serial", {{"irq", "99"}}, {}}, {"no-such", {}, {}}};
  plan.without = {"no-default"};
  const auto checked = check_plan(plan, plugins.library);
  REQUIRE(!checked.ok());
  const std::string& message = checked.error().message;
  for (const char* part : {"transport mmio: packed=perhaps: ", "device virtio-blk: path is required",
                           "device serial: irq=99: ", "unknown device 'no-such'", "--without no-default: "}) {
    CAPTURE(part);
    CHECK(message.find(part) != std::string::npos);
  }
  CHECK(std::count(message.begin(), message.end(), '\n') == 4);
}

TEST_CASE("profile: a plan that is written and read again is the same plan") {
  Plugins plugins;
  const ScratchDir folder;
  Plan plan;
  plan.kernel = "/boot/vmlinuz: with 'quotes' and # signs";
  plan.initrd = "/boot/initrd";
  plan.modules = "/lib/modules";
  plan.init = "/bin/on";
  plan.command_line = "quiet root=\"a b\" yes: no";
  plan.protocol = BootProtocol::pvh;
  plan.memory.size_bytes = (512ull << 20) + 4096;
  plan.memory.backing = MemoryBacking::memfd;
  plan.memory.huge_pages = HugePages::transparent;
  plan.memory.mergeable = false;
  plan.vcpus = 3;
  plan.on_reboot = OnReboot::exit;
  plan.grace_ms = 0;
  plan.transport.options = {{"packed", "off"}};
  plan.devices = {{"virtio-blk", {{"path", "disk, one.img"}, {"serial", "on"}, {"readonly", "on"}}, "/images"},
                  {"virtio-blk", {{"path", "/images/,two"}}, {}},
                  {"serial", {{"irq", "0x3"}, {"port", "0x2f8"}}, {}}};
  plan.without = {"i8042"};
  const auto checked = check_plan(plan, plugins.library);
  REQUIRE(checked.ok());
  const std::string yaml = write_profile(*checked);
  CAPTURE(yaml);

  const auto read = read_profile(folder.write("again.yaml", yaml), plugins.settings);
  REQUIRE(read.ok());
  const auto second = make_plan(*read, {});
  REQUIRE(second.ok());
  CHECK(second->kernel == plan.kernel);
  CHECK(second->initrd == plan.initrd);
  CHECK(second->modules == plan.modules);
  CHECK(second->init == plan.init);
  CHECK(second->command_line == plan.command_line);
  CHECK(second->protocol == plan.protocol);
  CHECK(second->memory.size_bytes == plan.memory.size_bytes);
  CHECK(second->memory.backing == plan.memory.backing);
  CHECK(second->memory.huge_pages == plan.memory.huge_pages);
  CHECK(second->memory.mergeable == plan.memory.mergeable);
  CHECK(second->vcpus == plan.vcpus);
  CHECK(second->on_reboot == plan.on_reboot);
  CHECK(second->grace_ms == plan.grace_ms);
  CHECK(second->transport.options == plan.transport.options);
  CHECK(second->without == plan.without);
  REQUIRE(second->devices.size() == checked->devices.size());
  CHECK(second->devices[0].options ==
        KeyValues{{"path", "/images/disk, one.img"}, {"serial", "on"}, {"readonly", "on"}});
  CHECK(second->devices[1].options == plan.devices[1].options);

  const auto checked_again = check_plan(*second, plugins.library);
  REQUIRE(checked_again.ok());
  CHECK(write_profile(*checked_again) == yaml);
  for (size_t i = 0; i < checked->devices.size(); ++i)
    CHECK(checked_again->devices[i].instance == checked->devices[i].instance);
}
