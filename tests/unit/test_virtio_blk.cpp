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
#include "fake_driver.hpp"
#include "fake_host.hpp"
#include "fake_plugin.hpp"
#include "virtqueue/virtqueue_service.hpp"

using namespace vmm;
using namespace vmm::test;

namespace {

constexpr uint64_t kSector = 512;
constexpr uint64_t kSlotBytes = 128 << 10;
constexpr uint64_t kSlotData = 4096;  // of a slot: header at 0, status at 16, data from here
constexpr uint32_t kSlots = 16;       // of each queue
constexpr uint8_t kNoStatus = 0x55;

const PluginFile& plugin() {
  static const PluginFile file("virtio-blk");
  return file;
}

// A file with content of its own, gone afterwards.
class TemporaryFile {
 public:
  explicit TemporaryFile(uint64_t size_bytes, const char* folder = "/var/tmp") {
    path_ = std::string(folder) + "/clone-test-XXXXXX";
    fd_ = clone_sdk::Fd(::mkstemp(path_.data()));
    REQUIRE(fd_);
    file_path_ = path_;
    std::vector<uint8_t> bytes(size_bytes);
    for (uint64_t i = 0; i < size_bytes; ++i) bytes[i] = static_cast<uint8_t>(i / kSector * 7 + i);
    write(0, bytes);
  }
  ~TemporaryFile() {
    if (loop_) ::ioctl(loop_.get(), LOOP_CLR_FD);
    ::unlink(file_path_.c_str());
  }
  // From now on the file is seen through a block device; false when this machine lets us have none.
  bool become_block_device() {
    const clone_sdk::Fd control(::open("/dev/loop-control", O_RDWR | O_CLOEXEC));
    const int number = control ? ::ioctl(control.get(), LOOP_CTL_GET_FREE) : -1;
    const std::string device = "/dev/loop" + std::to_string(number);
    clone_sdk::Fd loop(::open(device.c_str(), O_RDWR | O_CLOEXEC));
    if (!loop || ::ioctl(loop.get(), LOOP_SET_FD, fd_.get()) != 0) return false;
    loop_ = std::move(loop);
    path_ = device;
    return true;
  }
  const std::string& path() const { return path_; }
  int fd() const { return fd_.get(); }
  std::vector<uint8_t> read() const {
    const int fd = loop_ ? loop_.get() : fd_.get();
    const off_t size = ::lseek(fd, 0, SEEK_END);
    REQUIRE(size >= 0);
    std::vector<uint8_t> bytes(static_cast<size_t>(size));
    REQUIRE(::pread(fd, bytes.data(), bytes.size(), 0) == size);
    return bytes;
  }
  void write(uint64_t offset, const std::vector<uint8_t>& bytes) {
    REQUIRE(::pwrite(fd_.get(), bytes.data(), bytes.size(), static_cast<off_t>(offset)) ==
            static_cast<ssize_t>(bytes.size()));
  }

 private:
  std::string path_, file_path_;
  clone_sdk::Fd fd_, loop_;
};

using Options = std::map<std::string, std::string>;

// One disk, its queues and their driver.
class Rig {
 public:
  struct Line {
    std::unique_ptr<FakeDriver> driver;
    clone_sdk::Fd kick, call;
    clone_virtqueue* queue = nullptr;
    std::map<uint16_t, uint32_t> slot_of;  // by chain id
    std::vector<uint32_t> free_slots;
  };

  explicit Rig(const Options& options, const char* name = "virtio-blk.0")
      : host_(96ull << 20), device_(plugin().device("virtio-blk"), prepare(host_, name)) {
    const clone_status status = device_.configure(options);
    REQUIRE_MESSAGE(status == CLONE_OK, device_.error);
    table_ = device_.extension<clone_virtio_device>(CLONE_VIRTIO_DEVICE);
    port_ = {sizeof port_, 0, this, [](void*) {}, [](void* self) { ++static_cast<Rig*>(self)->resets_wanted_; }};
  }
  ~Rig() {
    reset();
    device_.destroy();
  }

