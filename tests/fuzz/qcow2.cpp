// SPDX-License-Identifier: Apache-2.0
// Fuzzes the qcow2 tables: the input is an image, opened for reading and for writing, and used as a guest would.
// Beside what the sanitizers see, these hold: every step ends and moves on, no place lies outside of the file, and
// an image that was written to can be opened again.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "qcow2/decompress.hpp"
#include "qcow2/qcow2_file.hpp"

using namespace virtio_blk::qcow2;

namespace {

constexpr int kSteps = 48;
constexpr uint64_t kLongest = 256 << 10;
constexpr uint64_t kSector = 512;

void require(bool holds, int line = __builtin_LINE()) {
  if (holds) return;
  std::fprintf(stderr, "%s:%d does not hold\n", __FILE__, line);
  std::abort();
}

class MemoryFile {
 public:
  explicit MemoryFile(std::span<const uint8_t> bytes) : fd_(::memfd_create("image", MFD_CLOEXEC)) {
    require(fd_ >= 0 && write_at(fd_, 0, std::as_bytes(bytes)).ok());
  }
  ~MemoryFile() { ::close(fd_); }
  MemoryFile(const MemoryFile&) = delete;
  int fd() const { return fd_; }

 private:
  int fd_;
};

class Guest {
 public:
  Guest(Qcow2File& file, int fd, uint64_t seed) : file_(file), fd_(fd), random_(seed) {}

  // From the beginning, as far as the steps go, and then here and there.
  void read() {
    uint64_t at = 0;
    for (int step = 0; step < kSteps; ++step) {
      if (at >= size() || step > kSteps / 2) at = offset();
      if (at >= size()) return;
      const uint64_t length = std::min(size() - at, kLongest);
      const auto place = file_.find(at, length);
      if (!place.ok()) {
        at += file_.header().cluster_bytes();
        continue;
      }
      require(place->length_bytes > 0 && place->length_bytes <= length);
      // The file may end within its last cluster.
      const uint64_t cluster = file_.header().cluster_bytes();
      if (place->content == Content::data) require(place->host_offset / cluster * cluster < file_.file_bytes());
      if (place->content == Content::compressed) decompress_at(*place);
      at += place->length_bytes;
    }
  }

  void write() {
    for (int step = 0; step < kSteps; ++step) {
      const uint64_t at = offset();
      if (at >= size()) return;
      const uint64_t length = std::min(size() - at, kSector * (1 + random_() % (kLongest / kSector)));
      const bool has_backing = random_() % 2 != 0;
      switch (random_() % 8) {
        case 0:
        case 1: {
          const auto how = static_cast<Zeroing>(random_() % 3);
          const auto plan = file_.plan_zeroes(at, length, how, has_backing);
          if (plan.ok()) require(plan->length_bytes > 0 && plan->length_bytes <= length);
          break;
        }
        case 2:
          static_cast<void>(file_.commit_now());
          break;
        case 3:
          if (random_() % 4 == 0) static_cast<void>(file_.grow(size() + random_() % (64 << 20) / kSector * kSector));
          break;
        default:
          write_one(at, length);
      }
    }
    static_cast<void>(file_.commit_now());
  }

 private:
  uint64_t size() const { return file_.header().size_bytes / kSector * kSector; }
  // Anywhere, often in what the first tables map.
  uint64_t offset() {
    if (size() == 0) return 0;
    const uint64_t range = random_() % 2 ? size() : std::min<uint64_t>(size(), 1 << 20);
    return random_() % range / kSector * kSector;
  }
  void write_one(uint64_t at, uint64_t length) {
    const auto plan = file_.plan_write(at, length);
    if (!plan.ok()) return;
    require(plan->length_bytes > 0 && plan->length_bytes <= length);
    if (plan->in_place) {
      require(plan->host_offset >= file_.header().cluster_bytes());
      require(plan->host_offset + plan->length_bytes <= file_.file_bytes());
      return;
    }
    require(plan->start <= at && at + plan->length_bytes <= plan->end);
    require(plan->host_offset >= file_.header().cluster_bytes());
    require(plan->host_offset + (plan->end - plan->start) <= file_.file_bytes());
    if (random_() % 4 == 0 || !file_.map(*plan).ok()) file_.abandon(*plan);
  }
  void decompress_at(const Place& place) {
    std::vector<std::byte> raw(place.compressed_bytes);
    const ssize_t count = ::pread(fd_, raw.data(), raw.size(), static_cast<off_t>(place.host_offset));
    require(count >= 0);
    std::vector<std::byte> cluster(file_.header().cluster_bytes());
    static_cast<void>(
        decompress(file_.header().compression, std::span(raw).first(static_cast<size_t>(count)), cluster));
  }

  Qcow2File& file_;
  int fd_;
  std::mt19937_64 random_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::span<const uint8_t> input(data, size);
  uint64_t seed = size;
  for (const uint8_t byte : input.last(std::min<size_t>(size, 64))) seed = seed * 31 + byte;

  const MemoryFile image(input);
  if (auto file = Qcow2File::open(image.fd()); file.ok()) Guest(**file, image.fd(), seed).read();

  bool sound = false;
  const bool growable = seed % 8 != 0;
  if (auto file = Qcow2File::open(image.fd()); file.ok() && (*file)->begin_writing(growable, Syncs::none).ok()) {
    Guest guest(**file, image.fd(), seed);
    guest.write();
    guest.read();
    sound = true;
  }
  if (!sound) return 0;
  const auto again = Qcow2File::open(image.fd());
  if (!again.ok()) std::fprintf(stderr, "opened again, the image %s\n", again.error().message.c_str());
  require(again.ok());
  return 0;
}
