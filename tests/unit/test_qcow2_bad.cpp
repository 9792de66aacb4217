// SPDX-License-Identifier: Apache-2.0
// qcow2 images that are damaged, hostile or not for us: one clear line each, and nothing lost.
#include <endian.h>
#include <sys/stat.h>

#include "disk_rig.hpp"
#include "image_tools.hpp"
#include "scratch_dir.hpp"

using namespace vmm;
using namespace vmm::test;

namespace {

// A folder with an image "x.qcow2" in it.
class Image {
 public:
  explicit Image(const std::string& options = "", const std::string& size = "1M") : scratch_("/var/tmp") {
    make("qemu-img create -f qcow2 " + (options.empty() ? "" : "-o " + options) + " x.qcow2 " + size);
  }
  void make(const std::string& command) { REQUIRE_MESSAGE(shell(folder(), command) == 0, log_of(folder())); }
  const std::string& folder() const { return scratch_.path(); }
  std::string path(const char* name = "x.qcow2") const { return folder() + "/" + name; }

  Image& put(uint64_t offset, uint64_t value, size_t bytes = 8) {
    const clone_sdk::Fd fd(::open(path().c_str(), O_RDWR | O_CLOEXEC));
    const uint64_t raw = htobe64(value << (8 - bytes) * 8);
    REQUIRE(::pwrite(fd.get(), &raw, bytes, static_cast<off_t>(offset)) == static_cast<ssize_t>(bytes));
    return *this;
  }
  Image& put32(uint64_t offset, uint64_t value) { return put(offset, value, 4); }
  Image& cut(uint64_t size_bytes) {
    REQUIRE(::truncate(path().c_str(), static_cast<off_t>(size_bytes)) == 0);
    return *this;
  }
  uint64_t get(uint64_t offset) const {
    const auto bytes = read_file(path());
    REQUIRE(offset + 8 <= bytes.size());
    uint64_t raw = 0;
    std::memcpy(&raw, bytes.data() + offset, sizeof raw);
    return be64toh(raw);
  }
  uint64_t l1() const { return get(40); }
  // The table that maps the disk's beginning.
  uint64_t l2() const { return get(l1()) & 0x00ff'ffff'ffff'fe00; }

  // What it says when it is opened, without the file's name; "" when it opens.
  std::string error(bool read_only, bool backing = false) const {
    FakeHost host;
    DeviceUnderTest device(plugin().device("virtio-blk"), host.handle("virtio-blk.0"));
    const auto before = read_file(path());
    Options options = {{"path", path()}, {"readonly", read_only ? "on" : "off"}};
    if (backing) options["backing"] = "on";
    if (device.configure(options) == CLONE_OK) return "";
    CHECK(read_file(path()) == before);  // refused, and so not touched
    std::string message = device.error;
    CHECK(message.find('\n') == std::string::npos);
    const std::string prefix = "path=" + path() + ": ";
    REQUIRE_MESSAGE(message.starts_with(prefix), message);
    return message.substr(prefix.size());
  }
  void refused(const std::string& expected, bool backing = false) const {
    CHECK(error(false, backing) == expected);
    CHECK(error(true, backing) == expected);
  }

 private:
  ScratchDir scratch_;
};

Options writing(const Image& image) { return {{"path", image.path()}, {"backing", "on"}}; }
Options reading(const Image& image) { return {{"path", image.path()}, {"backing", "on"}, {"readonly", "on"}}; }

std::vector<uint8_t> filled(size_t size, uint8_t with) { return std::vector<uint8_t>(size, with); }

// Opens, and the first sector reads as that byte.
void reads(const Options& options, uint8_t byte) {
  Rig rig(options);
  rig.start();
  REQUIRE(rig.run(VIRTIO_BLK_T_IN, 0, {}, 512) == VIRTIO_BLK_S_OK);
  CHECK(rig.data(512) == filled(512, byte));
}

}  // namespace

TEST_CASE("qcow2: headers that cannot be") {
  Image().cut(0).refused("is too short for a qcow2 header");
  Image().cut(71).refused("is too short for a qcow2 header");
  Image().cut(90).refused("is too short for a qcow2 header");
  Image().put32(0, 0x12345678).refused("is not a qcow2 file: it does not begin with 'QFI'");
  Image().put32(4, 1).refused("is of qcow2 version 1; supported are 2 and 3");
  Image().put32(4, 4).refused("is of qcow2 version 4; supported are 2 and 3");
  for (const uint32_t bits : {0u, 8u, 22u, 63u, 64u, ~0u})
    Image().put32(20, bits).refused("has clusters of 2^" + std::to_string(bits) + " bytes; supported are 2^9 to 2^21");
  Image().put32(96, 7).refused("has reference counts of 2^7 bits; allowed are up to 64");
  Image().put32(100, 96).refused("has a header of 96 bytes");
  Image().put32(100, 1 << 30).refused("has a header of 1073741824 bytes");
  Image().put(72, 1 << 5).refused("uses a feature that is not known (incompatible feature bit 5)");
  Image().put(72, uint64_t{1} << 63).refused("uses a feature that is not known (incompatible feature bit 63)");
  Image().put(72, 4).refused("keeps its data in another file, which is not supported");
  Image("data_file=data.raw").refused("keeps its data in another file, which is not supported");
  Image("cluster_size=4k").put(72, 16).refused("has extended L2 entries and clusters of less than 16 KiB");
  Image().put32(32, 2).refused("is encrypted, which is not supported");

  Image luks;
  // The tool measures its processor for the key, and gives up on a busy machine: asked again, it measures again.
  const std::string command =
      "qemu-img create -f qcow2 --object secret,id=s,data=1234 -o "
      "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 x.qcow2 1M";
  for (int tries = 0; shell(luks.folder(), command) != 0; ++tries) REQUIRE_MESSAGE(tries < 20, log_of(luks.folder()));
  luks.refused("is encrypted, which is not supported");
}

TEST_CASE("qcow2: sizes that cannot be") {
  Image().put(24, uint64_t{1} << 63).refused("has a disk of 9223372036854775808 bytes; at most 2^62 are possible");
  Image().put(24, ~uint64_t{0}).refused("has a disk of 18446744073709551615 bytes; at most 2^62 are possible");
  Image().put(24, uint64_t{1} << 62).refused("has a disk of 4611686018427387904 bytes, more than its L1 table can map");
  Image()
      .put(24, (uint64_t{1} << 63) - 512)
      .refused("has a disk of 9223372036854775296 bytes; at most 2^62 are possible");
  Image().put(24, 0).refused("holds an empty disk; it has at least 512 bytes");
  Image().put32(36, 0).refused("has a disk of 1048576 bytes, more than its L1 table can map");
  Image().put32(36, (4 << 20) + 1).refused("has an L1 table of more than 32 MiB");
  Image().put32(36, ~0u).refused("has an L1 table of more than 32 MiB");
  Image().put32(56, 0).refused("has no refcount table");
  Image().put32(56, 129).refused("has a refcount table of more than 8 MiB");
  Image().put32(56, ~0u).refused("has a refcount table of more than 8 MiB");
}

TEST_CASE("qcow2: tables where they cannot be") {
  const uint64_t far = uint64_t{1} << 40;
  Image().cut(65536).refused("has an L1 table beyond the end of the file");
  Image().put(40, far).refused("has an L1 table beyond the end of the file");
  Image().put(40, ~uint64_t{0} << 16).refused("has an L1 table beyond the end of the file");
  Image().put(40, 512).refused("has an L1 table that begins within a cluster");
  Image().put(40, 0).refused("has an L1 table that overlaps its header");
  Image().put(40, 65536).refused("has an L1 table that overlaps its refcount table");
  Image().put(40, 131072).refused("has an L1 table that overlaps another table");  // the refcount block
  Image().put(48, far).refused("has a refcount table beyond the end of the file");
  Image().put(48, ~uint64_t{0} << 16).refused("has a refcount table beyond the end of the file");
  Image().put(48, 0).refused("has a refcount table that overlaps its header");
  Image().put(48, 65536 + 512).refused("has a refcount table that begins within a cluster");
  Image().put(65536, 65536).refused("has a refcount block that overlaps another table");
  Image().put(65536, 0x100).refused("has a refcount block that begins within a cluster");
  Image().put(65536, far).refused("has a refcount block beyond the end of the file");
  Image().put(65544, 131072).refused("has a refcount block that overlaps another table");

  const auto l1 = [](uint64_t entry) {
    Image image;
    image.cut(4 * 65536).put(image.l1(), entry);
    return image.error(false) + "|" + image.error(true);
  };
  const auto both = [](const std::string& message) { return message + "|" + message; };
  CHECK(l1(far) == both("has an L2 table beyond the end of the file"));
  CHECK(l1(65536) == both("has an L2 table that overlaps another table"));
  CHECK(l1(131072) == both("has an L2 table that overlaps another table"));
  CHECK(l1(196608) == both("has an L2 table that overlaps another table"));
  CHECK(l1(512) == both("has an L1 table with an entry that makes no sense"));
  CHECK(l1(1) == both("has an L1 table with an entry that makes no sense"));
  CHECK(l1(uint64_t{1} << 62) == both("has an L1 table with an entry that makes no sense"));

  Image twice("cluster_size=4k", "4M");  // an L2 table maps 2 MiB
  twice.make("qemu-io -c 'write 0 4k' -c 'write 2M 4k' x.qcow2");
  twice.put(twice.l1() + 8, twice.get(twice.l1())).refused("has an L2 table that overlaps another table");
}

TEST_CASE("qcow2: a hostile header costs little memory and time") {
  // A sparse file of 12 TiB whose L1 table, the largest there may be, names an L2 table in every entry; the last one
  // twice, which is found when all are known.
  Image image("cluster_size=2M", "8G");
  image.cut(uint64_t{12} << 40);
  constexpr uint32_t kEntries = 4 << 20;
  image.put(40, uint64_t{1} << 40).put32(36, kEntries);
  {
    const clone_sdk::Fd fd(::open(image.path().c_str(), O_RDWR | O_CLOEXEC));
    std::vector<uint64_t> entries(kEntries);
    for (uint32_t i = 0; i < kEntries; ++i)
      entries[i] = htobe64((uint64_t{1} << 42) + (uint64_t{std::min(i, kEntries - 2)} << 21));
    REQUIRE(::pwrite(fd.get(), entries.data(), kEntries * 8, off_t{1} << 40) == kEntries * 8);
  }
  struct Usage {
    static uint64_t peak_kib() {
      std::ifstream status("/proc/self/status");
      std::string word;
      uint64_t value = 0;
      while (status >> word)
        if (word == "VmHWM:") status >> value;
      return value;
    }
  };
  std::ofstream("/proc/self/clear_refs") << "5";  // the peak begins anew
  const uint64_t before = Usage::peak_kib();
  const auto begin = std::chrono::steady_clock::now();
  FakeHost host;
  DeviceUnderTest device(plugin().device("virtio-blk"), host.handle("virtio-blk.0"));
  CHECK(device.configure({{"path", image.path()}}) != CLONE_OK);
  CHECK(std::string(device.error).ends_with("has an L2 table that overlaps another table"));
  CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(20));
  const uint64_t used_kib = Usage::peak_kib() - before;
  CAPTURE(used_kib);
  CHECK(used_kib < 144 << 10);
}

