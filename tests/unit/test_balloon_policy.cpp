// SPDX-License-Identifier: Apache-2.0
// The hysteresis: each transition, driven by hand through the plugin's table and its state machine.
#include <doctest/doctest.h>

#include <cstring>

#include "balloon-policy/hysteresis.hpp"
#include "fake_host.hpp"
#include "fake_plugin.hpp"
#include "plugin/library.hpp"
#include "plugin/options.hpp"

using namespace vmm;
using namespace vmm::test;
using balloon_policy::Hysteresis;
using balloon_policy::Settings;

namespace {

constexpr uint64_t kMiB = 1 << 20;
constexpr uint64_t kUnknown = ~uint64_t{0};
constexpr uint32_t kIdle = CLONE_ACTIVITY_IDLE, kActive = CLONE_ACTIVITY_ACTIVE, kNobody = CLONE_ACTIVITY_UNKNOWN;

// A VM of 1024 MiB whose guest has 824 MiB available and follows at once: 800 MiB are to spare.
struct Vm {
  Settings settings;
  Hysteresis policy{settings};
  uint64_t balloon_bytes = 0;
  uint64_t spare_bytes = 824 * kMiB;
  uint32_t some = 0, full = 0;
  uint32_t wake_ms = 0;
  bool follows = true;

  Vm() = default;
  explicit Vm(const Settings& given) : settings(given), policy(given) {}

  clone_balloon_input input(uint64_t seconds, uint32_t activity) const {
    return {sizeof(clone_balloon_input),
            activity,
            seconds * 1000,
            1024 * kMiB,
            900 * kMiB,
            spare_bytes > balloon_bytes ? spare_bytes - balloon_bytes : 0,
            kUnknown,
            balloon_bytes,
            some,
            full};
  }
  // The target in MiB.
  uint64_t at(uint64_t seconds, uint32_t activity) {
    const clone_balloon_output output = policy.decide(input(seconds, activity));
    wake_ms = output.wake_ms;
    if (follows) balloon_bytes = output.target_bytes;
    return output.target_bytes / kMiB;
  }
};

}  // namespace

