// SPDX-License-Identifier: Apache-2.0
// Alpine's formats: versions, dependencies, indexes, gzip members, keys.
#include <doctest/doctest.h>
#include <zlib.h>

#include "apk.hpp"
#include "scratch_dir.hpp"

using namespace rootfs;
using namespace rootfs::apk;

namespace {

std::string gzipped(const std::string& text) {
  z_stream stream{};
  REQUIRE(deflateInit2(&stream, 6, Z_DEFLATED, 16 + MAX_WBITS, 8, Z_DEFAULT_STRATEGY) == Z_OK);
  std::string result(text.size() + 1000, '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(result.data());
  stream.avail_out = static_cast<uInt>(result.size());
  REQUIRE(deflate(&stream, Z_FINISH) == Z_STREAM_END);
  result.resize(stream.total_out);
  deflateEnd(&stream);
  return result;
}

std::vector<Package> index_of(const std::string& text) {
  auto packages = parse_index(text, "repo");
  REQUIRE(packages.ok());
  return std::move(packages).value();
}

std::string names(const std::vector<const Package*>& packages) {
  std::string result;
  for (const Package* package : packages)
    result += (result.empty() ? "" : " ") + package->name + "-" + package->version;
  return result;
}

std::string resolved(const std::string& index, const std::vector<std::string>& wanted) {
  const auto packages = index_of(index);
  const auto result = resolve(packages, wanted);
  return result.ok() ? names(*result) : "error: " + result.error().message;
}

}  // namespace

TEST_CASE("apk: versions in their order") {
  const char* ascending[] = {"0.9",    "1.0_alpha1", "1.0_alpha2", "1.0_beta",  "1.0_pre3",   "1.0_rc1",   "1.0",
                             "1.0-r1", "1.0-r2",     "1.0-r10",    "1.0_git20", "1.0_p1",     "1.0_p1-r1", "1.0a",
                             "1.0b",   "1.0.1",      "1.2",        "1.10",      "1.10.0_rc2", "1.10.0",    "20240101"};
  for (size_t i = 0; i < std::size(ascending); ++i)
    for (size_t j = 0; j < std::size(ascending); ++j) {
      CAPTURE(ascending[i]);
      CAPTURE(ascending[j]);
      CHECK(compare_versions(ascending[i], ascending[j]) == (i < j ? -1 : i > j ? 1 : 0));
    }
  CHECK(compare_versions("1.01", "1.1") == -1);  // digits behind a point
  CHECK(compare_versions("01", "1") == 0);
  CHECK(compare_versions("123456789012345678901234567890", "123456789012345678901234567891") == -1);
}

TEST_CASE("apk: dependencies") {
  const Dependency dependency = parse_dependency("!so:libx.so.1>=1.2-r3");
  CHECK(dependency.conflict);
  CHECK(dependency.name == "so:libx.so.1");
  CHECK(dependency.relation == ">=");
  CHECK(dependency.version == "1.2-r3");
  CHECK(parse_dependency("name@edge").name == "name");
  CHECK(satisfies("1.3", parse_dependency("x>1.2")));
  CHECK_FALSE(satisfies("1.2", parse_dependency("x>1.2")));
  CHECK(satisfies("1.2", parse_dependency("x<=1.2")));
  CHECK(satisfies("1.2.5-r1", parse_dependency("x~1.2")));
  CHECK_FALSE(satisfies("1.20", parse_dependency("x~1.2")));
  CHECK_FALSE(satisfies("", parse_dependency("x=1")));
  CHECK(satisfies("", parse_dependency("x")));
}

TEST_CASE("apk: an index is read, or refused with the line") {
  const auto packages = index_of(
      "C:Q1abc=\nP:one\nV:1.0-r0\nS:77\nD:two>1 so:three\np:cmd:one=1.0 four\nk:5\n\n"
      "C:Q2xyz=\nP:two\nV:2.0-r0\n");
  REQUIRE(packages.size() == 2);
  CHECK(packages[0].name == "one");
  CHECK(packages[0].size_bytes == 77);
  CHECK(packages[0].depends.size() == 2);
  CHECK(packages[0].provides[0].name == "cmd:one");
  CHECK(packages[0].provider_priority == 5);
  CHECK(packages[0].record.starts_with("C:Q1abc=\nP:one\n"));
  for (const char* bad : {"P:x\nV:1\n\n", "C:Q1a\nP:../x\nV:1\n\n", "C:Q1a\nP:x\nV:1/2\n\n", "no field\n",
                          "C:Xx\nP:x\nV:1\n\n", "C:Q1a\nP:.x\nV:1\n\n", "C:Q1a\nV:1\n\n"}) {
    CAPTURE(bad);
    const auto result = parse_index(bad, "repo");
    REQUIRE_FALSE(result.ok());
    CHECK(result.error().message.starts_with("index of repo, line "));
  }
}

TEST_CASE("apk: what is needed is found, in order") {
  const std::string index =
      "C:Q1a\nP:base\nV:1\nD:tool so:lib.so.1\n\n"
      "C:Q1a\nP:tool\nV:1.9\n\nC:Q1a\nP:tool\nV:1.10\nD:lib\n\n"
      "C:Q1a\nP:lib\nV:3\np:so:lib.so.1=1 \nD:base\n\n"  // a circle
      "C:Q1a\nP:mawk\nV:1\np:cmd:awk=1\nk:10\n\nC:Q1a\nP:gawk\nV:1\np:cmd:awk=1\nk:20\n\n"
      "C:Q1a\nP:hater\nV:1\nD:!gawk\n\n";
  CHECK(resolved(index, {"base"}) == "lib-3 tool-1.10 base-1");
  CHECK(resolved(index, {"tool<1.10"}) == "tool-1.9");
  CHECK(resolved(index, {"cmd:awk"}) == "gawk-1");
  CHECK(resolved(index, {"mawk", "cmd:awk"}) == "mawk-1");  // what is chosen already serves
  CHECK(resolved(index, {"base", "none"}) == "error: the image needs none, which is in none of the repositories");
  CHECK(resolved(index, {"tool>2"}) == "error: the image needs tool>2, which no package that can be chosen satisfies");
  CHECK(resolved(index, {"gawk", "hater"}) == "error: hater and gawk exclude each other");
}

TEST_CASE("apk: gzip members are taken apart, damage is refused") {
  const std::string first = gzipped("first"), second = gzipped(std::string(200000, 'x')),
                    rest = gzipped("rest") + "tail";
  const std::string all = first + second + rest;
  const auto parts = split_gzip({all.data(), all.size()}, 2);
  REQUIRE(parts.ok());
  CHECK(std::string((*parts)[0].data(), (*parts)[0].size()) == first);
  CHECK(std::string((*parts)[1].data(), (*parts)[1].size()) == second);
  CHECK(std::string((*parts)[2].data(), (*parts)[2].size()) == rest);
  for (size_t cut : {size_t{0}, size_t{5}, first.size() - 1, first.size() + 3}) {
    CAPTURE(cut);
    CHECK_FALSE(split_gzip({all.data(), cut}, 2).ok());
  }
  std::string damaged = all;
  damaged[first.size() - 6] ^= 1;  // the checksum
  CHECK_FALSE(split_gzip({damaged.data(), damaged.size()}, 1).ok());
}

TEST_CASE("apk: keys") {
  const ScratchDir scratch;
  CHECK_FALSE(Keys::load(scratch.path() + "/none").ok());
  CHECK_FALSE(Keys::load(scratch.path()).ok());
  scratch.write("x.rsa.pub", std::string_view("no key"));
  const auto keys = Keys::load(scratch.path());
  REQUIRE_FALSE(keys.ok());
  CHECK(keys.error().message.find("x.rsa.pub: not a public RSA key") != std::string::npos);
}

TEST_CASE("apk: digests") {
  CHECK(hex(digest("SHA256", {})) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(base64(digest("SHA1", std::string("abc"))) == "qZk+NkcGgWq6PiVxeFDCbJzQ2J0=");
  const auto fields = parse_pkginfo("# comment = x\npkgname = a\ndepend = one\ndepend = two = 2\nnoise\n");
  CHECK(fields.size() == 3);
  CHECK(fields.find("pkgname")->second == "a");
  CHECK(fields.count("depend") == 2);
}
