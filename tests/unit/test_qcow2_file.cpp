// SPDX-License-Identifier: Apache-2.0
// What a qcow2 file holds beside the guest's data: more tables than memory does, parts that are not ours, free
// clusters.
#include <endian.h>
#include <sys/stat.h>

#include <cstring>

#include "disk_rig.hpp"
#include "image_tools.hpp"
#include "scratch_dir.hpp"

using namespace vmm;
using namespace vmm::test;

namespace {

void create(const std::string& folder, const std::string& command) {
  REQUIRE_MESSAGE(shell(folder, command) == 0, log_of(folder));
}

// A sector that says where it is and which version of it.
std::vector<uint8_t> stamp(uint64_t sector, uint64_t version) {
  std::vector<uint8_t> bytes(kSector);
  const uint64_t word = version ? version << 48 | sector : 0;
  for (size_t i = 0; i < kSector; i += sizeof word) std::memcpy(bytes.data() + i, &word, sizeof word);
  return bytes;
}

// Requests for single sectors, as many in flight as the queue has slots for.
class Stream {
 public:
  explicit Stream(Rig& rig) : rig_(rig) {}

  void write(uint64_t sector, const std::vector<uint8_t>& bytes) { submit(VIRTIO_BLK_T_OUT, sector, bytes); }
  void expect(uint64_t sector, const std::vector<uint8_t>& bytes) { submit(VIRTIO_BLK_T_IN, sector, bytes); }
  void flush() { submit(VIRTIO_BLK_T_FLUSH, 0, {}); }
  void drain() {
    while (!in_flight_.empty()) collect();
  }

 private:
  struct Request {
    uint32_t type;
    std::vector<uint8_t> bytes;
  };

  void submit(uint32_t type, uint64_t sector, const std::vector<uint8_t>& bytes) {
    auto& slots = rig_.lines()[0].free_slots;
    while (slots.empty()) collect();
    const uint32_t slot = slots.back();
    slots.pop_back();
    const uint64_t base = Rig::slot(0, slot);
    *rig_.at<virtio_blk_outhdr>(base) = {type, 0, sector};
    *rig_.at<uint8_t>(base + 16) = kNoStatus;
    std::vector<FakeDriver::Buffer> buffers = {{base, 16, false}};
    if (type == VIRTIO_BLK_T_OUT) std::copy(bytes.begin(), bytes.end(), rig_.bytes(base + kSlotData, bytes.size()));
    if (type != VIRTIO_BLK_T_FLUSH)
      buffers.push_back({base + kSlotData, static_cast<uint32_t>(bytes.size()), type == VIRTIO_BLK_T_IN});
    buffers.push_back({base + 16, 1, true});
    in_flight_[slot] = {type, bytes};
    rig_.submit(0, slot, buffers);
  }
  void collect() {
    REQUIRE(rig_.wait());
    for (const uint32_t slot : rig_.take(0)) {
      const Request& request = in_flight_.at(slot);
      const uint64_t base = Rig::slot(0, slot);
      REQUIRE(*rig_.at<uint8_t>(base + 16) == VIRTIO_BLK_S_OK);
      if (request.type == VIRTIO_BLK_T_IN)
        REQUIRE(
            std::equal(request.bytes.begin(), request.bytes.end(), rig_.bytes(base + kSlotData, request.bytes.size())));
      in_flight_.erase(slot);
      rig_.lines()[0].free_slots.push_back(slot);
    }
  }

  Rig& rig_;
  std::map<uint32_t, Request> in_flight_;
};

uint64_t big_endian_64(const std::vector<uint8_t>& bytes, size_t offset) {
  uint64_t value;
  REQUIRE(bytes.size() >= offset + sizeof value);
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return be64toh(value);
}
uint32_t big_endian_32(const std::vector<uint8_t>& bytes, size_t offset) {
  uint32_t value;
  REQUIRE(bytes.size() >= offset + sizeof value);
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return be32toh(value);
}

// Of the header (docs/interop/qcow2.txt).
constexpr size_t kBackingOffset = 8, kAutoclear = 88, kHeaderLength = 100;

uint64_t autoclear(const std::string& image) { return big_endian_64(read_file(image), kAutoclear); }

struct Space {
  uint64_t blocks, bytes;
};
// Of a disk at rest: what follows on a flush is done too.
Space space(Rig& rig, const std::string& image) {
  REQUIRE(rig.run(VIRTIO_BLK_T_FLUSH, 0, {}) == VIRTIO_BLK_S_OK);
  REQUIRE(rig.device().quiesce() == CLONE_OK);
  REQUIRE(rig.device().resume() == CLONE_OK);
  struct stat status {};
  REQUIRE(::stat(image.c_str(), &status) == 0);
  return {static_cast<uint64_t>(status.st_blocks), static_cast<uint64_t>(status.st_size)};
}

// Bytes in clusters that hold data, as QEMU finds them.
uint64_t mapped_bytes(const std::string& folder) {
  create(folder, "qemu-img map -U --output=human x.qcow2 | awk 'NR > 1 && $4 ~ /x.qcow2$/ { print $2 }' >mapped");
  std::ifstream lines(folder + "/mapped");
  uint64_t bytes = 0;
  for (std::string line; std::getline(lines, line);) bytes += std::stoull(line, nullptr, 0);
  return bytes;
}

}  // namespace

