// SPDX-License-Identifier: Apache-2.0
// Manifests of plugin files, of damaged ones, and of files that are none.
#include <doctest/doctest.h>

#include <cstring>
#include <random>
#include <stdexcept>

#include "clone/abi/plugin.h"
#include "manifest_file.hpp"
#include "plugin/elf_exports.hpp"
#include "plugin/manifest.hpp"
#include "util/mapping.hpp"

using namespace vmm;
using namespace vmm::test;

namespace {

std::vector<std::byte> built_plugin() {
  auto file = map_file(CLONE_TEST_PLUGIN_DIR "/virtio-rng.so");
  if (!file.ok()) throw std::runtime_error(file.error().message);
  return {file->bytes().begin(), file->bytes().end()};
}

std::string error_of(const std::vector<std::byte>& file) {
  const auto manifest = parse_manifest(file);
  return manifest.ok() ? "" : manifest.error().message;
}
std::string error_of(const clone_manifest& manifest) { return error_of(elf_with(&manifest, sizeof manifest)); }

}  // namespace

TEST_CASE("manifest: a built plugin's says what it is") {
  const auto file = built_plugin();
  const auto manifest = parse_manifest(file);
  REQUIRE(manifest.ok());
  CHECK(manifest->id == "virtio-rng");
  CHECK(manifest->abi_major == CLONE_ABI_MAJOR);
  CHECK(manifest->licence == "Apache-2.0");
  REQUIRE(manifest->find("device", "virtio-rng"));
  CHECK(manifest->find("device", "virtio-rng")->by_default);
  CHECK(!manifest->find("transport", "virtio-rng"));
  CHECK(check_abi(*manifest).ok());
  CHECK(*exported_symbols(file) == std::vector<std::string>{CLONE_PLUGIN_ENTRY});
}

TEST_CASE("manifest: records of what is provided") {
  const clone_manifest raw = good_manifest();
  const auto manifest = parse_manifest(elf_with(&raw, sizeof raw));
  REQUIRE(manifest.ok());
  REQUIRE(manifest->provides.size() == 1);
  CHECK(manifest->provides[0].by_default);
  REQUIRE(manifest->flags.size() == 2);
  CHECK(manifest->flags[0].flag == "--test");
  CHECK(manifest->flags[0].device == "tester");
  CHECK(manifest->flags[0].value_is_optional);
  CHECK(manifest->flags[0].expansion == "kind=%");
  CHECK(manifest->flags[0].help == "Tests.");
  CHECK(!manifest->flags[1].value_is_optional);
  REQUIRE(manifest->flag_options.size() == 2);
  const FlagOption& spare = manifest->flag_options[0];
  CHECK(spare.flag == "--spare");
  CHECK(spare.device == "tester");
  CHECK(spare.which == KeyValues{{"main", "on"}});
  CHECK(spare.value_name == "[WHERE]");
  CHECK(spare.value_is_optional);
  CHECK(spare.option == "spare");
  CHECK(spare.left_out == "memory");
  CHECK(spare.help == "Spares it.");
  CHECK(manifest->flag_options[1].which.empty());
  CHECK(!manifest->flag_options[1].value_is_optional);
  CHECK(manifest->unknown_records.empty());
  for (const char* bad :
       {"device\n", "device\ttester\n", "device\tTester\t\n", "device\t\t\n", "flag\t--x\n",
        "flag\tx\ttester\tV\tk=%\thelp\n", "flag\t--\ttester\tV\tk=%\thelp\n",
        "flag-option\t--x\ttester\t\tV\tkey\tvalue\n", "flag-option\tx\ttester\t\tV\tkey\tvalue\thelp\n",
        "flag-option\t--x\ttester\t\tV\t\tvalue\thelp\n", "flag-option\t--x\ttester\t=on\tV\tkey\tvalue\thelp\n"}) {
    CAPTURE(bad);
    clone_manifest broken = good_manifest();
    std::memset(broken.provides, 0, sizeof broken.provides);
    std::strcpy(broken.provides, bad);
    CHECK(error_of(broken).find("cannot be read") != std::string::npos);
  }
}

TEST_CASE("manifest: records of a newer interface do not stand in a plugin's way") {
  clone_manifest newer = good_manifest();
  std::strcat(newer.provides, "wish\nwish-list\tOf\tanything\nhope\x1b\t\t\n");
  std::strcat(newer.provides, CLONE_PROVIDES("transport", "carrier", "") "device\tmore\t\tof a newer one\n");
  const auto manifest = parse_manifest(elf_with(&newer, sizeof newer));
  REQUIRE_MESSAGE(manifest.ok(), (manifest.ok() ? "" : manifest.error().message));
  CHECK(manifest->unknown_records == std::vector<std::string>{"wish", "wish-list", "hope?"});
  CHECK(manifest->provides.size() == 3);
  CHECK(manifest->find("transport", "carrier"));
  CHECK(manifest->find("device", "more"));
}

