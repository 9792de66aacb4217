// SPDX-License-Identifier: Apache-2.0
// The rules, in the order in which they count: activity, pressure, silence, then what an idle guest can spare.
#include "hysteresis.hpp"

#include <algorithm>

namespace balloon_policy {
namespace {

// Of times: far enough is never.
uint64_t add(uint64_t a, uint64_t b) { return a > kUnknown - b ? kUnknown : a + b; }

// How often a balloon that grows is looked at: as often as the guest's program reports pressure.
constexpr uint64_t kGrowthMs = 2000;

bool at_least(uint32_t permille, uint32_t limit) { return permille != ~0u && permille >= limit; }

// What the guest could give, balloon and all. Unknown when the guest does not tell.
uint64_t spare_bytes(const clone_balloon_input& input, uint64_t balloon_bytes, uint64_t floor_bytes) {
  uint64_t available = input.guest_available_bytes;
  if (available == kUnknown) available = input.guest_free_bytes;
  if (available == kUnknown || input.memory_bytes == kUnknown) return kUnknown;
  const uint64_t sum = add(std::min(balloon_bytes, input.memory_bytes), available);
  return std::min(sum > floor_bytes ? sum - floor_bytes : 0, input.memory_bytes);
}

}  // namespace

Settings settings_of(const clone_sdk::Options& options) {
  Settings settings;
  const auto seconds = [&](const char* name) { return options.number(name) * 1000; };
  const auto number = [&](const char* name) { return static_cast<uint32_t>(options.number(name)); };
  settings.stages = {{{seconds("first-after"), number("first-share")},
                      {seconds("second-after"), number("second-share")},
                      {seconds("last-after"), 100}}};
  settings.floor_bytes = options.number("floor");
  settings.hold_ms = seconds("hold");
  settings.flaps = number("flaps");
  settings.flap_window_ms = seconds("flap-window");
  settings.flap_hold_ms = seconds("flap-hold");
  settings.pressure_stop_permille = number("pressure-stop");
  settings.pressure_high_permille = number("pressure-high");
  settings.pressure_release_percent = number("pressure-release");
  settings.pressure_step_ms = seconds("pressure-step");
  settings.silence_ms = seconds("silence");
  settings.check_ms = seconds("check");
  settings.stall_ms = seconds("stall");
  settings.grain_bytes = options.number("grain");
  return settings;
}

bool Hysteresis::restore(const Memory& memory, std::vector<uint64_t> changes) {
  const auto past = [&](uint64_t time_ms) { return time_ms <= memory.now_ms; };
  for (const uint64_t time_ms : {memory.idle_since_ms, memory.deflated_ms, memory.released_ms})
    if (time_ms != kUnknown && !past(time_ms)) return false;
  if (!past(memory.balloon_changed_ms) || !std::all_of(changes.begin(), changes.end(), past) ||
      !std::is_sorted(changes.begin(), changes.end()) || memory.activity > CLONE_ACTIVITY_ACTIVE || memory.decided > 1)
    return false;
  memory_ = memory;
  silent_since_ms_ = kUnknown;
  if (changes.size() > settings_.flaps) changes.erase(changes.begin(), changes.end() - settings_.flaps);
  changes_ = std::move(changes);
  return true;
}

void Hysteresis::rebase(uint64_t now_ms) {
  const auto shift = [&](uint64_t& time_ms) {
    if (time_ms != kUnknown) time_ms = now_ms - std::min(now_ms, memory_.now_ms - time_ms);
  };
  for (uint64_t* time_ms :
       {&memory_.balloon_changed_ms, &memory_.idle_since_ms, &memory_.deflated_ms, &memory_.released_ms})
    shift(*time_ms);
  shift(silent_since_ms_);
  std::for_each(changes_.begin(), changes_.end(), shift);
  memory_.now_ms = now_ms;
}

uint64_t Hysteresis::idle_ms() const { return memory_.idle_since_ms == kUnknown ? 0 : now() - memory_.idle_since_ms; }

bool Hysteresis::is_silent() const {
  return silent_since_ms_ != kUnknown && now() - silent_since_ms_ >= settings_.silence_ms;
}

// The share of the stage that has been reached; 0 before the first one.
uint32_t Hysteresis::percent() const {
  uint32_t percent = 0;
  if (memory_.idle_since_ms == kUnknown) return 0;
  for (const Settings::Stage& stage : settings_.stages)
    if (idle_ms() >= stage.after_ms) percent = std::max(percent, stage.percent);
  return percent;
}

uint64_t Hysteresis::hold_end() const {
  if (memory_.deflated_ms == kUnknown) return 0;
  const auto recent = std::count_if(changes_.begin(), changes_.end(),
                                    [&](uint64_t at) { return now() - at < settings_.flap_window_ms; });
  const bool flapping = static_cast<uint64_t>(recent) >= settings_.flaps;
  return add(memory_.deflated_ms, flapping ? settings_.flap_hold_ms : settings_.hold_ms);
}

bool Hysteresis::is_growing() const {
  return add(memory_.balloon_bytes, settings_.grain_bytes) <= memory_.target_bytes;
}

void Hysteresis::deflate_to(uint64_t bytes) {
  if (bytes >= memory_.target_bytes) return;
  memory_.target_bytes = bytes;
  memory_.deflated_ms = now();
}

void Hysteresis::note_activity(uint32_t activity) {
  if (activity == CLONE_ACTIVITY_UNKNOWN || activity > CLONE_ACTIVITY_ACTIVE) {
    // What is not known to be idle is not taken from.
    memory_.idle_since_ms = kUnknown;
    if (silent_since_ms_ == kUnknown) silent_since_ms_ = now();
    return;
  }
  silent_since_ms_ = kUnknown;
  if (memory_.activity != CLONE_ACTIVITY_UNKNOWN && memory_.activity != activity) {
    if (changes_.size() >= settings_.flaps) changes_.erase(changes_.begin());
    changes_.push_back(now());
  }
  memory_.activity = activity;
  if (activity == CLONE_ACTIVITY_ACTIVE)
    memory_.idle_since_ms = kUnknown;
  else if (memory_.idle_since_ms == kUnknown)
    memory_.idle_since_ms = now();
}

void Hysteresis::note_balloon(uint64_t balloon_bytes) {
  const uint64_t before = memory_.balloon_bytes;
  memory_.balloon_bytes = balloon_bytes;
  if (balloon_bytes != before || !memory_.decided) memory_.balloon_changed_ms = now();
  // The guest took some back that it was not given (out of memory), or cannot give what it was asked for.
  const bool taken_back = balloon_bytes < before && before <= memory_.target_bytes;
  const bool stalled =
      balloon_bytes == before && now() - memory_.balloon_changed_ms >= settings_.stall_ms && is_growing();
  if (memory_.decided && (taken_back || stalled)) deflate_to(balloon_bytes);
}

clone_balloon_output Hysteresis::decide(const clone_balloon_input& input) {
  memory_.now_ms = memory_.decided ? std::max(memory_.now_ms, input.now_ms) : input.now_ms;
  note_activity(input.activity);
  const uint64_t balloon_bytes = input.balloon_bytes == kUnknown ? memory_.target_bytes : input.balloon_bytes;
  note_balloon(balloon_bytes);
  memory_.decided = 1;

  const bool pressed_hard = at_least(input.pressure_some_permille, settings_.pressure_high_permille) ||
                            at_least(input.pressure_full_permille, (settings_.pressure_high_permille + 1) / 2);
  const bool pressed = pressed_hard || at_least(input.pressure_some_permille, settings_.pressure_stop_permille);
  // What is still under way goes no further.
  if ((pressed || is_silent()) && is_growing()) deflate_to(balloon_bytes);
  if (input.activity == CLONE_ACTIVITY_ACTIVE) {
    deflate_to(0);
  } else if (pressed_hard || is_silent()) {
    if (memory_.target_bytes &&
        (memory_.released_ms == kUnknown || now() - memory_.released_ms >= settings_.pressure_step_ms)) {
      const uint64_t kept_bytes = memory_.target_bytes / 100 * (100 - settings_.pressure_release_percent);
      deflate_to(kept_bytes < settings_.grain_bytes ? 0 : kept_bytes);
      memory_.released_ms = now();
    }
  } else if (const uint64_t spare = spare_bytes(input, balloon_bytes, settings_.floor_bytes); spare != kUnknown) {
    const uint64_t wanted = spare / 100 * percent();
    // What the guest has left falls below the floor: it needs some again, at any stage.
    if (add(spare, settings_.grain_bytes) <= memory_.target_bytes) deflate_to(spare);
    // The next step when the last one is done: until then, the guest's numbers are of the time before.
    if (!is_growing() && !pressed && !is_holding() && wanted >= add(memory_.target_bytes, settings_.grain_bytes)) {
      memory_.target_bytes = wanted;
      memory_.balloon_changed_ms = now();
    }
  }
  return {sizeof(clone_balloon_output), wake_ms(), std::min(memory_.target_bytes, input.memory_bytes)};
}

// The next moment at which time alone can change the answer, or the guest's numbers are worth a look.
uint32_t Hysteresis::wake_ms() const {
  uint64_t next = kUnknown;
  const auto at = [&](uint64_t time_ms) {
    if (time_ms > now()) next = std::min(next, time_ms - now());
  };
  if (memory_.idle_since_ms != kUnknown) {
    for (const Settings::Stage& stage : settings_.stages) at(add(memory_.idle_since_ms, stage.after_ms));
    at(hold_end());
  }
  if (memory_.target_bytes || percent()) at(add(now(), settings_.check_ms));
  if (memory_.target_bytes) {
    if (is_growing()) at(add(now(), std::min(settings_.stall_ms, kGrowthMs)));
    if (silent_since_ms_ != kUnknown) at(add(silent_since_ms_, settings_.silence_ms));
    if (memory_.released_ms != kUnknown) at(add(memory_.released_ms, settings_.pressure_step_ms));
  }
  return next == kUnknown ? 0 : static_cast<uint32_t>(std::min<uint64_t>(next, 24 * 3'600'000));
}

}  // namespace balloon_policy
