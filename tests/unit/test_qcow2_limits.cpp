// SPDX-License-Identifier: Apache-2.0
// Disk images at their limits: in use by others, on a full file system, growing, on a block device.
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "disk_rig.hpp"
#include "image_tools.hpp"
#include "scratch_dir.hpp"

using namespace vmm;
using namespace vmm::test;

namespace {

std::vector<uint8_t> filled(size_t size, uint8_t with) { return std::vector<uint8_t>(size, with); }

// A small file system of its own.
class SmallFileSystem {
 public:
  explicit SmallFileSystem(const char* size) : folder_(scratch_.path()) {
    const std::string options = "size=" + std::string(size);
    REQUIRE(::mount("tmpfs", folder_.c_str(), "tmpfs", 0, options.c_str()) == 0);
  }
  ~SmallFileSystem() { ::umount2(folder_.c_str(), MNT_DETACH); }
  const std::string& folder() const { return folder_; }

 private:
  ScratchDir scratch_{"/var/tmp"};
  std::string folder_;
};

// While it lives, no file of this process grows beyond that: a write is refused, as in the machine itself
// (Session::run).
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) : handler_(::signal(SIGXFSZ, SIG_IGN)) {
    REQUIRE(::getrlimit(RLIMIT_FSIZE, &old_) == 0);
    const rlimit low{bytes, old_.rlim_max};
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &low) == 0);
  }
  FileSizeLimit(const FileSizeLimit&) = delete;
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &old_);
    ::signal(SIGXFSZ, handler_);
  }

 private:
  sighandler_t handler_;
  rlimit old_{};
};

std::string resize(Rig& rig, uint64_t size_bytes) {
  return rig.host().call_command("virtio-blk.0.resize", "{\"size_bytes\":" + std::to_string(size_bytes) + "}");
}

// Sectors from `first` on read as that byte.
bool reads(Rig& rig, uint64_t first, uint32_t sectors, uint8_t byte) {
  return rig.run(VIRTIO_BLK_T_IN, first, {}, sectors * kSector) == VIRTIO_BLK_S_OK &&
         rig.data(sectors * kSector) == filled(sectors * kSector, byte);
}

void create(const std::string& folder, const std::string& command) {
  REQUIRE_MESSAGE(shell(folder, command) == 0, log_of(folder));
}

}  // namespace

TEST_CASE("images: QEMU keeps off what is in use, and we keep off what QEMU uses") {
  for (const std::string format : {"qcow2", "raw"}) {
    CAPTURE(format);
    ScratchDir scratch("/var/tmp");
    const std::string folder = scratch.path(), image = folder + "/x." + format;
    const auto qemu = [&](const std::string& command) {
      const int status = shell(folder, command);
      return (status ? "refused: " : "done: ") + log_of(folder);
    };
    const auto refused = [&](const std::string& command) {
      const std::string said = qemu(command);
      CAPTURE(said);
      CHECK(said.starts_with("refused: "));
      CHECK(said.find("lock") != std::string::npos);
    };
    create(folder, "qemu-img create -f " + format + " x." + format + " 1M");
    {
      Rig writer({{"path", image}});
      // A raw image has no tables, and QEMU's readers of one let others write.
      if (format == "qcow2") {
        refused("qemu-img info x.qcow2");
        refused("qemu-io -r -c 'read 0 512' x.qcow2");
      }
      refused("qemu-io -f " + format + " -c 'read 0 512' x." + format);
      refused("qemu-img check -f " + format + " x." + format + " || qemu-img resize -f " + format + " x." + format +
              " 2M");
      CHECK(qemu("qemu-img info -U x." + format).starts_with("done: "));
      CHECK(configure_error({{"path", image}}, CLONE_ERR_BUSY) ==
            "path=" + image + ": in use by another process (opened for writing)");
      CHECK(configure_error({{"path", image}, {"readonly", "on"}}, CLONE_ERR_BUSY) ==
            "path=" + image + ": in use by another process (opened for writing)");
    }
    {
      Rig reader({{"path", image}, {"readonly", "on"}});
      Rig second({{"path", image}, {"readonly", "on"}});
      CHECK(qemu("qemu-img info x." + format).starts_with("done: "));
      refused("qemu-io -f " + format + " -c 'write 0 512' x." + format);
    }
    CHECK(qemu("qemu-io -f " + format + " -c 'write 0 512' x." + format).starts_with("done: "));

    // Two disks over one base.
    create(folder, "for i in 1 2; do qemu-img create -f qcow2 -b " + image + " -F " + format + " $i.qcow2; done");
    {
      Rig one({{"path", folder + "/1.qcow2"}, {"backing", "on"}});
      Rig two({{"path", folder + "/2.qcow2"}, {"backing", "on"}});
      one.start();
      two.start();
      CHECK(one.run(VIRTIO_BLK_T_OUT, 0, filled(512, 1)) == VIRTIO_BLK_S_OK);
      CHECK(two.run(VIRTIO_BLK_T_OUT, 0, filled(512, 2)) == VIRTIO_BLK_S_OK);
      CHECK(reads(one, 0, 1, 1));
      refused("qemu-io -f " + format + " -c 'write 0 512' x." + format);
      CHECK(configure_error({{"path", image}}, CLONE_ERR_BUSY) ==
            "path=" + image + ": in use by another process (opened for reading); readonly=on shares it");
      refused("qemu-img commit 1.qcow2");
    }

    // The other way round.
    const std::string busy = "exec qemu-io -f " + format + " -c 'write 0 512' -c 'sleep 20000' x." + format;
    const pid_t other = ::fork();
    if (other == 0) {
      ::execl("/bin/sh", "sh", "-c", ("cd " + folder + "; echo >other; " + busy + " >/dev/null").c_str(), nullptr);
      ::_exit(127);
    }
    std::string said;
    for (int i = 0; i < 200 && said.empty(); ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      FakeHost host;
      DeviceUnderTest device(plugin().device("virtio-blk"), host.handle("virtio-blk.0"));
      if (device.configure({{"path", image}, {"readonly", "on"}}) != CLONE_OK) said = device.error;
    }
    CHECK(said == "path=" + image + ": in use by another process (opened for writing)");
    ::kill(other, SIGKILL);
    ::waitpid(other, nullptr, 0);
  }
}

