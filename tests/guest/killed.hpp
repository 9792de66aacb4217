// SPDX-License-Identifier: Apache-2.0
// Kills a command of `clone` at a step of its own: no delay has to hit it.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

// Runs it with `input` to read and kills it when its threads have begun or ended `steps` system calls. What processes it has
// begun go on.
struct Killed {
  size_t steps;  // that there were: fewer than asked for when it came to its end
  int status;    // its exit status; 128 + N for signal N
};
Killed killed_after(size_t steps, const std::vector<std::string>& arguments, const std::string& input = {});
// How many steps it takes to its end, which is a good one. Asserts.
size_t steps_of(const std::vector<std::string>& arguments, const std::string& input = {});
