// SPDX-License-Identifier: Apache-2.0
// The core between a guest's reports, a policy and a balloon; with a policy that is not ours.
#include <doctest/doctest.h>

#include <chrono>
#include <cstring>

#include "loop/event_loop.hpp"
#include "plan/plan.hpp"
#include "vm/reclaim.hpp"

using namespace vmm;

namespace {

constexpr uint64_t kMiB = 1 << 20;
constexpr uint64_t kUnknown = ~uint64_t{0};

// A balloon and a guest's program, played by the test.
struct Guest {
  clone_balloon_state state{sizeof state, 1, 0, 0, 0, kUnknown, 200 * kMiB, kUnknown, 0};
  clone_guest_report told{};
  std::vector<uint64_t> targets;
  int looks = 0;
  void (*changed)(void*) = nullptr;
  void* listener = nullptr;

  clone_balloon balloon{sizeof balloon, 0, this,
                        [](void* self, uint64_t bytes) {
                          static_cast<Guest*>(self)->targets.push_back(bytes);
                          static_cast<Guest*>(self)->state.target_bytes = bytes;
                        },
                        [](void* self, clone_balloon_state* into) {
                          ++static_cast<Guest*>(self)->looks;
                          *into = static_cast<Guest*>(self)->state;
                        }};
  clone_guest program{sizeof program,
                      0,
                      this,
                      [](void* self, clone_guest_report* into) { *into = static_cast<Guest*>(self)->told; },
                      [](void* self, void (*call)(void*), void* context) {
                        static_cast<Guest*>(self)->changed = call;
                        static_cast<Guest*>(self)->listener = context;
                      },
                      nullptr};

  Guest() { told = {sizeof told, 1, CLONE_ACTIVITY_ACTIVE, 0, 1, 0, 0, 0, 512 * kMiB, 1, 2}; }
  void becomes(uint32_t activity) {
    told.activity = activity;
    changed(listener);
  }
  Reclaim::FindPublished find(bool with_program = true) {
    return [this, with_program](std::string_view id) -> const void* {
      if (id == CLONE_BALLOON) return &balloon;
      return id == CLONE_GUEST && with_program ? &program : nullptr;
    };
  }
};

struct Stage {
  Catalogue catalogue = Catalogue::scan({CLONE_TEST_POLICY_DIR}, PluginTrust::any).value();
  PluginLibrary library{catalogue};
  std::unique_ptr<EventLoop> loop = EventLoop::create().value();
  GuestMemory memory = GuestMemory::create({.size_bytes = 512 * kMiB}).value();
  Guest guest;
  PolicyType half = library.balloon_policy("half").value();

  Result<CheckedPlan> plan(PlannedDevice policy) {
    Plan given;
    given.balloon_policy = std::move(policy);
    // There is no transport in the folder: only the policy counts here.
    return check_plan(given, library);
  }
  void run(int ms) {
    loop->add_timer(std::chrono::milliseconds(ms), [&] { loop->stop(); });
    loop->run();
  }
  std::unique_ptr<Reclaim> reclaim(const KeyValues& options = {}, bool with_program = true) {
    checked.plan.balloon_policy.type = "half";
    checked.balloon_policy = half;
    checked.balloon_policy_options = OptionValues::check(checked.balloon_policy->descriptor, options).value();
    return Reclaim::create(checked, *loop, memory, guest.find(with_program)).value();
  }
  CheckedPlan checked;
};

}  // namespace

TEST_CASE("reclaim: another policy than ours decides, with its options") {
  Stage stage;
  const auto reclaim = stage.reclaim();
  REQUIRE(reclaim);
  CHECK(stage.guest.targets.empty());  // nothing before the loop runs
  stage.run(20);
  CHECK(stage.guest.targets.empty());  // active: none, as it is
  stage.guest.becomes(CLONE_ACTIVITY_IDLE);
  stage.run(300);
  CHECK(stage.guest.targets == std::vector<uint64_t>{100 * kMiB});
  stage.guest.becomes(CLONE_ACTIVITY_ACTIVE);
  stage.run(300);
  CHECK(stage.guest.state.target_bytes == 0);

  Stage other;
  const auto quarter = other.reclaim({{"percent", "25"}});
  other.guest.becomes(CLONE_ACTIVITY_IDLE);
  other.run(300);
  REQUIRE(other.guest.targets.size() == 1);
  CHECK(other.guest.targets[0] / kMiB == 50);
}