TEST_CASE("images: a full file system is an I/O error, and nothing that was flushed is lost") {
  if (::geteuid() != 0) {
    MESSAGE("only root may mount a file system of its own");
    return;
  }
  const struct {
    const char* name;
    const char* file;
    const char* make;
  } variants[] = {
      {"raw", "x.raw", "truncate -s 16M x.raw"},
      {"qcow2", "x.qcow2", "qemu-img create -f qcow2 x.qcow2 16M"},
      {"small clusters", "x.qcow2", "qemu-img create -f qcow2 -o cluster_size=4k x.qcow2 16M"},
      {"least clusters", "x.qcow2", "qemu-img create -f qcow2 -o cluster_size=512,refcount_bits=64 x.qcow2 16M"},
      {"subclusters", "x.qcow2", "qemu-img create -f qcow2 -o extended_l2=on x.qcow2 16M"},
      {"over raw", "x.qcow2", "truncate -s 16M base.raw; qemu-img create -f qcow2 -b base.raw -F raw x.qcow2"},
  };
  for (const auto& variant : variants) {
    for (const char* aio : {"io_uring", "threads"}) {
      CAPTURE(variant.name);
      CAPTURE(aio);
      SmallFileSystem small("8M");
      const ScratchDir logs("/var/tmp");  // the small one has no room
      const std::string& folder = small.folder();
      create(folder, variant.make);
      create(folder, "head -c 3M /dev/zero >ballast");
      constexpr uint32_t kPiece = 48;  // sectors, of no whole cluster
      constexpr uint64_t kPieces = 16 * 2048 / kPiece;
      std::vector<int> expected(kPieces, -1);  // a byte; -1: not certain
      const auto byte = [](uint64_t piece, int round) { return static_cast<uint8_t>(1 + (piece + 100 * round) % 250); };
      {
        Rig rig({{"path", folder + "/" + variant.file}, {"backing", "on"}, {"aio", aio}});
        rig.start();
        const auto write = [&](uint64_t piece, int round) {
          const uint8_t status =
              rig.run(VIRTIO_BLK_T_OUT, piece * kPiece, filled(kPiece * kSector, byte(piece, round)));
          expected[piece] = status == VIRTIO_BLK_S_OK ? byte(piece, round) : -1;
          return status;
        };
        for (uint64_t piece = 0; piece < 40; ++piece) REQUIRE(write(piece, 0) == VIRTIO_BLK_S_OK);
        REQUIRE(rig.run(VIRTIO_BLK_T_FLUSH, 0, {}) == VIRTIO_BLK_S_OK);
        int failed = 0;
        for (uint64_t piece = 40; piece < kPieces; ++piece) {
          const uint8_t status = write(piece, 0);
          if (status == VIRTIO_BLK_S_OK) continue;
          REQUIRE(status == VIRTIO_BLK_S_IOERR);
          ++failed;
        }
        CHECK(failed > 100);
        // Full: what is there is read and written.
        for (uint64_t piece = 0; piece < 40; ++piece) {
          CHECK(reads(rig, piece * kPiece, kPiece, byte(piece, 0)));
          CHECK(write(piece, 1) == VIRTIO_BLK_S_OK);
          CHECK(reads(rig, piece * kPiece, kPiece, byte(piece, 1)));
        }
        // May or may not find room for tables.
        static_cast<void>(rig.run(VIRTIO_BLK_T_FLUSH, 0, {}));
        if (std::string(variant.file) == "x.qcow2") {
          const int status = WEXITSTATUS(shell(logs.path(), "qemu-img check -U " + folder + "/x.qcow2"));
          CHECK_MESSAGE((status == 0 || status == 3), log_of(logs.path()));
        }
        // Room again, for some of it.
        REQUIRE(::unlink((folder + "/ballast").c_str()) == 0);
        for (uint64_t piece = kPieces - 30; piece < kPieces; ++piece) REQUIRE(write(piece, 2) == VIRTIO_BLK_S_OK);
        REQUIRE(rig.run(VIRTIO_BLK_T_FLUSH, 0, {}) == VIRTIO_BLK_S_OK);
        for (uint64_t piece = 0; piece < kPieces; ++piece)
          if (expected[piece] >= 0) CHECK(reads(rig, piece * kPiece, kPiece, static_cast<uint8_t>(expected[piece])));
      }
      if (std::string(variant.file) == "x.qcow2") check(logs.path(), folder + "/x.qcow2", true);
      Rig again({{"path", folder + "/" + variant.file}, {"backing", "on"}, {"readonly", "on"}});
      again.start();
      for (uint64_t piece = 0; piece < kPieces; ++piece)
        if (expected[piece] >= 0) CHECK(reads(again, piece * kPiece, kPiece, static_cast<uint8_t>(expected[piece])));
    }
  }
}

