// SPDX-License-Identifier: Apache-2.0
// Renders timings.
#include "vm/timing.hpp"

#include <cstdio>

namespace vmm {

std::string Timing::report() const {
  std::string text;
  auto line = [&](const char* step, Clock::duration took) {
    char buffer[64];
    std::snprintf(buffer, sizeof buffer, "timing: %-24s %9.3f ms\n", step,
                  std::chrono::duration<double, std::milli>(took).count());
    text += buffer;
  };
  for (const auto& [step, took] : steps_) line(step, took);
  line("total", last_ - start_);
  return text;
}

}  // namespace vmm