TEST_CASE("qcow2: backing files that are not opened") {
  {
    Image image;
    image.make("truncate -s 1M base.raw; qemu-img create -f qcow2 -b base.raw -F raw x.qcow2");
    image.refused("has the backing file 'base.raw'; backing=on lets it be opened");
    CHECK(image.error(false, true) == "");
    CHECK(image.error(true, true) == "");
    image.make("rm base.raw");
    image.refused("backing file " + image.path("base.raw") + ": No such file or directory", true);
    image.make("mkdir base.raw");
    image.refused("backing file " + image.path("base.raw") + ": is neither a regular file nor a block device", true);
    image.make("rmdir base.raw; mkfifo base.raw");
    image.refused("backing file " + image.path("base.raw") + ": is neither a regular file nor a block device", true);
  }
  for (const std::string name : {"nbd://127.0.0.1:1/x", "json:{\"driver\":\"null-co\"}", "fat:rw:x"}) {
    Image image;
    image.make("qemu-img create -f qcow2 -u -b base.raw -F raw x.qcow2 1M");
    const uint64_t at = image.get(8);
    const clone_sdk::Fd fd(::open(image.path().c_str(), O_RDWR | O_CLOEXEC));
    REQUIRE(::pwrite(fd.get(), name.data(), name.size(), static_cast<off_t>(at)) == static_cast<ssize_t>(name.size()));
    image.put32(16, name.size());
    image.refused("has the backing file '" + name + "', which is no path", true);
  }
  {
    Image image;
    image.make("qemu-img create -f qcow2 -u -b base.vmdk -F vmdk x.qcow2 1M");
    image.refused("has a backing file of the format 'vmdk'; supported are raw and qcow2", true);
    image.put32(16, 1024).refused("has a backing file name of more than 1023 bytes", true);
    image.put32(16, 9).put(8, 1 << 20).refused("has a backing file name outside of its header", true);
  }
  {
    Image image("compat=0.10");
    image.put(8, 4096).put32(16, 8).put(4096, 0x626173652e726177);  // base.raw, and no format
    image.refused(
        "does not say of which format its backing file 'base.raw' is; `qemu-img rebase -u -F FORMAT -b "
        "FILE` does",
        true);
  }
  {
    Image image;
    image.make("qemu-img create -f qcow2 -u -b y.qcow2 -F qcow2 x.qcow2 1M");
    image.put(image.get(8), 'x', 1);
    image.refused("backing file " + image.path() + ": the chain of backing files contains itself", true);
    image.make(
        "qemu-img create -f qcow2 -u -b b.qcow2 -F qcow2 x.qcow2 1M; "
        "qemu-img create -f qcow2 -u -b x.qcow2 -F qcow2 b.qcow2 1M");
    image.refused("backing file " + image.path() + ": the chain of backing files contains itself", true);
    image.make(
        "rm b.qcow2; cp x.qcow2 b.qcow2; ln -sf x.qcow2 link.qcow2; "
        "qemu-img rebase -u -f qcow2 -F qcow2 -b link.qcow2 b.qcow2");
    image.refused("backing file " + image.path("link.qcow2") + ": the chain of backing files contains itself", true);
  }
  {
    Image image;
    image.make(
        "qemu-img create -f qcow2 0.qcow2 1M; for i in $(seq 40); do qemu-img create -q -u -f qcow2 -F qcow2 "
        "-b $((i - 1)).qcow2 $i.qcow2 1M; done; mv 40.qcow2 x.qcow2");
    image.refused("has a chain of more than 32 files", true);
  }
  {
    Image image;
    image.make(
        "qemu-img create -f qcow2 b.qcow2 1M; qemu-img create -f qcow2 -F qcow2 -b b.qcow2 x.qcow2; "
        "truncate -s 100 b.qcow2");
    image.refused("backing file " + image.path("b.qcow2") + ": is too short for a qcow2 header", true);
  }
}

