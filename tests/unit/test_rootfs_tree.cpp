// SPDX-License-Identifier: Apache-2.0
// The tree that images are made from: paths, links, layers, archives that mean harm.
#include <archive.h>
#include <archive_entry.h>
#include <doctest/doctest.h>
#include <sys/sysmacros.h>

#include "archive.hpp"
#include "scratch_dir.hpp"
#include "setup.hpp"
#include "tree.hpp"

using namespace rootfs;

namespace {

InodePointer inode(mode_t mode) {
  auto result = std::make_shared<Inode>();
  result->mode = mode;
  return result;
}

struct Member {
  std::string name;
  mode_t type = AE_IFREG;
  std::string link;  // a symbolic link's target, or a hard link's
  std::string content;
};

std::string tar_of(const std::vector<Member>& members) {
  std::string result(1 << 20, '\0');
  size_t used = 0;
  archive* handle = archive_write_new();
  archive_write_set_format_pax(handle);
  REQUIRE(archive_write_open_memory(handle, result.data(), result.size(), &used) == ARCHIVE_OK);
  for (const Member& member : members) {
    archive_entry* entry = archive_entry_new();
    archive_entry_set_pathname(entry, member.name.c_str());
    archive_entry_set_perm(entry, 04751);
    archive_entry_set_uid(entry, 3000000);
    archive_entry_set_size(entry, static_cast<la_int64_t>(member.content.size()));
    if (member.type == AE_IFLNK) archive_entry_set_symlink(entry, member.link.c_str());
    if (member.type == AE_IFREG && !member.link.empty()) archive_entry_set_hardlink(entry, member.link.c_str());
    archive_entry_set_filetype(entry, member.type);
    if (member.type == AE_IFREG && member.link.empty()) archive_entry_xattr_add_entry(entry, "user.x", "y", 1);
    if (member.type == AE_IFCHR) archive_entry_set_rdev(entry, makedev(259, 70000));
    REQUIRE(archive_write_header(handle, entry) == ARCHIVE_OK);
    if (!member.content.empty()) archive_write_data(handle, member.content.data(), member.content.size());
    archive_entry_free(entry);
  }
  archive_write_close(handle);
  archive_write_free(handle);
  result.resize(used);
  return result;
}

struct Fixture {
  ScratchDir scratch;
  Tree tree;
  Spool spool = std::move(Spool::make(scratch.path())).value();

  std::string unpacked(const std::vector<Member>& members, Whiteouts whiteouts = Whiteouts::plain_files) {
    const std::string tar = tar_of(members);
    ArchiveOptions options;
    options.whiteouts = whiteouts;
    const auto result = unpack(bytes_of(std::span<const char>(tar)), tree, spool, options);
    return result.ok() ? "" : result.error().message;
  }
  std::string content(const std::string& path) {
    const InodePointer file = tree.find(path);
    if (!file || !file->is_regular()) return "(none)";
    return read_text(file->content, 1 << 20).value();
  }
};

}  // namespace

TEST_CASE("rootfs tree: links are followed inside of it only") {
  Tree tree;
  REQUIRE(tree.put("usr/lib/file", inode(S_IFREG | 0644)).ok());
  REQUIRE(tree.put_symlink("lib", "usr/lib").ok());
  REQUIRE(tree.put_symlink("up", "../../../../usr").ok());
  REQUIRE(tree.put_symlink("absolute", "/usr/lib").ok());
  REQUIRE(tree.put_symlink("loop", "loop").ok());
  CHECK(tree.find("lib/file") == tree.find("/usr/lib/file"));
  CHECK(tree.find("up/lib/file") == tree.find("usr/lib/file"));
  CHECK(tree.find("absolute/../../usr/lib/./file") == tree.find("usr/lib/file"));
  CHECK(tree.find("lib", Tree::LastLink::keep)->is_symlink());
  CHECK(tree.find("loop") == nullptr);
  CHECK(tree.find("usr/lib/file/below") == nullptr);
  // What is put behind a link lands where the link leads.
  REQUIRE(tree.put("lib/second", inode(S_IFREG | 0644)).ok());
  CHECK(tree.find("usr/lib/second"));
  CHECK_FALSE(tree.put("loop/x", inode(S_IFREG)).ok());
  CHECK_FALSE(tree.put("usr/lib/file/x", inode(S_IFREG)).ok());
}

TEST_CASE("rootfs tree: names that are refused") {
  Tree tree;
  for (const std::string& name :
       {std::string("../x"), std::string("a/../../x"), std::string("/x"), std::string(), std::string(".."),
        std::string(256, 'x'), std::string(5000, '/') + "x", std::string("a\0b", 3)}) {
    CAPTURE(name.substr(0, 40));
    CHECK_FALSE(tree.put(name, inode(S_IFREG)).ok());
  }
  CHECK(tree.put(std::string(255, 'x'), inode(S_IFREG)).ok());
  CHECK(tree.put("./a//b/./c", inode(S_IFREG)).ok());
  CHECK(tree.find("a/b/c"));
}

