// SPDX-License-Identifier: Apache-2.0
// The generated initrd: what is in it, and what is refused.
#include <doctest/doctest.h>
#include <sys/stat.h>

#include <algorithm>

#include "boot/initrd.hpp"
#include "compress.hpp"
#include "cpio_reader.hpp"
#include "scratch_dir.hpp"

using namespace vmm;

namespace {

// A modules directory of kernel 6.1.0-test with plain, .xz and .zst modules.
struct Fixture {
  ScratchDir scratch;
  InitrdSpec spec;

  Fixture() {
    scratch.write("6.1.0-test/modules.dep",
                  "kernel/virtio_ring.ko.xz:\n"
                  "kernel/virtio-blk.ko.zst: kernel/virtio_ring.ko.xz\n"
                  "kernel/ext4.ko:\n");
    scratch.write("6.1.0-test/kernel/virtio_ring.ko.xz", compress_xz("ring module"));
    scratch.write("6.1.0-test/kernel/virtio-blk.ko.zst", compress_zstd("block module"));
    scratch.write("6.1.0-test/kernel/ext4.ko", "ext4 module");
    spec.init_path = scratch.write("clone-init", "the init");
    spec.modules_dir = scratch.path();
    spec.kernel_version = "6.1.0-test";
    spec.modules = {"virtio_blk", "ext4"};
    spec.root = "serial:root";
    spec.filesystem_types = {"ext4", "xfs"};
  }

  std::string refusal() const {
    const auto initrd = build_initrd(spec);
    REQUIRE_FALSE(initrd.ok());
    return initrd.error().message;
  }
};

const CpioMember* find(const std::vector<CpioMember>& members, std::string_view name) {
  const auto found = std::find_if(members.begin(), members.end(), [name](const auto& m) { return m.name == name; });
  return found == members.end() ? nullptr : &*found;
}

std::string configuration(const InitrdSpec& spec) {
  const auto bytes = build_initrd(spec);
  REQUIRE_MESSAGE(bytes.ok(), (bytes.ok() ? "" : bytes.error().message));
  const auto members = read_cpio(*bytes);
  REQUIRE(members);
  REQUIRE(find(*members, "clone/init.conf"));
  return find(*members, "clone/init.conf")->content;
}

}  // namespace

TEST_CASE("initrd: holds the init, the unpacked modules and the configuration") {
  const Fixture fixture;
  const auto bytes = build_initrd(fixture.spec);
  REQUIRE_MESSAGE(bytes.ok(), (bytes.ok() ? "" : bytes.error().message));
  const auto members = read_cpio(*bytes);
  REQUIRE(members);
  const auto content = [&](std::string_view name) {
    const CpioMember* member = find(*members, name);
    REQUIRE_MESSAGE(member, name);
    return member->content;
  };
  CHECK(content("init") == "the init");
  CHECK(find(*members, "init")->mode == (S_IFREG | 0755));
  CHECK(content("clone/modules/virtio_ring.ko") == "ring module");
  CHECK(content("clone/modules/virtio_blk.ko") == "block module");
  CHECK(content("clone/modules/ext4.ko") == "ext4 module");
  CHECK(content("clone/init.conf") ==
        "module=/clone/modules/virtio_ring.ko\nmodule=/clone/modules/virtio_blk.ko\nmodule=/clone/modules/ext4.ko\n"
        "root=serial:root\nfstype=ext4\nfstype=xfs\nmode=rw\ninit=/sbin/init\nwait_ms=10000\n");
  CHECK(find(*members, "dev/console")->mode == (S_IFCHR | 0600));
  // The kernel makes no parent directories: each has to come before what is in it.
  for (size_t i = 0; i < members->size(); ++i) {
    const std::string& name = (*members)[i].name;
    if (const size_t slash = name.rfind('/'); slash != std::string::npos) {
      const CpioMember* parent = find(*members, name.substr(0, slash));
      REQUIRE_MESSAGE(parent, name);
      CHECK(parent - members->data() < static_cast<std::ptrdiff_t>(i));
    }
  }
  for (const char* mount_point : {"dev", "proc", "sys", "root"}) CHECK(S_ISDIR(find(*members, mount_point)->mode));
}

