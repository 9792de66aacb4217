// SPDX-License-Identifier: Apache-2.0
// What the policy is told, when it is asked, and what becomes of its answer.
#include "vm/reclaim.hpp"

#include <algorithm>
#include <cstring>

#include "clone/sdk/error.hpp"
#include "memory/usage.hpp"
#include "plugin/crash_report.hpp"
#include "util/log.hpp"

namespace vmm {
namespace {

constexpr uint64_t kUnknown = ~uint64_t{0};
// How long a guest may take to answer with the numbers that a look at the balloon asked for.
constexpr uint64_t kAnswerMs = 100;
// A guest whose activity flickers does not keep the main loop busy.
constexpr uint64_t kLeastBetweenMs = 250;
constexpr uint64_t kFirstAbsentMs = 1000;
constexpr uint64_t kMostAbsentMs = 60'000;

uint64_t monotonic_ms() {
  using namespace std::chrono;
  return static_cast<uint64_t>(duration_cast<milliseconds>(steady_clock::now().time_since_epoch()).count());
}

}  // namespace

// One call into the policy: its error gets its name, a crash in it is reported under that name.
template <typename Call>
Result<void> Reclaim::call(const char* phase, Call&& body) {
  const std::string name = "balloon policy " + std::string(type_.descriptor.name);
  const CrashReport crash(name, phase);
  clone_sdk::ErrorBuffer error;
  try {
    return error.result(body(static_cast<clone_err*>(error))).context(name);
  } catch (...) {
    return Error{name + ": threw an exception " + phase, 0, CLONE_ERR_INTERNAL};
  }
}

Result<std::unique_ptr<Reclaim>> Reclaim::create(const CheckedPlan& plan, EventLoop& main_loop,
                                                 const GuestMemory& memory, const FindPublished& find) {
  const auto* balloon = static_cast<const clone_balloon*>(find(CLONE_BALLOON));
  if (!plan.balloon_policy || !balloon || balloon->size < sizeof *balloon) return std::unique_ptr<Reclaim>();
  std::unique_ptr<Reclaim> reclaim(new Reclaim(*plan.balloon_policy, main_loop, memory, *balloon));
  TRY(reclaim->call("while it was created", [&](clone_err* err) {
    return reclaim->type_.table.create(reclaim->host_.raw(), &plan.balloon_policy_options.raw(), &reclaim->policy_,
                                       err);
  }));
  if (!reclaim->policy_)
    return Error{"balloon policy " + plan.plan.balloon_policy.type + ": create succeeded without a policy"};
  reclaim->least_bytes_ = reclaim->balloon_state().target_bytes;
  const auto* guest = static_cast<const clone_guest*>(find(CLONE_GUEST));
  if (guest && guest->size >= sizeof *guest) {
    reclaim->guest_ = guest;
    guest->subscribe(
        guest->context, [](void* listener) { static_cast<Reclaim*>(listener)->changed(); }, reclaim.get());
  }
  reclaim->changed();
  return reclaim;
}

Reclaim::~Reclaim() {
  *alive_ = false;
  loop_.cancel_timer(timer_);
  if (policy_) type_.table.destroy(policy_);
}

Result<void> Reclaim::save(const clone_writer& writer) {
  return call("while it was saved", [&](clone_err* err) { return type_.table.save(policy_, &writer, err); });
}

Result<void> Reclaim::load(const clone_reader& reader) {
  TRY(call("while it was loaded", [&](clone_err* err) { return type_.table.load(policy_, &reader, err); }));
  changed();
  return {};
}

// Posted, so that whoever tells of a change is done with it before the balloon moves.
void Reclaim::changed() {
  if (std::exchange(changed_, true)) return;
  loop_.post([this, alive = alive_] {
    if (!*alive) return;
    changed_ = false;
    if (paused_since_ms_) return;  // resume() asks again
    const uint64_t since_ms = now_ms() - decided_ms_;
    if (since_ms >= kLeastBetweenMs) return decide();
    wait(kLeastBetweenMs - since_ms, &Reclaim::decide);
  });
}

void Reclaim::wait(uint64_t delay_ms, void (Reclaim::*then)()) {
  loop_.cancel_timer(timer_);
  timer_ = loop_.add_timer(std::chrono::milliseconds(delay_ms), [this, then] {
    timer_ = 0;
    (this->*then)();
  });
}

// Looking at the balloon asks the guest for its numbers, which are there a moment later.
void Reclaim::look() {
  balloon_state();
  wait(kAnswerMs, &Reclaim::decide);
}

void Reclaim::pause() {
  if (paused_since_ms_) return;
  paused_since_ms_ = monotonic_ms();
  loop_.cancel_timer(std::exchange(timer_, 0));
}

void Reclaim::resume() {
  if (!paused_since_ms_) return;
  paused_ms_ += monotonic_ms() - std::exchange(paused_since_ms_, 0);
  changed();
}

uint64_t Reclaim::now_ms() const { return (paused_since_ms_ ? paused_since_ms_ : monotonic_ms()) - paused_ms_; }

clone_balloon_state Reclaim::balloon_state() {
  clone_balloon_state state;
  std::memset(&state, 0xff, sizeof state);
  state.size = sizeof state;
  state.ready = 0;
  balloon_.state(balloon_.context, &state);
  if (std::exchange(balloon_bytes_, state.balloon_bytes) != state.balloon_bytes) steady_since_ms_ = now_ms();
  return state;
}

clone_balloon_input Reclaim::input(const clone_balloon_state& balloon) {
  clone_guest_report report;
  std::memset(&report, 0xff, sizeof report);
  report.size = sizeof report;
  report.connected = 0;
  if (guest_) guest_->report(guest_->context, &report);
  const bool connected = report.connected == 1;
  // Numbers from before the balloon's last change would count twice what went into it since.
  const uint64_t steady_ms = now_ms() - steady_since_ms_;
  const bool driver_counts = balloon.statistics_age_ms == kUnknown || balloon.statistics_age_ms <= steady_ms;
  const bool program_counts = connected && report.age_ms <= steady_ms;
  const auto known = [&](uint64_t of_driver, uint64_t of_program) {
    if (driver_counts && of_driver != kUnknown) return of_driver;
    return program_counts ? of_program : kUnknown;
  };
  return {sizeof(clone_balloon_input),
          connected ? report.activity : CLONE_ACTIVITY_UNKNOWN,
          now_ms(),
          memory_.size_bytes(),
          own_resident_bytes().value_or(kUnknown),
          known(balloon.guest_available_bytes, report.available_bytes),
          known(balloon.guest_free_bytes, report.free_bytes),
          balloon.balloon_bytes,
          connected ? report.pressure_some_permille : ~0u,
          connected ? report.pressure_full_permille : ~0u};
}

void Reclaim::decide() {
  if (failed_) return;
  decided_ms_ = now_ms();
  const clone_balloon_state balloon = balloon_state();
  if (!balloon.ready) {
    absent_ms_ = std::clamp(absent_ms_ * 2, kFirstAbsentMs, kMostAbsentMs);
    return wait(absent_ms_, &Reclaim::look);
  }
  absent_ms_ = 0;
  // Lower than it was ever set: the guest took some back, or a user set it.
  least_bytes_ = std::min(least_bytes_, balloon.target_bytes);

  const clone_balloon_input known = input(balloon);
  clone_balloon_output output{sizeof output, 0, 0};
  if (auto decided =
          call("while it decided", [&](clone_err* err) { return type_.table.decide(policy_, &known, &output, err); });
      !decided.ok()) {
    failed_ = true;
    return log_warning(decided.error().message + "; it is not asked again");
  }
  const uint64_t target_bytes = std::max(std::min(output.target_bytes, memory_.size_bytes()), least_bytes_);
  if (target_bytes != balloon.target_bytes) balloon_.set_target(balloon_.context, target_bytes);
  loop_.cancel_timer(std::exchange(timer_, 0));
  if (output.wake_ms) wait(std::max<uint64_t>(output.wake_ms, kAnswerMs) - kAnswerMs, &Reclaim::look);
}

}  // namespace vmm
