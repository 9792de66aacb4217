// SPDX-License-Identifier: Apache-2.0
// A disk under test: the plugin behind real virtqueues, a driver that knows what the disk should hold, random work.
#pragma once

#include <doctest/doctest.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <linux/virtio_blk.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "fake_driver.hpp"
#include "fake_host.hpp"
#include "fake_plugin.hpp"
#include "virtqueue/virtqueue_service.hpp"

namespace vmm::test {

constexpr uint64_t kSector = 512;
constexpr uint64_t kSlotBytes = 128 << 10;
constexpr uint64_t kSlotData = 4096;  // of a slot: header at 0, status at 16, data from here
constexpr uint32_t kSlots = 16;       // of each queue
constexpr uint8_t kNoStatus = 0x55;

inline const PluginFile& plugin() {
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
  bool tell_device_of_size() { return ::ioctl(loop_.get(), LOOP_SET_CAPACITY, 0) == 0; }
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
    port_ = {sizeof port_, 0, this, [](void* self) { ++static_cast<Rig*>(self)->config_changes_; },
             [](void* self) { ++static_cast<Rig*>(self)->resets_wanted_; }};
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
  int config_changes() const { return config_changes_; }
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
  std::atomic<int> config_changes_{0};
};

inline std::vector<uint8_t> range(uint64_t sector, uint32_t sectors, uint32_t flags) {
  const virtio_blk_discard_write_zeroes range = {sector, sectors, flags};
  const auto* from = reinterpret_cast<const uint8_t*>(&range);
  return {from, from + sizeof range};
}

inline std::vector<uint8_t> pattern(size_t size, uint8_t seed) {
  std::vector<uint8_t> bytes(size);
  for (size_t i = 0; i < size; ++i) bytes[i] = static_cast<uint8_t>(seed + i * 31 + i / 256);
  return bytes;
}

inline std::string configure_error(const Options& options, clone_status expected = CLONE_ERR_INVALID) {
  FakeHost host;
  DeviceUnderTest device(plugin().device("virtio-blk"), host.handle("virtio-blk.0"));
  CHECK(device.configure(options) == expected);
  return device.error;
}

// Random requests on all queues at once, none that overlaps another in flight, against a model of the disk.
class RandomWork {
 public:
  // A raw disk.
  RandomWork(Rig& rig, TemporaryFile& file, uint64_t seed)
      : RandomWork(rig, seed, file.read(), [&file] { return file.read(); }) {
    raw_ = true;
  }
  // `file` is what must not change while the disk is quiesced. Discards are of whole granules: those surely read as
  // zeroes; 0: there are none.
  RandomWork(Rig& rig, uint64_t seed, std::vector<uint8_t> model, std::function<std::vector<uint8_t>()> file,
             uint64_t discard_granule = kSector)
      : rig_(rig), file_(std::move(file)), model_(std::move(model)), random_(seed), discard_granule_(discard_granule) {}

  const std::vector<uint8_t>& model() const { return model_; }

  void run(int steps, int pause_every) {
    for (int step = 1; step <= steps; ++step) {
      const auto line = static_cast<uint32_t>(number(0, rig_.lines().size() - 1));
      while (rig_.lines()[line].free_slots.empty() || rig_.lines()[line].driver->free_entries() < 12) collect();
      begin(line);
      if (step % pause_every == 0) pause();
    }
    while (!in_flight_.empty()) collect();
    CHECK(completed_ == steps);
    completed_ = 0;
    if (raw_) CHECK(file_() == model_);
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
      // Large granules of discards may leave no room beside what is in flight.
      int tries_left = 20;
      do {
        if (tries_left-- == 0)
          while (!in_flight_.empty()) collect();
        uint64_t count = number(0, 3) ? number(1, 16) : number(1, (kSlotBytes - 2 * kSlotData) / kSector);
        sector = number(0, sectors - count);
        if (number(0, 1)) {  // as file systems do
          sector -= sector % 8;
          count = std::min(count + 7 - (count + 7) % 8, sectors - sector);
        }
        if (request.type == VIRTIO_BLK_T_DISCARD && discard_granule_ == 0) request.type = VIRTIO_BLK_T_OUT;
        if (request.type == VIRTIO_BLK_T_DISCARD) {
          const uint64_t granule = discard_granule_ / kSector;
          sector -= sector % granule;
          count = std::min((count + granule - 1) / granule * granule, sectors - sector);
          if (count % granule) request.type = VIRTIO_BLK_T_WRITE_ZEROES;
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
    const auto still = file_();
    for (auto& line : rig_.lines()) signal_event(line.kick.get());
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    for (auto& line : rig_.lines()) REQUIRE_FALSE(line.driver->used_pending());
    REQUIRE(file_() == still);
    SavedState state;
    REQUIRE(rig_.device().save(state) == CLONE_OK);
    REQUIRE(rig_.device().load(state) == CLONE_OK);
    REQUIRE(rig_.device().resume() == CLONE_OK);
  }

  Rig& rig_;
  std::function<std::vector<uint8_t>()> file_;
  std::vector<uint8_t> model_;
  std::mt19937_64 random_;
  uint64_t discard_granule_;
  bool raw_ = false;
  std::map<std::pair<uint32_t, uint32_t>, Request> in_flight_;
  int completed_ = 0;
};

}  // namespace vmm::test
