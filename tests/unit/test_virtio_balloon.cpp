// SPDX-License-Identifier: Apache-2.0
// The balloon device behind real queues, with a driver played by the test.
#include <doctest/doctest.h>
#include <linux/virtio_balloon.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include <chrono>
#include <functional>
#include <memory>
#include <numeric>
#include <thread>

#include "clone/abi/balloon.h"
#include "fake_driver.hpp"
#include "fake_host.hpp"
#include "fake_plugin.hpp"
#include "virtio-balloon/page_ranges.hpp"
#include "virtqueue/virtqueue_service.hpp"

using namespace vmm;
using namespace vmm::test;
using Buffers = std::vector<FakeDriver::Buffer>;

namespace {

constexpr uint64_t kMiB = 1 << 20;
constexpr uint64_t kMemoryBytes = 64 * kMiB;
constexpr uint64_t kUnknown = ~uint64_t{0};
constexpr uint64_t kScratch = 4 * kMiB;  // what the driver sends
constexpr uint64_t kPages = 16 * kMiB;   // from here on, pages for the balloon
enum : uint32_t { kInflate, kDeflate, kStatistics, kHints, kReports };
constexpr uint64_t bit(unsigned feature) { return 1ull << feature; }

const PluginFile& plugin() {
  static const PluginFile file("virtio-balloon");
  return file;
}

using Options = std::map<std::string, std::string>;

class Rig {
 public:
  explicit Rig(const Options& options = {}, uint64_t memory_bytes = kMemoryBytes,
               const clone_host_memory* memory_table = nullptr)
      : host_(memory_bytes), device_(plugin().device("virtio-balloon"), prepare(host_, memory_table)) {
    REQUIRE_MESSAGE(device_.configure(options) == CLONE_OK, device_.error);
    table_ = device_.extension<clone_virtio_device>(CLONE_VIRTIO_DEVICE);
    balloon_ = static_cast<const clone_balloon*>(handle()->get_extension(handle(), CLONE_BALLOON));
    REQUIRE(balloon_);
    port_ = {sizeof port_, 0, this, [](void* self) { ++static_cast<Rig*>(self)->config_changes; },
             [](void* self) { ++static_cast<Rig*>(self)->resets_wanted; }};
    REQUIRE(device_.start() == CLONE_OK);
    std::memset(host_.memory().slice({kPages}, kMemoryBytes - kPages), 7, kMemoryBytes - kPages);
  }
  ~Rig() {
    reset();
    device_.destroy();
  }

  // The queues at `places` are enabled; `features` of what is offered are negotiated.
  void activate(uint64_t features = ~0ull, std::vector<uint32_t> places = {0, 1, 2, 3, 4}) {
    std::vector<clone_virtqueue*> queues(table_->queue_count(device_.raw()), nullptr);
    lines_.resize(queues.size());
    for (const uint32_t place : places) {
      Line& line = lines_[place];
      line.driver = std::make_unique<FakeDriver>(host_.memory(),
                                                 FakeDriverConfig{.size = 32, .base = 0x10'0000 + place * 0x4'0000});
      line.kick = clone_sdk::Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
      line.call = clone_sdk::Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
      clone_virtqueue_config config = line.driver->queue_config();
      config.index = place;
      config.kick_fd = line.kick.get();
      config.call_fd = line.call.get();
      clone_err err{sizeof err, 0, {}};
      REQUIRE_MESSAGE(virtqueue_service()->create(handle(), &config, &line.queue, &err) == CLONE_OK, err.message);
      queues[place] = line.queue;
    }
    const clone_virtio_activation activation = {sizeof activation, static_cast<uint32_t>(queues.size()),
                                                table_->features(device_.raw()) & features, queues.data(), &port_};
    clone_err err{sizeof err, 0, {}};
    activated = table_->activate(device_.raw(), &activation, &err);
  }
  void reset() {
    table_->reset(device_.raw());
    for (Line& line : lines_)
      if (line.queue) virtqueue_service()->destroy(line.queue);
    lines_.clear();
  }