TEST_CASE("qcow2: more tables than are kept in memory") {
  ScratchDir scratch("/dev/shm");
  const std::string folder = scratch.path();
  // A table maps 32 KiB, 64 sectors; 8192 of them are kept.
  create(folder, "qemu-img create -f qcow2 -o cluster_size=512 x.qcow2 1G; truncate -s 1G model.raw");
  constexpr uint64_t kTables = 13'000, kTableSectors = 64;
  const auto first = [](uint64_t table) { return table * kTableSectors + table % kTableSectors; };
  const auto second = [](uint64_t table) { return table * kTableSectors + (table + 7) % kTableSectors; };
  {
    const clone_sdk::Fd model(::open((folder + "/model.raw").c_str(), O_WRONLY | O_CLOEXEC));
    REQUIRE(model);
    Rig rig({{"path", folder + "/x.qcow2"}});
    rig.start();
    Stream stream(rig);
    const auto write = [&](uint64_t sector, uint64_t version) {
      const auto bytes = stamp(sector, version);
      stream.write(sector, bytes);
      REQUIRE(::pwrite(model.get(), bytes.data(), bytes.size(), static_cast<off_t>(sector * kSector)) ==
              static_cast<ssize_t>(bytes.size()));
    };
    // More new tables than there is room for before the first flush; it and others overlap writes.
    for (uint64_t table = 0; table < kTables; ++table) {
      write(first(table), 1);
      if (table > 10'000 && table % 500 == 0) stream.flush();
    }
    stream.drain();
    // Tables that were put out, changed again in an order of no use to a cache.
    for (uint64_t i = 0; i < kTables; ++i) {
      const uint64_t table = i * 7919 % kTables;
      write(second(table), 2);
      if (i % 9000 == 8999) stream.flush();
    }
    stream.drain();
    for (uint64_t table = 0; table < kTables; ++table) {
      stream.expect(first(table), stamp(first(table), 1));
      stream.expect(second(table), stamp(second(table), 2));
      stream.expect(first(table) ^ 1, stamp(0, 0));
    }
    stream.flush();
    stream.drain();
  }
  check(folder, "x.qcow2");
  CHECK_MESSAGE(shell(folder, "qemu-img compare -f qcow2 -F raw x.qcow2 model.raw") == 0, log_of(folder));
}

TEST_CASE("qcow2: extensions of the header that nobody knows are kept") {
  ScratchDir scratch("/var/tmp");
  const std::string folder = scratch.path(), image = folder + "/x.qcow2";
  write_file(folder + "/base.raw", pattern(4 << 20, 5));
  create(folder, "qemu-img create -f qcow2 -b base.raw -F raw x.qcow2");
  auto bytes = read_file(image);
  size_t end = big_endian_32(bytes, kHeaderLength);  // of the extensions that QEMU wrote
  while (big_endian_32(bytes, end) != 0) end += 8 + (big_endian_32(bytes, end + 4) + 7) / 8 * 8;
  // Twenty bytes, filled up to 24.
  std::vector<uint8_t> extension = {0x12, 0x34, 0x56, 0x78, 0, 0, 0, 20};
  for (uint8_t i = 0; i < 24; ++i) extension.push_back(i < 20 ? static_cast<uint8_t>(0xc0 + i) : 0);
  // What follows in the first cluster is moved on: the end marker and the name of the backing file.
  constexpr size_t kCluster = 65536;
  const uint64_t name = big_endian_64(bytes, kBackingOffset);
  REQUIRE(name >= end + 8);
  const auto at = [&](size_t offset) { return bytes.begin() + static_cast<ptrdiff_t>(offset); };
  bytes.erase(at(kCluster - extension.size()), at(kCluster));
  bytes.insert(at(end), extension.begin(), extension.end());
  const uint64_t moved = htobe64(name + extension.size());
  std::memcpy(bytes.data() + kBackingOffset, &moved, sizeof moved);
  write_file(image, bytes);
  std::vector<uint8_t> model = content(folder, "x.qcow2");
  REQUIRE(model == read_file(folder + "/base.raw"));

  const auto data = pattern(65536, 77);
  {
    Rig rig({{"path", image}, {"backing", "on"}});
    rig.start();
    for (const uint64_t sector : {3ull, 2048ull, 8000ull}) {
      REQUIRE(rig.run(VIRTIO_BLK_T_OUT, sector, data) == VIRTIO_BLK_S_OK);
      std::copy(data.begin(), data.end(), model.begin() + static_cast<ptrdiff_t>(sector * kSector));
    }
    // The size stands in the header.
    REQUIRE(rig.host().call_command("virtio-blk.0.resize", "{\"size_bytes\":5242880}") == "{\"size_bytes\": 5242880}");
    model.resize(5 << 20);
  }
  const auto after = read_file(image);
  CHECK(std::equal(at(kHeaderLength), at(kCluster), after.begin() + kHeaderLength));
  check(folder, "x.qcow2");
  CHECK(content(folder, "x.qcow2") == model);
  create(folder, "qemu-img info x.qcow2");
  CHECK(log_of(folder).find("backing file: base.raw") != std::string::npos);
}

TEST_CASE("qcow2: bitmaps of what changed are void once the guest writes") {
  ScratchDir scratch("/var/tmp");
  const std::string folder = scratch.path(), image = folder + "/x.qcow2";
  create(folder, "qemu-img create -f qcow2 x.qcow2 4M; qemu-img bitmap --add x.qcow2 b");
  REQUIRE((autoclear(image) & 1) == 1);
  { Rig reader({{"path", image}, {"readonly", "on"}}); }
  CHECK((autoclear(image) & 1) == 1);
  std::vector<uint8_t> model(4 << 20);
  {
    Rig rig({{"path", image}});
    rig.start();
    const auto data = pattern(65536, 78);
    REQUIRE(rig.run(VIRTIO_BLK_T_OUT, 100, data) == VIRTIO_BLK_S_OK);
    std::copy(data.begin(), data.end(), model.begin() + 100 * kSector);
  }
  CHECK((autoclear(image) & 1) == 0);
  check(folder, "x.qcow2", true);
  CHECK(content(folder, "x.qcow2") == model);
}

TEST_CASE("qcow2: zeroes that may free clusters do, and later writes have them") {
  constexpr uint32_t kPiece = 64 << 10, kPieces = 64;  // 4 MiB
  constexpr uint64_t kSectors = kPieces * kPiece / kSector;
  for (const std::string& options :
       std::vector<std::string>{"", "-o cluster_size=4k", "-o cluster_size=2M", "-o extended_l2=on",
                                "-b base.raw -F raw", "-b base.raw -F raw -o cluster_size=4k"}) {
    CAPTURE(options);
    ScratchDir scratch("/dev/shm");
    const std::string folder = scratch.path(), image = folder + "/x.qcow2";
    const auto base = pattern(16 << 20, 6);
    write_file(folder + "/base.raw", base);
    create(folder, "qemu-img create -f qcow2 " + options + " x.qcow2 16M");
    std::vector<uint8_t> model = content(folder, "x.qcow2");
    {
      Rig rig({{"path", image}, {"backing", "on"}});
      rig.start();
      const auto write = [&](uint64_t first, uint8_t seed) {
        const auto data = pattern(kPiece, seed);
        for (uint64_t at = first; at < first + kSectors; at += kPiece / kSector) {
          REQUIRE(rig.run(VIRTIO_BLK_T_OUT, at, data) == VIRTIO_BLK_S_OK);
          std::copy(data.begin(), data.end(), model.begin() + static_cast<ptrdiff_t>(at * kSector));
        }
      };
      const auto zero = [&](uint32_t flags) {
        REQUIRE(rig.run(VIRTIO_BLK_T_WRITE_ZEROES, 0, range(0, kSectors, flags)) == VIRTIO_BLK_S_OK);
        std::fill_n(model.begin(), kSectors * kSector, uint8_t{0});
      };
      write(0, 1);
      write(kSectors, 2);
      const Space full = space(rig, image);
      CHECK(mapped_bytes(folder) == 2 * kSectors * kSector);
      // Space that is to stay does.
      zero(0);
      const Space kept = space(rig, image);
      CHECK(kept.bytes == full.bytes);
      CHECK(mapped_bytes(folder) == 2 * kSectors * kSector);
      write(0, 3);
      CHECK(space(rig, image).bytes == full.bytes);

      zero(VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP);
      const Space freed = space(rig, image);
      CHECK(freed.bytes <= full.bytes);
      CHECK(freed.blocks + kSectors <= full.blocks + 64);  // what tables take may change
      CHECK(mapped_bytes(folder) == kSectors * kSector);
      check(folder, "-U x.qcow2", true);

      write(2 * kSectors, 4);
      const Space again = space(rig, image);
      CHECK(again.bytes == full.bytes);
      CHECK(again.blocks <= full.blocks + 64);
      CHECK(mapped_bytes(folder) == 2 * kSectors * kSector);
    }
    check(folder, "x.qcow2");
    CHECK(content(folder, "x.qcow2") == model);
  }
}
