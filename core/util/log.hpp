// SPDX-License-Identifier: Apache-2.0
// Messages to the user on standard error, one line each: "clone: warning: …".
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace vmm {

enum class LogLevel : int { error = 0, warning = 1, info = 2, debug = 3 };

// The least important level that is printed. Set once, before threads start.
void set_log_level(LogLevel level);
LogLevel log_level();

// [any] Writes one line with one write(2), so that threads do not mix. In raw terminal mode lines end in CR LF.
void log(LogLevel level, std::string_view message);
void set_log_raw_terminal(bool raw);

// [any] The last lines that were printed, oldest first.
std::vector<std::string> log_history();

inline void log_error(std::string_view message) { log(LogLevel::error, message); }
inline void log_warning(std::string_view message) { log(LogLevel::warning, message); }
inline void log_info(std::string_view message) { log(LogLevel::info, message); }
inline void log_debug(std::string_view message) { log(LogLevel::debug, message); }

}  // namespace vmm
