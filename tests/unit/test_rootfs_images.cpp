// SPDX-License-Identifier: Apache-2.0
// Images written: qcow2 read back by its specification, ext4 by its own checker.
#include <doctest/doctest.h>
#include <endian.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <random>

#include "ext4_image.hpp"
#include "output_file.hpp"
#include "process.hpp"
#include "qcow2_writer.hpp"
#include "scratch_dir.hpp"

using namespace rootfs;

namespace {

constexpr uint64_t kCluster = 65536;

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

template <typename T>
T big_endian(const std::string& data, uint64_t at) {
  REQUIRE(at + sizeof(T) <= data.size());
  T value;
  std::memcpy(&value, data.data() + at, sizeof value);
  return sizeof(T) == 8   ? static_cast<T>(be64toh(value))
         : sizeof(T) == 4 ? static_cast<T>(be32toh(static_cast<uint32_t>(value)))
                          : static_cast<T>(be16toh(static_cast<uint16_t>(value)));
}

// A reader of its own: what the guest would see of a cluster.
std::string cluster_of(const std::string& image, uint64_t number) {
  const uint64_t l1 = big_endian<uint64_t>(image, 40);
  const uint64_t l2 = big_endian<uint64_t>(image, l1 + number / 8192 * 8) & 0x00fffffffffffe00;
  if (l2 == 0) return std::string(kCluster, '\0');
  const uint64_t data = big_endian<uint64_t>(image, l2 + number % 8192 * 8) & 0x00fffffffffffe00;
  return data == 0 ? std::string(kCluster, '\0') : image.substr(data, kCluster);
}

}  // namespace

