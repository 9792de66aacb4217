// SPDX-License-Identifier: Apache-2.0
// Trees of files into a guest and out of it.
#pragma once

#include <string>

#include "agent/session.hpp"

namespace vmm {

struct CopyOptions {
  bool owners = false;                   // keep user and group; otherwise they are those of who copies
  AgentSession::Milliseconds answer{};   // for the agent's first answer
  AgentSession::Milliseconds silence{};  // for each after it: disks may be slow
};

// `source` here becomes `target` there, or, where that is a directory, an entry of it.
Result<void> copy_into_guest(AgentSession& session, const std::string& source, const std::string& target,
                             const CopyOptions& options);

// `source` there becomes `target` here, or, where that is a directory, an entry of it. The guest may be hostile:
// nothing is written outside of the tree that is made, and what is made is no more than files, directories and symbolic
// links, without set-user-id and set-group-id.
Result<void> copy_out_of_guest(AgentSession& session, const std::string& source, const std::string& target,
                               const CopyOptions& options);

// The last part of a path, without '/' at its end; empty for "/", "." and "..".
std::string last_part(std::string path);

}  // namespace vmm
