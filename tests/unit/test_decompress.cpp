// SPDX-License-Identifier: Apache-2.0
// Reading .xz and .zst with a bound.
#include <doctest/doctest.h>

#include "compress.hpp"
#include "scratch_dir.hpp"
#include "util/decompress.hpp"

using namespace vmm;

namespace {

std::span<const std::byte> as_input(std::string_view text) { return std::as_bytes(std::span(text)); }
std::string_view as_text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// Compressible and not, in turns, and longer than the decoder's first buffer.
std::string sample(size_t size_bytes) {
  std::string text;
  uint32_t state = 1;
  while (text.size() < size_bytes) {
    state = state * 1664525 + 1013904223;
    text += state & 0x80000000 ? std::string(64, 'a') : std::to_string(state);
  }
  text.resize(size_bytes);
  return text;
}

}  // namespace

TEST_CASE("decompress: xz and zstd give back the content up to exactly the bound") {
  for (const size_t size_bytes : {size_t{0}, size_t{1}, size_t{65536}, size_t{65537}, size_t{700000}}) {
    const std::string plain = sample(size_bytes);
    for (const std::string& packed :
         {compress_xz(plain), compress_zstd(plain), compress_zstd(plain, ContentSize::unknown)}) {
      const auto output = decompress(as_input(packed), size_bytes, "sample");
      REQUIRE(output.ok());
      CHECK(as_text(*output) == plain);
      if (size_bytes == 0) continue;
      const auto bounded = decompress(as_input(packed), size_bytes - 1, "sample");
      REQUIRE_FALSE(bounded.ok());
      CHECK(bounded.error().code == EFBIG);
      CHECK(bounded.error().message.starts_with("sample: "));
    }
  }
}

TEST_CASE("decompress: several streams in one file follow each other") {
  const std::string first = sample(1000), second = sample(70000);
  const std::string both_xz = compress_xz(first) + compress_xz(second);
  const std::string both_zstd = compress_zstd(first) + compress_zstd(second);
  for (const std::string& packed : {both_xz, both_zstd}) {
    const auto output = decompress(as_input(packed), 1 << 20, "two");
    REQUIRE(output.ok());
    CHECK(as_text(*output) == first + second);
  }
}

TEST_CASE("decompress: a bomb stops at the bound") {
  const std::string plain(64 << 20, '\0');
  for (const std::string& packed : {compress_xz(plain), compress_zstd(plain)}) {
    const auto output = decompress(as_input(packed), 1 << 20, "bomb");
    REQUIRE_FALSE(output.ok());
    CHECK(output.error().message == "bomb: unpacks to more than 1048576 bytes");
  }
}

TEST_CASE("decompress: truncated anywhere, changed or followed by rubbish is an error that names the file") {
  const std::string plain = sample(3000);
  for (const std::string& packed : {compress_xz(plain), compress_zstd(plain)}) {
    const auto is_refused = [](const std::string& bytes) {
      const auto output = decompress(as_input(bytes), 1 << 20, "/m/x.ko");
      return !output.ok() && output.error().message.starts_with("/m/x.ko: not a valid ");
    };
    for (size_t size_bytes = 6; size_bytes < packed.size(); size_bytes += 7)
      CHECK(is_refused(packed.substr(0, size_bytes)));
    CHECK(is_refused(packed.substr(0, packed.size() - 1)));
    std::string changed = packed;
    changed[packed.size() / 2] = static_cast<char>(changed[packed.size() / 2] ^ 0x55);
    CHECK(is_refused(changed));
    CHECK(is_refused(packed + "rubbish"));
  }
}

TEST_CASE("decompress: the content decides, not the name") {
  const ScratchDir scratch;
  const std::string plain = sample(5000);
  for (const std::string& packed : {plain, compress_xz(plain), compress_zstd(plain)}) {
    const std::string path = scratch.write("module.ko.xz", packed);
    const auto content = FileContent::load(path, 5000);
    REQUIRE(content.ok());
    CHECK(as_text(content->bytes()) == plain);
    const auto bounded = FileContent::load(path, 4999);
    REQUIRE_FALSE(bounded.ok());
    CHECK(bounded.error().message.starts_with(path));
  }
  const auto empty_after_unpacking = FileContent::load(scratch.write("empty.xz", compress_xz("")), 10);
  REQUIRE(empty_after_unpacking.ok());
  CHECK(empty_after_unpacking->bytes().empty());
  const auto gzip = FileContent::load(scratch.write("module.ko.gz", std::string_view("\x1f\x8b\x08 and more")), 1000);
  REQUIRE_FALSE(gzip.ok());
  CHECK(gzip.error().message.find("gzip is not supported") != std::string::npos);
  CHECK(FileContent::load(scratch.path() + "/missing", 10).error().code == ENOENT);
  CHECK_FALSE(FileContent::load(scratch.path(), 10).ok());
}
