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
  // The library is that of the plan; snapshot backends are loaded from it. `saved`: NULL to boot.
  Session(const CheckedPlan& plan, PluginLibrary& library, Timing& timing, TimingReport report,
          const SavedMachine* saved = nullptr)
      : plan_(plan), library_(library), timing_(timing), report_(report), saved_(saved) {}

  // A socket of who waits for the machine elsewhere: a byte from there is a signal to stop, its end stops the machine.
  void waits_for_it(int socket) { waiting_ = socket; }

  // An error: the machine could not start. Everything is put back when this returns.
  Result<Ending> run();

 private:
  const CheckedPlan& plan_;
  PluginLibrary& library_;
  Timing& timing_;
  TimingReport report_;
  const SavedMachine* saved_;
  int waiting_ = -1;
};

}  // namespace vmm
