// SPDX-License-Identifier: Apache-2.0
// Child processes that have what their parent has read, and nothing of its terminal.
#include "cli/many.hpp"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <vector>

#include "util/fd.hpp"

namespace vmm {
namespace {

// Away from the terminal's signals, but not from their parent's end.
void leave_terminal(pid_t parent) {
  ::setpgid(0, 0);
  ::prctl(PR_SET_PDEATHSIG, SIGTERM);
  if (::getppid() != parent) ::raise(SIGTERM);
  const Fd nothing(::open("/dev/null", O_RDWR | O_CLOEXEC));
  ::dup2(nothing.get(), STDIN_FILENO);
  ::dup2(nothing.get(), STDOUT_FILENO);
}

ExitCode status_of(int status) {
  return WIFEXITED(status) ? static_cast<ExitCode>(WEXITSTATUS(status))
                           : static_cast<ExitCode>(128 + WTERMSIG(status));
}

}  // namespace

ExitCode start_many(unsigned count, const std::function<std::string(unsigned number)>& name_of,
                    const std::function<ExitCode(unsigned number)>& start) {
  sigset_t signals, before;
  ::sigemptyset(&signals);
  for (const int number : {SIGCHLD, SIGTERM, SIGINT, SIGHUP}) ::sigaddset(&signals, number);
  ::sigprocmask(SIG_BLOCK, &signals, &before);
  const pid_t parent = ::getpid();
  std::vector<pid_t> children;
  ExitCode worst = ExitCode::success;
  for (unsigned number = 1; number <= count; ++number) {
    std::fflush(stdout);
    const pid_t child = ::fork();
    if (child == 0) {
      ::sigprocmask(SIG_SETMASK, &before, nullptr);
      leave_terminal(parent);
      const ExitCode code = start(number);
      std::fflush(stderr);
      ::_exit(static_cast<int>(code));
    }
    if (child < 0) {
      worst = fail(errno_error(name_of(number) + ": fork"));
      break;
    }
    children.push_back(child);
    std::printf("%s: process %d\n", name_of(number).c_str(), static_cast<int>(child));
  }
  std::fflush(stdout);
  while (!children.empty()) {
    siginfo_t info{};
    if (::sigwaitinfo(&signals, &info) > 0 && info.si_signo != SIGCHLD)
      for (const pid_t child : children) ::kill(child, info.si_signo);
    std::erase_if(children, [&](pid_t child) {
      int status = 0;
      if (::waitpid(child, &status, WNOHANG) != child) return false;
      if (worst == ExitCode::success) worst = status_of(status);
      return true;
    });
  }
  ::sigprocmask(SIG_SETMASK, &before, nullptr);
  return worst;
}

}  // namespace vmm