  void send(uint32_t place, const Buffers& buffers) {
    REQUIRE(lines_[place].driver->add(buffers));
    lines_[place].driver->publish();
    signal_event(lines_[place].kick.get());
  }
  // True when a chain came back in time.
  bool comes_back(uint32_t place, int timeout_ms = 5000) {
    Line& line = lines_[place];
    for (int waited_ms = 0; waited_ms <= timeout_ms; waited_ms += 2) {
      if (line.driver->take_used()) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return false;
  }
  void send_pages(uint32_t place, const std::vector<uint32_t>& pages, uint32_t extra_bytes = 0) {
    std::memcpy(memory(kScratch), pages.data(), 4 * pages.size());
    send(place, {{kScratch, static_cast<uint32_t>(4 * pages.size() + extra_bytes), false}});
    CHECK(comes_back(place));
  }
  void send_statistics(const std::vector<std::pair<uint16_t, uint64_t>>& rows) {
    std::byte* at = memory(kScratch + 0x8000);
    for (const auto& [tag, value] : rows) {
      std::memcpy(at, &tag, 2);
      std::memcpy(at + 2, &value, 8);
      at += 10;
    }
    send(kStatistics, {{kScratch + 0x8000, static_cast<uint32_t>(10 * rows.size()), false}});
  }

  std::byte* memory(uint64_t address) { return host_.memory().slice({address}, 1); }
  bool is_filled(uint64_t address) { return *memory(address) == std::byte{7}; }
  // Of the page on the host.
  bool is_resident(uint64_t address) {
    unsigned char resident = 0;
    REQUIRE(::mincore(memory(address), 4096, &resident) == 0);
    return resident & 1;
  }
  virtio_balloon_config config() {
    virtio_balloon_config config{};
    table_->read_config(device_.raw(), 0, &config, sizeof config);
    return config;
  }
  void write_config(uint32_t offset, uint32_t value) { table_->write_config(device_.raw(), offset, &value, 4); }
  void set_actual(uint64_t mib) { write_config(4, static_cast<uint32_t>(mib * 256)); }
  uint64_t shown_mib() { return config().num_pages / 256; }
  clone_balloon_state state() {
    clone_balloon_state state{};
    state.size = sizeof state;
    balloon_->state(balloon_->context, &state);
    return state;
  }
  void set_target(uint64_t bytes) { balloon_->set_target(balloon_->context, bytes); }
  std::string command(const std::string& name, const std::string& json = "{}") {
    BenchHost::Answer answer;
    host_.begin_command("virtio-balloon.0." + name, json, answer);
    return answer.text;
  }
  bool until(const std::function<bool()>& done) {
    for (int i = 0; i < 2500; ++i) {
      if (done()) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return false;
  }

  const clone_host* handle() { return host_.handle("virtio-balloon.0"); }
  DeviceUnderTest& device() { return device_; }
  uint64_t features() { return table_->features(device_.raw()); }
  FakeHost& host() { return host_; }
  std::atomic<int> config_changes{0}, resets_wanted{0};
  clone_status activated = CLONE_ERR_STATE;

 private:
  struct Line {
    std::unique_ptr<FakeDriver> driver;
    clone_sdk::Fd kick, call;
    clone_virtqueue* queue = nullptr;
  };
  static const clone_host* prepare(FakeHost& host, const clone_host_memory* memory_table) {
    if (memory_table) host.offer(CLONE_HOST_MEMORY, memory_table);
    host.offer(CLONE_VIRTQUEUE, virtqueue_service());
    return host.handle("virtio-balloon.0");
  }

  FakeHost host_;
  DeviceUnderTest device_;
  const clone_virtio_device* table_ = nullptr;
  const clone_balloon* balloon_ = nullptr;
  clone_virtio_port port_{};
  std::vector<Line> lines_;
};

constexpr uint32_t kFirst = kPages / 4096;  // page number

}  // namespace

TEST_CASE("balloon: page numbers become as few ranges as there are") {
  using virtio_balloon::Range;
  const std::vector<Range> memory = {{0, 0x10'0000}, {0x100'0000, 0x3000}};
  std::vector<Range> ranges;
  std::vector<uint32_t> pages = {5, 3, 4, 9, 4, 0xff, 0x100, 0x1000, 0x1002, 0x1001, 0x1003, ~0u, 0};
  const uint64_t outside =
      virtio_balloon::visit_ranges(pages, memory, [&](const Range& range) { ranges.push_back(range); });
  CHECK(outside == 3);  // 0x100, 0x1003, ~0
  CHECK(ranges ==
        std::vector<Range>{{0, 0x1000}, {0x3000, 0x3000}, {0x9000, 0x1000}, {0xf'f000, 0x1000}, {0x100'0000, 0x3000}});
  ranges.clear();
  CHECK(virtio_balloon::visit_ranges({}, memory, [&](const Range& range) { ranges.push_back(range); }) == 0);
  CHECK(ranges.empty());
}

TEST_CASE("balloon: inflated pages go back to the host, and only those; deflated ones are the guest's again") {
  Rig rig;
  rig.activate();
  REQUIRE(rig.activated == CLONE_OK);
  std::vector<uint32_t> pages;
  for (uint32_t i = 0; i < 600; ++i) pages.push_back(kFirst + 512 + (i * 7) % 600);  // each once, in no order
  REQUIRE(rig.is_resident(kPages + 2 * kMiB));
  rig.send_pages(kInflate, pages);
  for (uint32_t i = 0; i < 600; ++i) REQUIRE_FALSE(rig.is_resident(kPages + 2 * kMiB + i * 4096));
  CHECK(rig.is_filled(kPages + 2 * kMiB - 4096));
  CHECK(rig.is_filled(kPages + 2 * kMiB + 600 * 4096));
  rig.send_pages(kDeflate, pages);
  CHECK(*rig.memory(kPages + 2 * kMiB) == std::byte{0});
  *rig.memory(kPages + 2 * kMiB) = std::byte{9};
  CHECK(*rig.memory(kPages + 2 * kMiB) == std::byte{9});
}

TEST_CASE("balloon: more page numbers than one round takes") {
  Rig rig;
  rig.activate();
  std::vector<uint32_t> pages(10'000);
  std::iota(pages.rbegin(), pages.rend(), kFirst);
  rig.send_pages(kInflate, pages);
  for (uint32_t i = 0; i < 10'000; i += 99) REQUIRE_FALSE(rig.is_filled(kPages + i * 4096ull));
  CHECK(rig.is_filled(kPages + 10'000ull * 4096));
}

TEST_CASE("balloon: page numbers outside memory and odd lengths are ignored and counted") {
  Rig rig;
  rig.activate();
  rig.send_pages(kInflate, {kFirst, ~0u, kMemoryBytes / 4096, 0x8000'0000, kFirst + 1}, 3);
  CHECK_FALSE(rig.is_filled(kPages));
  CHECK_FALSE(rig.is_filled(kPages + 4096));
  CHECK(rig.is_filled(kPages + 8192));
  CHECK(rig.command("status").find("\"ignored_pages\": 3,") != std::string::npos);
  // Less than a number, and a chain that can only be written.
  rig.send(kInflate, {{kScratch, 3, false}});
  CHECK(rig.comes_back(kInflate));
  rig.send(kInflate, {{kScratch, 64, true}});
  CHECK(rig.comes_back(kInflate));
  rig.send(kReports, {{kPages + 8192, 4096, false}});
  CHECK(rig.comes_back(kReports));
  CHECK(rig.is_filled(kPages + 8192));
  CHECK(rig.resets_wanted == 0);
}

TEST_CASE("balloon: a target is reached in steps, and left at once") {
  Rig rig(Options{{"size", "48M"}, {"step", "16M"}});
  CHECK(rig.state().ready == 0);
  CHECK(rig.shown_mib() == 0);
  rig.activate();
  CHECK(rig.state().ready == 1);
  CHECK(rig.state().target_bytes == 48 * kMiB);
  CHECK(rig.shown_mib() == 16);
  const int before = rig.config_changes;
  rig.set_actual(8);
  CHECK(rig.shown_mib() == 16);  // not there yet: not driven on
  CHECK(rig.config_changes == before);
  rig.set_actual(16);
  CHECK(rig.shown_mib() == 32);
  CHECK(rig.config_changes == before + 1);
  rig.set_actual(32);
  CHECK(rig.shown_mib() == 48);
  rig.set_actual(48);
  CHECK(rig.shown_mib() == 48);
  CHECK(rig.state().balloon_bytes == 48 * kMiB);
  rig.set_target(4 * kMiB);
  CHECK(rig.shown_mib() == 4);
  rig.set_actual(30);  // on the way down nothing is asked for anew
  CHECK(rig.shown_mib() == 4);
  rig.set_actual(4);
  CHECK(rig.state().target_bytes == 4 * kMiB);
  // More than there is.
  rig.set_target(kUnknown);
  CHECK(rig.state().target_bytes == kMemoryBytes);
  CHECK(rig.shown_mib() == 20);
}

TEST_CASE("balloon: what a guest out of memory took back stays the guest's") {
  Rig rig(Options{{"size", "32M"}});
  rig.activate();
  rig.set_actual(32);
  rig.set_actual(20);
  CHECK(rig.state().target_bytes == 20 * kMiB);
  CHECK(rig.shown_mib() == 20);
  rig.set_target(24 * kMiB);
  CHECK(rig.shown_mib() == 24);

  Rig strict(Options{{"size", "32M"}, {"deflate-on-oom", "off"}});
  CHECK((strict.features() & bit(VIRTIO_BALLOON_F_DEFLATE_ON_OOM)) == 0);
  strict.activate();
  strict.set_actual(32);
  strict.set_actual(20);
  CHECK(strict.state().target_bytes == 32 * kMiB);
}

TEST_CASE("balloon: a deflation that was asked for is none out of memory, even when more is asked for meanwhile") {
  const auto deflating = [](Rig& rig) {
    rig.activate();
    rig.set_actual(40);
    rig.set_target(20 * kMiB);
    rig.set_target(60 * kMiB);
    REQUIRE(rig.shown_mib() == 60);
    rig.set_actual(36);  // the chunk that it was at
    CHECK(rig.state().target_bytes == 60 * kMiB);
    CHECK(rig.shown_mib() == 60);
  };
  const Options options{{"size", "40M"}, {"step", "64M"}};
  Rig grows(options);
  deflating(grows);
  grows.set_actual(37);  // it has seen the new number: from now on
  grows.set_actual(30);
  CHECK(grows.state().target_bytes == 30 * kMiB);

  Rig arrives(options);
  deflating(arrives);
  arrives.set_actual(20);
  CHECK(arrives.state().target_bytes == 60 * kMiB);
  arrives.set_actual(16);
  CHECK(arrives.state().target_bytes == 16 * kMiB);

  Rig beyond(options);
  deflating(beyond);
  beyond.set_actual(19);
  CHECK(beyond.state().target_bytes == 19 * kMiB);
  CHECK(beyond.shown_mib() == 19);

  Rig again(options);
  deflating(again);
  again.set_target(30 * kMiB);  // less, and more once again
  again.set_target(50 * kMiB);
  again.set_actual(22);
  CHECK(again.state().target_bytes == 50 * kMiB);

  Rig anew(options);
  deflating(anew);
  anew.reset();
  anew.activate();
  anew.set_actual(60);
  anew.set_actual(50);
  CHECK(anew.state().target_bytes == 50 * kMiB);
}

TEST_CASE("balloon: the driver's claims about its size are bounded, other fields are not its to write") {
  Rig rig;
  rig.activate();
  rig.write_config(4, ~0u);
  CHECK(rig.state().balloon_bytes == kMemoryBytes);
  rig.write_config(0, 77);
  CHECK(rig.config().num_pages == 0);
  rig.write_config(8, 77);
  CHECK(rig.config().free_page_hint_cmd_id == 0);
}

TEST_CASE("balloon: statistics are asked for when somebody wants them") {
  Rig rig(Options{{"stats-interval", "1"}});
  rig.activate();
  CHECK(rig.state().guest_free_bytes == kUnknown);
  rig.send_statistics(
      {{VIRTIO_BALLOON_S_MEMFREE, 11}, {VIRTIO_BALLOON_S_AVAIL, 22}, {VIRTIO_BALLOON_S_MEMTOT, 33}, {99, 1}});
  REQUIRE(rig.until([&] { return rig.state().guest_free_bytes == 11; }));
  CHECK(rig.state().guest_available_bytes == 22);
  CHECK(rig.state().guest_total_bytes == 33);
  REQUIRE(rig.until([&] { return rig.state().ready && rig.comes_back(kStatistics, 0); }));  // state() asks
  rig.send_statistics({{VIRTIO_BALLOON_S_AVAIL, 44}});
  REQUIRE(rig.until([&] { return rig.state().guest_available_bytes == 44; }));
  CHECK(rig.state().guest_free_bytes == kUnknown);  // what is not told any more is not known
  // Nonsense: no row whole.
  REQUIRE(rig.until([&] { return rig.state().ready && rig.comes_back(kStatistics, 0); }));
  rig.send(kStatistics, {{kScratch, 9, false}});
  CHECK(rig.until([&] { return rig.state().guest_available_bytes == kUnknown; }));

  Rig never(Options{{"stats-interval", "0"}});
  never.activate();
  never.send_statistics({{VIRTIO_BALLOON_S_AVAIL, 5}});
  REQUIRE(never.until([&] { return never.state().guest_available_bytes == 5; }));
  CHECK_FALSE(never.comes_back(kStatistics, 50));
  // Before the VM is saved, the buffer is the driver's again.
  CHECK(never.device().quiesce() == CLONE_OK);
  CHECK(never.comes_back(kStatistics, 0));
  CHECK(never.device().resume() == CLONE_OK);
}

TEST_CASE("balloon: reported pages go back to the host") {
  Rig rig;
  rig.activate();
  rig.send(kReports,
           {{kPages, 1 * kMiB, true}, {kPages + kMiB, kMiB, true}, {kPages + 4 * kMiB + 100, 3 * 4096, true}});
  REQUIRE(rig.comes_back(kReports));
  for (uint64_t offset = 0; offset < 2 * kMiB; offset += 4096) REQUIRE_FALSE(rig.is_resident(kPages + offset));
  CHECK(rig.is_filled(kPages + 2 * kMiB));
  // Only whole pages of what was reported.
  CHECK(rig.is_filled(kPages + 4 * kMiB));
  CHECK_FALSE(rig.is_filled(kPages + 4 * kMiB + 4096));
  CHECK(rig.is_filled(kPages + 4 * kMiB + 3 * 4096));
  CHECK(rig.state().reported_bytes == 2 * kMiB + 2 * 4096);
  CHECK(rig.state().balloon_bytes == 0);
}

TEST_CASE("balloon: no more reported memory is discarded at a time than a round takes") {
  static std::vector<std::pair<uint64_t, uint64_t>> discards;
  discards.clear();
  FakeHost plain;
  clone_host_memory memory = *static_cast<const clone_host_memory*>(
      plain.handle("virtio-balloon.0")->get_extension(plain.handle("virtio-balloon.0"), CLONE_HOST_MEMORY));
  memory.discard = [](const clone_host*, uint64_t address, uint64_t size_bytes) {
    discards.emplace_back(address, size_bytes);
    return CLONE_OK;
  };
  constexpr uint64_t size = 1024 * kMiB;
  Rig rig({}, size, &memory);
  rig.activate();
  // A round ends in the middle of the second segment, the next one in the middle of the third, which begins nowhere
  // near.
  rig.send(kReports, {{64 * kMiB, 200 * kMiB, true},
                      {264 * kMiB, 200 * kMiB, true},
                      {600 * kMiB + 1, 300 * kMiB, true},
                      {900 * kMiB, 4096, true}});
  REQUIRE(rig.comes_back(kReports));
  CHECK(discards == std::vector<std::pair<uint64_t, uint64_t>>{{64 * kMiB, 256 * kMiB},
                                                               {320 * kMiB, 144 * kMiB},
                                                               {600 * kMiB + 4096, 112 * kMiB},
                                                               {712 * kMiB + 4096, 188 * kMiB}});
  CHECK(rig.state().reported_bytes == 700 * kMiB);
}

TEST_CASE("balloon: pages that must read as a poison are not given back") {
  Rig rig;
  rig.activate();
  rig.write_config(12, 0xaaaa'aaaa);
  rig.send(kReports, {{kPages, kMiB, true}});
  REQUIRE(rig.comes_back(kReports));
  CHECK(rig.is_filled(kPages));
  CHECK(rig.state().reported_bytes == 0);
  rig.write_config(12, 0);  // init_on_free
  rig.send(kReports, {{kPages, kMiB, true}});
  REQUIRE(rig.comes_back(kReports));
  CHECK_FALSE(rig.is_filled(kPages));

  Rig off(Options{{"reporting", "off"}});
  CHECK((off.features() & (bit(VIRTIO_BALLOON_F_REPORTING) | bit(VIRTIO_BALLOON_F_PAGE_POISON))) == 0);
}

TEST_CASE("balloon: hints are counted, and nothing is thrown away for them") {
  Rig rig(Options{{"hinting", "on"}});
  CHECK(rig.command("hint").starts_with("error"));
  rig.activate();
  CHECK(rig.command("hint") == "{}");
  const uint32_t round = rig.config().free_page_hint_cmd_id;
  CHECK(round >= 2);
  const auto send_command = [&](uint32_t command) {
    std::memcpy(rig.memory(kScratch), &command, 4);
    rig.send(kHints, {{kScratch, 4, false}});
    REQUIRE(rig.comes_back(kHints));
  };
  const auto send_hint = [&] {
    rig.send(kHints, {{kPages, kMiB, true}});
    REQUIRE(rig.comes_back(kHints));
  };
  send_hint();  // of no round
  send_command(round + 1);
  send_hint();  // of another round
  CHECK(rig.command("status").find("\"hinted_bytes\": 0,") != std::string::npos);
  send_command(round);
  send_hint();
  send_hint();
  CHECK(rig.config().free_page_hint_cmd_id == round);
  send_command(VIRTIO_BALLOON_CMD_ID_STOP);
  CHECK(rig.config().free_page_hint_cmd_id == VIRTIO_BALLOON_CMD_ID_DONE);
  CHECK(rig.command("status").find("\"hinted_bytes\": 2097152,") != std::string::npos);
  CHECK(rig.is_filled(kPages));
  CHECK(rig.command("hint") == "{}");
  CHECK(rig.config().free_page_hint_cmd_id == round + 1);
}

TEST_CASE("balloon: drivers that number only the queues they use") {
  // Linux up to 6.10, of hints and reports only the latter.
  Rig rig;
  rig.activate(~0ull, {0, 1, 2, 3});
  REQUIRE(rig.activated == CLONE_OK);
  rig.send(kHints, {{kPages, kMiB, true}});
  REQUIRE(rig.comes_back(kHints));
  CHECK_FALSE(rig.is_filled(kPages));
  // The oldest drivers: two queues, no features.
  Rig old;
  old.activate(0, {0, 1});
  REQUIRE(old.activated == CLONE_OK);
  old.send_pages(kInflate, {kFirst});
  CHECK_FALSE(old.is_filled(kPages));
  CHECK(old.state().ready == 1);
  Rig broken;
  broken.activate(~0ull, {0, 2, 3, 4});
  CHECK(broken.activated != CLONE_OK);
}

TEST_CASE("balloon: after a reset the balloon is empty, the target stays") {
  Rig rig(Options{{"size", "16M"}, {"step", "8M"}});
  rig.activate();
  rig.set_actual(8);
  rig.set_actual(16);
  rig.reset();
  CHECK(rig.state().ready == 0);
  CHECK(rig.state().balloon_bytes == 0);
  CHECK(rig.state().target_bytes == 16 * kMiB);
  CHECK(rig.state().guest_available_bytes == kUnknown);
  rig.activate();
  CHECK(rig.shown_mib() == 8);
  rig.set_target(0);
  CHECK(rig.device().reset() == CLONE_OK);  // of the machine
  CHECK(rig.state().target_bytes == 16 * kMiB);
}

TEST_CASE("balloon: its state is saved and loaded") {
  SavedState state;
  {
    Rig rig;
    rig.activate();
    rig.set_target(24 * kMiB);
    rig.set_actual(10);
    rig.write_config(12, 5);
    REQUIRE(rig.device().quiesce() == CLONE_OK);
    REQUIRE(rig.device().save(state) == CLONE_OK);
    SavedState again;
    REQUIRE(rig.device().save(again) == CLONE_OK);
    CHECK(state.sections == again.sections);
    REQUIRE(rig.device().resume() == CLONE_OK);
    rig.send_pages(kInflate, {kFirst});
    CHECK_FALSE(rig.is_filled(kPages));
  }
  {
    Rig rig;
    REQUIRE(rig.device().load(state) == CLONE_OK);
    CHECK(rig.state().target_bytes == 24 * kMiB);
    CHECK(rig.state().balloon_bytes == 10 * kMiB);
    CHECK(rig.shown_mib() == 24);
    CHECK(rig.config().poison_val == 5);
    rig.activate();
    CHECK(rig.state().balloon_bytes == 10 * kMiB);
    rig.set_actual(24);
    CHECK(rig.state().balloon_bytes == 24 * kMiB);
  }
  Rig rig;
  SavedState none;
  CHECK(rig.device().load(none) == CLONE_ERR_CORRUPT);
  SavedState huge = state;
  std::memset(huge.sections.begin()->second.bytes.data(), 0xff, 8);
  CHECK(rig.device().load(huge) == CLONE_ERR_CORRUPT);
  huge = state;
  huge.sections.begin()->second.bytes.pop_back();
  CHECK(rig.device().load(huge) == CLONE_ERR_CORRUPT);
  CHECK(rig.state().target_bytes == 0);
}

TEST_CASE("balloon: commands") {
  Rig rig;
  rig.activate();
  CHECK(rig.command("set", "{\"target_bytes\": 8388608}").find("\"target_bytes\": 8388608,") != std::string::npos);
  CHECK(rig.shown_mib() == 8);
  for (const char* bad :
       {"", "{}", "[]", "{\"target_bytes\": -1}", "{\"target_bytes\": \"8\"}", "{\"target\": 8}",
        "{\"target_bytes\": 8", "{\"target_bytes\": 8} x", "{\"target_bytes\": 99999999999999999999}"}) {
    CAPTURE(bad);
    CHECK(rig.command("set", bad) == "error: allowed is {\"target_bytes\": N}, a number of bytes from 0");
  }
  CHECK(rig.shown_mib() == 8);
  CHECK(rig.command("status").find("\"guest_free_bytes\": null") != std::string::npos);
}

TEST_CASE("balloon: a size beyond the machine's memory is refused by name") {
  FakeHost host(kMemoryBytes);
  host.offer(CLONE_VIRTQUEUE, virtqueue_service());
  DeviceUnderTest device(plugin().device("virtio-balloon"), host.handle("virtio-balloon.0"));
  CHECK(device.configure({{"size", "65M"}}) != CLONE_OK);
  CHECK(device.error == "size=65M is more than the machine's memory (64 MiB)");
}

TEST_CASE("balloon: memory that single pages cannot be taken from has no balloon") {
  FakeHost host(kMemoryBytes);
  host.offer(CLONE_VIRTQUEUE, virtqueue_service());
  // Locked memory answers MADV_DONTNEED as reserved huge pages do.
  std::byte* start = host.memory().slice({0}, kMemoryBytes);
  if (::mlock2(start, kMemoryBytes, MLOCK_ONFAULT) != 0) return;  // RLIMIT_MEMLOCK of this machine
  {
    DeviceUnderTest device(plugin().device("virtio-balloon"), host.handle("virtio-balloon.0"));
    CHECK(device.configure({{"size", "8M"}}) != CLONE_OK);
    CHECK(device.error.find("cannot be given back in pages of 4 KiB") != std::string::npos);
  }
  DeviceUnderTest device(plugin().device("virtio-balloon"), host.handle("virtio-balloon.1"));
  REQUIRE(device.configure() == CLONE_OK);
  CHECK(device.extension<clone_virtio_device>(CLONE_VIRTIO_DEVICE)->features(device.raw()) == 0);
  CHECK(host.handle("x.0")->get_extension(host.handle("x.0"), CLONE_BALLOON) == nullptr);
  ::munlock(start, kMemoryBytes);
}
