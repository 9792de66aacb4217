// SPDX-License-Identifier: Apache-2.0
// Names the plugin whose code was running when a fatal signal came: one line instead of a bare "Segmentation fault".
#pragma once

#include <string>

namespace vmm {

// While it lives, a fatal signal on this thread is reported as "plugin NAME crashed PHASE". The strings must outlive
// it.
class CrashReport {
 public:
  CrashReport(const std::string& plugin, const char* phase);
  ~CrashReport();
  CrashReport(const CrashReport&) = delete;
  CrashReport& operator=(const CrashReport&) = delete;

 private:
  const char* outer_plugin_;
  const char* outer_phase_;
};

// Installs the handler for SIGSEGV, SIGBUS, SIGILL, SIGFPE and SIGABRT, on a stack of its own. It prints its line when
// a CrashReport is there and lets the signal take its course. A terminal in raw mode chains its own handler before it.
void install_crash_handler();

}  // namespace vmm
