// SPDX-License-Identifier: Apache-2.0
// virtio-blk, driven through real virtqueues by a driver that knows what the disk should hold.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/loop.h>
#include <linux/seccomp.h>
#include <linux/virtio_blk.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <numeric>
#include <random>
#include <thread>

#include "clone/abi/boot_root.h"
#include "disk_rig.hpp"
#include "fake_driver.hpp"
#include "fake_host.hpp"
#include "fake_plugin.hpp"
#include "virtqueue/virtqueue_service.hpp"

using namespace vmm;
using namespace vmm::test;

TEST_CASE("virtio-blk: what the guest is told of the disk") {
  TemporaryFile file(1 << 20);
  Rig rig({{"path", file.path()}, {"queues", "3"}, {"queue-size", "128"}});
  CHECK(rig.table().device_type == 2);
  CHECK(rig.table().queue_count(rig.device().raw()) == 3);
  CHECK(rig.table().queue_max_size(rig.device().raw(), 0) == 128);
  const virtio_blk_config config = rig.config();
  CHECK(config.capacity == 2048);
  CHECK(config.seg_max == 126);
  CHECK(config.blk_size == 512);
  CHECK(config.physical_block_exp == 3);
  CHECK(config.num_queues == 3);
  CHECK(config.max_discard_seg == 1);
  CHECK(config.max_write_zeroes_seg == 1);
  CHECK(config.write_zeroes_may_unmap == 1);
  const uint64_t features = rig.table().features(rig.device().raw());
  for (const uint32_t bit : {VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
                             VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES})
    CHECK((features >> bit & 1) == 1);
  CHECK((features >> VIRTIO_BLK_F_RO & 1) == 0);

  uint32_t beyond = 7;
  rig.table().read_config(rig.device().raw(), sizeof config - 2, &beyond, 4);
  CHECK(beyond == 0);

  SUBCASE("one queue for each vCPU by default") {
    TemporaryFile other(4096);
    Rig by_default({{"path", other.path()}});
    CHECK(by_default.table().queue_count(by_default.device().raw()) == 2);
    FakeHost large;
    large.vcpu_count = 40;
    DeviceUnderTest device(plugin().device("virtio-blk"), large.handle("virtio-blk.0"));
    TemporaryFile third(4096);
    REQUIRE(device.configure({{"path", third.path()}}) == CLONE_OK);
    CHECK(device.extension<clone_virtio_device>(CLONE_VIRTIO_DEVICE)->queue_count(device.raw()) == 32);
  }
  SUBCASE("without discard") {
    TemporaryFile other(4096);
    Rig without({{"path", other.path()}, {"discard", "off"}, {"queues", "1"}});
    const uint64_t fewer = without.table().features(without.device().raw());
    CHECK((fewer >> VIRTIO_BLK_F_DISCARD & 1) == 0);
    CHECK((fewer >> VIRTIO_BLK_F_MQ & 1) == 0);
    CHECK(without.config().write_zeroes_may_unmap == 0);
    without.start();
    CHECK(without.run(VIRTIO_BLK_T_DISCARD, 0, range(0, 1, 0)) == VIRTIO_BLK_S_UNSUPP);
  }
}

TEST_CASE("virtio-blk: each kind of request") {
  for (const char* aio : {"io_uring", "threads"}) {
    CAPTURE(aio);
    TemporaryFile file(64 * kSector);
    Rig rig({{"path", file.path()}, {"aio", aio}, {"serial", "SN-0123456789abcdefg"}});
    rig.start();
    const auto before = file.read();
    CHECK(rig.run(VIRTIO_BLK_T_IN, 3, {}, 1024) == VIRTIO_BLK_S_OK);
    CHECK(rig.written_bytes == 1025);
    CHECK(rig.data(1024) == std::vector<uint8_t>(before.begin() + 3 * 512, before.begin() + 5 * 512));
    const auto written = pattern(1536, 9);
    CHECK(rig.run(VIRTIO_BLK_T_OUT, 61, written) == VIRTIO_BLK_S_OK);
    CHECK(rig.written_bytes == 1);
    CHECK(rig.run(VIRTIO_BLK_T_FLUSH, 0, {}) == VIRTIO_BLK_S_OK);
    CHECK(rig.run(VIRTIO_BLK_T_DISCARD, 0, range(0, 8, 0)) == VIRTIO_BLK_S_OK);
    CHECK(rig.run(VIRTIO_BLK_T_WRITE_ZEROES, 0, range(9, 2, 0)) == VIRTIO_BLK_S_OK);
    CHECK(rig.run(VIRTIO_BLK_T_WRITE_ZEROES, 0, range(12, 1, 1)) == VIRTIO_BLK_S_OK);
    CHECK(rig.run(VIRTIO_BLK_T_GET_ID, 0, {}, 20) == VIRTIO_BLK_S_OK);
    const auto id = rig.data(20);
    CHECK(std::string(id.begin(), id.end()) == "SN-0123456789abcdefg");

    auto expected = before;
    std::copy(written.begin(), written.end(), expected.begin() + 61 * 512);
    std::fill_n(expected.begin(), 8 * 512, uint8_t{0});
    std::fill_n(expected.begin() + 9 * 512, 2 * 512, uint8_t{0});
    std::fill_n(expected.begin() + 12 * 512, 512, uint8_t{0});
    CHECK(file.read() == expected);
    CHECK(rig.resets_wanted() == 0);
  }
}

TEST_CASE("virtio-blk: random work matches a plain file") {
  struct Variant {
    const char *aio, *cache, *queues, *folder;
    bool packed;
    int steps;
  };
  const Variant variants[] = {
      {"io_uring", "writeback", "1", "/var/tmp", false, 4000}, {"io_uring", "writeback", "4", "/var/tmp", true, 4000},
      {"io_uring", "none", "2", "/var/tmp", true, 1500},       {"io_uring", "unsafe", "3", "/dev/shm", false, 4000},
      {"threads", "writeback", "3", "/var/tmp", false, 4000},  {"threads", "none", "1", "/var/tmp", false, 1000},
      {"threads", "unsafe", "2", "/dev/shm", true, 4000}};
  uint64_t seed = 20'240'101;
  for (const Variant& variant : variants) {
    CAPTURE(variant.aio);
    CAPTURE(variant.cache);
    CAPTURE(variant.folder);
    CAPTURE(seed);
    TemporaryFile file(4096 * kSector, variant.folder);
    Rig rig({{"path", file.path()},
             {"aio", variant.aio},
             {"cache", variant.cache},
             {"queues", variant.queues},
             {"serial", "disk"}});
    rig.start(variant.packed);
    RandomWork(rig, file, seed++).run(variant.steps, 400);
    CHECK(rig.resets_wanted() == 0);
  }
}

