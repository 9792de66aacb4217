// SPDX-License-Identifier: Apache-2.0
// A command in the guest: its request, and the loop that joins it to descriptors here.
#pragma once

#include <string>
#include <vector>

#include "agent/session.hpp"

namespace vmm {

struct ExecRequest {
  std::vector<std::string> arguments;
  std::vector<std::string> environment;  // "NAME=value", added to that of the user
  std::string user;                      // empty: root
  std::string directory;                 // empty: the user's home
  bool terminal = false;
  bool input = false;
  uint16_t rows = 0, columns = 0;
};

// An error when it is longer than a frame.
Result<std::string> exec_frame(const ExecRequest& request);

// Where the command's streams lead to; -1 for none. None of them is made non-blocking: others may share it.
struct ExecStreams {
  int input = -1;
  int output = -1;
  int errors = -1;
  int signals = -1;   // a signalfd: SIGWINCH resizes, others are passed on; the second of them leaves
  int terminal = -1;  // whose size it has
};

struct ExecEnd {
  int status = 0;
  std::string message;  // why the command did not run; empty: it did
};

constexpr int kExecFailed = 125;         // clone's own failures
constexpr int kExecCannotExecute = 126;  // as shells have it
constexpr int kExecNotFound = 127;
constexpr int kExecSignalBase = 128;

// Asks for the command and stays with it until its end: its status, 128 + N if it ended by signal N. `limit` is for the
// agent to begin it, not for its run.
Result<ExecEnd> run_exec(AgentSession& session, const std::string& request, const ExecStreams& streams,
                         AgentSession::Milliseconds limit);

}  // namespace vmm
