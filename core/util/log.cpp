// SPDX-License-Identifier: Apache-2.0
// Messages to the user on standard error.
#include "util/log.hpp"

#include <unistd.h>

#include <atomic>
#include <string>

namespace vmm {
namespace {
constinit std::atomic<LogLevel> level_limit{LogLevel::warning};
constinit std::atomic<bool> raw_terminal{false};
}  // namespace

void set_log_level(LogLevel level) { level_limit.store(level, std::memory_order_relaxed); }
LogLevel log_level() { return level_limit.load(std::memory_order_relaxed); }
void set_log_raw_terminal(bool raw) { raw_terminal.store(raw, std::memory_order_relaxed); }

void log(LogLevel level, std::string_view message) {
  if (level > log_level()) return;
  static constexpr std::string_view prefixes[] = {"clone: error: ", "clone: warning: ", "clone: ", "clone: debug: "};
  std::string line(prefixes[static_cast<int>(level)]);
  line += message;
  line += raw_terminal.load(std::memory_order_relaxed) ? "\r\n" : "\n";
  [[maybe_unused]] ssize_t written = ::write(STDERR_FILENO, line.data(), line.size());
}

}  // namespace vmm
