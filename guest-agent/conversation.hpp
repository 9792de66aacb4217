// SPDX-License-Identifier: Apache-2.0
// What the agent does for one connection, in a process of its own.
#pragma once

#include "connection.hpp"

// Whether the agent may change the machine: not in tests that run it on a machine of someone's.
enum class Machine { ours, not_ours };

class Conversation {
 public:
  Conversation(int fd, Machine machine_is) : machine(machine_is) { connection.open(fd); }

  // Until the host is gone.
  void run();
  void end() { over_ = true; }

  Connection connection;
  const Machine machine;

 private:
  bool greet();
  void answer(const Connection::Frame& frame);
  void watch(const Connection::Frame& frame);
  void sample(bool is_first);
  int timeout_ms() const;

  bool over_ = false;
  bool watching_ = false;
  unsigned long interval_ms_ = 0, next_sample_ms_ = 0, last_report_ms_ = 0;
};

// Each answers the request, whatever comes of it.
void run_program(Conversation& conversation, const Connection::Frame& frame);
void take_copy(Conversation& conversation, const Connection::Frame& frame);
void give_copy(Conversation& conversation, const Connection::Frame& frame);
void set_identity(Conversation& conversation, const Connection::Frame& frame);
void set_power(Conversation& conversation, const Connection::Frame& frame);

// File systems that this conversation froze.
namespace freezer {
void freeze(Conversation& conversation, const Connection::Frame& frame);
void thaw(Conversation& conversation);
bool is_frozen();
// Until it has to thaw; -1 when nothing is frozen.
int left_ms();
void thaw_all();
}  // namespace freezer

void set_oom_score(const char* score);
