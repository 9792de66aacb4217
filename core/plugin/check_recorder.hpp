// SPDX-License-Identifier: Apache-2.0
// Phases of a check: each runs in a child process, whose verdicts come back one by one, so that a crash costs one row.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "plugin/checker.hpp"

namespace vmm {

struct Verdict {
  CheckVerdict kind = CheckVerdict::passed;
  std::string detail;

  static Verdict failed(std::string detail) { return {CheckVerdict::failed, std::move(detail)}; }
  static Verdict skipped(std::string detail) { return {CheckVerdict::skipped, std::move(detail)}; }
  static Verdict when(bool passed, std::string detail) { return passed ? Verdict{} : failed(std::move(detail)); }
};

// The child's end: tells which rule comes next, then its verdict.
class CheckRecorder {
 public:
  explicit CheckRecorder(int fd) : fd_(fd) {}

  // Runs the rule; false when it failed. An exception that leaves it came out of the plugin.
  bool rule(const std::string& what, const std::function<Verdict()>& body);

 private:
  void send(char kind, const std::string& text);

  int fd_;
};

enum class PhaseEnd { completed, died };

// Runs `phase` in a child and appends its rows. When the child crashes, hangs or exits, the rule that it was at has
// failed.
PhaseEnd run_check_phase(std::vector<CheckRow>& rows, unsigned limit_ms,
                         const std::function<void(CheckRecorder&)>& phase);

}  // namespace vmm
