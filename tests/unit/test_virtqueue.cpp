// SPDX-License-Identifier: Apache-2.0
// Virtqueues against a model: random valid chains, event index around the wrap, two threads, dirty marks, positions.
#include <doctest/doctest.h>

#include <chrono>
#include <deque>
#include <random>
#include <thread>

#include "fake_driver.hpp"
#include "fake_host.hpp"
#include "virtqueue/virtqueue_service.hpp"

using namespace vmm;
using namespace vmm::test;

namespace {

GuestMemory make_memory(uint64_t size_bytes = 8 << 20) {
  MemoryConfig config;
  config.size_bytes = size_bytes;
  return std::move(GuestMemory::create(config)).value();
}

// A chain with room for its segments.
struct Popped {
  explicit Popped(uint32_t capacity) : segments(capacity) {
    chain.size = sizeof chain;
    chain.capacity = capacity;
    chain.segments = segments.data();
  }
  Popped(Popped&&) = default;
  Popped& operator=(Popped&&) = default;
  std::vector<FakeDriver::Buffer> buffers() const {
    std::vector<FakeDriver::Buffer> result;
    for (uint32_t i = 0; i < chain.readable_count + chain.writable_count; ++i)
      result.push_back({segments[i].guest_address, segments[i].size_bytes, i >= chain.readable_count});
    return result;
  }
  std::vector<clone_segment> segments;
  clone_chain chain{};
};

std::unique_ptr<Virtqueue> make_queue(GuestMemory& memory, const FakeDriver& driver,
                                      void (*interrupt)(void*, uint32_t) = nullptr, void* context = nullptr) {
  clone_virtqueue_config config = driver.queue_config();
  config.interrupt = interrupt;
  config.context = context;
  auto queue = Virtqueue::create(memory, config);
  REQUIRE(queue.ok());
  REQUIRE((*queue)->set_position(driver.start_position()).ok());
  return std::move(queue).value();
}

void count_interrupt(void* context, uint32_t) { ++*static_cast<std::atomic<int>*>(context); }

}  // namespace

TEST_CASE("virtqueue: random chains come out as they went in, and go back in any order") {
  for (const bool packed : {false, true}) {
    for (const uint64_t features : {uint64_t{0}, kFeatureIndirectDescriptors | kFeatureEventIndex}) {
      for (const uint32_t size : {1u, 2u, 8u, 64u, packed ? 37u : 256u}) {
        CAPTURE(packed);
        CAPTURE(features);
        CAPTURE(size);
        GuestMemory memory = make_memory();
        FakeDriver driver(memory, {packed, size, features, 0x10000, packed ? size * 3ull - 1 : 65500});
        const auto queue = make_queue(memory, driver);
        std::mt19937_64 random(42 + size);
        std::deque<std::pair<uint16_t, std::vector<FakeDriver::Buffer>>> published;
        std::vector<Popped> held;
        std::map<uint16_t, uint32_t> given_back;
        int completed = 0;
        for (int step = 0; step < 8000; ++step) {
          switch (random() % 4) {
            case 0: {  // the driver adds up to three chains
              for (uint64_t chains = random() % 3 + 1; chains--;) {
                const size_t count = random() % std::min<uint32_t>(size, 6) + 1;
                const size_t readable = random() % (count + 1);
                std::vector<FakeDriver::Buffer> buffers;
                for (size_t i = 0; i < count; ++i)
                  buffers.push_back(
                      {0x400000 + random() % 0x300000, static_cast<uint32_t>(random() % 5000), i >= readable});
                const auto id = driver.add(buffers, (features & kFeatureIndirectDescriptors) && random() % 2);
                if (id) published.emplace_back(*id, buffers);
              }
              driver.publish();
              break;
            }
            case 1: {  // the device takes one
              Popped popped(size);
              const clone_status status = queue->pop(popped.chain);
              if (published.empty()) {
                REQUIRE(status == CLONE_EMPTY);
                break;
              }
              REQUIRE(status == CLONE_OK);
              REQUIRE(popped.chain.head == published.front().first);
              REQUIRE(popped.buffers() == published.front().second);
              uint64_t bytes = 0;
              for (const auto& buffer : published.front().second) bytes += buffer.size_bytes;
              REQUIRE(bytes == uint64_t{popped.chain.readable_bytes} + popped.chain.writable_bytes);
              REQUIRE(popped.segments[0].host_address == memory.slice({popped.segments[0].guest_address}, 1));
              published.pop_front();
              held.push_back(std::move(popped));
              break;
            }
            case 2: {  // the device gives one back
              if (held.empty()) break;
              const size_t pick = random() % held.size();
              const clone_chain& chain = held[pick].chain;
              const auto written = static_cast<uint32_t>(random() % (uint64_t{chain.writable_bytes} + 1));
              REQUIRE(queue->push(chain, written) == CLONE_OK);
              given_back[static_cast<uint16_t>(chain.head)] = written;
              held.erase(held.begin() + static_cast<std::ptrdiff_t>(pick));
              break;
            }
            default:  // the driver collects
              while (const auto used = driver.take_used()) {
                REQUIRE(given_back.count(used->id) == 1);
                REQUIRE(given_back[used->id] == used->written_bytes);
                given_back.erase(used->id);
                ++completed;
              }
              REQUIRE(given_back.empty());
          }
        }
        CHECK(completed > 300);
        CHECK(queue->broken() == nullptr);
      }
    }
  }
}

