// SPDX-License-Identifier: Apache-2.0
// qcow2 images whose process is killed while it writes: no damage, and all that was flushed is there.
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "disk_rig.hpp"
#include "image_tools.hpp"
#include "scratch_dir.hpp"

using namespace vmm;
using namespace vmm::test;

namespace {

constexpr uint64_t kDiskSectors = (6 << 20) / kSector;

// What the child did, kept in memory that outlives it.
struct Event {
  enum class Kind : uint8_t { submitted, acknowledged };
  Kind kind;
  bool flush;
  uint32_t request;  // number of it, and the stamp of its data
  uint32_t sector, count;
  bool zeroes;
};
struct Journal {
  static constexpr uint32_t kMost = 1 << 18;
  std::atomic<uint32_t> count;
  Event events[kMost];

  void add(const Event& event) {
    const uint32_t at = count.load(std::memory_order_relaxed);
    if (at == kMost) ::_exit(4);
    events[at] = event;
    count.store(at + 1, std::memory_order_release);
  }
};

// A sector of a request's data says of which request and where it is.
void fill(uint8_t* sector, uint32_t request, uint64_t number) {
  const uint64_t word = uint64_t{request} << 16 | number;
  for (size_t i = 0; i < kSector; i += sizeof word) std::memcpy(sector + i, &word, sizeof word);
}

struct InFlight {
  uint32_t request, type;
  uint32_t sector, count;
};

// The child: random work until the end.
[[noreturn]] void work(const Options& options, uint64_t seed, uint64_t granule, Journal& journal) {
  Rig rig(options);
  rig.start();
  std::mt19937_64 random(seed);
  const auto number = [&](uint64_t least, uint64_t most) {
    return std::uniform_int_distribution<uint64_t>(least, most)(random);
  };
  std::map<std::pair<uint32_t, uint32_t>, InFlight> in_flight;
  const auto collect = [&] {
    REQUIRE(rig.wait());
    for (uint32_t line = 0; line < rig.lines().size(); ++line) {
      for (const uint32_t slot : rig.take(line)) {
        REQUIRE(*rig.at<uint8_t>(Rig::slot(line, slot) + 16) == VIRTIO_BLK_S_OK);
        const InFlight& done = in_flight.at({line, slot});
        journal.add({Event::Kind::acknowledged, done.type == VIRTIO_BLK_T_FLUSH, done.request, done.sector, done.count,
                     done.type != VIRTIO_BLK_T_OUT});
        in_flight.erase({line, slot});
        rig.lines()[line].free_slots.push_back(slot);
      }
    }
  };
  for (uint32_t request = 1;; ++request) {
    const auto line = static_cast<uint32_t>(number(0, rig.lines().size() - 1));
    while (rig.lines()[line].free_slots.empty()) collect();
    constexpr uint32_t kTypes[] = {VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_OUT,  VIRTIO_BLK_T_OUT,     VIRTIO_BLK_T_OUT,
                                   VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_OUT,  VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES,
                                   VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_FLUSH};
    InFlight next{request, kTypes[number(0, std::size(kTypes) - 1)], 0, 0};
    if (next.type != VIRTIO_BLK_T_FLUSH) {
      const auto overlaps = [&](const auto& other) {
        return other.second.sector < next.sector + next.count && next.sector < other.second.sector + other.second.count;
      };
      while (true) {
        const uint64_t step = next.type == VIRTIO_BLK_T_DISCARD ? granule / kSector : number(0, 1) ? 8 : 1;
        next.count = static_cast<uint32_t>(number(1, number(0, 3) ? 16 : 200));
        next.count = static_cast<uint32_t>((next.count + step - 1) / step * step);
        next.sector = static_cast<uint32_t>(number(0, kDiskSectors - next.count) / step * step);
        if (std::none_of(in_flight.begin(), in_flight.end(), overlaps)) break;
        collect();
      }
    }
    auto& slots = rig.lines()[line].free_slots;
    const uint32_t slot = slots.back();
    slots.pop_back();
    const uint64_t base = Rig::slot(line, slot);
    *rig.at<virtio_blk_outhdr>(base) = {next.type, 0, next.type == VIRTIO_BLK_T_OUT ? next.sector : 0};
    std::vector<FakeDriver::Buffer> buffers = {{base, 16, false}};
    if (next.type == VIRTIO_BLK_T_OUT) {
      const auto size = static_cast<uint32_t>(next.count * kSector);
      uint8_t* data = rig.bytes(base + kSlotData, size);
      for (uint32_t i = 0; i < next.count; ++i) fill(data + i * kSector, request, next.sector + i);
      buffers.push_back({base + kSlotData, size, false});
    } else if (next.type != VIRTIO_BLK_T_FLUSH) {
      const uint32_t unmap = next.type == VIRTIO_BLK_T_WRITE_ZEROES ? static_cast<uint32_t>(number(0, 1)) : 0;
      const auto bytes = range(next.sector, next.count, unmap);
      std::copy(bytes.begin(), bytes.end(), rig.bytes(base + 64, bytes.size()));
      buffers.push_back({base + 64, static_cast<uint32_t>(bytes.size()), false});
    }
    buffers.push_back({base + 16, 1, true});
    in_flight[{line, slot}] = next;
    journal.add({Event::Kind::submitted, next.type == VIRTIO_BLK_T_FLUSH, request, next.sector, next.count,
                 next.type != VIRTIO_BLK_T_OUT});
    rig.submit(line, slot, buffers);
  }
}

// How the sectors may read after the events: as at the last flush that was acknowledged, or as anything since.
class Allowed {
 public:
  explicit Allowed(const std::vector<uint8_t>& before) : before_(before), sectors_(before.size() / kSector) {}