TEST_CASE("policy: the longer a VM idles, the more it gives back; active, it has all at once") {
  Vm vm;
  CHECK(vm.at(1000, kIdle) == 0);
  CHECK(vm.wake_ms == 30'000);
  CHECK(vm.at(1029, kIdle) == 0);
  CHECK(vm.wake_ms == 1000);
  CHECK(vm.at(1030, kIdle) == 200);  // 25 % of 800
  CHECK(vm.wake_ms == 2000);         // has it grown?
  CHECK(vm.at(1040, kIdle) == 200);
  CHECK(vm.wake_ms == 30'000);
  CHECK(vm.at(1119, kIdle) == 200);
  CHECK(vm.wake_ms == 1000);
  CHECK(vm.at(1120, kIdle) == 400);
  CHECK(vm.at(1299, kIdle) == 400);
  CHECK(vm.at(1300, kIdle) == 800);  // 24 MiB stay
  CHECK(vm.at(5000, kIdle) == 800);
  CHECK(vm.wake_ms == 30'000);
  CHECK(vm.at(5001, kActive) == 0);
  CHECK(vm.wake_ms == 0);
  CHECK(vm.at(9000, kActive) == 0);
}

TEST_CASE("policy: a VM that was idle for long before anybody asked starts at its first report") {
  Vm vm;
  CHECK(vm.at(100'000, kIdle) == 0);
  CHECK(vm.at(100'400, kIdle) == 800);
}

TEST_CASE("policy: no inflation for a while after memory went back") {
  Vm vm;
  vm.at(0, kIdle);
  CHECK(vm.at(300, kIdle) == 800);
  CHECK(vm.at(310, kActive) == 0);
  vm.at(311, kIdle);
  CHECK(vm.wake_ms == 30'000);
  CHECK(vm.at(341, kIdle) == 0);  // idle for 30 s, but 31 s after the deflation
  CHECK(vm.wake_ms == 29'000);    // the hold ends
  CHECK(vm.at(369, kIdle) == 0);
  CHECK(vm.at(370, kIdle) == 200);
}

TEST_CASE("policy: active without memory to get back begins no hold") {
  Vm vm;
  vm.at(0, kActive);
  vm.at(10, kIdle);
  CHECK(vm.at(40, kIdle) == 200);
}

TEST_CASE("policy: a VM that changes often waits longer") {
  Vm vm;
  vm.at(0, kIdle);
  CHECK(vm.at(30, kIdle) == 200);
  vm.at(31, kActive);  // deflation, change 1
  vm.at(32, kIdle);    // 2
  vm.at(33, kActive);  // 3
  vm.at(34, kIdle);    // 4
  CHECK(vm.at(100, kIdle) == 0);
  CHECK(vm.at(210, kIdle) == 0);
  CHECK(vm.at(211, kIdle) == 400);  // 180 s after 31, idle for more than 2 minutes

  // Two changes are not three.
  Vm calm;
  calm.at(0, kIdle);
  calm.at(30, kIdle);
  calm.at(31, kActive);
  calm.at(32, kIdle);
  CHECK(calm.at(90, kIdle) == 0);
  CHECK(calm.at(91, kIdle) == 200);

  // Three, of which the first is older than five minutes.
  Vm slow;
  slow.at(0, kActive);
  slow.at(1, kIdle);  // 1
  CHECK(slow.at(290, kIdle) == 400);
  slow.at(291, kActive);  // 2: deflation
  slow.at(292, kIdle);    // 3
  CHECK(slow.at(351, kIdle) == 200);
}

TEST_CASE("policy: pressure stops inflation, and undoes it when it is high") {
  Vm vm;
  vm.some = 50;
  vm.at(0, kIdle);
  CHECK(vm.at(40, kIdle) == 0);
  CHECK(vm.wake_ms == 30'000);
  vm.some = 49;
  CHECK(vm.at(41, kIdle) == 200);
  vm.some = 199;
  CHECK(vm.at(42, kIdle) == 200);
  CHECK(vm.at(150, kIdle) == 200);  // the second stage is not taken
  vm.some = 200;
  CHECK(vm.at(151, kIdle) == 100);
  CHECK(vm.wake_ms == 10'000);
  CHECK(vm.at(152, kIdle) == 100);  // one step in 10 s
  CHECK(vm.at(161, kIdle) == 50);
  vm.some = 0;
  CHECK(vm.at(162, kIdle) == 50);
  CHECK(vm.at(220, kIdle) == 50);  // the hold counts from the last step
  CHECK(vm.at(221, kIdle) == 400);
  vm.full = 100;  // half of it full is as bad
  CHECK(vm.at(230, kIdle) == 200);
  for (uint64_t seconds = 240; seconds < 400; seconds += 10) vm.at(seconds, kIdle);
  CHECK(vm.at(400, kIdle) == 0);
  // Not known is no pressure.
  Vm unknown;
  unknown.some = unknown.full = ~0u;
  unknown.at(0, kIdle);
  CHECK(unknown.at(30, kIdle) == 200);
}

TEST_CASE("policy: pressure and silence stop a balloon that grows where it is") {
  for (const uint32_t some : {50u, 200u}) {
    Vm vm;
    vm.follows = false;
    vm.at(0, kIdle);
    CHECK(vm.at(300, kIdle) == 800);
    vm.balloon_bytes = 100 * kMiB;
    vm.some = some;
    CHECK(vm.at(302, kIdle) == (some == 50 ? 100 : 50));  // high pressure gives half of it back
    vm.some = 0;
    CHECK(vm.at(304, kIdle) <= 100);  // and a hold begins
  }
  Vm silent;
  silent.follows = false;
  silent.at(0, kIdle);
  CHECK(silent.at(300, kIdle) == 800);
  silent.at(301, kNobody);
  for (uint64_t seconds = 302; seconds < 331; ++seconds) {
    silent.balloon_bytes = (seconds - 300) * 8 * kMiB;
    silent.at(seconds, kNobody);
  }
  CHECK(silent.at(331, kNobody) == 119);  // half of 240, rounded down
}

TEST_CASE("policy: what the guest needs later comes back without waiting") {
  Vm vm;
  vm.at(0, kIdle);
  CHECK(vm.at(300, kIdle) == 800);
  vm.spare_bytes -= 100 * kMiB;  // 76 MiB more than there is: nothing is left available
  vm.follows = false;
  CHECK(vm.at(301, kIdle) == 776);  // all that is known is that none is available: the floor first
  vm.follows = true;
  vm.balloon_bytes = 776 * kMiB;
  vm.spare_bytes = 700 * kMiB + 24 * kMiB;
  vm.at(302, kIdle);
  CHECK(vm.at(361, kIdle) <= 776);
}

TEST_CASE("policy: small changes are not made") {
  Vm vm;
  vm.at(0, kIdle);
  CHECK(vm.at(300, kIdle) == 800);
  vm.spare_bytes += 3 * kMiB;
  CHECK(vm.at(330, kIdle) == 800);
  vm.spare_bytes += 2 * kMiB;
  CHECK(vm.at(360, kIdle) == 804);
  vm.spare_bytes -= 3 * kMiB;
  CHECK(vm.at(390, kIdle) == 804);
}

TEST_CASE("policy: the next step waits until the guest has done the last one") {
  Vm vm;
  vm.follows = false;
  vm.at(0, kIdle);
  CHECK(vm.at(30, kIdle) == 200);
  vm.balloon_bytes = 100 * kMiB;
  CHECK(vm.at(120, kIdle) == 200);
  vm.balloon_bytes = 200 * kMiB;
  CHECK(vm.at(121, kIdle) == 400);
  CHECK(vm.wake_ms == 2000);
  // It gets no further: that is the target, and it is left in peace for a while.
  vm.balloon_bytes = 250 * kMiB;
  CHECK(vm.at(125, kIdle) == 400);
  CHECK(vm.at(134, kIdle) == 400);
  CHECK(vm.at(135, kIdle) == 250);
  CHECK(vm.at(194, kIdle) == 250);
  CHECK(vm.at(195, kIdle) == 400);
}

TEST_CASE("policy: memory that the guest took back itself is its own for a while") {
  Vm vm;
  vm.at(0, kIdle);
  CHECK(vm.at(30, kIdle) == 200);
  CHECK(vm.at(35, kIdle) == 200);
  vm.balloon_bytes = 120 * kMiB;
  vm.follows = false;
  CHECK(vm.at(40, kIdle) == 120);
  CHECK(vm.at(99, kIdle) == 120);
  CHECK(vm.at(100, kIdle) == 200);
}

TEST_CASE("policy: what is not known changes nothing") {
  Vm vm;
  CHECK(vm.at(0, kNobody) == 0);
  CHECK(vm.wake_ms == 0);
  CHECK(vm.at(1000, kNobody) == 0);
  vm.at(2000, kIdle);
  CHECK(vm.at(2030, kIdle) == 200);
  CHECK(vm.at(2040, kNobody) == 200);  // the program in the guest is gone
  CHECK(vm.at(2069, kNobody) == 200);
  vm.at(2070, kIdle);  // idle from now on
  CHECK(vm.at(2099, kIdle) == 200);
  CHECK(vm.at(2190, kIdle) == 400);
  CHECK(vm.at(2191, 77) == 400);  // an activity that nobody knows
  CHECK(vm.at(2192, kActive) == 0);

  // No numbers: nothing is taken. Then free memory alone.
  Hysteresis blind{Settings{}};
  clone_balloon_input input;
  std::memset(&input, 0xff, sizeof input);
  input.activity = kIdle;
  input.now_ms = 0;
  blind.decide(input);
  input.now_ms = 500'000;
  CHECK(blind.decide(input).target_bytes == 0);
  input.memory_bytes = 1024 * kMiB;
  CHECK(blind.decide(input).target_bytes == 0);
  input.guest_free_bytes = 124 * kMiB;
  CHECK(blind.decide(input).target_bytes / kMiB == 100);
  input.guest_free_bytes = 0;
  CHECK(blind.decide(input).target_bytes <= 100 * kMiB);
  input.guest_free_bytes = kUnknown - 1;
  input.now_ms = 900'000;
  CHECK(blind.decide(input).target_bytes <= 1024 * kMiB);
}

TEST_CASE("policy: a guest of which nothing is heard any more gets its memory back, by steps") {
  Vm vm;
  vm.at(0, kIdle);
  CHECK(vm.at(300, kIdle) == 800);
  CHECK(vm.at(310, kNobody) == 800);
  CHECK(vm.wake_ms == 30'000);
  CHECK(vm.at(315, 77) == 800);  // an activity that nobody knows
  CHECK(vm.wake_ms == 25'000);
  CHECK(vm.at(339, kNobody) == 800);
  CHECK(vm.at(340, kNobody) == 400);
  CHECK(vm.wake_ms == 10'000);
  CHECK(vm.at(349, kNobody) == 400);
  CHECK(vm.at(350, kNobody) == 200);
  for (uint64_t seconds = 360; seconds <= 410; seconds += 10) vm.at(seconds, kNobody);
  CHECK(vm.at(410, kNobody) == 0);
  CHECK(vm.wake_ms == 0);
  // Heard again, it is treated as ever.
  vm.at(500, kIdle);
  CHECK(vm.at(530, kIdle) == 200);
  // The silence is counted from its own beginning.
  CHECK(vm.at(531, kNobody) == 200);
  CHECK(vm.at(550, kIdle) == 200);
  CHECK(vm.at(551, kNobody) == 200);
  CHECK(vm.at(580, kNobody) == 200);
  CHECK(vm.at(581, kNobody) == 100);

  Settings settings;
  settings.silence_ms = 5000;
  Vm hasty(settings);
  hasty.at(0, kIdle);
  CHECK(hasty.at(300, kIdle) == 800);
  hasty.at(301, kNobody);
  CHECK(hasty.wake_ms == 5000);
  // A restore gives the guest's program the time to be there again.
  Vm restored(settings);
  REQUIRE(restored.policy.restore(hasty.policy.memory(), hasty.policy.changes()));
  restored.balloon_bytes = 800 * kMiB;
  CHECK(restored.at(306, kNobody) == 800);
  CHECK(restored.at(310, kNobody) == 800);
  CHECK(restored.at(311, kNobody) == 400);
  CHECK(hasty.at(306, kNobody) == 400);
}

TEST_CASE("policy: a guest with no more than the floor gives nothing") {
  Vm vm;
  vm.spare_bytes = 24 * kMiB;
  vm.at(0, kIdle);
  CHECK(vm.at(600, kIdle) == 0);
  vm.spare_bytes = 0;
  CHECK(vm.at(700, kIdle) == 0);
  Settings settings;
  settings.floor_bytes = 424 * kMiB;
  Vm roomy(settings);
  roomy.at(0, kIdle);
  CHECK(roomy.at(300, kIdle) == 400);
}

TEST_CASE("policy: time that stands still, jumps, or runs backwards") {
  Vm vm;
  for (int i = 0; i < 10; ++i) CHECK(vm.at(500, kIdle) == 0);
  for (int i = 0; i < 10; ++i) CHECK(vm.at(530, kIdle) == 200);
  CHECK(vm.at(100, kIdle) == 200);  // as if at 530
  CHECK(vm.at(620, kIdle) == 400);
  for (int i = 0; i < 10; ++i) vm.at(620, i % 2 ? kIdle : kActive);
  CHECK(vm.at(620, kIdle) == 0);
  CHECK(vm.at(kUnknown / 1000, kIdle) == 800);
  CHECK(vm.at(0, kActive) == 0);
}

TEST_CASE("policy: state goes on under another clock") {
  Vm vm;
  vm.at(1'000'000, kIdle);
  CHECK(vm.at(1'000'030, kIdle) == 200);
  vm.at(1'000'031, kActive);
  vm.at(1'000'032, kIdle);
  Vm other;
  REQUIRE(other.policy.restore(vm.policy.memory(), vm.policy.changes()));
  other.policy.rebase(500'000);  // 500 s here are 1'000'032 s there
  CHECK(other.at(558, kIdle) == 0);
  CHECK(other.at(559, kIdle) == 200);
  // A clock that is younger than what happened.
  REQUIRE(other.policy.restore(vm.policy.memory(), vm.policy.changes()));
  other.balloon_bytes = 0;
  other.policy.rebase(0);
  CHECK(other.at(60, kIdle) == 200);
  balloon_policy::Memory future = vm.policy.memory();
  future.deflated_ms = future.now_ms + 1;
  CHECK_FALSE(other.policy.restore(future, {}));
  CHECK_FALSE(other.policy.restore(vm.policy.memory(), {5, 3}));
  CHECK_FALSE(other.policy.restore(vm.policy.memory(), {vm.policy.memory().now_ms + 1}));
}

TEST_CASE("policy: the plugin's options, states and mistakes") {
  const auto catalogue = Catalogue::scan({CLONE_TEST_PLUGIN_DIR}, PluginTrust::any);
  REQUIRE(catalogue.ok());
  PluginLibrary library(*catalogue);
  const auto type = library.balloon_policy("hysteresis");
  REQUIRE_MESSAGE(type.ok(), (type.ok() ? "" : type.error().message));
  FakeHost host;
  clone_err err{sizeof err, 0, {}};
  const auto create = [&](const KeyValues& given) {
    void* policy = nullptr;
    const auto values = OptionValues::check(type->descriptor, given).value();
    type->table.create(host.handle("policy"), &values.raw(), &policy, &err);
    return policy;
  };
  CHECK(create({{"first-after", "200"}}) == nullptr);
  CHECK(std::string(err.message) == "first-after=200 is later than second-after=120");
  CHECK(create({{"pressure-stop", "300"}}) == nullptr);
  CHECK(std::string(err.message) == "pressure-stop=300 is more than pressure-high=200");
  CHECK(create({{"last-after", "60"}}) == nullptr);

  Vm vm;
  const auto decide = [&](void* policy, uint64_t seconds, uint32_t activity) {
    const clone_balloon_input input = vm.input(seconds, activity);
    clone_balloon_output output{sizeof output, 0, 0};
    REQUIRE(type->table.decide(policy, &input, &output, &err) == CLONE_OK);
    return output.target_bytes / kMiB;
  };
  // Each option reaches its own number.
  const KeyValues all = {{"first-after", "1"},      {"first-share", "2"},    {"second-after", "3"},
                         {"second-share", "4"},     {"last-after", "5"},     {"floor", "6M"},
                         {"hold", "7"},             {"flaps", "8"},          {"flap-window", "9"},
                         {"flap-hold", "10"},       {"pressure-stop", "11"}, {"pressure-high", "12"},
                         {"pressure-release", "13"}, {"pressure-step", "14"}, {"silence", "15"},
                         {"check", "16"},           {"stall", "17"},         {"grain", "18K"}};
  size_t options = 0;
  while (type->descriptor.options[options]) ++options;
  CHECK(options == all.size());
  const auto values = OptionValues::check(type->descriptor, all).value();
  const Settings told = balloon_policy::settings_of(clone_sdk::Options(values.raw()));
  CHECK(told.stages[0].after_ms == 1000);
  CHECK(told.stages[0].percent == 2);
  CHECK(told.stages[1].after_ms == 3000);
  CHECK(told.stages[1].percent == 4);
  CHECK(told.stages[2].after_ms == 5000);
  CHECK(told.stages[2].percent == 100);
  CHECK(told.floor_bytes == 6 * kMiB);
  CHECK(told.hold_ms == 7000);
  CHECK(told.flaps == 8);
  CHECK(told.flap_window_ms == 9000);
  CHECK(told.flap_hold_ms == 10'000);
  CHECK(told.pressure_stop_permille == 11);
  CHECK(told.pressure_high_permille == 12);
  CHECK(told.pressure_release_percent == 13);
  CHECK(told.pressure_step_ms == 14'000);
  CHECK(told.silence_ms == 15'000);
  CHECK(told.check_ms == 16'000);
  CHECK(told.stall_ms == 17'000);
  CHECK(told.grain_bytes == 18 << 10);

  void* policy = create({{"first-after", "2"},
                         {"first-share", "10"},
                         {"second-after", "4"},
                         {"second-share", "20"},
                         {"last-after", "6"},
                         {"floor", "124M"},
                         {"hold", "3"},
                         {"silence", "7"}});
  REQUIRE(policy);
  decide(policy, 0, kIdle);
  CHECK(decide(policy, 1, kIdle) == 0);
  CHECK(decide(policy, 2, kIdle) == 70);
  vm.balloon_bytes = 70 * kMiB;
  CHECK(decide(policy, 4, kIdle) == 140);
  SavedState state;
  const clone_writer writer = state.writer();
  REQUIRE(type->table.save(policy, &writer, &err) == CLONE_OK);
  void* second = create({});
  const clone_reader reader = state.reader();
  REQUIRE(type->table.load(second, &reader, &err) == CLONE_OK);
  vm.balloon_bytes = 140 * kMiB;
  CHECK(decide(second, 100'000, kIdle) == 140);
  CHECK(decide(second, 100'001, kActive) == 0);
  state.sections.at("changes").bytes.resize(5);
  CHECK(type->table.load(second, &reader, &err) == CLONE_ERR_CORRUPT);
  state.sections.erase("hysteresis");
  CHECK(type->table.load(second, &reader, &err) == CLONE_ERR_CORRUPT);
  // A host that knows less of a VM than this interface: the rest is not known.
  clone_balloon_input short_input = vm.input(200'000, kIdle);
  short_input.size = offsetof(clone_balloon_input, guest_available_bytes);
  clone_balloon_output output{sizeof output, 0, 0};
  CHECK(type->table.decide(second, &short_input, &output, &err) == CLONE_OK);
  CHECK(output.target_bytes == 0);
  decide(policy, 5, kNobody);
  CHECK(decide(policy, 11, kNobody) == 140);
  CHECK(decide(policy, 12, kNobody) == 69);  // half, rounded down
  type->table.destroy(policy);
  type->table.destroy(second);
}