TEST_CASE("virtqueue: event index interrupts exactly when the driver's event is passed, around every wrap") {
  for (const bool packed : {false, true}) {
    for (const uint32_t size : {4u, 8u}) {
      for (const uint64_t start :
           {uint64_t{0}, uint64_t{size - 1}, uint64_t{size + 2}, uint64_t{65534}, uint64_t{65536}}) {
        for (uint32_t pushes = 0; pushes <= size; ++pushes) {
          for (int64_t distance = -static_cast<int64_t>(size) + 1; distance < static_cast<int64_t>(size); ++distance) {
            if (static_cast<int64_t>(start) + distance < 0) continue;
            CAPTURE(packed);
            CAPTURE(size);
            CAPTURE(start);
            CAPTURE(pushes);
            CAPTURE(distance);
            GuestMemory memory = make_memory(1 << 20);
            FakeDriver driver(memory, {packed, size, kFeatureEventIndex, 0x1000, start});
            std::atomic<int> interrupts{0};
            const auto queue = make_queue(memory, driver, count_interrupt, &interrupts);
            driver.set_interrupt_event(start + static_cast<uint64_t>(distance));
            for (uint32_t i = 0; i < pushes; ++i) REQUIRE(driver.add({{0x80000, 16, true}}));
            driver.publish();
            Popped popped(size);
            for (uint32_t i = 0; i < pushes; ++i) {
              REQUIRE(queue->pop(popped.chain) == CLONE_OK);
              REQUIRE(queue->push(popped.chain, 1) == CLONE_OK);
            }
            queue->signal();
            REQUIRE(interrupts == (distance >= 0 && distance < pushes ? 1 : 0));
            queue->signal();  // nothing new
            REQUIRE(interrupts <= 1);
          }
        }
      }
    }
  }
}

TEST_CASE("virtqueue: without event index the driver's flag decides") {
  for (const bool packed : {false, true}) {
    CAPTURE(packed);
    GuestMemory memory = make_memory(1 << 20);
    FakeDriver driver(memory, {packed, 8, 0, 0x1000, 0});
    std::atomic<int> interrupts{0};
    const auto queue = make_queue(memory, driver, count_interrupt, &interrupts);
    Popped popped(8);
    const auto one_request = [&] {
      REQUIRE(driver.add({{0x80000, 16, true}}));
      driver.publish();
      REQUIRE(queue->pop(popped.chain) == CLONE_OK);
      REQUIRE(queue->push(popped.chain, 1) == CLONE_OK);
      queue->signal();
      REQUIRE(driver.take_used());
    };
    one_request();
    CHECK(interrupts == 1);
    driver.set_interrupts(false);
    one_request();
    CHECK(interrupts == 1);
    driver.set_interrupts(true);
    one_request();
    CHECK(interrupts == 2);
  }
}

TEST_CASE("virtqueue: the driver is asked to notify only while the device waits") {
  for (const bool packed : {false, true}) {
    for (const uint64_t features : {uint64_t{0}, kFeatureEventIndex}) {
      CAPTURE(packed);
      CAPTURE(features);
      GuestMemory memory = make_memory(1 << 20);
      FakeDriver driver(memory, {packed, 8, features, 0x1000, packed ? 15u : 65535u});
      const auto queue = make_queue(memory, driver);
      Popped popped(8);
      const auto add = [&] {
        REQUIRE(driver.add({{0x80000, 16, false}}));
        return driver.publish();
      };
      // A device that never says a word about kicks: it is told whenever it found the queue empty.
      CHECK(queue->pop(popped.chain) == CLONE_EMPTY);
      CHECK(add());
      REQUIRE(queue->pop(popped.chain) == CLONE_OK);
      CHECK(queue->pop(popped.chain) == CLONE_EMPTY);
      CHECK(add());
      // Busy: no notifications.
      queue->disable_kick();
      REQUIRE(queue->pop(popped.chain) == CLONE_OK);
      CHECK(queue->pop(popped.chain) == CLONE_EMPTY);
      CHECK(!add());
      CHECK(!add());
      // About to sleep, but something came in.
      CHECK(queue->enable_kick());
      REQUIRE(queue->pop(popped.chain) == CLONE_OK);
      REQUIRE(queue->pop(popped.chain) == CLONE_OK);
      CHECK(!queue->enable_kick());
      CHECK(add());
    }
  }
}

