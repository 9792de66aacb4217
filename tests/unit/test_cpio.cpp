// SPDX-License-Identifier: Apache-2.0
// The initramfs archive writer.
#include <doctest/doctest.h>
#include <sys/stat.h>

#include "boot/cpio.hpp"
#include "cpio_reader.hpp"

using namespace vmm;

namespace {

std::span<const std::byte> as_content(std::string_view text) { return std::as_bytes(std::span(text)); }

std::vector<std::byte> archive_of(std::span<const CpioEntry> entries, std::byte fill = std::byte{0xaa}) {
  auto size_bytes = cpio_size_bytes(entries);
  REQUIRE(size_bytes.ok());
  std::vector<std::byte> output(*size_bytes, fill);
  write_cpio(entries, output);
  return output;
}

}  // namespace

TEST_CASE("cpio: every kind of entry comes back as it went in") {
  const std::vector<CpioEntry> entries = {
      CpioEntry::directory("dev"),
      CpioEntry::character_device("dev/console", 5, 1),
      CpioEntry::file("init", as_content("#!/bin/sh\n"), 0755),
      CpioEntry::symlink("link", "init"),
      CpioEntry::file("empty", {}),
  };
  const auto members = read_cpio(archive_of(entries));
  REQUIRE(members);
  REQUIRE(members->size() == 5);
  CHECK((*members)[0].name == "dev");
  CHECK((*members)[0].mode == (S_IFDIR | 0755));
  CHECK((*members)[0].links == 2);
  CHECK((*members)[1].mode == (S_IFCHR | 0600));
  CHECK((*members)[1].rmajor == 5);
  CHECK((*members)[1].rminor == 1);
  CHECK((*members)[2].mode == (S_IFREG | 0755));
  CHECK((*members)[2].content == "#!/bin/sh\n");
  CHECK((*members)[3].mode == (S_IFLNK | 0777));
  CHECK((*members)[3].content == "init");
  CHECK((*members)[4].content.empty());
  for (const CpioMember& member : *members) {
    CHECK(member.uid == 0);
    CHECK(member.gid == 0);
    CHECK(member.mtime == 0);
    if (member.name != "dev") CHECK(member.links == 1);  // 2 would make the kernel look for a hard link
  }
}

TEST_CASE("cpio: names and contents of each length modulo 4 are padded with zeros over dirty memory") {
  for (size_t name_length = 1; name_length <= 8; ++name_length) {
    for (size_t content_length = 0; content_length <= 8; ++content_length) {
      const std::string content(content_length, 'c');
      const std::vector<CpioEntry> entries = {CpioEntry::file(std::string(name_length, 'n'), as_content(content))};
      const auto archive = archive_of(entries);
      CHECK(archive.size() % 4 == 0);
      const auto members = read_cpio(archive);
      REQUIRE(members);
      REQUIRE(members->size() == 1);
      CHECK(members->front().content == content);
    }
  }
}

TEST_CASE("cpio: the same entries give the same bytes, and a cut archive is seen") {
  const std::vector<CpioEntry> entries = {CpioEntry::directory("a"), CpioEntry::file("a/b", as_content("text"))};
  const auto archive = archive_of(entries, std::byte{0});
  CHECK(archive == archive_of(entries, std::byte{0xff}));
  for (size_t size_bytes = 0; size_bytes < archive.size(); ++size_bytes)
    CHECK_FALSE(read_cpio(std::span(archive).first(size_bytes)));
}

TEST_CASE("cpio: entries that no archive can hold are refused by name") {
  for (const std::string& name : {std::string(), std::string("/absolute"), std::string("TRAILER!!!"),
                                  std::string("nul\0inside", 10), std::string(4096, 'x')}) {
    const std::vector<CpioEntry> entries = {CpioEntry::directory(name)};
    const auto size_bytes = cpio_size_bytes(entries);
    REQUIRE_FALSE(size_bytes.ok());
    CHECK(size_bytes.error().message.find(name) != std::string::npos);
  }
  // A size that does not fit eight hexadecimal digits; the content itself is never touched.
  const std::byte one{};
  const std::vector<CpioEntry> entries = {CpioEntry::file("huge", std::span(&one, size_t{1} << 32))};
  CHECK_FALSE(cpio_size_bytes(entries).ok());
}