TEST_CASE("virtio-blk: a block device as the disk") {
  for (const char* cache : {"writeback", "none"}) {
    for (const char* aio : {"io_uring", "threads"}) {
      TemporaryFile file(4096 * kSector);
      if (!file.become_block_device()) {
        MESSAGE("skipped: no loop device can be had");
        return;
      }
      Rig rig({{"path", file.path()}, {"cache", cache}, {"aio", aio}});
      CHECK(rig.config().capacity == 4096);
      CHECK(rig.config().blk_size == 512);
      rig.start();
      RandomWork(rig, file, 77).run(600, 200);
    }
  }
}

TEST_CASE("virtio-blk: where io_uring is not allowed") {
  TemporaryFile file(64 * kSector);
  // Of this thread only: io_uring_setup fails with EPERM, as under Docker's filter.
  std::thread confined([&] {
    sock_filter code[] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
                          BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_io_uring_setup, 0, 1),
                          BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
                          BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    const sock_fprog program = {static_cast<unsigned short>(std::size(code)), code};
    REQUIRE(::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    REQUIRE(::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
    CHECK(configure_error({{"path", file.path()}, {"aio", "io_uring"}}, CLONE_ERR_SYSTEM) ==
          "aio=io_uring: Operation not permitted");
    Rig rig({{"path", file.path()}});
    REQUIRE(rig.host().log_lines().size() == 1);
    CHECK(rig.host().log_lines()[0] == "virtio-blk.0: aio=threads, because of io_uring: Operation not permitted");
    rig.start();
    CHECK(rig.run(VIRTIO_BLK_T_OUT, 3, pattern(512, 4)) == VIRTIO_BLK_S_OK);
    CHECK(rig.run(VIRTIO_BLK_T_IN, 3, {}, 512) == VIRTIO_BLK_S_OK);
    CHECK(rig.data(512) == pattern(512, 4));
  });
  confined.join();
}

TEST_CASE("virtio-blk: without the flush feature every write is durable, and works") {
  for (const char* aio : {"io_uring", "threads"}) {
    TemporaryFile file(1024 * kSector);
    Rig rig({{"path", file.path()}, {"aio", aio}, {"queues", "1"}});
    rig.start(false, 1ull << VIRTIO_BLK_F_FLUSH);
    RandomWork(rig, file, 5).run(60, 50);
  }
}

TEST_CASE("virtio-blk: hostile requests are answered and harm nothing") {
  for (const char* aio : {"io_uring", "threads"}) {
    CAPTURE(aio);
    TemporaryFile file(64 * kSector);
    Rig rig({{"path", file.path()}, {"aio", aio}});
    rig.start();
    const auto before = file.read();
    const auto sector_of_data = pattern(512, 1);
    const uint64_t base = Rig::slot(0, 0);
    const FakeDriver::Buffer header = {base, 16, false}, status = {base + 16, 1, true};
    const auto set_header = [&](uint32_t type, uint64_t sector) {
      *rig.at<virtio_blk_outhdr>(base) = {type, 0, sector};
    };

    // Ranges.
    for (const uint64_t sector : {64ull, 65ull, 1ull << 55, ~0ull, ~0ull - 1, ~0ull / 512, 1ull << 63}) {
      CAPTURE(sector);
      CHECK(rig.run(VIRTIO_BLK_T_IN, sector, {}, 512) == VIRTIO_BLK_S_IOERR);
      CHECK(rig.run(VIRTIO_BLK_T_OUT, sector, sector_of_data) == VIRTIO_BLK_S_IOERR);
      CHECK(rig.run(VIRTIO_BLK_T_DISCARD, 0, range(sector, 1, 0)) == VIRTIO_BLK_S_IOERR);
      CHECK(rig.run(VIRTIO_BLK_T_WRITE_ZEROES, 0, range(sector, 1, 0)) == VIRTIO_BLK_S_IOERR);
    }
    CHECK(rig.run(VIRTIO_BLK_T_IN, 63, {}, 1024) == VIRTIO_BLK_S_IOERR);
    CHECK(rig.run(VIRTIO_BLK_T_OUT, 63, pattern(1024, 2)) == VIRTIO_BLK_S_IOERR);
    CHECK(rig.run(VIRTIO_BLK_T_DISCARD, 0, range(1, 64, 0)) == VIRTIO_BLK_S_IOERR);
    CHECK(rig.run(VIRTIO_BLK_T_WRITE_ZEROES, 0, range(1, ~0u, 0)) == VIRTIO_BLK_S_IOERR);
    // Lengths.
    CHECK(rig.run(VIRTIO_BLK_T_IN, 0, {}, 511) == VIRTIO_BLK_S_IOERR);
    CHECK(rig.run(VIRTIO_BLK_T_OUT, 0, pattern(513, 2)) == VIRTIO_BLK_S_IOERR);
    CHECK(rig.run(VIRTIO_BLK_T_IN, 0, {}) == VIRTIO_BLK_S_OK);
    CHECK(rig.run(VIRTIO_BLK_T_OUT, 0, {}) == VIRTIO_BLK_S_OK);
    CHECK(rig.run(VIRTIO_BLK_T_DISCARD, 0, range(0, 0, 0)) == VIRTIO_BLK_S_OK);
    CHECK(rig.run(VIRTIO_BLK_T_DISCARD, 0, pattern(15, 0)) == VIRTIO_BLK_S_IOERR);
    CHECK(rig.run(VIRTIO_BLK_T_DISCARD, 0, pattern(32, 0)) == VIRTIO_BLK_S_IOERR);
    CHECK(rig.run(VIRTIO_BLK_T_WRITE_ZEROES, 0, {}) == VIRTIO_BLK_S_IOERR);
    // Flags and types.
    CHECK(rig.run(VIRTIO_BLK_T_DISCARD, 0, range(0, 1, 1)) == VIRTIO_BLK_S_UNSUPP);
    CHECK(rig.run(VIRTIO_BLK_T_WRITE_ZEROES, 0, range(0, 1, 2)) == VIRTIO_BLK_S_UNSUPP);
    for (const uint32_t type : {2u, 3u, 5u, 14u, 0x8000'0000u, ~0u})
      CHECK(rig.run(type, 0, sector_of_data) == VIRTIO_BLK_S_UNSUPP);
    // An identity longer and shorter than it is.
    CHECK(rig.run(VIRTIO_BLK_T_GET_ID, 0, {}, 3) == VIRTIO_BLK_S_OK);
    CHECK(rig.run(VIRTIO_BLK_T_GET_ID, 0, {}, 100) == VIRTIO_BLK_S_OK);
    // Chains of the wrong shape.
    set_header(VIRTIO_BLK_T_OUT, 0);
    CHECK(rig.run_chain({{base, 15, false}, status}) == VIRTIO_BLK_S_IOERR);
    CHECK(rig.run_chain({status}) == VIRTIO_BLK_S_IOERR);
    CHECK(rig.run_chain({header, {base + kSlotData, 512, false}}) == kNoStatus);
    CHECK(rig.written_bytes == 0);
    // A write whose data the device may write is one of no bytes.
    CHECK(rig.run_chain({header, {base + kSlotData, 512, true}, status}) == VIRTIO_BLK_S_OK);
    // The status byte at the end of the data.
    set_header(VIRTIO_BLK_T_IN, 1);
    *rig.at<uint8_t>(base + kSlotData + 512) = kNoStatus;
    CHECK(rig.run_chain({header, {base + kSlotData, 513, true}}) == kNoStatus);
    CHECK(*rig.at<uint8_t>(base + kSlotData + 512) == VIRTIO_BLK_S_OK);
    CHECK(rig.data(512) == std::vector<uint8_t>(before.begin() + 512, before.begin() + 1024));

    CHECK(file.read() == before);
    CHECK(rig.resets_wanted() == 0);

    // A rule of the ring broken: that queue asks for a reset, others and the machine go on.
    auto& driver = *rig.lines()[0].driver;
    driver.offer_head(9999);
    signal_event(rig.lines()[0].kick.get());
    CHECK(rig.host().run_until([&] { return rig.resets_wanted() > 0; }));
    rig.reset();
    rig.activate();
    CHECK(rig.run(VIRTIO_BLK_T_OUT, 0, sector_of_data) == VIRTIO_BLK_S_OK);
    CHECK(rig.device().quiesce() == CLONE_OK);
  }
}

TEST_CASE("virtio-blk: a file that shrinks gives I/O errors") {
  TemporaryFile file(64 * kSector);
  Rig rig({{"path", file.path()}});
  rig.start();
  REQUIRE(::ftruncate(file.fd(), 8 * kSector) == 0);
  CHECK(rig.run(VIRTIO_BLK_T_IN, 7, {}, 1024) == VIRTIO_BLK_S_IOERR);
  CHECK(rig.run(VIRTIO_BLK_T_IN, 32, {}, 512) == VIRTIO_BLK_S_IOERR);
  CHECK(rig.run(VIRTIO_BLK_T_IN, 7, {}, 512) == VIRTIO_BLK_S_OK);
  const auto lines = rig.host().log_lines();
  REQUIRE(lines.size() == 2);
  CHECK(lines[1] == "virtio-blk.0: read of 512 bytes at 16384 failed: Input/output error");
}

TEST_CASE("virtio-blk: reset while busy, again and again") {
  for (const char* aio : {"io_uring", "threads"}) {
    for (const char* cache : {"writeback", "none"}) {
      TemporaryFile file(4096 * kSector);
      Rig rig({{"path", file.path()}, {"aio", aio}, {"cache", cache}, {"queues", "2"}});
      rig.start();
      for (int round = 0; round < 20; ++round) {
        for (uint32_t line = 0; line < 2; ++line) {
          for (uint32_t slot = 0; slot < kSlots; ++slot) {
            const uint64_t base = Rig::slot(line, slot);
            const bool out = slot % 3 == 0;
            *rig.at<virtio_blk_outhdr>(base) = {out ? 1u : 0u, 0, (line * kSlots + slot) * 128};
            rig.submit(line, slot, {{base, 16, false}, {base + kSlotData, 64 << 10, !out}, {base + 16, 1, true}});
          }
        }
        if (round % 3 == 1) REQUIRE(rig.device().quiesce() == CLONE_OK);
        rig.reset();
        // No request is under way any more: memory stays as it is.
        std::fill_n(rig.host().memory().slice({Rig::slot(0, 0)}, kSlotBytes), kSlotBytes, std::byte{0x77});
        rig.activate(round % 2 == 1);
        if (round % 3 == 1) REQUIRE(rig.device().resume() == CLONE_OK);
        const auto data = pattern(4096, static_cast<uint8_t>(round));
        REQUIRE(rig.run(VIRTIO_BLK_T_OUT, 8, data) == VIRTIO_BLK_S_OK);
        REQUIRE(rig.run(VIRTIO_BLK_T_IN, 8, {}, 4096) == VIRTIO_BLK_S_OK);
        REQUIRE(rig.data(4096) == data);
      }
    }
  }
}

namespace {

// `count` reads of `size` bytes, spread over the queues, all made available at once as far as the rings hold them, and
// how long they took.
class Throttled {
 public:
  Throttled(Rig& rig, uint32_t size) : rig_(rig), size_(size), start_(std::chrono::steady_clock::now()) {}

  void submit(uint32_t line, uint32_t slot) {
    const uint64_t base = Rig::slot(line, slot);
    *rig_.at<virtio_blk_outhdr>(base) = {VIRTIO_BLK_T_IN, 0, 0};
    *rig_.at<uint8_t>(base + 16) = kNoStatus;
    rig_.submit(line, slot, {{base, 16, false}, {base + kSlotData, size_, true}, {base + 16, 1, true}});
  }
  // Keeps every ring full until `count` were answered; the answers of each queue.
  std::vector<uint32_t> run(uint32_t count) {
    std::vector<uint32_t> answers(rig_.lines().size());
    for (uint32_t line = 0; line < answers.size(); ++line)
      for (uint32_t slot = 0; slot < kSlots; ++slot) submit(line, slot);
    for (uint32_t done = 0; done < count;) {
      for (uint32_t line = 0; line < answers.size(); ++line) {
        for (const uint32_t slot : rig_.take(line)) {
          REQUIRE(*rig_.at<uint8_t>(Rig::slot(line, slot) + 16) == VIRTIO_BLK_S_OK);
          ++answers[line];
          ++done;
          submit(line, slot);
        }
      }
      if (done < count) REQUIRE(rig_.wait());
    }
    return answers;
  }
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  Rig& rig_;
  uint32_t size_;
  std::chrono::steady_clock::time_point start_;
};

double seconds_of(auto&& call) {
  const auto start = std::chrono::steady_clock::now();
  call();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

TEST_CASE("virtio-blk: limits hold, and are reached") {
  for (const char* aio : {"io_uring", "threads"}) {
    CAPTURE(aio);
    TemporaryFile file(1 << 20);
    {
      Rig rig({{"path", file.path()}, {"aio", aio}, {"queues", "2"}, {"iops", "500"}});
      rig.start();
      Throttled work(rig, 4096);
      const auto answers = work.run(250);
      // 50 of them are the burst.
      CHECK(work.seconds() >= 200 / 500.0);
      CHECK(work.seconds() < 200 / 500.0 + 5);
      // Both queues get their turn, also where the machine is too busy to wake them in time.
      for (const uint32_t of_one : answers) CHECK(of_one >= 250 / 10);
    }
    {
      Rig rig({{"path", file.path()}, {"aio", aio}, {"queues", "1"}, {"bps", "1M"}, {"bps-burst", "64K"}});
      rig.start();
      Throttled work(rig, 64 << 10);
      work.run(9);
      // The first costs what is there, the second needs one byte, the ninth that the eighth is paid for.
      CHECK(work.seconds() >= 7 * 64 / 1024.0);
      CHECK(work.seconds() < 7 * 64 / 1024.0 + 5);
    }
    {
      // One operation each: flush, identity, discard, and what is refused.
      Rig rig({{"path", file.path()}, {"aio", aio}, {"iops", "100"}, {"iops-burst", "1"}, {"bps", "4K"}});
      rig.start();
      const double taken = seconds_of([&] {
        for (int i = 0; i < 5; ++i) {
          CHECK(rig.run(VIRTIO_BLK_T_FLUSH, 0, {}) == VIRTIO_BLK_S_OK);
          CHECK(rig.run(VIRTIO_BLK_T_GET_ID, 0, {}, 20) == VIRTIO_BLK_S_OK);
          CHECK(rig.run(VIRTIO_BLK_T_DISCARD, 0, range(0, 2048, 0)) == VIRTIO_BLK_S_OK);
          CHECK(rig.run(77, 0, {}, 0) == VIRTIO_BLK_S_UNSUPP);
        }
      });
      CHECK(taken >= 19 / 100.0);
      CHECK(taken < 19 / 100.0 + 5);
    }
    {
      // Zeroes are bytes: 8 KiB at 16 KiB a second before the next request may begin.
      Rig rig({{"path", file.path()}, {"aio", aio}, {"bps", "16K"}, {"bps-burst", "1"}});
      rig.start();
      const double taken = seconds_of([&] {
        CHECK(rig.run(VIRTIO_BLK_T_WRITE_ZEROES, 0, range(0, 16, 0)) == VIRTIO_BLK_S_OK);
        CHECK(rig.run(VIRTIO_BLK_T_FLUSH, 0, {}) == VIRTIO_BLK_S_OK);
      });
      CHECK(taken >= 8191 / 16384.0);
      CHECK(taken < 0.5 + 5);
    }
  }
}

TEST_CASE("virtio-blk: a throttled disk is paused, saved and reset at once") {
  for (const char* aio : {"io_uring", "threads"}) {
    CAPTURE(aio);
    TemporaryFile file(1 << 20);
    // After its first 64 KiB this disk begins nothing for 16 seconds.
    const Options options = {{"path", file.path()}, {"aio", aio}, {"queues", "2"}, {"bps", "4K"}, {"bps-burst", "1"}};
    SavedState state;
    {
      Rig rig(options);
      rig.start();
      REQUIRE(rig.run(VIRTIO_BLK_T_IN, 0, {}, 64 << 10) == VIRTIO_BLK_S_OK);
      Throttled work(rig, 512);
      for (uint32_t line = 0; line < 2; ++line)
        for (uint32_t slot = 0; slot < kSlots; ++slot) work.submit(line, slot);
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      CHECK(seconds_of([&] { REQUIRE(rig.device().quiesce() == CLONE_OK); }) < 2);
      CHECK(rig.take(0).empty());
      CHECK(rig.take(1).empty());
      REQUIRE(rig.device().save(state) == CLONE_OK);
      REQUIRE(rig.device().resume() == CLONE_OK);
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      CHECK(rig.take(0).empty());
      CHECK(seconds_of([&] { rig.reset(); }) < 2);
      // The debt stays: a reset is no way around the limit.
      rig.activate();
      work.submit(0, 0);
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      CHECK(seconds_of([&] { rig.reset(); }) < 2);
    }
    // The limits are the host's, not the guest's: another host may have others.
    Rig loaded({{"path", file.path()}, {"aio", aio}, {"queues", "2"}});
    REQUIRE(loaded.device().load(state) == CLONE_OK);
    loaded.start();
    CHECK(loaded.run(VIRTIO_BLK_T_IN, 0, {}, 512) == VIRTIO_BLK_S_OK);
  }
}

TEST_CASE("virtio-blk: throttled random work matches a plain file") {
  for (const char* aio : {"io_uring", "threads"}) {
    TemporaryFile file(4096 * kSector);
    Rig rig({{"path", file.path()},
             {"aio", aio},
             {"queues", "3"},
             {"serial", "disk"},
             {"iops", "3000"},
             {"iops-burst", "5"},
             {"bps", "100M"},
             {"bps-burst", "1K"}});
    rig.start(true);
    RandomWork(rig, file, 4711).run(1500, 100);
    CHECK(rig.resets_wanted() == 0);
  }
}

namespace {

std::string resize(Rig& rig, uint64_t size_bytes) {
  return rig.host().call_command("virtio-blk.0.resize", "{\"size_bytes\":" + std::to_string(size_bytes) + "}");
}

}  // namespace

// As a copy is that keeps the time of change.
static void become_as_old(const TemporaryFile& copy, const TemporaryFile& original) {
  struct stat status {};
  REQUIRE(::stat(original.path().c_str(), &status) == 0);
  const timespec times[] = {status.st_atim, status.st_mtim};
  REQUIRE(::utimensat(AT_FDCWD, copy.path().c_str(), times, 0) == 0);
}

TEST_CASE("virtio-blk: a disk grows while the guest uses it") {
  for (const char* aio : {"io_uring", "threads"}) {
    for (const char* cache : {"writeback", "none"}) {
      CAPTURE(aio);
      CAPTURE(cache);
      TemporaryFile file(64 * kSector);
      const auto before = file.read();
      Rig rig({{"path", file.path()}, {"aio", aio}, {"cache", cache}, {"serial", "disk"}});
      rig.start();
      const auto last = pattern(512, 8);
      CHECK(rig.run(VIRTIO_BLK_T_OUT, 4095, last) == VIRTIO_BLK_S_IOERR);
      CHECK(resize(rig, 4096 * kSector) == "{\"size_bytes\": 2097152}");
      CHECK(rig.config_changes() == 1);
      CHECK(rig.config().capacity == 4096);
      CHECK(rig.run(VIRTIO_BLK_T_OUT, 4095, last) == VIRTIO_BLK_S_OK);
      CHECK(rig.run(VIRTIO_BLK_T_OUT, 4096, last) == VIRTIO_BLK_S_IOERR);
      CHECK(rig.run(VIRTIO_BLK_T_IN, 4094, {}, 1024) == VIRTIO_BLK_S_OK);
      auto end = std::vector<uint8_t>(512);
      end.insert(end.end(), last.begin(), last.end());
      CHECK(rig.data(1024) == end);
      // Sparse; what was there is there.
      struct stat status {};
      REQUIRE(::fstat(file.fd(), &status) == 0);
      CHECK(status.st_blocks * 512 < 1 << 20);
      const auto after = file.read();
      CHECK(std::equal(before.begin(), before.end(), after.begin()));

      // The same size again: nothing for the guest to look at.
      CHECK(resize(rig, 4096 * kSector) == "{\"size_bytes\": 2097152}");
      CHECK(rig.config_changes() == 1);
      RandomWork(rig, file, 31).run(200, 50);

      // Paused: the guest is told, and finds it when it goes on.
      REQUIRE(rig.device().quiesce() == CLONE_OK);
      CHECK(resize(rig, 4097 * kSector) == "{\"size_bytes\": 2097664}");
      CHECK(rig.config_changes() == 2);
      SavedState state;
      REQUIRE(rig.device().save(state) == CLONE_OK);
      TemporaryFile copy(4097 * kSector);
      become_as_old(copy, file);
      REQUIRE(rig.device().load(state) == CLONE_OK);
      REQUIRE(rig.device().resume() == CLONE_OK);
      CHECK(rig.run(VIRTIO_BLK_T_OUT, 4096, last) == VIRTIO_BLK_S_OK);

      // Without a driver there is nobody to tell.
      rig.reset();
      CHECK(resize(rig, 4098 * kSector) == "{\"size_bytes\": 2098176}");
      CHECK(rig.config_changes() == 2);
      rig.activate();
      CHECK(rig.run(VIRTIO_BLK_T_OUT, 4097, last) == VIRTIO_BLK_S_OK);
      Rig loaded({{"path", copy.path()}, {"serial", "disk"}});
      CHECK(loaded.device().load(state) == CLONE_OK);
    }
  }
}

TEST_CASE("virtio-blk: a disk grows again and again under load") {
  TemporaryFile file(4096 * kSector);
  Rig rig({{"path", file.path()}, {"queues", "2"}});
  rig.start();
  std::atomic<bool> done{false};
  // A vCPU reads the configuration meanwhile: always one of the sizes that there were.
  std::thread vcpu([&] {
    uint64_t last = 4096;
    while (!done) {
      const uint64_t capacity = rig.config().capacity;
      CHECK(capacity >= last);
      CHECK(capacity <= 4096 + 200 * 8);
      last = capacity;
    }
  });
  uint32_t errors = 0;
  for (uint64_t size = 4096; size < 4096 + 200 * 8;) {
    for (uint32_t slot = 0; slot < kSlots; ++slot) {
      const uint64_t base = Rig::slot(1, slot);
      *rig.at<virtio_blk_outhdr>(base) = {VIRTIO_BLK_T_OUT, 0, size - 8};
      rig.submit(1, slot, {{base, 16, false}, {base + kSlotData, 4096, false}, {base + 16, 1, true}});
    }
    size += 8;
    REQUIRE(resize(rig, size * kSector) == "{\"size_bytes\": " + std::to_string(size * kSector) + "}");
    for (uint32_t answered = 0; answered < kSlots;) {
      for (const uint32_t slot : rig.take(1)) {
        errors += *rig.at<uint8_t>(Rig::slot(1, slot) + 16) != VIRTIO_BLK_S_OK;
        ++answered;
      }
      if (answered < kSlots) REQUIRE(rig.wait());
    }
  }
  done = true;
  vcpu.join();
  CHECK(errors == 0);
  CHECK(rig.config_changes() == 200);
  CHECK(file.read().size() == (4096 + 200 * 8) * kSector);
}

TEST_CASE("virtio-blk: sizes that a disk does not take") {
  TemporaryFile file(64 * kSector);
  const auto before = file.read();
  {
    Rig rig({{"path", file.path()}});
    rig.start();
    const std::string usage = "error: resize: allowed is {\"size_bytes\": N}, N being the new size of the disk";
    for (const char* json :
         {"", "{}", "null", "[65536]", "65536", "{\"size_bytes\":}", "{\"size_bytes\":\"65536\"}",
          "{\"size_bytes\":-65536}", "{\"size_bytes\":65536.5}", "{\"size_bytes\":6e4}", "{\"size_bytes\":65536",
          "{\"size_bytes\":65536}}", "{\"size_bytes\":65536,\"x\":1}", "{\"bytes\":65536}",
          "{\"size_bytes\":18446744073709551616}", "{\"size_bytes\":true}", "{\"size_bytes\" 65536}"}) {
      CAPTURE(json);
      CHECK(rig.host().call_command("virtio-blk.0.resize", json) == usage);
    }
    CHECK(rig.host().call_command("virtio-blk.0.resize", " { \"size_bytes\" :\n32768 } ") == "{\"size_bytes\": 32768}");
    CHECK(resize(rig, 32768 + 100) == "error: size_bytes=32868: allowed is a multiple of the disk's block size, 512");
    CHECK(resize(rig, 32768 - 512) == "error: size_bytes=32256: the disk has 32768 bytes and can only grow");
    CHECK(resize(rig, 0) == "error: size_bytes=0: the disk has 32768 bytes and can only grow");
    for (const uint64_t size : {1ull << 63, ~0ull - 511, (1ull << 63) - 512})
      CHECK(resize(rig, size) ==
            "error: path=" + file.path() + ": size_bytes=" + std::to_string(size) + ": File too large");
    CHECK(rig.config_changes() == 0);
    CHECK(rig.config().capacity == 64);
    CHECK(file.read() == before);

    // Somebody appended to the file: nothing of that is cut off.
    REQUIRE(::ftruncate(file.fd(), 66 * kSector) == 0);
    CHECK(resize(rig, 65 * kSector) ==
          "error: path=" + file.path() + ": size_bytes=33280: the file has 33792 bytes and can only grow");
    CHECK(resize(rig, 66 * kSector) == "{\"size_bytes\": 33792}");
    CHECK(rig.config().capacity == 66);
  }
  Rig reader({{"path", file.path()}, {"readonly", "on"}});
  CHECK(resize(reader, 70 * kSector) == "error: size_bytes=35840: the disk is read-only (readonly=on)");
  CHECK(file.read().size() == 66 * kSector);
}

TEST_CASE("virtio-blk: a block device that grew") {
  TemporaryFile file(4096 * kSector);
  if (!file.become_block_device()) {
    MESSAGE("skipped: no loop device can be had");
    return;
  }
  Rig rig({{"path", file.path()}});
  rig.start();
  REQUIRE(::ftruncate(file.fd(), 4104 * kSector) == 0);
  CHECK(resize(rig, 4104 * kSector) == "error: path=" + file.path() +
                                           ": size_bytes=2101248: the block device has 2097152 bytes; allowed is that "
                                           "size, after the device itself was resized");
  REQUIRE(file.tell_device_of_size());
  CHECK(resize(rig, 4104 * kSector) == "{\"size_bytes\": 2101248}");
  CHECK(rig.config().capacity == 4104);
  CHECK(rig.run(VIRTIO_BLK_T_OUT, 4103, pattern(512, 3)) == VIRTIO_BLK_S_OK);
}

TEST_CASE("virtio-blk: without a control socket there is no resize, and no error") {
  TemporaryFile file(64 * kSector);
  FakeHost host;
  host.offer(CLONE_HOST_CONTROL, nullptr);
  DeviceUnderTest device(plugin().device("virtio-blk"), host.handle("virtio-blk.0"));
  CHECK(device.configure({{"path", file.path()}}) == CLONE_OK);
  CHECK(host.call_command("virtio-blk.0.resize", "{\"size_bytes\":65536}") == "error: no such command");
}

TEST_CASE("virtio-blk: queues activated before start wait for it") {
  TemporaryFile file(64 * kSector);
  Rig rig({{"path", file.path()}});
  rig.activate();  // as a transport's load() does
  const uint64_t base = Rig::slot(0, 0);
  *rig.at<virtio_blk_outhdr>(base) = {VIRTIO_BLK_T_FLUSH, 0, 0};
  rig.submit(0, 0, {{base, 16, false}, {base + 16, 1, true}});
  CHECK_FALSE(rig.wait(20));
  REQUIRE(rig.device().start() == CLONE_OK);
  CHECK(rig.wait());
  CHECK(rig.take(0).size() == 1);
}

TEST_CASE("virtio-blk: paused and resumed at any moment") {
  for (const char* aio : {"io_uring", "threads"}) {
    TemporaryFile file(64 * kSector);
    Rig rig({{"path", file.path()}, {"aio", aio}, {"queues", "2"}});
    REQUIRE(rig.device().start() == CLONE_OK);
    std::mt19937 random(3);
    for (int round = 0; round < 300; ++round) {
      rig.activate();
      const auto spin_until = std::chrono::steady_clock::now() + std::chrono::microseconds(random() % 200);
      while (std::chrono::steady_clock::now() < spin_until) {
      }
      REQUIRE(rig.device().quiesce() == CLONE_OK);
      REQUIRE(rig.device().resume() == CLONE_OK);
      REQUIRE(rig.device().quiesce() == CLONE_OK);
      REQUIRE(rig.device().resume() == CLONE_OK);
      REQUIRE(rig.run(VIRTIO_BLK_T_IN, 0, {}, 512) == VIRTIO_BLK_S_OK);
      rig.reset();
    }
  }
}

TEST_CASE("virtio-blk: read-only disks") {
  TemporaryFile file(64 * kSector);
  REQUIRE(::fchmod(file.fd(), 0400) == 0);
  Rig rig({{"path", file.path()}, {"readonly", "on"}});
  const uint64_t features = rig.table().features(rig.device().raw());
  CHECK((features >> VIRTIO_BLK_F_RO & 1) == 1);
  CHECK((features >> VIRTIO_BLK_F_DISCARD & 1) == 0);
  CHECK((features >> VIRTIO_BLK_F_WRITE_ZEROES & 1) == 0);
  rig.start();
  const auto before = file.read();
  CHECK(rig.run(VIRTIO_BLK_T_OUT, 0, pattern(512, 0)) == VIRTIO_BLK_S_IOERR);
  CHECK(rig.run(VIRTIO_BLK_T_WRITE_ZEROES, 0, range(0, 1, 0)) == VIRTIO_BLK_S_IOERR);
  CHECK(rig.run(VIRTIO_BLK_T_DISCARD, 0, range(0, 1, 0)) != VIRTIO_BLK_S_OK);
  CHECK(rig.run(VIRTIO_BLK_T_FLUSH, 0, {}) == VIRTIO_BLK_S_OK);
  CHECK(rig.run(VIRTIO_BLK_T_IN, 0, {}, 512) == VIRTIO_BLK_S_OK);
  CHECK(file.read() == before);
}

TEST_CASE("virtio-blk: an image is written by one machine, or read by many") {
  TemporaryFile file(64 * kSector);
  const std::string name = "path=" + file.path();
  {
    Rig writer({{"path", file.path()}});
    CHECK(configure_error({{"path", file.path()}}, CLONE_ERR_BUSY) ==
          name + ": in use by another process (opened for writing)");
    CHECK(configure_error({{"path", file.path()}, {"readonly", "on"}}, CLONE_ERR_BUSY) ==
          name + ": in use by another process (opened for writing)");
  }
  Rig reader({{"path", file.path()}, {"readonly", "on"}});
  Rig second({{"path", file.path()}, {"readonly", "on"}});
  CHECK(configure_error({{"path", file.path()}}, CLONE_ERR_BUSY) ==
        name + ": in use by another process (opened for reading); readonly=on shares it");
}

TEST_CASE("virtio-blk: an overlay in the guest's memory shares the image and leaves it alone") {
  TemporaryFile file(64 * kSector);
  const Options options = {{"path", file.path()}, {"root", "on"}, {"overlay", "tmpfs"}};
  Rig first(options);
  Rig second(options);
  const auto* table = second.device().extension<clone_virtio_device>(CLONE_VIRTIO_DEVICE);
  CHECK((table->features(second.device().raw()) & (1ull << VIRTIO_BLK_F_RO)) != 0);
  CHECK((table->features(second.device().raw()) & (1ull << VIRTIO_BLK_F_DISCARD)) == 0);
  CHECK(configure_error({{"path", file.path()}}, CLONE_ERR_BUSY) ==
        "path=" + file.path() + ": in use by another process (opened for reading); readonly=on shares it");
}

TEST_CASE("virtio-blk: overlays that cannot be") {
  TemporaryFile file(64 * kSector);
  for (const char* value : {"tmpfs", "on"}) {
    const std::string given = "overlay=" + std::string(value);
    CHECK(configure_error({{"path", file.path()}, {"overlay", value}}) ==
          given + ": allowed with root=on only: a disk that is not the root has none");
    CHECK(configure_error({{"path", file.path()}, {"root", "on"}, {"readonly", "on"}, {"overlay", value}}) ==
          given + ": allowed without readonly=on only: the image is opened for reading anyway");
  }
}

TEST_CASE("virtio-blk: images and options that make no disk") {
  CHECK(configure_error({{"path", "/nonexistent/x"}}, CLONE_ERR_SYSTEM) ==
        "path=/nonexistent/x: No such file or directory");
  CHECK(configure_error({{"path", "/tmp"}}, CLONE_ERR_SYSTEM) == "path=/tmp: Is a directory");
  CHECK(configure_error({{"path", "/tmp"}, {"readonly", "on"}}) ==
        "path=/tmp: is neither a regular file nor a block device");
  CHECK(configure_error({{"path", "/dev/null"}}) == "path=/dev/null: is neither a regular file nor a block device");
  TemporaryFile empty(0), tiny(511), file(4096);
  CHECK(configure_error({{"path", empty.path()}}) ==
        "path=" + empty.path() + ": is empty; a disk has at least one sector of 512 bytes");
  CHECK(configure_error({{"path", tiny.path()}}) ==
        "path=" + tiny.path() + ": has 511 bytes; a disk has at least one sector of 512");
  CHECK(configure_error({{"path", file.path()}, {"queue-size", "100"}}) ==
        "queue-size=100: allowed are the powers of two from 16 to 1024");
  CHECK(configure_error({{"path", file.path()}, {"iops-burst", "9"}}) ==
        "iops-burst=9: needs iops, the limit that it may exceed");
  CHECK(configure_error({{"path", file.path()}, {"bps-burst", "8K"}, {"iops", "5"}}) ==
        "bps-burst=8192: needs bps, the limit that it may exceed");
  CHECK(configure_error({{"path", file.path()}, {"serial", "has blanks"}}) ==
        "serial=has blanks: allowed are 1 to 20 printable ASCII characters without blanks");
  CHECK(configure_error({{"path", file.path()}, {"serial", "123456789012345678901"}}) ==
        "serial=123456789012345678901: allowed are 1 to 20 printable ASCII characters without blanks");

  const std::string fifo = file.path() + ".fifo";
  REQUIRE(::mkfifo(fifo.c_str(), 0600) == 0);
  CHECK(configure_error({{"path", fifo}, {"readonly", "on"}}) ==
        "path=" + fifo + ": is neither a regular file nor a block device");
  ::unlink(fifo.c_str());
}

TEST_CASE("virtio-blk: a tail that is no whole sector is not part of the disk") {
  TemporaryFile file(3 * kSector + 100);
  Rig rig({{"path", file.path()}});
  CHECK(rig.config().capacity == 3);
  REQUIRE(rig.host().log_lines().size() == 1);
  CHECK(rig.host().log_lines()[0] ==
        "virtio-blk.0: path=" + file.path() + ": the last 100 bytes are no whole sector and not part of the disk");
}

TEST_CASE("virtio-blk: saved and loaded") {
  TemporaryFile file(64 * kSector), other(64 * kSector), larger(65 * kSector);
  SavedState state, again;
  Rig saved({{"path", file.path()}});
  saved.start();
  REQUIRE(saved.device().quiesce() == CLONE_OK);
  REQUIRE(saved.device().save(state) == CLONE_OK);
  REQUIRE(saved.device().save(again) == CLONE_OK);
  CHECK(state.sections == again.sections);

  const auto load_error = [&](const Options& options, clone_status expected = CLONE_ERR_INVALID) {
    Rig loaded(options);
    CHECK(loaded.device().load(state) == expected);
    return loaded.device().error;
  };
  const timespec long_ago[] = {{1, 0}, {1, 0}};
  REQUIRE(::utimensat(AT_FDCWD, other.path().c_str(), long_ago, 0) == 0);
  CHECK(load_error({{"path", other.path()}}, CLONE_ERR_STATE) ==
        "path=" + other.path() + ": is not as it was when the snapshot was taken; the guest would mix old and new");
  become_as_old(other, file);
  CHECK(load_error({{"path", other.path()}}, CLONE_OK).empty());
  CHECK(load_error({{"path", larger.path()}}) == "the number of 512-byte sectors is 65, of the saved disk 64");
  CHECK(load_error({{"path", other.path()}, {"readonly", "on"}}) == "readonly is 1, of the saved disk 0");
  CHECK(load_error({{"path", other.path()}, {"queues", "5"}}) == "queues is 5, of the saved disk 2");
  CHECK(load_error({{"path", other.path()}, {"serial", "x"}}) == "serial differs from that of the saved disk");
  auto& section = state.sections.at("virtio-blk");
  section.version = 2;
  CHECK(load_error({{"path", other.path()}}, CLONE_ERR_CORRUPT) ==
        "section virtio-blk has version 2, known are 1 to 1");
  section.version = 1;
  section.bytes.pop_back();
  CHECK(load_error({{"path", other.path()}}, CLONE_ERR_CORRUPT).starts_with("section virtio-blk has "));
  state.sections.clear();
  CHECK(load_error({{"path", other.path()}}, CLONE_ERR_CORRUPT) == "section virtio-blk is missing");
}

TEST_CASE("virtio-blk: the root disk says how it is found") {
  const auto describe = [](const Options& options, clone_boot_root_info& info, auto&& look) {
    Rig rig(options);
    const auto* boot_root = rig.device().extension<clone_boot_root>(CLONE_BOOT_ROOT);
    REQUIRE(boot_root);
    info = {};
    info.size = sizeof info;
    const clone_status status = boot_root->describe(rig.device().raw(), &info, nullptr);
    look(info);
    return status;
  };
  const auto put = [](TemporaryFile& file, uint64_t offset, std::vector<uint8_t> bytes) { file.write(offset, bytes); };
  clone_boot_root_info info{};
  TemporaryFile file(256 * kSector);
  CHECK(describe({{"path", file.path()}}, info, [](auto&) {}) == CLONE_EMPTY);
  const auto expect = [&](const char* file_system, const char* module) {
    CHECK(describe({{"path", file.path()}, {"root", "on"}}, info, [&](const clone_boot_root_info& found) {
            CHECK(std::string(found.source) == "serial:clone-root");
            CHECK(std::string(found.file_system) == file_system);
            CHECK(std::string(found.guest_modules).starts_with(module));
            CHECK(found.read_only == 0);
          }) == CLONE_OK);
  };
  put(file, 0, std::vector<uint8_t>(128 << 10));
  expect("", "");
  put(file, 0x10040, {'_', 'B', 'H', 'R', 'f', 'S', '_', 'M'});
  expect("btrfs", "btrfs");
  put(file, 1024, {0x10, 0x20, 0xf5, 0xf2});
  expect("f2fs", "f2fs");
  put(file, 1024, {0xe2, 0xe1, 0xf5, 0xe0});
  expect("erofs", "erofs");
  put(file, 1024, std::vector<uint8_t>(4));
  put(file, 1080, {0x53, 0xef});
  expect("ext2", "ext4");
  put(file, 1024 + 0x5c, {4});
  expect("ext3", "ext4");
  put(file, 1024 + 0x60, {0x42});
  expect("ext4", "ext4");
  put(file, 0, {'h', 's', 'q', 's'});
  expect("squashfs", "squashfs");
  put(file, 0, {'X', 'F', 'S', 'B'});
  expect("xfs", "xfs");
  CHECK(describe({{"path", file.path()}, {"root", "on"}, {"serial", "mine"}, {"readonly", "on"}}, info,
                 [](const clone_boot_root_info& found) {
                   CHECK(std::string(found.source) == "serial:mine");
                   CHECK(found.read_only == 1);
                 }) == CLONE_OK);
  // With an overlay in the guest's memory the disk is for reading, and the host is told to have it laid.
  for (const char* value : {"tmpfs", "on"})
    CHECK(describe({{"path", file.path()}, {"root", "on"}, {"overlay", value}}, info,
                   [](const clone_boot_root_info& found) {
                     CHECK(found.read_only == 1);
                     CHECK(std::string(found.overlay) == "tmpfs");
                   }) == CLONE_OK);
  CHECK(describe({{"path", file.path()}, {"root", "on"}, {"overlay", "off"}}, info,
                 [](const clone_boot_root_info& found) {
                   CHECK(found.read_only == 0);
                   CHECK(std::string(found.overlay).empty());
                 }) == CLONE_OK);
  // A host from before the field gives room for what it knows.
  {
    Rig rig({{"path", file.path()}, {"root", "on"}, {"overlay", "tmpfs"}});
    clone_boot_root_info old{};
    old.size = offsetof(clone_boot_root_info, overlay);
    old.overlay = "untouched";
    const auto* boot_root = rig.device().extension<clone_boot_root>(CLONE_BOOT_ROOT);
    CHECK(boot_root->describe(rig.device().raw(), &old, nullptr) == CLONE_OK);
    CHECK(std::string(old.source) == "serial:clone-root");
    CHECK(std::string(old.overlay) == "untouched");
  }
  // A disk shorter than where some file systems keep their superblock.
  TemporaryFile small(kSector);
  CHECK(describe({{"path", small.path()}, {"root", "on"}}, info,
                 [](const clone_boot_root_info& found) { CHECK(std::string(found.file_system).empty()); }) == CLONE_OK);
}

// micro-bench -tc='*time of*': the queue, the worker and the page cache, without a guest.
#ifdef CLONE_MICRO_BENCH
TEST_CASE("virtio-blk: time of 4 KiB requests") {
  constexpr uint64_t kDisk = 64 << 20;
  for (const char* folder : {"/var/tmp", "/dev/shm"}) {
    TemporaryFile file(kDisk, folder);
    for (const char* aio : {"io_uring", "threads"}) {
      for (const uint32_t type : {VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT}) {
        for (const uint32_t depth : {1u, 4u, 16u}) {
          Rig rig({{"path", file.path()}, {"aio", aio}, {"queues", "1"}});
          rig.start();
          std::mt19937_64 random(1);
          constexpr int kRequests = 50'000;
          int sent = 0, done = 0;
          uint64_t kicks = 0, waits = 0;
          std::vector<uint32_t> free(depth);
          std::iota(free.begin(), free.end(), 0u);
          auto& line = rig.lines()[0];
          const auto start = std::chrono::steady_clock::now();
          while (done < kRequests) {
            while (!free.empty() && sent < kRequests) {
              const uint64_t base = Rig::slot(0, free.back());
              *rig.at<virtio_blk_outhdr>(base) = {type, 0, random() % (kDisk / 4096) * 8};
              const auto id = line.driver->add(
                  {{base, 16, false}, {base + kSlotData, 4096, type == VIRTIO_BLK_T_IN}, {base + 16, 1, true}});
              line.slot_of[*id] = free.back();
              free.pop_back();
              ++sent;
            }
            if (line.driver->publish()) {
              signal_event(line.kick.get());
              ++kicks;
            }
            const auto slots = rig.take(0);
            done += static_cast<int>(slots.size());
            free.insert(free.end(), slots.begin(), slots.end());
            if (slots.empty()) {
              REQUIRE(rig.wait());
              ++waits;
            }
          }
          const double ns = std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count();
          std::printf("%-8s %-8s %s depth %2u: %6.0f ns each, %.3f kicks and %.3f waits each\n", folder, aio,
                      type == VIRTIO_BLK_T_IN ? "read " : "write", depth, ns / kRequests,
                      static_cast<double>(kicks) / kRequests, static_cast<double>(waits) / kRequests);
        }
      }
    }
  }
}
#endif