TEST_CASE("initrd: every setting reaches the configuration") {
  Fixture fixture;
  InitrdSpec& spec = fixture.spec;
  spec.modules.clear();
  spec.modules_dir = "/nonexistent";  // not looked at where nothing is wanted
  spec.root = "/dev/vda1";
  spec.filesystem_types.clear();
  spec.root_access = RootAccess::read_only;
  spec.overlay = RootOverlay::guest_memory;
  spec.options = "noatime,errors=panic";
  spec.init = "/bin/sh";
  spec.init_arguments = {"-c", "echo a = b", ""};
  spec.wait_ms = 5;
  CHECK(configuration(spec) ==
        "root=/dev/vda1\nmode=ro\noverlay=tmpfs\noptions=noatime,errors=panic\ninit=/bin/sh\n"
        "init-arg=-c\ninit-arg=echo a = b\ninit-arg=\nwait_ms=5\n");
}

TEST_CASE("initrd: a prepared one is written elsewhere, the same each time") {
  const Fixture fixture;
  auto prepared = Initrd::prepare(fixture.spec);
  REQUIRE(prepared.ok());
  const Initrd initrd = std::move(prepared).value();
  std::vector<std::byte> dirty(initrd.size_bytes(), std::byte{0xff});
  initrd.write_to(dirty);
  CHECK(dirty == build_initrd(fixture.spec).value());
}

TEST_CASE("initrd: what cannot work is refused in one line") {
  Fixture fixture;
  InitrdSpec& spec = fixture.spec;
  const InitrdSpec good = spec;
  for (const char* root : {"", "vda", "serial:", "/dev/", "tag:", "/etc/passwd"}) {
    spec.root = root;
    CHECK(fixture.refusal() == "root " + std::string(root) + ": allowed are serial:TEXT, /dev/NAME, tag:TAG and none");
  }
  spec = good;
  spec.root = "serial:a\nmode=ro";
  CHECK(fixture.refusal() == "initrd: root: may not hold a newline or a NUL");
  spec = good;
  spec.init_arguments = {std::string("a\0b", 3)};
  CHECK(fixture.refusal() == "initrd: init-arg: may not hold a newline or a NUL");
  spec = good;
  spec.init = "sbin/init";
  CHECK(fixture.refusal() == "init sbin/init: has to be an absolute path");
  spec = good;
  spec.filesystem_types = {""};
  CHECK(fixture.refusal() == "an empty file system type");
  spec = good;
  spec.options = std::string(5000, 'o');
  CHECK(fixture.refusal().starts_with("root mount options of 5000 bytes"));
  spec = good;
  spec.init_arguments.assign(129, "x");
  CHECK(fixture.refusal().starts_with("129 arguments to init"));
  spec.init_arguments.assign(2, std::string(40000, 'x'));
  CHECK(fixture.refusal().find("at most 65535 are allowed") != std::string::npos);
}

TEST_CASE("initrd: missing and broken files are named") {
  Fixture fixture;
  InitrdSpec& spec = fixture.spec;
  spec.modules = {"nosuch"};
  CHECK(fixture.refusal().starts_with("no module nosuch of kernel 6.1.0-test in "));
  spec.modules = {"ext4"};
  const std::string ext4 = fixture.scratch.write("6.1.0-test/kernel/ext4.ko", compress_xz("module").substr(0, 40));
  CHECK(fixture.refusal().starts_with(ext4 + ": not a valid xz file"));
  std::filesystem::remove(ext4);
  CHECK(fixture.refusal() == ext4 + ": No such file or directory");
  spec.kernel_version = "5.0.0";
  CHECK(build_initrd(spec).error().code == ENOENT);
  spec.modules.clear();
  CHECK(build_initrd(spec).ok());
  spec.init_path += "-missing";
  CHECK(fixture.refusal() == spec.init_path + ": No such file or directory");
}
