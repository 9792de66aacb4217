// SPDX-License-Identifier: Apache-2.0
// Signals, console and reboots around a machine.
#include "vm/session.hpp"

#include <pthread.h>
#include <signal.h>
#include <sys/signalfd.h>

#include "console/console_hub.hpp"
#include "loop/event_loop.hpp"
#include "plugin/crash_report.hpp"
#include "util/fd.hpp"
#include "util/log.hpp"
#include "vm/machine.hpp"

namespace vmm {
namespace {

// SIGTERM, SIGINT and SIGHUP come through a descriptor; threads made later inherit the mask.
class Signals {
 public:
  Signals() {
    ::sigemptyset(&set_);
    for (int number : {SIGTERM, SIGINT, SIGHUP}) ::sigaddset(&set_, number);
    ::pthread_sigmask(SIG_BLOCK, &set_, &old_);
    fd_ = Fd(::signalfd(-1, &set_, SFD_CLOEXEC | SFD_NONBLOCK));
  }
  ~Signals() { ::pthread_sigmask(SIG_SETMASK, &old_, nullptr); }

  int fd() const { return fd_.get(); }
  bool take() {
    signalfd_siginfo info;
    return ::read(fd_.get(), &info, sizeof info) == sizeof info;
  }

 private:
  sigset_t set_;
  sigset_t old_;
  Fd fd_;
};

// Of every thread made later. In the usual 8 MiB a transparent huge page fits: 2 MiB for one thread's few KiB.
void use_small_stacks() {
  constexpr size_t stack_bytes = 1 << 20;
  pthread_attr_t attributes;
  ::pthread_attr_init(&attributes);
  ::pthread_attr_setstacksize(&attributes, stack_bytes);
  ::pthread_setattr_default_np(&attributes);
  ::pthread_attr_destroy(&attributes);
}

}  // namespace

Result<Ending> Session::run() {
  use_small_stacks();
  install_crash_handler();
  ::signal(SIGPIPE, SIG_IGN);
  Signals signals;
  const auto loop = TRY(EventLoop::create());

  std::optional<Ending> ending;
  auto end = [&](Ending how, const std::string& detail) {
    if (ending) return;
    ending = how;
    if (!detail.empty()) log_error(detail);
    loop->stop();
  };

  ConsoleHub console(*loop, {STDIN_FILENO, STDOUT_FILENO, [&] { end(Ending::stopped, ""); }});
  // Made after the console, and so gone before it: its devices write there to the last.
  std::unique_ptr<Machine> machine;
  unsigned requests = 0;
  TRY(loop->add_fd(signals.fd(), CLONE_READABLE, [&](uint32_t) {
    while (signals.take()) ++requests;
    if (requests > 1) return end(Ending::stopped, "");
    if (auto pressed = machine->press_power_button(); !pressed.ok()) {
      log_warning(pressed.error().message + "; stopping it");
      return end(Ending::stopped, "");
    }
    const auto grace = std::chrono::milliseconds(plan_.plan.grace_ms);
    loop->add_timer(grace, [&] { end(Ending::stopped, "the guest did not power off in time; stopping it"); });
  }));

  for (bool first = true;; first = false) {
    Timing again;
    Timing& timing = first ? timing_ : again;
    ending.reset();
    machine = TRY(Machine::create(plan_, *loop, console, timing, end));
    if (first) TRY(console.start());
    TRY(machine->start(timing));
    if (report_ == TimingReport::print && first) {
      timing.mark_at("first instruction", machine->first_instruction());
      std::fputs(timing.report().c_str(), stderr);
    }
    loop->run();
    machine.reset();
    console.flush();
    // Asked to power off, a guest that reboots instead does not get another run.
    if (*ending != Ending::reset || plan_.plan.on_reboot == OnReboot::exit || requests > 0) return *ending;
  }
}

}  // namespace vmm
