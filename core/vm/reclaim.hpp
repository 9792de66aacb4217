// SPDX-License-Identifier: Apache-2.0
// Drives a machine's balloon: asks the policy how much memory the guest should give back, when it is time or the
// guest's activity has changed.
#pragma once

#include <functional>
#include <memory>
#include <string_view>

#include "clone/abi/balloon.h"
#include "clone/abi/guest.h"
#include "loop/event_loop.hpp"
#include "memory/guest_memory.hpp"
#include "plan/plan.hpp"
#include "plugin/host_context.hpp"
#include "util/result.hpp"

namespace vmm {

// Everything on the main loop.
class Reclaim {
 public:
  // The table that is published under an id, or NULL.
  using FindPublished = std::function<const void*(std::string_view id)>;

  // Before the devices are started, after they have published what they offer. Nothing where the plan has no policy or
  // no device offers a balloon. The first decision comes when the loop runs.
  static Result<std::unique_ptr<Reclaim>> create(const CheckedPlan& plan, EventLoop& main_loop,
                                                 const GuestMemory& memory, const FindPublished& find);
  Reclaim(const Reclaim&) = delete;
  Reclaim& operator=(const Reclaim&) = delete;
  ~Reclaim();

  // While the machine is paused nothing is decided, and no time goes by for the policy.
  void pause();
  void resume();
  // The policy's state. The machine is paused.
  Result<void> save(const clone_writer& writer);
  Result<void> load(const clone_reader& reader);

 private:
  Reclaim(const PolicyType& policy, EventLoop& main_loop, const GuestMemory& memory, const clone_balloon& balloon)
      : type_(policy), loop_(main_loop), memory_(memory), balloon_(balloon), host_("balloon-policy", context_) {}

  void changed();
  void look();
  void decide();
  void wait(uint64_t delay_ms, void (Reclaim::*then)());
  uint64_t now_ms() const;
  clone_balloon_state balloon_state();
  clone_balloon_input input(const clone_balloon_state& balloon);
  template <typename Call>
  Result<void> call(const char* phase, Call&& body);

  const PolicyType& type_;
  EventLoop& loop_;
  const GuestMemory& memory_;
  const clone_balloon& balloon_;
  const clone_guest* guest_ = nullptr;
  HostContext context_;
  HostHandle host_;
  void* policy_ = nullptr;
  uint64_t least_bytes_ = 0;  // what the balloon's owner asked for itself
  uint64_t absent_ms_ = 0;    // how long to wait for the guest's driver
  uint64_t decided_ms_ = 0;
  uint64_t balloon_bytes_ = 0;     // when it was last looked at
  uint64_t steady_since_ms_ = 0;   // since when it was seen to stand so
  uint64_t paused_ms_ = 0;         // in all pauses that are over
  uint64_t paused_since_ms_ = 0;   // 0: not paused
  bool changed_ = false;  // a decision is posted
  bool failed_ = false;
  EventLoop::TimerId timer_ = 0;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);  // for calls posted to the loop
};

}  // namespace vmm
