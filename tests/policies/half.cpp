// SPDX-License-Identifier: Apache-2.0
// The second balloon policy: an idle guest gives back a share of what it has available, an active one nothing.
#include "clone/sdk/plugin.hpp"

namespace {

class Half final : public clone_sdk::BalloonPolicy {
 public:
  using BalloonPolicy::BalloonPolicy;
  static const clone_descriptor descriptor;

  clone_sdk::Result<void> configure(const clone_sdk::Options& options) override {
    percent_ = options.number("percent");
    return {};
  }
  clone_sdk::Result<clone_balloon_output> decide(const clone_balloon_input& input) override {
    const bool idle = input.activity == CLONE_ACTIVITY_IDLE && input.guest_available_bytes != ~uint64_t{0};
    return clone_balloon_output{sizeof(clone_balloon_output), 1000,
                                idle ? input.guest_available_bytes / 100 * percent_ : 0};
  }

 private:
  uint64_t percent_ = 50;
};

constexpr clone_option percent = clone_sdk::number_option("percent", "50", "The share.", 0, 100);
constexpr const clone_option* options[] = {&percent, nullptr};
constexpr clone_descriptor Half::descriptor = {
    sizeof(clone_descriptor), CLONE_CAN_SAVE | CLONE_CAN_MIGRATE, "half", "Half of what is available.", options, ""};

}  // namespace

CLONE_SDK_PLUGIN("half", "1.0.0", "the tests", "Apache-2.0", "A trivial balloon policy.",
                 CLONE_PROVIDES("balloon-policy", "half", ""))
CLONE_SDK_BALLOON_POLICIES(Half)