TEST_CASE("qcow2: what is no image, or not to be written to") {
  Image image;
  image.make("mkdir d.qcow2; mkfifo f.qcow2");
  CHECK(configure_error({{"path", image.path("d.qcow2")}}, CLONE_ERR_SYSTEM) ==
        "path=" + image.path("d.qcow2") + ": Is a directory");
  CHECK(configure_error({{"path", image.path("d.qcow2")}, {"readonly", "on"}}) ==
        "path=" + image.path("d.qcow2") + ": is neither a regular file nor a block device");
  for (const char* read_only : {"on", "off"})
    CHECK(configure_error({{"path", image.path("f.qcow2")}, {"readonly", read_only}}) ==
          "path=" + image.path("f.qcow2") + ": is neither a regular file nor a block device");
  CHECK(configure_error({{"path", image.path("none.qcow2")}}, CLONE_ERR_SYSTEM) ==
        "path=" + image.path("none.qcow2") + ": No such file or directory");

  // Root may write to any file, but not through a mount that is read-only; elsewhere the mode says no.
  image.make("mount --bind . . && mount -o remount,bind,ro .");
  CHECK(configure_error({{"path", image.path()}}, CLONE_ERR_SYSTEM) ==
        "path=" + image.path() + ": Read-only file system (opened for writing; readonly=on opens it for reading only)");
  { Rig reader({{"path", image.path()}, {"readonly", "on"}}); }
  REQUIRE(std::system(("umount " + image.folder()).c_str()) == 0);
}

