// SPDX-License-Identifier: Apache-2.0
// Finding kernel modules and what they depend on.
#include <doctest/doctest.h>

#include "boot/modules.hpp"
#include "scratch_dir.hpp"

using namespace vmm;

namespace {

constexpr const char* version = "6.1.0-test";

// Names in load order; the paths are checked to be below the directory.
std::vector<std::string> resolved(const ScratchDir& scratch, const std::vector<std::string>& names) {
  const auto modules = resolve_modules(scratch.path(), version, names);
  REQUIRE_MESSAGE(modules.ok(), (modules.ok() ? "" : modules.error().message));
  std::vector<std::string> result;
  for (const KernelModule& module : *modules) {
    CHECK(module.path.starts_with(scratch.path() + "/kernel/"));
    result.push_back(module.name);
  }
  return result;
}

std::string refusal(const ScratchDir& scratch, const std::vector<std::string>& names) {
  const auto modules = resolve_modules(scratch.path(), version, names);
  REQUIRE_FALSE(modules.ok());
  CHECK(modules.error().code != ENOENT);
  return modules.error().message;
}

using Names = std::vector<std::string>;

constexpr const char* dependencies =
    "kernel/fs/ext4/ext4.ko.xz: kernel/lib/crc16.ko kernel/fs/mbcache.ko kernel/fs/jbd2/jbd2.ko\n"
    "kernel/fs/jbd2/jbd2.ko:\n"
    "kernel/fs/mbcache.ko:\n"
    "kernel/lib/crc16.ko:\n"
    "kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko\n"
    "kernel/drivers/virtio/virtio_ring.ko:\n"
    "kernel/drivers/virtio/virtio_mmio.ko.zst: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko\n"
    "kernel/drivers/char/virtio-rng.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko\n"
    "kernel/crypto/crc32c-intel.ko:\n"
    "kernel/crypto/crc32c_generic.ko:\n";

}  // namespace

TEST_CASE("modules: dependencies come first, each once, with '-' and '_' equal") {
  const ScratchDir scratch;
  scratch.write("modules.dep", dependencies);
  CHECK(resolved(scratch, {"virtio_mmio", "virtio_rng"}) ==
        Names{"virtio_ring", "virtio", "virtio_mmio", "virtio_rng"});
  CHECK(resolved(scratch, {"virtio-mmio", "virtio_mmio", "virtio"}) == Names{"virtio_ring", "virtio", "virtio_mmio"});
  CHECK(resolved(scratch, {"ext4"}) == Names{"jbd2", "mbcache", "crc16", "ext4"});
  CHECK(resolved(scratch, {}).empty());
  const std::vector<std::string> names = {"ext4"};
  const auto modules = resolve_modules(scratch.path(), version, names);
  CHECK(modules->back().path == scratch.path() + "/kernel/fs/ext4/ext4.ko.xz");
}

TEST_CASE("modules: what is built in needs no file, even where there is one") {
  const ScratchDir scratch;
  scratch.write("modules.dep", dependencies);
  scratch.write("modules.builtin", "kernel/fs/ext4/ext4.ko\nkernel/drivers/block/virtio-blk.ko");
  CHECK(resolved(scratch, {"ext4", "virtio_blk"}).empty());
  CHECK(resolved(scratch, {"ext4", "virtio"}) == Names{"virtio_ring", "virtio"});
}

TEST_CASE("modules: soft dependencies by name and by alias come before, if the kernel has them") {
  const ScratchDir scratch;
  scratch.write("modules.dep", dependencies);
  scratch.write("modules.softdep",
                "# Soft dependencies\n"
                "softdep ext4 pre: crypto-crc32c nosuch post: virtio_rng\n"
                "softdep jbd2 pre: crypto-crc32c\n"
                "softdep virtio_ring without_a_keyword\n"
                "softdep crc32c_intel pre: crc32c-intel crc16\n");  // a circle
  scratch.write("modules.alias",
                "alias crypto-crc32c-intel mbcache\n"
                "alias xalias crypto-crc32c mbcache\n"
                "alias crypto-crc32c crc32c_intel\n"
                "alias crypto-crc32c crc32c_generic\n"
                "alias crypto-crc32c not_there\n");
  CHECK(resolved(scratch, {"ext4"}) == Names{"crc16", "crc32c_intel", "crc32c_generic", "jbd2", "mbcache", "ext4"});
  CHECK(resolved(scratch, {"virtio"}) == Names{"virtio_ring", "virtio"});
  scratch.write("modules.builtin", "kernel/crypto/crc32c_generic.ko\n");
  CHECK(resolved(scratch, {"ext4"}) == Names{"crc16", "crc32c_intel", "jbd2", "mbcache", "ext4"});
}

