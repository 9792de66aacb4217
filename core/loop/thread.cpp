// SPDX-License-Identifier: Apache-2.0
// Threads that bear a name and leave signals to the main thread.
#include "loop/thread.hpp"

#include <pthread.h>
#include <signal.h>

#include <system_error>

namespace vmm {

Result<Thread> spawn_thread(const std::string& name, std::function<void()> run,
                            std::initializer_list<int> open_signals) {
  sigset_t blocked;
  ::sigfillset(&blocked);
  // A fault whose signal is blocked kills the process without its handler, which restores the terminal.
  for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS, SIGABRT}) ::sigdelset(&blocked, fault);
  for (const int open : open_signals) ::sigdelset(&blocked, open);

  // A new thread inherits the mask of its creator: set it here, so that there is no moment without it.
  sigset_t before;
  if (const int code = ::pthread_sigmask(SIG_SETMASK, &blocked, &before))
    return errno_error("thread " + name + ": signal mask", code);
  Result<Thread> result = [&]() -> Result<Thread> {
    try {
      return Thread(std::thread([name = name.substr(0, 15), run = std::move(run)] {
        ::pthread_setname_np(::pthread_self(), name.c_str());
        run();
      }));
    } catch (const std::system_error& error) {
      return errno_error("thread " + name, error.code().value());
    }
  }();
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return result;
}

}  // namespace vmm