TEST_CASE("qcow2: internal snapshots are read past, and never written to") {
  Image image("", "1M");
  image.make(
      "qemu-io -c 'write -P 1 0 64k' x.qcow2; qemu-img snapshot -c first x.qcow2; "
      "qemu-io -c 'write -P 2 0 64k' x.qcow2; qemu-img snapshot -c second x.qcow2");
  CHECK(image.error(false) ==
        "holds 2 internal snapshots, which are not supported for writing; allowed is readonly=on");
  const auto before = read_file(image.path());
  reads(reading(image), 2);
  CHECK(read_file(image.path()) == before);
  check(image.folder(), "x.qcow2");
}

TEST_CASE("qcow2: the corrupt bit keeps writers off") {
  Image image;
  image.make("qemu-io -c 'write -P 5 0 64k' x.qcow2");
  image.put(72, 2);
  CHECK(image.error(false) == "is marked as damaged; `qemu-img check -r all` mends it, readonly=on opens it as it is");
  reads(reading(image), 5);
  image.make("qemu-img check -r all x.qcow2");
  reads(writing(image), 5);
}

TEST_CASE("qcow2: an image that was not closed is repaired when it is opened") {
  for (const char* options : {"lazy_refcounts=on", "lazy_refcounts=on,cluster_size=512",
                              "lazy_refcounts=on,cluster_size=4k,refcount_bits=1"}) {
    CAPTURE(options);
    Image image(options, "4M");
    shell(image.folder(), "qemu-io -c 'write -P 5 0 1M' -c 'write -P 6 2M 100k' -c 'flush' -c 'sigraise 9' x.qcow2");
    REQUIRE((image.get(72) & 1) == 1);
    reads(reading(image), 5);
    REQUIRE((image.get(72) & 1) == 1);
    const auto before = content(image.folder(), "x.qcow2");
    {
      Rig rig(writing(image));
      rig.start();
      CHECK((image.get(72) & 1) == 0);
      REQUIRE(rig.run(VIRTIO_BLK_T_OUT, 8184, filled(4096, 7)) == VIRTIO_BLK_S_OK);
    }
    check(image.folder(), "x.qcow2");
    auto after = content(image.folder(), "x.qcow2");
    CHECK(std::equal(before.begin(), before.end() - 4096, after.begin()));
    CHECK(std::equal(after.end() - 4096, after.end(), filled(4096, 7).begin()));
  }
}