TEST_CASE("reclaim: it asks again when the policy said, with fresh numbers") {
  Stage stage;
  const auto reclaim = stage.reclaim();
  stage.guest.told.activity = CLONE_ACTIVITY_IDLE;
  stage.run(50);
  REQUIRE(stage.guest.targets.size() == 1);
  const int looks = stage.guest.looks;
  stage.guest.state.guest_available_bytes = 400 * kMiB;
  stage.run(1200);  // the policy's wake is 1 s
  REQUIRE(stage.guest.targets.size() == 2);
  CHECK(stage.guest.targets[1] / kMiB == 200);
  CHECK(stage.guest.looks >= looks + 2);  // one asks the guest, one takes its answer
}

TEST_CASE("reclaim: without a program in the guest nothing is known to be idle") {
  Stage stage;
  const auto reclaim = stage.reclaim({}, false);
  stage.run(50);
  CHECK(stage.guest.targets.empty());
  CHECK(stage.guest.looks > 0);
  Stage gone;
  const auto other = gone.reclaim();
  gone.guest.told.activity = CLONE_ACTIVITY_IDLE;
  gone.guest.told.connected = 0;
  gone.run(50);
  CHECK(gone.guest.targets.empty());
}

TEST_CASE("reclaim: a balloon that has no driver yet is looked at again") {
  Stage stage;
  stage.guest.told.activity = CLONE_ACTIVITY_IDLE;
  stage.guest.state.ready = 0;
  const auto reclaim = stage.reclaim();
  stage.run(50);
  CHECK(stage.guest.targets.empty());
  stage.guest.state.ready = 1;
  stage.run(1300);
  CHECK(stage.guest.targets.size() == 1);
}

TEST_CASE("reclaim: what the balloon's owner asked for is the least, until the guest takes it back") {
  Stage stage;
  stage.guest.state.target_bytes = 64 * kMiB;
  const auto reclaim = stage.reclaim();
  stage.run(20);
  CHECK(stage.guest.targets.empty());  // active, and 64 MiB all the same
  stage.guest.becomes(CLONE_ACTIVITY_IDLE);
  stage.run(300);
  CHECK(stage.guest.state.target_bytes > 90 * kMiB);
  stage.guest.becomes(CLONE_ACTIVITY_ACTIVE);
  stage.run(300);
  CHECK(stage.guest.state.target_bytes == 64 * kMiB);
  stage.guest.state.target_bytes = 10 * kMiB;  // out of memory
  stage.guest.becomes(CLONE_ACTIVITY_ACTIVE);
  stage.run(300);
  CHECK(stage.guest.state.target_bytes == 10 * kMiB);
}

TEST_CASE("reclaim: a guest whose activity flickers does not keep the loop busy") {
  Stage stage;
  const auto reclaim = stage.reclaim();
  stage.run(10);
  const int looks = stage.guest.looks;
  for (int i = 0; i < 1000; ++i) {
    stage.guest.becomes(i % 2 ? CLONE_ACTIVITY_ACTIVE : CLONE_ACTIVITY_IDLE);
    if (i % 100 == 0) stage.run(1);
  }
  CHECK(stage.guest.looks - looks <= 5);
  // One decision for all of them, and no more than four a second for as long as it goes on.
  const auto begun = std::chrono::steady_clock::now();
  for (int i = 0; i < 60; ++i) {
    stage.guest.becomes(i % 2 ? CLONE_ACTIVITY_ACTIVE : CLONE_ACTIVITY_IDLE);
    stage.run(10);
  }
  const auto lasted = std::chrono::steady_clock::now() - begun;
  CHECK(stage.guest.looks > looks);
  CHECK(stage.guest.looks - looks <= 2 + lasted / std::chrono::milliseconds(250));
}