  void start(bool packed = false, uint64_t without = 0) {
    REQUIRE(device_.start() == CLONE_OK);
    activate(packed, without);
  }
  void activate(bool packed = false, uint64_t without = 0) {
    const auto* service = virtqueue_service();
    std::vector<clone_virtqueue*> queues;
    for (uint32_t i = 0; i < table_->queue_count(device_.raw()); ++i) {
      Line line;
      line.driver = std::make_unique<FakeDriver>(
          host_.memory(), FakeDriverConfig{.packed = packed,
                                           .size = 64,
                                           .features = service->ring_features(handle()) & ~(1ull << 34),
                                           .base = 0x10'0000 + i * 0x10'0000});
      line.kick = clone_sdk::Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
      line.call = clone_sdk::Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
      clone_virtqueue_config config = line.driver->queue_config();
      config.index = i;
      config.kick_fd = line.kick.get();
      config.call_fd = line.call.get();
      clone_err err{sizeof err, 0, {}};
      REQUIRE_MESSAGE(service->create(handle(), &config, &line.queue, &err) == CLONE_OK, err.message);
      for (uint32_t slot = 0; slot < kSlots; ++slot) line.free_slots.push_back(slot);
      queues.push_back(line.queue);
      lines_.push_back(std::move(line));
    }
    const clone_virtio_activation activation = {sizeof activation, static_cast<uint32_t>(queues.size()),
                                                table_->features(device_.raw()) & ~without, queues.data(), &port_};
    clone_err err{sizeof err, 0, {}};
    REQUIRE_MESSAGE(table_->activate(device_.raw(), &activation, &err) == CLONE_OK, err.message);
  }
  void reset() {
    table_->reset(device_.raw());
    for (Line& line : lines_) virtqueue_service()->destroy(line.queue);
    lines_.clear();
  }

  // Where a slot's parts are.
  static uint64_t slot(uint32_t line, uint32_t index) { return 0x120'0000 + (line * kSlots + index) * kSlotBytes; }
  template <typename T>
  T* at(uint64_t address) {
    return lines_[0].driver->at<T>(address);
  }
  uint8_t* bytes(uint64_t address, uint64_t size) {
    return reinterpret_cast<uint8_t*>(host_.memory().slice({address}, size));
  }

  // Adds a chain to a slot and tells the device if it wants to be told.
  void submit(uint32_t line_index, uint32_t slot_index, const std::vector<FakeDriver::Buffer>& buffers) {
    Line& line = lines_[line_index];
    const auto id = line.driver->add(buffers);
    REQUIRE(id);
    line.slot_of[*id] = slot_index;
    if (line.driver->publish()) signal_event(line.kick.get());
  }
  // Chains that came back: slots of the line.
  std::vector<uint32_t> take(uint32_t line_index) {
    Line& line = lines_[line_index];
    std::vector<uint32_t> slots;
    while (const auto used = line.driver->take_used()) {
      slots.push_back(line.slot_of.at(used->id));
      written_bytes = used->written_bytes;
      line.slot_of.erase(used->id);
    }
    return slots;
  }
  // Waits for an interrupt of any queue; false when none came in time.
  bool wait(int timeout_ms = 10'000) {
    std::vector<pollfd> entries;
    for (Line& line : lines_) {
      if (line.driver->enable_interrupts()) return true;
      entries.push_back({line.call.get(), POLLIN, 0});
    }
    const bool any = ::poll(entries.data(), entries.size(), timeout_ms) > 0;
    for (Line& line : lines_) take_event(line.call.get());
    return any;
  }

  // One request on its own: its status, or kNoStatus.
  uint8_t run(uint32_t type, uint64_t sector, const std::vector<uint8_t>& out, uint32_t in_bytes = 0) {
    const uint64_t base = slot(0, 0);
    *at<virtio_blk_outhdr>(base) = {type, 0, sector};
    std::vector<FakeDriver::Buffer> buffers = {{base, sizeof(virtio_blk_outhdr), false}};
    if (!out.empty()) {
      std::copy(out.begin(), out.end(), bytes(base + kSlotData, out.size()));
      buffers.push_back({base + kSlotData, static_cast<uint32_t>(out.size()), false});
    }
    if (in_bytes) buffers.push_back({base + kSlotData, in_bytes, true});
    buffers.push_back({base + 16, 1, true});
    return run_chain(buffers);
  }
  // The same with buffers as they are; the status byte is expected at 16 of slot 0.
  uint8_t run_chain(const std::vector<FakeDriver::Buffer>& buffers) {
    *at<uint8_t>(slot(0, 0) + 16) = kNoStatus;
    submit(0, 0, buffers);
    while (true) {
      if (!take(0).empty()) return *at<uint8_t>(slot(0, 0) + 16);
      REQUIRE(wait());
    }
  }
  std::vector<uint8_t> data(uint64_t size) {
    const uint8_t* from = bytes(slot(0, 0) + kSlotData, size);
    return {from, from + size};
  }

  const clone_host* handle() { return host_.handle("virtio-blk.0"); }
  std::vector<Line>& lines() { return lines_; }
  FakeHost& host() { return host_; }
  DeviceUnderTest& device() { return device_; }
  const clone_virtio_device& table() { return *table_; }
  virtio_blk_config config() {
    virtio_blk_config config{};
    table_->read_config(device_.raw(), 0, &config, sizeof config);
    return config;
  }
  int resets_wanted() const { return resets_wanted_; }
  uint32_t written_bytes = 0;

 private:
  static const clone_host* prepare(FakeHost& host, const char* name) {
    host.vcpu_count = 2;
    host.offer(CLONE_VIRTQUEUE, virtqueue_service());
    return host.handle(name);
  }

  FakeHost host_;
  DeviceUnderTest device_;
  const clone_virtio_device* table_ = nullptr;
  clone_virtio_port port_{};
  std::vector<Line> lines_;
  std::atomic<int> resets_wanted_{0};
};

std::vector<uint8_t> range(uint64_t sector, uint32_t sectors, uint32_t flags) {
  const virtio_blk_discard_write_zeroes range = {sector, sectors, flags};
  const auto* from = reinterpret_cast<const uint8_t*>(&range);
  return {from, from + sizeof range};
}

std::vector<uint8_t> pattern(size_t size, uint8_t seed) {
  std::vector<uint8_t> bytes(size);
  for (size_t i = 0; i < size; ++i) bytes[i] = static_cast<uint8_t>(seed + i * 31 + i / 256);
  return bytes;
}

std::string configure_error(const Options& options, clone_status expected = CLONE_ERR_INVALID) {
  FakeHost host;
  DeviceUnderTest device(plugin().device("virtio-blk"), host.handle("virtio-blk.0"));
  CHECK(device.configure(options) == expected);
  return device.error;
}

// Random requests on all queues at once, none that overlaps another in flight, against a model of the disk.
class RandomWork {
 public:
  RandomWork(Rig& rig, TemporaryFile& file, uint64_t seed)
      : rig_(rig), file_(file), model_(file.read()), random_(seed) {}

