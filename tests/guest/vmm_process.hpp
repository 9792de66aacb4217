// SPDX-License-Identifier: Apache-2.0
// A running `clone run`: what it is fed, what it says, how it ends. Nothing waits for longer than a limit.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <string>
#include <vector>

#include "util/fd.hpp"

struct VmmResult {
  int status = -1;         // the exit status; 128 + N for signal N
  bool timed_out = false;  // it was killed
  std::string output;
  std::string errors;
  std::chrono::milliseconds took{};
};

class VmmProcess {
 public:
  // Of the guest programs. The arguments follow `clone run --kernel PROGRAM`.
  VmmProcess(const std::string& program, const std::vector<std::string>& arguments);
  // Any command of `clone`, with its arguments.
  explicit VmmProcess(const std::vector<std::string>& arguments);
  VmmProcess(const VmmProcess&) = delete;
  VmmProcess& operator=(const VmmProcess&) = delete;
  ~VmmProcess();

  pid_t pid() const { return pid_; }
  // False when it ends, or time passes, without that in its output.
  bool wait_for(const std::string& text);
  // The next whole line of its output with that in it, from there on; lines before it are passed over.
  bool wait_for_line(const std::string& text, std::string& line);
  void type(const std::string& text);
  void signal(int number);
  // Closes its input, reads what it says, and gives the end.
  VmmResult finish();

 private:
  bool read_some(std::chrono::steady_clock::time_point end);  // false: at the end of all output, or of time

  pid_t pid_ = -1;
  vmm::Fd input_;
  vmm::Fd output_;
  vmm::Fd errors_;
  std::chrono::steady_clock::time_point start_;
  VmmResult result_;
  size_t passed_ = 0;  // of the output, by wait_for_line()
};

// Types `.`, by which many programs end: without a complaint of theirs or of the VMM's. Asserts.
void ends_well(VmmProcess& vm);

// Another command than `run`, to its end.
VmmResult run_command(const std::vector<std::string>& arguments);

VmmResult run_guest(const std::string& program, const std::vector<std::string>& arguments,
                    const std::string& input = {});
