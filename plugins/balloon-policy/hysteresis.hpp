// SPDX-License-Identifier: Apache-2.0
// When a VM gives back memory, and when it has it again: a state machine that is told the time.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "clone/abi/balloon_policy.h"
#include "clone/sdk/options.hpp"

namespace balloon_policy {

constexpr uint64_t kUnknown = ~uint64_t{0};

struct Settings {
  // Idle for so long, the VM gives back this share of what it could; from the last stage on all but `floor_bytes`.
  struct Stage {
    uint64_t after_ms;
    uint32_t percent;
  };
  std::array<Stage, 3> stages = {{{30'000, 25}, {120'000, 50}, {300'000, 100}}};
  uint64_t floor_bytes = 24ull << 20;  // available to the guest beyond what it uses, always
  uint64_t hold_ms = 60'000;           // no inflation after a deflation
  // So many changes between active and idle in the window: the hold is longer.
  uint32_t flaps = 3;
  uint64_t flap_window_ms = 300'000;
  uint64_t flap_hold_ms = 180'000;
  // Memory pressure in the guest (PSI), in thousandths of the time.
  uint32_t pressure_stop_permille = 50;    // some: no inflation
  uint32_t pressure_high_permille = 200;   // some, or half of it full: deflation, by steps
  uint32_t pressure_release_percent = 50;  // of the balloon, a step
  uint64_t pressure_step_ms = 10'000;      // between two steps: PSI is an average over 10 s
  uint64_t silence_ms = 30'000;            // activity not known for so long: deflation, by the same steps
  uint64_t check_ms = 30'000;              // how often a settled balloon is looked at
  uint64_t stall_ms = 10'000;              // a balloon that does not grow for so long gets no further
  uint64_t grain_bytes = 4ull << 20;       // smaller changes are not worth it
};

Settings settings_of(const clone_sdk::Options& options);

// Everything that is remembered between two decisions.
struct Memory {
  uint64_t now_ms = 0;
  uint64_t target_bytes = 0;
  uint64_t balloon_bytes = 0;                  // at the decision before
  uint64_t balloon_changed_ms = 0;             // when it was another than the one before
  uint64_t idle_since_ms = kUnknown;           // kUnknown: not idle
  uint64_t deflated_ms = kUnknown;             // kUnknown: never
  uint64_t released_ms = kUnknown;             // the last step because of pressure
  uint32_t activity = CLONE_ACTIVITY_UNKNOWN;  // the last known one
  uint32_t decided = 0;                        // 1 after the first decision
};

class Hysteresis {
 public:
  explicit Hysteresis(const Settings& settings) : settings_(settings) {}

  clone_balloon_output decide(const clone_balloon_input& input);

  // The state, to be saved and restored; false, and nothing done, when it makes no sense.
  const Memory& memory() const { return memory_; }
  const std::vector<uint64_t>& changes() const { return changes_; }
  [[nodiscard]] bool restore(const Memory& memory, std::vector<uint64_t> changes);
  // From now on time is told by another clock, which stands at `now_ms`: what happened is as long ago as it was.
  void rebase(uint64_t now_ms);

 private:
  void note_activity(uint32_t activity);
  void note_balloon(uint64_t balloon_bytes);
  void deflate_to(uint64_t bytes);
  // The guest has not given all that it was asked for.
  bool is_growing() const;
  bool is_holding() const { return now() < hold_end(); }
  uint64_t hold_end() const;
  uint64_t now() const { return memory_.now_ms; }
  uint64_t idle_ms() const;
  bool is_silent() const;
  uint32_t percent() const;
  uint32_t wake_ms() const;

  Settings settings_;
  Memory memory_;
  // kUnknown: activity is known. Not saved: after a restore the guest's program has its time anew to be there again.
  uint64_t silent_since_ms_ = kUnknown;
  std::vector<uint64_t> changes_;  // when activity changed, the last `flaps` times
};

}  // namespace balloon_policy