TEST_CASE("reclaim: numbers from before the balloon's last change are not known") {
  Stage stage;
  static std::vector<clone_balloon_input> told;
  told.clear();
  stage.half.table.decide = [](void*, const clone_balloon_input* input, clone_balloon_output* output, clone_err*) {
    told.push_back(*input);
    *output = {sizeof *output, 0, 0};
    return CLONE_OK;
  };
  const auto available = [&] {
    told.clear();
    stage.guest.changed(stage.guest.listener);
    stage.run(300);
    REQUIRE(told.size() == 1);
    return told[0].guest_available_bytes;
  };
  stage.guest.told.available_bytes = 77 * kMiB;
  const auto reclaim = stage.reclaim();
  stage.run(50);
  REQUIRE(told.size() == 1);
  CHECK(told[0].guest_available_bytes == 200 * kMiB);
  CHECK(told[0].resident_bytes > kMiB);
  CHECK(told[0].resident_bytes < (1 << 20) * kMiB);
  // The balloon has grown since both were told; then the guest's program tells anew; then the driver.
  stage.guest.state.balloon_bytes = 100 * kMiB;
  stage.guest.state.statistics_age_ms = 10'000;
  stage.guest.told.age_ms = 10'000;
  CHECK(available() == kUnknown);
  stage.guest.told.age_ms = 0;
  CHECK(available() == 77 * kMiB);
  stage.guest.state.statistics_age_ms = 0;
  CHECK(available() == 200 * kMiB);
  // A plugin that was made before there was an age.
  stage.guest.state.balloon_bytes = 120 * kMiB;
  stage.guest.state.statistics_age_ms = kUnknown;
  CHECK(available() == 200 * kMiB);
}

TEST_CASE("reclaim: a pause is no time, and nothing happens in it") {
  Stage stage;
  static std::vector<uint64_t> times;
  times.clear();
  stage.half.table.decide = [](void*, const clone_balloon_input* input, clone_balloon_output* output, clone_err*) {
    times.push_back(input->now_ms);
    *output = {sizeof *output, 100, 0};
    return CLONE_OK;
  };
  const auto reclaim = stage.reclaim();
  stage.run(20);
  REQUIRE(times.size() == 1);
  reclaim->pause();
  const int looks = stage.guest.looks;
  stage.guest.becomes(CLONE_ACTIVITY_IDLE);
  stage.run(1000);
  CHECK(stage.guest.looks == looks);
  reclaim->resume();
  stage.run(400);
  REQUIRE(times.size() >= 2);
  CHECK(times[1] - times[0] < 900);
}

TEST_CASE("reclaim: nothing happens after its end, and nothing without a policy or a balloon") {
  Stage stage;
  auto reclaim = stage.reclaim();
  stage.guest.told.activity = CLONE_ACTIVITY_IDLE;
  reclaim.reset();
  stage.run(50);
  CHECK(stage.guest.targets.empty());
  CHECK_FALSE(Reclaim::create(CheckedPlan{}, *stage.loop, stage.memory, stage.guest.find()).value());
  CHECK_FALSE(
      Reclaim::create(stage.checked, *stage.loop, stage.memory, [](std::string_view) { return nullptr; }).value());
}

TEST_CASE("plan: the balloon policy's name and options are checked") {
  Stage stage;
  const auto mistakes = [&](PlannedDevice policy) {
    const auto checked = stage.plan(std::move(policy));
    return checked.ok() ? std::string() : checked.error().message;
  };
  CHECK(mistakes({"third", {}, {}, {}}).find("unknown balloon-policy 'third'; there are: half") != std::string::npos);
  CHECK(mistakes({"half", {{"percent", "101"}}, {}, {}}).find("balloon policy half: percent=101") != std::string::npos);
  CHECK(mistakes({"none", {{"a", "b"}}, {}, {}}).find("balloon policy none: it has no options") != std::string::npos);
  CHECK(mistakes({"half", {{"percent", "10"}}, {}, {}}).find("balloon") == std::string::npos);
  // Half is for nobody who did not ask: no default, and so none.
  CHECK(mistakes({}).find("balloon") == std::string::npos);
}