  void add(const Event& event) {
    const bool submitted = event.kind == Event::Kind::submitted;
    if (event.flush && submitted) {
      auto& durable = flushes_[event.request];
      for (const History& sector : sectors_) durable.push_back(sector.acknowledged);
    } else if (event.flush) {
      const auto& durable = flushes_.at(event.request);
      for (size_t i = 0; i < sectors_.size(); ++i) sectors_[i].durable = std::max(sectors_[i].durable, durable[i]);
      flushes_.erase(event.request);
      ++flushed;
    } else {
      for (uint32_t i = event.sector; i < event.sector + event.count; ++i) {
        if (submitted)
          sectors_[i].requests.push_back(event.zeroes ? 0 : event.request);
        else
          sectors_[i].acknowledged = static_cast<uint32_t>(sectors_[i].requests.size());
      }
    }
  }
  bool matches(const std::vector<uint8_t>& now, uint64_t number) const {
    const History& sector = sectors_[number];
    const uint8_t* found = now.data() + number * kSector;
    for (size_t version = sector.durable; version <= sector.requests.size(); ++version) {
      std::vector<uint8_t> expected(kSector);
      if (version == 0)
        expected.assign(before_.begin() + static_cast<ptrdiff_t>(number * kSector),
                        before_.begin() + static_cast<ptrdiff_t>((number + 1) * kSector));
      else if (sector.requests[version - 1])
        fill(expected.data(), sector.requests[version - 1], number);
      if (std::equal(expected.begin(), expected.end(), found)) return true;
    }
    return false;
  }
  int flushed = 0;

 private:
  // Versions: 0 is what was there before, n what the n-th request left.
  struct History {
    std::vector<uint32_t> requests;  // 0: zeroes
    uint32_t acknowledged = 0, durable = 0;
  };
  const std::vector<uint8_t>& before_;
  std::vector<History> sectors_;
  std::map<uint32_t, std::vector<uint32_t>> flushes_;
};

struct Variant {
  const char* name;
  const char* make;
  uint64_t granule;
  const char* cache;
};

}  // namespace