TEST_CASE("rootfs tree: a directory over a directory keeps what is in it, another file does not") {
  Tree tree;
  REQUIRE(tree.put("d/x", inode(S_IFREG)).ok());
  REQUIRE(tree.put("d", inode(S_IFDIR | 0700)).ok());
  CHECK(tree.find("d/x"));
  CHECK((tree.find("d")->mode & 0777) == 0700);
  REQUIRE(tree.put("d", inode(S_IFREG)).ok());
  CHECK_FALSE(tree.find("d/x"));
}

TEST_CASE_FIXTURE(Fixture, "rootfs archive: everything about a file is kept") {
  REQUIRE(unpacked({{"./d", AE_IFDIR},
                    {"d/a file\nwith a line", AE_IFREG, "", "content"},
                    {"hard", AE_IFREG, "d/a file\nwith a line"},
                    {"soft", AE_IFLNK, "/nowhere"},
                    {"node", AE_IFCHR}}) == "");
  const InodePointer file = tree.find("d/a file\nwith a line");
  REQUIRE(file);
  CHECK(file == tree.find("hard"));
  CHECK(content("hard") == "content");
  CHECK((file->mode & 07777) == 04751);
  CHECK(file->uid == 3000000);
  CHECK(file->attributes.at("user.x") == "y");
  CHECK(tree.find("soft", Tree::LastLink::keep)->target == "/nowhere");
  CHECK(tree.find("node")->device == makedev(259, 70000));
}

TEST_CASE_FIXTURE(Fixture, "rootfs archive: what means harm is refused") {
  CHECK(unpacked({{"../escape", AE_IFREG, "", "x"}}).find("'..' in a name") != std::string::npos);
  CHECK(unpacked({{"/etc/passwd", AE_IFREG, "", "x"}}).find("an absolute name") != std::string::npos);
  CHECK(unpacked({{"x", AE_IFREG, "../../etc/passwd"}}).find("'..' in a name") != std::string::npos);
  CHECK(unpacked({{"x", AE_IFREG, "etc/passwd"}}).find("which is not there") != std::string::npos);
  CHECK(unpacked({{"out", AE_IFLNK, "/tmp"}, {"out/file", AE_IFREG, "", "x"}}).find("leads nowhere") !=
        std::string::npos);
  CHECK(unpacked({{"f", AE_IFREG, "", "x"}, {"f/g", AE_IFREG, "", "x"}}).find("not a directory") != std::string::npos);
  CHECK(unpacked({{"d", AE_IFDIR}, {"e", AE_IFREG, "d"}}).find("hard link to a directory") != std::string::npos);
  const std::string whole = tar_of({{"x", AE_IFREG, "", std::string(5000, 'x')}});
  CHECK_FALSE(unpack(bytes_of(std::span<const char>(whole).first(3000)), tree, spool).ok());
  const std::string noise(4096, 'n');
  CHECK_FALSE(unpack(bytes_of(std::span<const char>(noise)), tree, spool).ok());
}

TEST_CASE_FIXTURE(Fixture, "rootfs archive: layers hide what is below them") {
  tree.set_layer(1);
  REQUIRE(unpacked({{"a/old", AE_IFREG, "", "1"},
                    {"a/both", AE_IFREG, "", "1"},
                    {"b/old", AE_IFREG, "", "1"},
                    {"gone/x", AE_IFREG, "", "1"}},
                   Whiteouts::remove) == "");
  tree.set_layer(2);
  // The opaque mark comes after a file of the same layer, which stays.
  REQUIRE(unpacked({{"a/new", AE_IFREG, "", "2"}, {"a/.wh..wh..opq"}, {"b/.wh.old"}, {".wh.gone"}, {".wh.not-there"}},
                   Whiteouts::remove) == "");
  CHECK(tree.find("a/old") == nullptr);
  CHECK(tree.find("a/both") == nullptr);
  CHECK(content("a/new") == "2");
  CHECK(tree.find("b"));
  CHECK(tree.find("b/old") == nullptr);
  CHECK(tree.find("gone") == nullptr);
  // Elsewhere such a name is a file like any other.
  REQUIRE(unpacked({{".wh.b", AE_IFREG, "", "plain"}}) == "");
  CHECK(content(".wh.b") == "plain");
}

TEST_CASE("rootfs: host names") {
  CHECK(check_hostname("web-1.example").ok());
  for (const std::string& name :
       {std::string(), std::string("a b"), std::string("-a"), std::string("a\n"), std::string(65, 'a')})
    CHECK_FALSE(check_hostname(name).ok());
}
