// SPDX-License-Identifier: Apache-2.0
// Messages to the user on standard error.
#include "util/log.hpp"

#include <unistd.h>

#include <atomic>
#include <deque>
#include <mutex>
#include <string>

namespace vmm {
namespace {
constinit std::atomic<LogLevel> level_limit{LogLevel::warning};
constinit std::atomic<bool> raw_terminal{false};

constexpr size_t kHistoryLines = 256;
struct History {
  std::mutex mutex;
  std::deque<std::string> lines;
};
// Made with the first message, never destroyed: threads may log to the last.
History& history() {
  static History& history = *new History;
  return history;
}
}  // namespace

void set_log_level(LogLevel level) { level_limit.store(level, std::memory_order_relaxed); }
LogLevel log_level() { return level_limit.load(std::memory_order_relaxed); }
void set_log_raw_terminal(bool raw) { raw_terminal.store(raw, std::memory_order_relaxed); }

void log(LogLevel level, std::string_view message) {
  if (level > log_level()) return;
  static constexpr std::string_view prefixes[] = {"clone: error: ", "clone: warning: ", "clone: ", "clone: debug: "};
  std::string line(prefixes[static_cast<int>(level)]);
  line += message;
  {
    History& kept = history();
    const std::lock_guard lock(kept.mutex);
    if (kept.lines.size() == kHistoryLines) kept.lines.pop_front();
    kept.lines.push_back(line);
  }
  line += raw_terminal.load(std::memory_order_relaxed) ? "\r\n" : "\n";
  [[maybe_unused]] ssize_t written = ::write(STDERR_FILENO, line.data(), line.size());
}

std::vector<std::string> log_history() {
  History& kept = history();
  const std::lock_guard lock(kept.mutex);
  return {kept.lines.begin(), kept.lines.end()};
}

}  // namespace vmm