TEST_CASE("qcow2: compressed garbage is an I/O error, and the disk goes on") {
  for (const char* type : {"zlib", "zstd"}) {
    CAPTURE(type);
    Image image;
    image.make(
        "head -c 1M /dev/zero | tr '\\0' 'c' >base.raw; qemu-img convert -c -f raw -O qcow2 -o compression_type=" +
        std::string(type) + " base.raw x.qcow2");
    const uint64_t place = image.get(image.l2()) & ((uint64_t{1} << 54) - 1);
    image.put(place, 0xffff'ffff'ffff'ffff).put(place + 8, 0xffff'ffff'ffff'ffff);
    Rig rig(writing(image));
    rig.start();
    CHECK(rig.run(VIRTIO_BLK_T_IN, 0, {}, 512) == VIRTIO_BLK_S_IOERR);
    CHECK(rig.run(VIRTIO_BLK_T_OUT, 1, filled(512, 1)) == VIRTIO_BLK_S_IOERR);  // the rest of the cluster is not known
    REQUIRE(rig.run(VIRTIO_BLK_T_IN, 128, {}, 512) == VIRTIO_BLK_S_OK);
    CHECK(rig.data(512) == filled(512, 'c'));
    CHECK(rig.run(VIRTIO_BLK_T_OUT, 128, filled(512, 2)) == VIRTIO_BLK_S_OK);
    CHECK(rig.run(VIRTIO_BLK_T_OUT, 0, filled(65536, 3)) == VIRTIO_BLK_S_OK);  // all of it: what was is not needed
    CHECK(rig.run(VIRTIO_BLK_T_FLUSH, 0, {}) == VIRTIO_BLK_S_OK);
    REQUIRE(rig.run(VIRTIO_BLK_T_IN, 0, {}, 512) == VIRTIO_BLK_S_OK);
    CHECK(rig.data(512) == filled(512, 3));
  }
}

