// SPDX-License-Identifier: Apache-2.0
// Several machines from one command: a process each.
#pragma once

#include <functional>
#include <string>

#include "cli/command.hpp"

namespace vmm {

// Calls start(number) in `count` new processes, numbers from 1, with neither terminal nor output but errors, and prints a
// line for each. Hands SIGTERM, SIGINT and SIGHUP on to them, waits for them all, and returns the first status that is not
// success. This process has no other threads.
ExitCode start_many(unsigned count, const std::function<std::string(unsigned number)>& name_of,
                    const std::function<ExitCode(unsigned number)>& start);

}  // namespace vmm