TEST_CASE("qcow2: killed at any moment, an image is sound and holds what was flushed") {
  const Variant variants[] = {
      {"fresh", "qemu-img create -f qcow2 x.qcow2 6M", 65536, "writeback"},
      {"small clusters", "qemu-img create -f qcow2 -o cluster_size=4k x.qcow2 6M", 4096, "writeback"},
      {"small clusters, past the page cache", "qemu-img create -f qcow2 -o cluster_size=4k x.qcow2 6M", 4096, "none"},
      {"small clusters, unsafe", "qemu-img create -f qcow2 -o cluster_size=4k x.qcow2 6M", 4096, "unsafe"},
      {"counts that outgrow their table", "qemu-img create -f qcow2 -o cluster_size=512,refcount_bits=64 x.qcow2 6M",
       512, "writeback"},
      {"over raw", "qemu-img create -f qcow2 -b base.raw -F raw x.qcow2 6M", 65536, "writeback"},
      {"over raw, small clusters", "qemu-img create -f qcow2 -b base.raw -F raw -o cluster_size=4k x.qcow2 6M", 4096,
       "writeback"},
      {"over raw, subclusters", "qemu-img create -f qcow2 -b base.raw -F raw -o extended_l2=on x.qcow2 6M", 65536,
       "writeback"},
      {"compressed", "qemu-img convert -c -f raw -O qcow2 -o cluster_size=8k base.raw x.qcow2", 8192, "writeback"},
  };
  auto* journal = static_cast<Journal*>(
      ::mmap(nullptr, sizeof(Journal), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  REQUIRE(journal != MAP_FAILED);
  static_cast<void>(plugin());
  uint64_t seed = 40;
  int kills = 0, busy = 0, flushes = 0;
  for (const Variant& variant : variants) {
    CAPTURE(variant.name);
    ScratchDir scratch("/var/tmp");
    const std::string folder = scratch.path();
    write_file(folder + "/base.raw", pattern(kDiskSectors * kSector, static_cast<uint8_t>(seed)));
    REQUIRE_MESSAGE(shell(folder, variant.make) == 0, log_of(folder));
    std::vector<uint8_t> before = content(folder, "x.qcow2");
    for (int round = 0; round < 3; ++round, ++seed) {
      CAPTURE(seed);
      const Options options = {{"path", folder + "/x.qcow2"},
                               {"backing", "on"},
                               {"cache", variant.cache},
                               {"aio", seed % 3 ? "io_uring" : "threads"},
                               {"queues", std::to_string(1 + seed % 2)}};
      journal->count = 0;
      const pid_t child = ::fork();
      REQUIRE(child >= 0);
      if (child == 0) {
        try {
          work(options, seed, variant.granule, *journal);
        } catch (...) {
          ::_exit(3);
        }
      }
      // After some events, but no longer than half a second.
      std::mt19937_64 random(seed);
      const auto events = static_cast<uint32_t>(random() % 4000);
      const auto stop = std::chrono::steady_clock::now() + std::chrono::milliseconds(500);
      const auto goes_on = [&] {
        const auto now = std::chrono::steady_clock::now();
        const uint32_t count = journal->count.load();
        return now < stop ? count < std::max(events, 20u) : count < 20 && now < stop + std::chrono::seconds(20);
      };
      while (goes_on()) std::this_thread::sleep_for(std::chrono::microseconds(200));
      std::this_thread::sleep_for(std::chrono::microseconds(random() % 3000));
      ::kill(child, SIGKILL);
      int status = 0;
      REQUIRE(::waitpid(child, &status, 0) == child);
      REQUIRE_MESSAGE(WIFSIGNALED(status), "the child ended by itself, with status ", WEXITSTATUS(status));
      ++kills;

      check(folder, "x.qcow2", true);
      const std::vector<uint8_t> now = content(folder, "x.qcow2");
      Allowed allowed(before);
      int in_flight = 0;
      for (uint32_t i = 0; i < journal->count; ++i) {
        allowed.add(journal->events[i]);
        in_flight += journal->events[i].kind == Event::Kind::submitted ? 1 : -1;
      }
      busy += in_flight > 0;
      flushes += allowed.flushed;
      REQUIRE(now.size() == before.size());
      int lost = 0;
      for (uint64_t sector = 0; sector < kDiskSectors; ++sector) {
        if (allowed.matches(now, sector)) continue;
        CAPTURE(sector);
        if (lost++ == 0) FAIL_CHECK("the sector is none of what it may be");
      }
      if (lost) return;
      before = now;
    }
    // And it goes on, leaks and all.
    Rig rig({{"path", folder + "/x.qcow2"}, {"backing", "on"}});
    rig.start();
    const auto data = pattern(8 * kSector, 9);
    for (uint64_t sector = 0; sector < kDiskSectors; sector += 8) {
      if (sector % 32 == 0) {
        REQUIRE(rig.run(VIRTIO_BLK_T_OUT, sector, data) == VIRTIO_BLK_S_OK);
        std::copy(data.begin(), data.end(), before.begin() + static_cast<ptrdiff_t>(sector * kSector));
      } else {
        REQUIRE(rig.run(VIRTIO_BLK_T_IN, sector, {}, 8 * kSector) == VIRTIO_BLK_S_OK);
        REQUIRE(std::equal(before.begin() + static_cast<ptrdiff_t>(sector * kSector),
                           before.begin() + static_cast<ptrdiff_t>((sector + 8) * kSector),
                           rig.data(8 * kSector).begin()));
      }
    }
    REQUIRE(rig.run(VIRTIO_BLK_T_FLUSH, 0, {}) == VIRTIO_BLK_S_OK);
    CHECK(content(folder, "x.qcow2") == before);
  }
  CHECK(busy > kills / 2);  // were killed amid their work
  CHECK(flushes > kills);
  ::munmap(journal, sizeof(Journal));
}