TEST_CASE("manifest: versions are judged with both numbers named") {
  clone_manifest other_major = good_manifest();
  other_major.abi_major = 7;
  std::memset(other_major.id, 0xff, sizeof other_major.id);  // means something else there
  const auto read = parse_manifest(elf_with(&other_major, sizeof other_major));
  REQUIRE(read.ok());
  CHECK(check_abi(*read).error().message ==
        "built for plugin interface 7.0, this clone has 1.0 (the major number must be the same)");
  clone_manifest newer = good_manifest();
  newer.least_host_minor = CLONE_ABI_MINOR + 1;
  CHECK(check_abi(*parse_manifest(elf_with(&newer, sizeof newer))).error().message ==
        "needs plugin interface 1.1 or later, this clone has 1.0");
  clone_manifest built_with_newer = good_manifest();
  built_with_newer.abi_minor = CLONE_ABI_MINOR + 5;
  CHECK(check_abi(*parse_manifest(elf_with(&built_with_newer, sizeof built_with_newer))).ok());
}

TEST_CASE("manifest: one that grew or is older is read as far as both know it") {
  std::vector<std::byte> grown(sizeof(clone_manifest) + 64, std::byte{0xee});
  clone_manifest raw = good_manifest();
  raw.size = static_cast<uint32_t>(grown.size());
  std::memcpy(grown.data(), &raw, sizeof raw);
  CHECK(error_of(elf_with(grown.data(), grown.size())).empty());
  raw.size = offsetof(clone_manifest, provides);
  CHECK(parse_manifest(elf_with(&raw, sizeof raw))->provides.empty());
}

TEST_CASE("manifest: what is wrong with it is said") {
  clone_manifest no_magic = good_manifest();
  no_magic.magic[0] = 'X';
  CHECK(error_of(no_magic) == "not a plugin: its manifest does not begin with CLONEPLG");
  clone_manifest too_large = good_manifest();
  too_large.size = sizeof too_large + 1;
  CHECK(error_of(too_large) == "not a plugin: its manifest has a wrong size");
  clone_manifest too_small = good_manifest();
  too_small.size = 8;
  CHECK(error_of(too_small) == "not a plugin: its manifest has a wrong size");
  clone_manifest no_end = good_manifest();
  std::memset(no_end.id, 'a', sizeof no_end.id);
  CHECK(error_of(no_end).empty());
  clone_manifest bad_id = good_manifest();
  std::strcpy(bad_id.id, "../evil");
  CHECK(error_of(bad_id).find("'../evil'") != std::string::npos);
  CHECK(error_of(elf_with("short", 5)) == "not a plugin: its manifest is too short");
  const std::string text = "#!/bin/sh\n";
  const auto* bytes = reinterpret_cast<const std::byte*>(text.data());
  CHECK(error_of(std::vector<std::byte>(bytes, bytes + text.size())) == "not a plugin: not an ELF file");
  CHECK(error_of(elf_with("", 0)) == "not a plugin: its manifest is too short");
}

TEST_CASE("manifest: terminal escapes of a hostile file do not reach the terminal") {
  clone_manifest escaping = good_manifest();
  std::strcpy(escaping.description, "fine\x1b[2J\x07");
  const auto manifest = parse_manifest(elf_with(&escaping, sizeof escaping));
  REQUIRE(manifest.ok());
  CHECK(manifest->description == "fine?[2J?");
}

TEST_CASE("manifest: truncated files are refused or read, never more than is there") {
  const auto whole = built_plugin();
  unsigned refused = 0;
  for (size_t size_bytes = 0; size_bytes < whole.size(); size_bytes += 64) {
    // A heap block of the exact size: AddressSanitizer sees a byte too many.
    const std::vector<std::byte> part(whole.begin(), whole.begin() + static_cast<ptrdiff_t>(size_bytes));
    refused += !parse_manifest(part).ok();
    (void)exported_symbols(part);
  }
  // The section headers stand at the end.
  CHECK(refused == (whole.size() + 63) / 64);
}

TEST_CASE("manifest: flipped bytes and wild headers are survived") {
  const auto whole = built_plugin();
  const clone_manifest raw = good_manifest();
  const auto small = elf_with(&raw, sizeof raw);
  std::mt19937_64 random(42);
  unsigned read = 0, refused = 0;
  for (int round = 0; round < 4000; ++round) {
    auto file = round % 2 ? small : whole;
    Elf64_Ehdr header;
    std::memcpy(&header, file.data(), sizeof header);
    for (uint64_t flips = 1 + random() % 4; flips != 0; --flips) {
      // Mostly where it matters: the header and the section headers.
      const uint64_t at = random() % 3 == 0   ? random() % sizeof header
                          : random() % 2 == 0 ? header.e_shoff + random() % (file.size() - header.e_shoff)
                                              : random() % file.size();
      file[at] = static_cast<std::byte>(random() % 4 ? random() : 0xff);
    }
    const auto manifest = parse_manifest(file);
    (manifest.ok() ? read : refused) += 1;
    if (!manifest.ok()) CHECK(!manifest.error().message.empty());
    (void)exported_symbols(file);
  }
  CHECK(read > 100);
  CHECK(refused > 100);
}