TEST_CASE("images: a file size limit is an I/O error") {
  for (const char* file : {"x.qcow2", "x.raw"}) {
    CAPTURE(file);
    ScratchDir scratch("/var/tmp");
    create(scratch.path(), "qemu-img create -f qcow2 x.qcow2 16M; head -c 2M /dev/zero >x.raw");
    Rig rig({{"path", scratch.path() + "/" + file}});
    rig.start();
    {
      const FileSizeLimit limit(1 << 20);
      const uint8_t first = rig.run(VIRTIO_BLK_T_OUT, 0, filled(65536, 1));
      uint8_t last = VIRTIO_BLK_S_OK;
      for (uint64_t sector = 128; sector < 4096 && last == VIRTIO_BLK_S_OK; sector += 128)
        last = rig.run(VIRTIO_BLK_T_OUT, sector, filled(65536, 2));
      CHECK(first == VIRTIO_BLK_S_OK);
      CHECK(last == VIRTIO_BLK_S_IOERR);
      CHECK(reads(rig, 0, 128, 1));
    }
    CHECK(rig.run(VIRTIO_BLK_T_OUT, 3968, filled(65536, 3)) == VIRTIO_BLK_S_OK);
    CHECK(rig.run(VIRTIO_BLK_T_FLUSH, 0, {}) == VIRTIO_BLK_S_OK);
    CHECK(reads(rig, 3968, 128, 3));
  }
}

