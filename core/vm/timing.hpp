// SPDX-License-Identifier: Apache-2.0
// What each step of a start took.
#pragma once

#include <chrono>
#include <string>
#include <utility>
#include <vector>

namespace vmm {

class Timing {
 public:
  using Clock = std::chrono::steady_clock;

  // Ends a step: the time since the last mark is its.
  void mark(const char* step) { mark_at(step, Clock::now()); }
  void mark_at(const char* step, Clock::time_point now) {
    steps_.emplace_back(step, now - last_);
    last_ = now;
  }

  // A line a step, and the total since this object was made.
  std::string report() const;

 private:
  Clock::time_point start_ = Clock::now();
  Clock::time_point last_ = start_;
  std::vector<std::pair<const char*, Clock::duration>> steps_;
};

}  // namespace vmm
