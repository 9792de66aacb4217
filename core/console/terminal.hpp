// SPDX-License-Identifier: Apache-2.0
// The user's terminal in raw mode, given back on every way out.
#pragma once

namespace vmm {

// One at a time in a process: signal handlers restore it. A fatal signal (a fault, abort, or SIGTERM, SIGINT, SIGHUP,
// SIGQUIT where nobody handles them) restores the terminal and then does what it would have done. SIGCONT enters raw
// mode again.
class Terminal {
 public:
  explicit Terminal(int fd) : fd_(fd) {}
  Terminal(const Terminal&) = delete;
  Terminal& operator=(const Terminal&) = delete;
  ~Terminal() { restore(); }

  // Of a terminal only. A process in the background would be stopped for reading it or for changing its mode.
  bool in_background() const;
  // True when the terminal is raw now; false, and nothing changed, when it is none or we are in the background.
  bool enter_raw();
  void restore();

 private:
  int fd_;
  bool raw_ = false;
};

}  // namespace vmm