TEST_CASE("rootfs qcow2: the guest reads what the raw image holds, and zeros take no space") {
  const ScratchDir scratch;
  // 1.5 GiB: three L1 entries, of which the second stays empty; a part of a cluster at the end.
  const uint64_t size_bytes = (uint64_t{3} << 29) + 512;
  const Fd raw(::open((scratch.path() + "/raw").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  const Fd output(::open((scratch.path() + "/qcow2").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  REQUIRE(::ftruncate(raw.get(), static_cast<off_t>(size_bytes)) == 0);
  std::mt19937 random(7);
  std::map<uint64_t, std::string> written;
  for (const uint64_t number : {uint64_t{0}, uint64_t{3}, uint64_t{8191}, uint64_t{16384}, size_bytes / kCluster}) {
    std::string data(number == size_bytes / kCluster ? 512 : kCluster, '\0');
    for (char& c : data) c = static_cast<char>(random());
    REQUIRE(::pwrite(raw.get(), data.data(), data.size(), static_cast<off_t>(number * kCluster)) ==
            static_cast<ssize_t>(data.size()));
    data.resize(kCluster);
    written[number] = data;
  }
  const std::string zeros(kCluster, '\0');
  REQUIRE(::pwrite(raw.get(), zeros.data(), zeros.size(), 5 * kCluster) == static_cast<ssize_t>(kCluster));
  REQUIRE(write_qcow2(raw, size_bytes, output, nullptr).ok());

  const std::string image = read_file(scratch.path() + "/qcow2");
  CHECK(image.starts_with("QFI\xfb"));
  CHECK(big_endian<uint32_t>(image, 4) == 3);
  CHECK(big_endian<uint64_t>(image, 24) == size_bytes);
  for (uint64_t number = 0; number <= size_bytes / kCluster; ++number) {
    const auto found = written.find(number);
    if (number % 1000 == 0 || found != written.end() || number < 8) {
      CAPTURE(number);
      CHECK(cluster_of(image, number) == (found == written.end() ? zeros : found->second));
    }
  }
  // Header, L1, refcount table and block, two L2 tables (and the last entry's), five of data: each counted once.
  const uint64_t clusters = image.size() / kCluster;
  CHECK(image.size() % kCluster == 0);
  CHECK(clusters == 1 + 1 + 1 + 1 + 3 + 5);
  const uint64_t block = big_endian<uint64_t>(image, big_endian<uint64_t>(image, 48));
  for (uint64_t i = 0; i < clusters + 3; ++i)
    CHECK(big_endian<uint16_t>(image, block + i * 2) == (i < clusters ? 1 : 0));
}

TEST_CASE("rootfs ext4: a sound file system; too small a size says what is needed, and that does") {
  const ScratchDir scratch;
  Tree tree;
  Spool spool = std::move(Spool::make(scratch.path())).value();
  std::string text(20 << 20, '\0');
  std::mt19937 random(5);
  for (size_t i = 0; i < text.size(); i += 3) text[i] = static_cast<char>(random() | 1);
  REQUIRE(tree.put("large", spool.file(text, 0644).value()).ok());
  for (int i = 0; i < 3000; ++i)
    REQUIRE(tree.put("many/small file number " + std::to_string(i), spool.file("x", 0600).value()).ok());
  REQUIRE(tree.link("second name", "large").ok());
  Progress progress(Loudness::quiet);
  const std::string path = scratch.write("image", std::string_view());
  const auto refused = write_ext4(path, 24 << 20, tree, progress);
  REQUIRE_FALSE(refused.ok());
  const std::string& message = refused.error().message;
  CHECK(message.starts_with("--size: 24.0 MiB given; the files need at least "));
  const uint64_t needed = std::stoull(message.substr(message.rfind(' ') + 1));
  CHECK(::truncate(path.c_str(), 0) == 0);
  REQUIRE(write_ext4(path, needed << 20, tree, progress).ok());
  CHECK(Process::run({"e2fsck", "-fn", path}).ok());
  const auto told = Process::output({"debugfs", "-R", "stat /large", path});
  REQUIRE(told.ok());
  CHECK(told->find("Links: 2") != std::string::npos);
  CHECK(default_image_size(measure(tree)) == uint64_t{4} << 30);
}

TEST_CASE("rootfs: an image takes its name at the end only") {
  const ScratchDir scratch;
  const std::string path = scratch.path() + "/image";
  const auto entries = [&] { return std::distance(std::filesystem::directory_iterator(scratch.path()), {}); };
  {
    auto file = OutputFile::make(path, Existing::refuse);
    REQUIRE(file.ok());
    CHECK_FALSE(std::filesystem::exists(path));
    CHECK(entries() == 1);
  }
  CHECK(entries() == 0);
  {
    auto file = OutputFile::make(path, Existing::refuse);
    REQUIRE(file.ok());
    scratch.write("image", std::string_view("came in between"));
    CHECK_FALSE(file->commit().ok());
  }
  CHECK(read_file(path) == "came in between");
  CHECK(entries() == 1);
  CHECK_FALSE(OutputFile::make(path, Existing::refuse).ok());
  for (const Existing existing : {Existing::refuse, Existing::replace})
    CHECK(OutputFile::make(scratch.path(), existing).error().message ==
          scratch.path() + ": is a directory; give the name of a file");
  {
    const auto temporary = OutputFile::make_temporary(scratch.path());  // whatever has that name
    REQUIRE(temporary.ok());
    CHECK(std::filesystem::is_regular_file(temporary->temporary_path()));
  }
  auto file = OutputFile::make(path, Existing::replace);
  REQUIRE(file.ok());
  REQUIRE(file->commit().ok());
  CHECK(read_file(path).empty());
}

TEST_CASE("rootfs: programs that fail tell their last words") {
  CHECK(Process::run({"true"}).ok());
  const auto missing = Process::run({"no-such-program-of-any-kind"});
  CHECK(missing.error().message == "no-such-program-of-any-kind is not installed");
  const auto failed = Process::run({"sh", "-c", "for i in 1 2 3 4 5 6 7 8 9; do echo line $i >&2; done; exit 7"});
  REQUIRE_FALSE(failed.ok());
  CHECK(failed.error().message.starts_with("sh failed with status 7\nsh: line 4\n"));
  CHECK(failed.error().message.ends_with("line 9"));
  CHECK(Process::output({"printf", "%s", "a;b $HOME"}).value() == "a;b $HOME");
  CHECK_FALSE(Process::output({"head", "-c", "100", "/dev/zero"}, 50).ok());
  CHECK(human_size(1536) == "1.5 KiB");
}
