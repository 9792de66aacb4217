// SPDX-License-Identifier: Apache-2.0
// One `clone run`: the console, the signals, and a machine that may start again when the guest reboots.
#pragma once

#include "plan/plan.hpp"
#include "util/result.hpp"
#include "vm/machine.hpp"
#include "vm/timing.hpp"

namespace vmm {

enum class TimingReport { none, print };

class Session {
 public:
  Session(const CheckedPlan& plan, Timing& timing, TimingReport report)
      : plan_(plan), timing_(timing), report_(report) {}

  // An error: the machine could not start. Everything is put back when this returns.
  Result<Ending> run();

 private:
  const CheckedPlan& plan_;
  Timing& timing_;
  TimingReport report_;
};

}  // namespace vmm
