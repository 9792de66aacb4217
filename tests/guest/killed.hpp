// SPDX-License-Identifier: Apache-2.0
// Kills a command of `clone` at a step of its own: no delay has to hit it.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

// Runs it with `input` to read and kills it when its threads have begun or ended `steps` system calls. What processes it has
// begun go on. Answers how many steps there were: fewer than asked for when it came to its end.
size_t killed_after(size_t steps, const std::vector<std::string>& arguments, const std::string& input = {});