TEST_CASE("modules: names that are parts of others are not confused") {
  const ScratchDir scratch;
  scratch.write("modules.dep",
                "kernel/a/virtio_blk_extra.ko:\nkernel/a/my_virtio_blk.ko:\nkernel/virtio_blk/other.ko:\n"
                "kernel/a/other.ko: kernel/a/virtio_blk_extra.ko\nkernel/virtio-blk.ko:\n");
  CHECK(resolved(scratch, {"virtio_blk"}) == Names{"virtio_blk"});
  // Two files of one name are one module to the kernel: the first counts.
  CHECK(resolved(scratch, {"other"}) == Names{"other"});
  CHECK(refusal(scratch, {"virtio"}) == "no module virtio of kernel 6.1.0-test in " + scratch.path() +
                                            " (neither in modules.dep nor in modules.builtin)");
  CHECK(refusal(scratch, {""}).starts_with("no module "));
}

TEST_CASE("modules: a malformed modules.dep is refused with its line") {
  const ScratchDir scratch;
  const auto dep = [&scratch](std::string_view text) { scratch.write("modules.dep", text); };
  dep("kernel/a.ko:\n\n# comment\nkernel/b.ko");
  CHECK(refusal(scratch, {"a"}) == scratch.path() + "/modules.dep: line 4: not \"MODULE: DEPENDENCIES\"");
  dep(": kernel/a.ko\n");
  CHECK(refusal(scratch, {"a"}).find("line 1") != std::string::npos);
  dep(std::string_view("\0\0\0\0", 4));
  CHECK(refusal(scratch, {"a"}).find("line 1") != std::string::npos);
  for (const char* path : {"../../etc/shadow.ko", "/etc/a.ko", "kernel/../../a.ko", ".."}) {
    dep("kernel/a.ko: " + std::string(path) + "\n");
    CHECK(refusal(scratch, {"a"}).find("is not a path below that directory") != std::string::npos);
  }
  dep(std::string("kernel/a.ko: kernel/n\0l.ko\n", 27));
  CHECK(refusal(scratch, {"a"}).find("is not a path below") != std::string::npos);
  dep("");
  CHECK(refusal(scratch, {"a"}).starts_with("no module a "));
  std::string many = "kernel/a.ko:";
  for (int i = 0; i < 1100; ++i) many += " kernel/m" + std::to_string(i) + ".ko";
  dep(many);
  CHECK(refusal(scratch, {"a"}).find("more than 1024 modules") != std::string::npos);
}

TEST_CASE("modules: no prefix of a modules.dep makes trouble") {
  const ScratchDir scratch;
  const std::string_view whole = dependencies;
  const std::vector<std::string> names = {"virtio_mmio"};
  size_t refused = 0;
  for (size_t size_bytes = 0; size_bytes < whole.size(); size_bytes += 13) {
    scratch.write("modules.dep", whole.substr(0, size_bytes));
    if (!resolve_modules(scratch.path(), version, names).ok()) ++refused;
  }
  CHECK(refused > 20);
}

TEST_CASE("modules: the directory is the version's, or holds it") {
  const ScratchDir scratch;
  scratch.write("lib/6.1.0-test/modules.dep", "");
  const std::string parent = scratch.path() + "/lib", own = parent + "/6.1.0-test";
  CHECK(find_modules_directory(parent, version).value() == own);
  CHECK(find_modules_directory(own, version).value() == own);
  CHECK(find_modules_directory(own, "").value() == own);
  const auto other = find_modules_directory(parent, "5.0.0");
  REQUIRE_FALSE(other.ok());
  CHECK(other.error().code == ENOENT);
  CHECK(other.error().message.starts_with("no modules of kernel 5.0.0 in " + parent));
  const auto missing = find_modules_directory("", "0.0.0-none");
  REQUIRE_FALSE(missing.ok());
  CHECK(missing.error().code == ENOENT);
  CHECK(missing.error().message == "no modules of kernel 0.0.0-none in /lib/modules; give --modules DIR");
  for (const char* bad : {"../lib", "..", ".", "a/b"})
    CHECK(find_modules_directory(parent, bad).error().code == EINVAL);
}
