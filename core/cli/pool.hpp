// SPDX-License-Identifier: Apache-2.0
// A pool: processes that have made what a fork of a template needs of the host, and wait to become one. Whoever forks the
// template next hands one of them its terminal and its command line, and waits for the machine's end.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "cli/command.hpp"
#include "cli/template_option.hpp"
#include "util/fd.hpp"
#include "util/result.hpp"

namespace vmm {

// Which pool: of this user, one for each template of each store.
struct PoolKey {
  TemplateStore store;
  std::string name;
  PluginPaths plugins;
};

// A machine from this pool. None when there is no pool, or nobody in it is ready: start it here.
std::optional<ExitCode> fork_from_pool(const PoolKey& key, const Arguments& arguments);

// Ends it; false when there is none.
Result<bool> end_pool(const PoolKey& key);

// What a process of the pool does. It has been given nothing but memory: no thread runs yet.
struct PoolMember {
  // Makes all that does not depend on who will ask.
  std::function<Result<void>()> prepare;
  // Whether that is still good. If not, the pool ends, and whoever asked starts the machine itself.
  std::function<bool()> is_current;
  // With the terminal and the folder of whoever asked. `waiting`: he sends a byte for each signal to stop, and closes it
  // when he goes.
  std::function<ExitCode(const Arguments& arguments, int waiting)> run;
};

// Starts a process in the background that keeps `count` members ready, and returns the id of it when they are.
Result<int> start_pool(const PoolKey& key, unsigned count, const PoolMember& member);

}  // namespace vmm
