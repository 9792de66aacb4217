// SPDX-License-Identifier: Apache-2.0
// The balloon policy "hysteresis": its options, and its state saved and loaded.
#include "clone/sdk/plugin.hpp"
#include "hysteresis.hpp"

namespace balloon_policy {
namespace {

using clone_sdk::Error;
using clone_sdk::number_option;
using clone_sdk::Options;
using clone_sdk::Result;

constexpr uint32_t kMostFlaps = 100;
constexpr uint64_t kDay = 86'400;

class Policy final : public clone_sdk::BalloonPolicy {
 public:
  using BalloonPolicy::BalloonPolicy;
  static const clone_descriptor descriptor;

  Result<void> configure(const Options& options) override {
    settings_ = settings_of(options);
    for (const auto& [earlier, later] : {std::pair("first-after", "second-after"), {"second-after", "last-after"}})
      if (options.number(earlier) > options.number(later))
        return Error{std::string(earlier) + "=" + std::to_string(options.number(earlier)) + " is later than " + later +
                     "=" + std::to_string(options.number(later))};
    if (settings_.pressure_stop_permille > settings_.pressure_high_permille)
      return Error{"pressure-stop=" + std::to_string(settings_.pressure_stop_permille) +
                   " is more than pressure-high=" + std::to_string(settings_.pressure_high_permille)};
    machine_ = Hysteresis(settings_);
    return {};
  }

  Result<clone_balloon_output> decide(const clone_balloon_input& input) override {
    if (loaded_) {
      // Times are kept as ages: another host's clock starts elsewhere.
      machine_.rebase(input.now_ms);
      loaded_ = false;
    }
    return machine_.decide(input);
  }

  Result<void> save(const clone_sdk::Writer& writer) override {
    CLONE_TRY(writer.put("hysteresis", 1, machine_.memory()));
    return writer.put_bytes("changes", 1, std::as_bytes(std::span(machine_.changes())));
  }

  Result<void> load(const clone_sdk::Reader& reader) override {
    const auto memory = CLONE_TRY(reader.get<Memory>("hysteresis", 1));
    const auto section = CLONE_TRY(reader.section("changes", 1));
    if (section.bytes.size() % sizeof(uint64_t) || section.bytes.size() > kMostFlaps * sizeof(uint64_t))
      return Error{"section changes has " + std::to_string(section.bytes.size()) + " bytes", 0, CLONE_ERR_CORRUPT};
    std::vector<uint64_t> changes(section.bytes.size() / sizeof(uint64_t));
    if (!changes.empty()) std::memcpy(changes.data(), section.bytes.data(), section.bytes.size());
    if (!machine_.restore(memory, std::move(changes)))
      return Error{"section hysteresis: a time in the future, or an unknown activity", 0, CLONE_ERR_CORRUPT};
    loaded_ = true;
    return {};
  }

 private:
  Settings settings_;
  Hysteresis machine_{settings_};
  bool loaded_ = false;
};

constexpr clone_option first_after =
    number_option("first-after", "30", "Seconds of idleness before the first share is given back.", 0, kDay);
constexpr clone_option first_share =
    number_option("first-share", "25", "The first share, per cent of what the guest can spare.", 0, 100);
constexpr clone_option second_after =
    number_option("second-after", "120", "Seconds of idleness before the second share is given back.", 0, kDay);
constexpr clone_option second_share =
    number_option("second-share", "50", "The second share, per cent of what the guest can spare.", 0, 100);
constexpr clone_option last_after =
    number_option("last-after", "300", "Seconds of idleness before all but the floor is given back.", 0, kDay);
constexpr clone_option floor_size = clone_sdk::size_option(
    "floor", "24M", "Memory that stays available to the guest beyond what it uses.", 1 << 20, 1ull << 40);
constexpr clone_option hold =
    number_option("hold", "60", "Seconds after memory went back to the guest in which none is taken.", 0, kDay);
constexpr clone_option flaps = number_option(
    "flaps", "3", "Changes between active and idle in the flap window that make the hold longer.", 1, kMostFlaps);
constexpr clone_option flap_window = number_option("flap-window", "300", "Seconds that such changes count.", 0, kDay);
constexpr clone_option flap_hold = number_option("flap-hold", "180", "Seconds of the longer hold.", 0, kDay);
constexpr clone_option pressure_stop = number_option(
    "pressure-stop", "50", "Memory pressure (PSI some, thousandths) from which no memory is taken.", 0, 1000);
constexpr clone_option pressure_high = number_option(
    "pressure-high", "200", "Memory pressure (PSI some, or twice PSI full) from which memory goes back.", 0, 2000);
constexpr clone_option pressure_release =
    number_option("pressure-release", "50", "How much then goes back at a time, per cent of the balloon.", 1, 100);
constexpr clone_option pressure_step = number_option("pressure-step", "10", "Seconds between two such times.", 1, kDay);
constexpr clone_option silence = number_option(
    "silence", "30", "Seconds without word of the guest's activity after which memory goes back, by the same steps.", 0,
    kDay);
constexpr clone_option check =
    number_option("check", "30", "Seconds after which the guest's numbers are looked at again.", 1, kDay);
constexpr clone_option stall = number_option(
    "stall", "10", "Seconds without growth after which a balloon is taken to be as large as it gets.", 1, kDay);
constexpr clone_option grain =
    clone_sdk::size_option("grain", "4M", "Changes that are smaller are not made.", 4096, 1ull << 30);
constexpr const clone_option* options[] = {
    &first_after, &first_share, &second_after, &second_share,  &last_after,    &floor_size,       &hold,
    &flaps,       &flap_window, &flap_hold,    &pressure_stop, &pressure_high, &pressure_release, &pressure_step,
    &silence,     &check,       &stall,        &grain,         nullptr};

constexpr clone_descriptor Policy::descriptor = {
    sizeof(clone_descriptor),
    CLONE_CAN_SAVE | CLONE_CAN_MIGRATE,
    "hysteresis",
    "An idle VM gives back more the longer it idles, an active one has all of its memory at once.",
    options,
    ""};

}  // namespace
}  // namespace balloon_policy

CLONE_SDK_PLUGIN("balloon-policy", "1.0.0", "clone", "Apache-2.0", "When a VM gives memory back.",
                 CLONE_PROVIDES("balloon-policy", "hysteresis", "default"))
CLONE_SDK_BALLOON_POLICIES(balloon_policy::Policy)