TEST_CASE("virtqueue: two threads lose no request and no wake-up") {
  for (const bool packed : {false, true}) {
    for (const uint64_t features : {uint64_t{0}, kFeatureEventIndex}) {
      CAPTURE(packed);
      CAPTURE(features);
      GuestMemory memory = make_memory(1 << 20);
      FakeDriver driver(memory, {packed, 16, features, 0x1000, 0});
      const clone_sdk::Fd kick(::eventfd(0, EFD_CLOEXEC)), call(::eventfd(0, EFD_CLOEXEC));
      clone_virtqueue_config config = driver.queue_config();
      config.kick_fd = kick.get();
      config.call_fd = call.get();
      const auto queue = std::move(Virtqueue::create(memory, config)).value();
      constexpr int kRequests = 20000;
      std::atomic<bool> lost{false};
      const auto wait = [&](int fd) {  // a wake-up that does not come is lost
        pollfd entry{fd, POLLIN, 0};
        if (::poll(&entry, 1, 5000) != 1) return !(lost = true);
        uint64_t count;
        return ::read(fd, &count, sizeof count) == sizeof count;
      };
      std::thread device([&] {
        Popped popped(16);
        for (int served = 0; served < kRequests && !lost;) {
          queue->disable_kick();
          while (queue->pop(popped.chain) == CLONE_OK) {
            queue->push(popped.chain, 4);
            queue->signal();
            ++served;
          }
          if (served < kRequests && !queue->enable_kick() && !wait(queue->kick_fd())) return;
        }
      });
      int sent = 0, received = 0;
      while (received < kRequests && !lost) {
        while (sent < kRequests && driver.add({{0x80000, 16, false}, {0x90000, 16, true}})) ++sent;
        if (driver.publish()) signal_event(kick.get());
        int now = 0;
        while (driver.take_used()) ++now;
        received += now;
        if (now == 0 && !driver.enable_interrupts() && !wait(call.get())) break;
      }
      device.join();
      CHECK(!lost);
      CHECK(received == kRequests);
    }
  }
}

TEST_CASE("virtqueue: a push marks what was written, and the ring, and nothing else") {
  for (const bool packed : {false, true}) {
    CAPTURE(packed);
    GuestMemory memory = make_memory(1 << 20);
    FakeDriver driver(memory, {packed, 8, 0, 0x10000, 0});
    const auto queue = make_queue(memory, driver);
    REQUIRE(driver.add({{0x20000, 4096, false}, {0x30ff0, 32, true}, {0x40000, 8192, true}}));
    driver.publish();
    Popped popped(8);
    REQUIRE(queue->pop(popped.chain) == CLONE_OK);
    memory.enable_dirty_tracking(true);
    REQUIRE(queue->push(popped.chain, 32 + 4097) == CLONE_OK);
    std::set<uint64_t> pages;
    const auto words = memory.take_dirty(0);
    for (uint64_t page = 0; page < words.size() * 64; ++page)
      if (words[page / 64] >> (page % 64) & 1) pages.insert(page);
    CHECK(pages == std::set<uint64_t>{0x10, 0x30, 0x31, 0x40, 0x41});
  }
}

TEST_CASE("virtqueue: the used index is marked where it lies pages away from the used entry") {
  GuestMemory memory = make_memory(32 << 20);
  FakeDriver driver(memory, {false, 1024, 0, 0x10000, 1023});
  const auto queue = make_queue(memory, driver);
  REQUIRE(driver.add({{0x1e00000, 16, false}}));
  driver.publish();
  Popped popped(1024);
  REQUIRE(queue->pop(popped.chain) == CLONE_OK);
  memory.enable_dirty_tracking(true);
  REQUIRE(queue->push(popped.chain, 0) == CLONE_OK);
  const auto words = memory.take_dirty(0);
  const auto marked = [&](uint64_t address) { return (words[address / 4096 / 64] >> (address / 4096 % 64) & 1) != 0; };
  const uint64_t entry = driver.device_address + 4 + 8 * 1023;
  REQUIRE(entry / 4096 > driver.device_address / 4096 + 1);
  CHECK(marked(driver.device_address));
  CHECK(!marked(driver.device_address + 4096));
  CHECK(marked(entry));
}