TEST_CASE("qcow2: a disk grows while the guest uses it, past its L1 table") {
  for (const char* make :
       {"qemu-img create -f qcow2 -o cluster_size=512 x.qcow2 6M",
        "qemu-img create -f qcow2 -o cluster_size=4k x.qcow2 6M", "qemu-img create -f qcow2 x.qcow2 6M",
        "qemu-img create -f qcow2 -b base.raw -F raw x.qcow2",
        "qemu-img create -f qcow2 -b base.raw -F raw -o cluster_size=512,refcount_bits=64 x.qcow2"}) {
    CAPTURE(make);
    ScratchDir scratch("/var/tmp");
    const std::string folder = scratch.path();
    write_file(folder + "/base.raw", pattern(6 << 20, 3));
    create(folder, make);
    std::vector<uint8_t> model = content(folder, "x.qcow2");
    {
      // Syncs are not what is tested here, and slow.
      Rig rig({{"path", folder + "/x.qcow2"}, {"backing", "on"}, {"queues", "2"}, {"cache", "unsafe"}});
      rig.start();
      uint64_t seed = 70;
      for (const uint64_t size : {6ull << 20, (6ull << 20) + 512, 9ull << 20, (13ull << 20) + 1536}) {
        if (size > model.size())
          CHECK(rig.run(VIRTIO_BLK_T_OUT, size / kSector - 1, filled(512, 1)) == VIRTIO_BLK_S_IOERR);
        CHECK(resize(rig, size) == "{\"size_bytes\": " + std::to_string(size) + "}");
        CHECK(rig.config().capacity == size / kSector);
        model.resize(size);
        RandomWork work(
            rig, ++seed, model, [&] { return read_file(folder + "/x.qcow2"); }, 0);
        work.run(250, 125);
        model = work.model();
      }
      CHECK(rig.config_changes() == 3);
      CHECK(resize(rig, 4 << 20) == "error: size_bytes=4194304: the disk has 13633024 bytes and can only grow");
      CHECK(resize(rig, uint64_t{1} << 62) == "error: path=" + folder + "/x.qcow2: File too large");
      CHECK(rig.config().capacity == model.size() / kSector);
    }
    check(folder, "x.qcow2");
    CHECK(content(folder, "x.qcow2") == model);
  }
}

TEST_CASE("qcow2: a disk over a longer backing file does not grow into it") {
  ScratchDir scratch("/var/tmp");
  create(scratch.path(), "head -c 4M /dev/urandom >base.raw; qemu-img create -f qcow2 -b base.raw -F raw x.qcow2 2M");
  Rig rig({{"path", scratch.path() + "/x.qcow2"}, {"backing", "on"}});
  rig.start();
  CHECK(resize(rig, 3 << 20) == "error: path=" + scratch.path() +
                                    "/x.qcow2: size_bytes=3145728: the backing file is longer than the disk, with "
                                    "4194304 bytes, which would show; allowed over one that is not");
  CHECK(rig.config().capacity == 4096);
}

TEST_CASE("qcow2: on a block device, into the room that it has") {
  for (const char* options : {"", "-o cluster_size=4k", "-o cluster_size=512,refcount_bits=64"}) {
    CAPTURE(options);
    ScratchDir scratch("/var/tmp");
    const std::string folder = scratch.path();
    TemporaryFile file(0);
    // What the device holds beyond the image is not zeroes.
    file.write(0, filled(10 << 20, 0xee));
    create(folder, "qemu-img create -f qcow2 " + std::string(options) + " x.qcow2 6M; cat x.qcow2 >start");
    file.write(0, read_file(folder + "/start"));
    if (!file.become_block_device()) {
      MESSAGE("no loop devices here");
      return;
    }
    std::vector<uint8_t> model(6 << 20);
    for (uint64_t seed = 90; seed < 92; ++seed) {
      {
        Rig rig({{"path", file.path()}, {"format", "qcow2"}, {"queues", "2"}, {"cache", "unsafe"}});
        rig.start();
        RandomWork work(
            rig, seed, model, [&] { return file.read(); }, 0);
        work.run(600, 200);
        model = work.model();
      }
      CHECK_MESSAGE(WEXITSTATUS(shell(folder, "qemu-img check -f qcow2 " + file.path())) == 0, log_of(folder));
      create(folder, "qemu-img convert -f qcow2 -O raw " + file.path() + " content.raw");
      CHECK(read_file(folder + "/content.raw") == model);
    }
    // A device that is too small for the disk.
    {
      Rig rig({{"path", file.path()}, {"format", "qcow2"}});
      rig.start();
      REQUIRE(resize(rig, 16 << 20) == "{\"size_bytes\": 16777216}");
      uint8_t status = VIRTIO_BLK_S_OK;
      for (uint64_t sector = 6 * 2048; sector < 16 * 2048 && status == VIRTIO_BLK_S_OK; sector += 128)
        status = rig.run(VIRTIO_BLK_T_OUT, sector, filled(65536, 9));
      CHECK(status == VIRTIO_BLK_S_IOERR);
      CHECK(rig.run(VIRTIO_BLK_T_FLUSH, 0, {}) == VIRTIO_BLK_S_OK);
      REQUIRE(rig.run(VIRTIO_BLK_T_IN, 0, {}, 65536) == VIRTIO_BLK_S_OK);
      CHECK(std::equal(model.begin(), model.begin() + 65536, rig.data(65536).begin()));
    }
    const int status = WEXITSTATUS(shell(folder, "qemu-img check -f qcow2 " + file.path()));
    CHECK_MESSAGE((status == 0 || status == 3), log_of(folder));
  }
}
