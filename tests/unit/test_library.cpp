// SPDX-License-Identifier: Apache-2.0
// Plugin files loaded through the library; those that misbehave are the conformance suite's.
#include <doctest/doctest.h>

#include "clone/abi/virtio.h"
#include "plugin/checker.hpp"
#include "plugin/library.hpp"
#include "scratch_dir.hpp"

using namespace vmm;

TEST_CASE("library: a device's tables by its name, loaded once") {
  const auto catalogue = Catalogue::scan({CLONE_TEST_PLUGIN_DIR}, PluginTrust::any);
  REQUIRE(catalogue.ok());
  PluginLibrary library(*catalogue);
  const auto device = library.device("virtio-rng");
  REQUIRE(device.ok());
  CHECK(std::string(device->descriptor.name) == "virtio-rng");
  CHECK(device->file->manifest.id == "virtio-rng");
  CHECK(static_cast<bool>(device->ops.create));
  CHECK(*library.load(*device->file) == *library.load(*device->file));
  const auto transport = library.transport("mmio");
  REQUIRE(transport.ok());
  CHECK(static_cast<bool>(transport->attach));
  // Three devices in one file.
  CHECK(library.device("rtc")->file == library.device("i8042")->file);
  CHECK(known_extensions(*device) == CLONE_VIRTIO_DEVICE);
}

TEST_CASE("library: an unknown name is answered with those there are") {
  const auto catalogue = Catalogue::scan({CLONE_TEST_PLUGIN_DIR}, PluginTrust::any);
  REQUIRE(catalogue.ok());
  PluginLibrary library(*catalogue);
  const auto device = library.device("virtio-rgn");
  REQUIRE(!device.ok());
  CHECK(device.error().message.find("unknown device 'virtio-rgn'; there are: ") == 0);
  CHECK(device.error().message.find("virtio-rng") != std::string::npos);
  CHECK(!library.transport("virtio-rng").ok());
}

TEST_CASE("library: a file that vanished after the scan is an error that names plugin and file") {
  const ScratchDir folder;
  const std::string path = folder.path() + "/virtio-rng.so";
  std::filesystem::copy_file(CLONE_TEST_PLUGIN_DIR "/virtio-rng.so", path);
  const auto catalogue = Catalogue::scan({folder.path()}, PluginTrust::any);
  REQUIRE(catalogue.ok());
  std::filesystem::remove(path);
  PluginLibrary library(*catalogue);
  const auto device = library.device("virtio-rng");
  REQUIRE(!device.ok());
  CHECK(device.error().message.find("plugin virtio-rng: cannot be loaded: ") == 0);
  CHECK(device.error().message.find(path) != std::string::npos);
}

TEST_CASE("library: tables of another size are read as far as both know them") {
  struct Older {
    uint32_t size;
    uint32_t value;
  };
  struct Newer {
    uint32_t size;
    uint32_t value;
    uint64_t added;
  };
  const Newer written{sizeof(Newer), 5, 9};
  const Older older{sizeof(Older), 5};
  CHECK(copy_table(reinterpret_cast<const Older*>(&written)).value == 5);
  const Newer read = copy_table(reinterpret_cast<const Newer*>(&older));
  CHECK(read.value == 5);
  CHECK(read.added == 0);
  CHECK(copy_table<Newer>(nullptr).size == 0);
}