  void run(int steps, int pause_every) {
    for (int step = 1; step <= steps; ++step) {
      const auto line = static_cast<uint32_t>(number(0, rig_.lines().size() - 1));
      while (rig_.lines()[line].free_slots.empty() || rig_.lines()[line].driver->free_entries() < 12) collect();
      begin(line);
      if (step % pause_every == 0) pause();
    }
    while (!in_flight_.empty()) collect();
    CHECK(completed_ == steps);
    CHECK(file_.read() == model_);
  }

 private:
  struct Request {
    uint32_t type;
    uint64_t start, length;
    std::vector<FakeDriver::Buffer> data;
  };

  uint64_t number(uint64_t least, uint64_t most) {
    return std::uniform_int_distribution<uint64_t>(least, most)(random_);
  }

  void begin(uint32_t line) {
    const uint64_t sectors = model_.size() / kSector;
    Request request{};
    constexpr uint32_t kTypes[] = {VIRTIO_BLK_T_IN,      VIRTIO_BLK_T_IN,    VIRTIO_BLK_T_IN,
                                   VIRTIO_BLK_T_OUT,     VIRTIO_BLK_T_OUT,   VIRTIO_BLK_T_OUT,
                                   VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_WRITE_ZEROES};
    request.type = kTypes[number(0, std::size(kTypes) - 1)];
    uint64_t sector = 0;
    if (request.type != VIRTIO_BLK_T_FLUSH) {
      do {
        uint64_t count = number(0, 3) ? number(1, 16) : number(1, (kSlotBytes - 2 * kSlotData) / kSector);
        sector = number(0, sectors - count);
        if (number(0, 1)) {  // as file systems do
          sector -= sector % 8;
          count = std::min(count + 7 - (count + 7) % 8, sectors - sector);
        }
        request.start = sector * kSector;
        request.length = count * kSector;
      } while (std::any_of(in_flight_.begin(), in_flight_.end(), [&](const auto& other) {
        return other.second.start < request.start + request.length &&
               request.start < other.second.start + other.second.length;
      }));
    }

    auto& slots = rig_.lines()[line].free_slots;
    const uint32_t slot = slots.back();
    slots.pop_back();
    const uint64_t base = Rig::slot(line, slot);
    *rig_.at<virtio_blk_outhdr>(base) = {request.type, 0, sector};
    *rig_.at<uint8_t>(base + 16) = kNoStatus;
    std::vector<FakeDriver::Buffer> buffers;
    const auto header_cut = static_cast<uint32_t>(number(0, 3) ? 16 : number(1, 15));
    buffers.push_back({base, header_cut, false});
    if (header_cut < 16) buffers.push_back({base + header_cut, 16 - header_cut, false});

    const auto count = static_cast<uint32_t>(request.length / kSector);
    if (request.type == VIRTIO_BLK_T_IN || request.type == VIRTIO_BLK_T_OUT) {
      const bool out = request.type == VIRTIO_BLK_T_OUT;
      // Sometimes not even aligned to a sector.
      uint64_t at = base + kSlotData + (number(0, 9) ? 0 : number(1, 4000));
      auto left = static_cast<uint32_t>(request.length);
      while (left) {
        uint32_t piece = left;
        if (request.data.size() < 4 && left > kSector && number(0, 1))
          piece = number(0, 5) ? static_cast<uint32_t>(number(1, left / kSector) * kSector)
                               : static_cast<uint32_t>(number(1, left));
        request.data.push_back({at, piece, !out});
        at += piece;
        left -= piece;
      }
      if (out) {
        uint64_t position = request.start;
        for (const auto& buffer : request.data) {
          uint8_t* to = rig_.bytes(buffer.address, buffer.size_bytes);
          for (uint32_t i = 0; i < buffer.size_bytes; ++i) model_[position++] = to[i] = static_cast<uint8_t>(random_());
        }
      }
      buffers.insert(buffers.end(), request.data.begin(), request.data.end());
    } else if (request.type != VIRTIO_BLK_T_FLUSH) {
      const uint32_t flags = request.type == VIRTIO_BLK_T_WRITE_ZEROES && number(0, 1) ? 1 : 0;
      const auto bytes = range(sector, count, flags);
      std::copy(bytes.begin(), bytes.end(), rig_.bytes(base + 64, bytes.size()));
      buffers.push_back({base + 64, static_cast<uint32_t>(bytes.size()), false});
      // A regular file reads as zeroes where it has a hole.
      std::fill_n(model_.begin() + static_cast<ptrdiff_t>(request.start), request.length, uint8_t{0});
    }
    buffers.push_back({base + 16, 1, true});
    in_flight_[{line, slot}] = std::move(request);
    rig_.submit(line, slot, buffers);
  }

