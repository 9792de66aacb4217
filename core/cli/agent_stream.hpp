// SPDX-License-Identifier: Apache-2.0
// How commands reach the agent in a VM's guest.
#pragma once

#include <string>

#include "agent/session.hpp"

namespace vmm {

// Until when the agent may take to answer.
class AnswerLimit {
 public:
  using Milliseconds = AgentSession::Milliseconds;
  explicit AnswerLimit(uint32_t seconds)
      : seconds_(seconds), end_(std::chrono::steady_clock::now() + std::chrono::seconds(seconds)) {}

  Milliseconds left() const {
    const auto left = std::chrono::duration_cast<Milliseconds>(end_ - std::chrono::steady_clock::now());
    return std::max(left, Milliseconds(0));
  }
  // Names the limit if it was what ended the wait; the VM stops a little earlier, when another try has no time left.
  Error explain(Error error) const {
    if (left() > Milliseconds(250) && error.code != ETIMEDOUT) return error;
    return Error{"the agent in the guest did not answer within " + std::to_string(seconds_) +
                 " s (--timeout): " + error.message};
  }

 private:
  uint32_t seconds_;
  std::chrono::steady_clock::time_point end_;
};

struct AgentOf {
  std::string name;  // "VM web", for messages
  AgentSession session;
};
// `vm`: a name, an id or a process id; empty: the only VM there is. The guest may still be booting: its agent is asked
// until the limit.
Result<AgentOf> open_agent(const std::string& vm, const AnswerLimit& limit);

}  // namespace vmm