TEST_CASE("virtqueue: a position is taken up by another queue on the same rings") {
  for (const bool packed : {false, true}) {
    CAPTURE(packed);
    GuestMemory memory = make_memory(1 << 20);
    FakeDriver driver(memory, {packed, 8, kFeatureEventIndex, 0x1000, 0});
    auto queue = make_queue(memory, driver);
    Popped popped(8);
    for (int round = 0; round < 100; ++round) {
      const auto id = driver.add({{0x80000, 16, false}, {0x81000, 16, true}});
      REQUIRE(id);
      driver.publish();
      const auto position = queue->position();
      queue = make_queue(memory, driver);
      REQUIRE(queue->set_position(position).ok());
      REQUIRE(queue->pop(popped.chain) == CLONE_OK);
      CHECK(popped.chain.head == *id);
      REQUIRE(queue->push(popped.chain, 3) == CLONE_OK);
      REQUIRE(driver.take_used());
    }
  }
  GuestMemory memory = make_memory(1 << 20);
  const auto refused = [&](bool packed, uint16_t available, uint16_t used) {
    FakeDriver driver(memory, {packed, 8, 0, 0x1000, 0});
    const auto result = make_queue(memory, driver)->set_position({sizeof(clone_virtqueue_position), available, used});
    return !result.ok() && result.error().status == CLONE_ERR_CORRUPT;
  };
  CHECK(refused(false, 9, 0));
  CHECK(!refused(false, 8, 0));
  CHECK(refused(false, 0, 1));
  CHECK(!refused(false, 3, 65535));
  CHECK(refused(true, 8 | 0x8000, 0x8000));
  CHECK(refused(true, 0x8000, 0x8001));
  CHECK(refused(true, 2, 0x8001));
  CHECK(!refused(true, 1, 0x8001));
}

TEST_CASE("virtqueue: the C table does what the class does") {
  FakeHost host;
  const clone_host_virtqueue* table = virtqueue_service();
  CHECK(table->ring_features(host.handle()) == kRingFeatures);
  FakeDriver driver(host.memory(), {false, 8, 0, 0x1000, 0});
  const clone_virtqueue_config config = driver.queue_config();
  clone_virtqueue* queue = nullptr;
  REQUIRE(table->create(host.handle(), &config, &queue, nullptr) == CLONE_OK);
  CHECK(table->queue_size(queue) == 8);
  Popped popped(8);
  CHECK(table->pop(queue, &popped.chain, nullptr) == CLONE_EMPTY);
  REQUIRE(driver.add({{0x80000, 16, true}}));
  driver.publish();
  popped.chain.capacity = 7;
  CHECK(table->pop(queue, &popped.chain, nullptr) == CLONE_ERR_INVALID);
  popped.chain.capacity = 8;
  CHECK(table->pop(queue, &popped.chain, nullptr) == CLONE_OK);
  CHECK(table->push(queue, &popped.chain, 99) == CLONE_OK);
  CHECK(driver.take_used()->written_bytes == 16);                    // never more than there was room for
  CHECK(table->push(queue, &popped.chain, 0) == CLONE_ERR_INVALID);  // it is not out any more
  clone_virtqueue_layout layout{};
  CHECK(table->layout(queue, &layout) == CLONE_ERR_INVALID);
  layout.size = sizeof layout;
  CHECK(table->layout(queue, &layout) == CLONE_OK);
  CHECK(layout.device_address == driver.device_address);
  CHECK(table->call_fd_taken(queue) == 0);
  table->call_fd(queue);
  CHECK(table->call_fd_taken(queue) == 1);
  driver.offer_head(8);
  clone_err err{sizeof err, 0, {}};
  CHECK(table->pop(queue, &popped.chain, &err) == CLONE_ERR_GUEST);
  CHECK(std::string(err.message) == "a descriptor's number is beyond the table");
  table->destroy(queue);
}

// micro-bench -tc='*nanoseconds*'
#ifdef CLONE_MICRO_BENCH
TEST_CASE("virtqueue: nanoseconds for a pop and a push") {
  for (const bool packed : {false, true}) {
    for (const bool indirect : {false, true}) {
      GuestMemory memory = make_memory(8 << 20);
      FakeDriver driver(memory, {packed, 256, kFeatureEventIndex | kFeatureIndirectDescriptors, 0x10000, 0});
      const auto queue = make_queue(memory, driver);
      Popped popped(256);
      double best_ns = 1e9;
      for (int round = 0; round < 2000; ++round) {
        int chains = 0;
        while (driver.add({{0x300000, 16, false}, {0x301000, 4096, true}, {0x302000, 1, true}}, indirect)) ++chains;
        driver.publish();
        const auto start = std::chrono::steady_clock::now();
        for (int i = 0; i < chains; ++i) {
          queue->pop(popped.chain);
          queue->push(popped.chain, 4097);
        }
        const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - start;
        best_ns = std::min(best_ns, taken.count() / chains);
        while (driver.take_used()) {
        }
      }
      const std::string name = std::string(packed ? "packed" : "split") + (indirect ? ", indirect: " : ", direct: ");
      MESSAGE(name << best_ns << " ns");
    }
  }
}
#endif
