// SPDX-License-Identifier: Apache-2.0
// The user's terminal in raw mode, given back on every way out.
#include "console/terminal.hpp"

#include <signal.h>
#include <termios.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <iterator>

#include "util/log.hpp"

namespace vmm {
namespace {

constexpr int kFatalSignals[] = {SIGSEGV, SIGBUS,  SIGFPE, SIGILL, SIGTRAP, SIGSYS,
                                 SIGABRT, SIGTERM, SIGINT, SIGHUP, SIGQUIT};

// What the handlers work with. The modes are written only while raw_fd is -1.
constinit std::atomic<int> raw_fd{-1};
termios saved_mode;
termios raw_mode;
struct sigaction previous_fatal[std::size(kFatalSignals)];
bool fatal_installed[std::size(kFatalSignals)];
struct sigaction previous_continue;

bool is_request(int signal) { return signal == SIGTERM || signal == SIGINT || signal == SIGHUP || signal == SIGQUIT; }

// A terminal that does not control our session knows no foreground: we may use it always.
bool foreground(int fd) {
  const pid_t group = ::tcgetpgrp(fd);
  return group < 0 ? errno == ENOTTY : group == ::getpgrp();
}

// tcsetattr() from the background would stop the process: then the terminal is somebody else's, and left alone.
void set_mode(int fd, const termios& mode) {
  if (foreground(fd)) ::tcsetattr(fd, TCSANOW, &mode);
}

void on_fatal(int signal, siginfo_t* info, void*) {
  const int fd = raw_fd.load();
  if (fd >= 0) set_mode(fd, saved_mode);
  for (size_t i = 0; i < std::size(kFatalSignals); ++i)
    if (kFatalSignals[i] == signal) ::sigaction(signal, &previous_fatal[i], nullptr);
  // A faulting instruction faults again on return, now for the previous handler with the true address.
  const bool fault = signal == SIGSEGV || signal == SIGBUS || signal == SIGFPE || signal == SIGILL;
  if (!fault || info->si_code <= 0) ::raise(signal);
}

void on_continue(int) {
  const int error = errno;
  if (const int fd = raw_fd.load(); fd >= 0) set_mode(fd, raw_mode);
  errno = error;
}

void install_handlers() {
  struct sigaction fatal {};
  fatal.sa_sigaction = on_fatal;
  fatal.sa_flags = SA_SIGINFO | SA_ONSTACK;
  ::sigfillset(&fatal.sa_mask);
  for (size_t i = 0; i < std::size(kFatalSignals); ++i) {
    ::sigaction(kFatalSignals[i], nullptr, &previous_fatal[i]);
    // A request to end that is ignored or handled does not end the process.
    const bool by_default = !(previous_fatal[i].sa_flags & SA_SIGINFO) && previous_fatal[i].sa_handler == SIG_DFL;
    fatal_installed[i] = by_default || !is_request(kFatalSignals[i]);
    if (fatal_installed[i]) ::sigaction(kFatalSignals[i], &fatal, nullptr);
  }
  struct sigaction resumed {};
  resumed.sa_handler = on_continue;
  resumed.sa_flags = SA_RESTART;
  ::sigfillset(&resumed.sa_mask);
  ::sigaction(SIGCONT, &resumed, &previous_continue);
}

void remove_handlers() {
  for (size_t i = 0; i < std::size(kFatalSignals); ++i) {
    struct sigaction current;
    ::sigaction(kFatalSignals[i], nullptr, &current);
    const bool ours = (current.sa_flags & SA_SIGINFO) && current.sa_sigaction == on_fatal;
    if (fatal_installed[i] && ours) ::sigaction(kFatalSignals[i], &previous_fatal[i], nullptr);
  }
  ::sigaction(SIGCONT, &previous_continue, nullptr);
}

}  // namespace

bool Terminal::in_background() const { return ::isatty(fd_) && !foreground(fd_); }

bool Terminal::enter_raw() {
  if (raw_) return true;
  if (!::isatty(fd_) || !foreground(fd_) || raw_fd.load() >= 0) return false;
  if (::tcgetattr(fd_, &saved_mode) != 0) return false;
  raw_mode = saved_mode;
  ::cfmakeraw(&raw_mode);
  install_handlers();
  raw_fd.store(fd_);
  raw_ = ::tcsetattr(fd_, TCSANOW, &raw_mode) == 0;
  if (!raw_) {
    raw_fd.store(-1);
    remove_handlers();
  }
  set_log_raw_terminal(raw_);
  return raw_;
}

void Terminal::restore() {
  if (!raw_) return;
  raw_ = false;
  // Until the mode is set, a signal that ends the process must still find the terminal to restore.
  set_mode(fd_, saved_mode);
  raw_fd.store(-1);
  remove_handlers();
  set_log_raw_terminal(false);
}

}  // namespace vmm