TEST_CASE("qcow2: an L2 entry that makes no sense is an I/O error, and the disk goes on") {
  const uint64_t copied = uint64_t{1} << 63;
  const struct {
    const char* name;
    uint64_t entry;
  } cases[] = {
      {"beyond the file", copied | uint64_t{1} << 40},
      {"a reserved bit", copied | uint64_t{1} << 58 | 5 * 65536},
      {"a reserved low bit", copied | 2 | 5 * 65536},
      {"within a cluster", copied | (5 * 65536 + 512)},
      {"compressed, beyond the file", uint64_t{1} << 62 | uint64_t{1} << 40},
  };
  for (const auto& each : cases) {
    CAPTURE(each.name);
    Image image;
    image.make("qemu-io -c 'write -P 5 0 128k' x.qcow2");
    image.put(image.l2(), each.entry);
    Rig rig(writing(image));
    rig.start();
    CHECK(rig.run(VIRTIO_BLK_T_IN, 0, {}, 512) == VIRTIO_BLK_S_IOERR);
    CHECK(rig.run(VIRTIO_BLK_T_OUT, 0, filled(512, 1)) == VIRTIO_BLK_S_IOERR);
    CHECK(rig.run(VIRTIO_BLK_T_WRITE_ZEROES, 0, range(0, 128, 0)) == VIRTIO_BLK_S_IOERR);
    REQUIRE(rig.run(VIRTIO_BLK_T_IN, 128, {}, 512) == VIRTIO_BLK_S_OK);
    CHECK(rig.data(512) == filled(512, 5));
    CHECK(rig.run(VIRTIO_BLK_T_OUT, 128, filled(512, 1)) == VIRTIO_BLK_S_OK);
    CHECK(rig.run(VIRTIO_BLK_T_OUT, 1024, filled(512, 1)) == VIRTIO_BLK_S_OK);
    CHECK(rig.run(VIRTIO_BLK_T_FLUSH, 0, {}) == VIRTIO_BLK_S_OK);
  }
}

TEST_CASE("qcow2: nothing that a guest does reaches a table") {
  const uint64_t copied = uint64_t{1} << 63;
  struct Request {
    const char* name;
    uint32_t type;
    uint32_t sectors, flags;
  };
  const Request requests[] = {
      {"write", VIRTIO_BLK_T_OUT, 1, 0},
      {"write a cluster", VIRTIO_BLK_T_OUT, 8, 0},
      {"zeroes", VIRTIO_BLK_T_WRITE_ZEROES, 8, 0},
      {"zeroes that unmap", VIRTIO_BLK_T_WRITE_ZEROES, 8, 1},
      {"zeroes in a part", VIRTIO_BLK_T_WRITE_ZEROES, 1, 0},
      {"discard", VIRTIO_BLK_T_DISCARD, 8, 0},
  };
  // Header, refcount table and block, L1, the L2 table itself; each as the guest's own cluster, as one shared with a
  // snapshot, and compressed.
  for (const char* options : {"cluster_size=4k", "cluster_size=4k,compat=0.10"}) {
    Image image(options, "2M");
    image.make("qemu-io -c 'write -P 5 0 8k' x.qcow2");
    const auto sound = read_file(image.path());
    for (uint64_t table = 0; table < 5; ++table) {
      for (const uint64_t flags : {copied, uint64_t{0}, uint64_t{1} << 62}) {
        if (table == 0 && !(flags >> 62 & 1)) continue;  // offset 0 is no cluster
        for (const Request& request : requests) {
          CAPTURE(options);
          CAPTURE(table);
          CAPTURE(flags);
          CAPTURE(request.name);
          write_file(image.path(), sound);
          const uint64_t l2 = image.l2();
          const uint64_t target = table < 4 ? table * 4096 : l2;
          image.put(l2, target | flags);
          const auto before = read_file(image.path());
          {
            Rig rig({{"path", image.path()}, {"cache", "unsafe"}});
            rig.start();
            const bool write = request.type == VIRTIO_BLK_T_OUT;
            const uint8_t status =
                rig.run(request.type, 0,
                        write ? filled(request.sectors * kSector, 0xaa) : range(0, request.sectors, request.flags));
            // A compressed form that makes no sense is not to be read either, and advice may be left alone.
            if (request.type != VIRTIO_BLK_T_DISCARD) CHECK(status == VIRTIO_BLK_S_IOERR);
            rig.run(VIRTIO_BLK_T_FLUSH, 0, {});
          }
          auto after = read_file(image.path());
          if (image.get(4) >> 32 == 3) {
            const bool marked = (image.get(72) & 2) != 0;
            // One that could not be decompressed was not given back yet.
            if (!(flags >> 62 & 1) || request.sectors == 8) CHECK(marked);
            after[79] = before[79];
          }
          // All but counts of clusters that were taken or given back, in the block.
          for (const uint64_t cluster : {uint64_t{0}, uint64_t{1}, uint64_t{3}, l2 / 4096}) {
            const auto at = static_cast<ptrdiff_t>(cluster * 4096);
            CHECK(std::equal(before.begin() + at, before.begin() + at + 4096, after.begin() + at));
          }
          for (uint64_t i = 0; i < 7; ++i) CHECK(after[2 * 4096 + 2 * i + 1] == before[2 * 4096 + 2 * i + 1]);
        }
      }
    }
  }
}