  void collect() {
    REQUIRE(rig_.wait());
    take();
  }
  void take() {
    for (uint32_t line = 0; line < rig_.lines().size(); ++line) {
      for (const uint32_t slot : rig_.take(line)) {
        const auto found = in_flight_.find({line, slot});
        REQUIRE(found != in_flight_.end());
        const Request& request = found->second;
        REQUIRE(*rig_.at<uint8_t>(Rig::slot(line, slot) + 16) == VIRTIO_BLK_S_OK);
        if (request.type == VIRTIO_BLK_T_IN) {
          uint64_t position = request.start;
          for (const auto& buffer : request.data) {
            const uint8_t* from = rig_.bytes(buffer.address, buffer.size_bytes);
            REQUIRE(std::equal(from, from + buffer.size_bytes, model_.begin() + static_cast<ptrdiff_t>(position)));
            position += buffer.size_bytes;
          }
        }
        in_flight_.erase(found);
        rig_.lines()[line].free_slots.push_back(slot);
        ++completed_;
      }
    }
  }

  // While quiesced nothing moves; what was not taken before is served afterwards.
  void pause() {
    REQUIRE(rig_.device().quiesce() == CLONE_OK);
    take();
    const auto still = file_.read();
    for (auto& line : rig_.lines()) signal_event(line.kick.get());
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    for (auto& line : rig_.lines()) REQUIRE_FALSE(line.driver->used_pending());
    REQUIRE(file_.read() == still);
    SavedState state;
    REQUIRE(rig_.device().save(state) == CLONE_OK);
    REQUIRE(rig_.device().load(state) == CLONE_OK);
    REQUIRE(rig_.device().resume() == CLONE_OK);
  }

  Rig& rig_;
  TemporaryFile& file_;
  std::vector<uint8_t> model_;
  std::mt19937_64 random_;
  std::map<std::pair<uint32_t, uint32_t>, Request> in_flight_;
  int completed_ = 0;
};

}  // namespace

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
  CHECK(load_error({{"path", other.path()}}, CLONE_OK).empty());
  CHECK(load_error({{"path", larger.path()}}) == "the number of 512-byte sectors is 65, of the saved disk 64");
  CHECK(load_error({{"path", other.path()}, {"readonly", "on"}}) == "readonly is 1, of the saved disk 0");
  CHECK(load_error({{"path", other.path()}, {"queues", "5"}}) == "queues is 5, of the saved disk 2");
  CHECK(load_error({{"path", other.path()}, {"serial", "x"}}) == "serial differs from that of the saved disk");
  auto& section = state.sections.begin()->second;
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
