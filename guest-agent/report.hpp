// SPDX-License-Identifier: Apache-2.0
// What the guest's kernel tells of the machine's load and memory.
#pragma once

#include "activity.hpp"
#include "protocol.hpp"

// Takes a sample every time it is called; `report()` fills what the samples and the kernel say now.
class Reporter {
 public:
  // Whether the activity has changed.
  bool sample();
  void fill(agent_protocol::Report& report);

 private:
  Activity activity_;
  uint64_t busy_ticks_ = 0, all_ticks_ = 0;                    // now, with the agent's
  uint64_t reported_busy_ticks_ = 0, reported_all_ticks_ = 0;  // at the last report
  uint32_t run_queue_ = 0;
};
