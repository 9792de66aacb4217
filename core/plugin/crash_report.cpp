// SPDX-License-Identifier: Apache-2.0
// The handler of fatal signals. Everything in it is async-signal-safe.
#include "plugin/crash_report.hpp"

#include <signal.h>
#include <unistd.h>

#include <cstring>
#include <initializer_list>

namespace vmm {
namespace {

constinit thread_local const char* current_plugin = nullptr;
constinit thread_local const char* current_phase = nullptr;

void put(const char* text) { [[maybe_unused]] ssize_t written = ::write(STDERR_FILENO, text, std::strlen(text)); }

void on_fatal_signal(int signal_number) {
  if (current_plugin) {
    put("clone: error: plugin ");
    put(current_plugin);
    put(" crashed ");
    put(current_phase);
    put(" (signal ");
    const char digits[] = {static_cast<char>('0' + signal_number / 10), static_cast<char>('0' + signal_number % 10), 0};
    put(digits[0] == '0' ? digits + 1 : digits);
    put(")\n");
  }
  // SA_RESETHAND put the default action back: the signal comes again when this returns.
  ::raise(signal_number);
}

}  // namespace

CrashReport::CrashReport(const std::string& plugin, const char* phase)
    : outer_plugin_(current_plugin), outer_phase_(current_phase) {
  current_plugin = plugin.c_str();
  current_phase = phase;
}

CrashReport::~CrashReport() {
  current_plugin = outer_plugin_;
  current_phase = outer_phase_;
}

void install_crash_handler() {
  alignas(16) static char stack[16384];
  const stack_t alternate{stack, 0, sizeof stack};
  ::sigaltstack(&alternate, nullptr);
  struct sigaction action {};
  action.sa_handler = on_fatal_signal;
  action.sa_flags = static_cast<int>(SA_RESETHAND | SA_NODEFER | SA_ONSTACK);
  for (int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT}) ::sigaction(number, &action, nullptr);
}

}  // namespace vmm
