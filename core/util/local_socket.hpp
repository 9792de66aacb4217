// SPDX-License-Identifier: Apache-2.0
// Unix sockets in a directory that is held open: paths of any length, no race over their names.
#pragma once

#include <chrono>
#include <string>

#include "util/fd.hpp"
#include "util/result.hpp"

namespace vmm {

// Non-blocking and listening; readable and writable by its owner only.
Result<Fd> listen_in(int directory_fd, const std::string& name);
// Blocking. Neither this nor a send waits longer than `limit` for a listener that does not accept or read: ETIMEDOUT
// here, EAGAIN of a send.
Result<Fd> connect_in(int directory_fd, const std::string& name,
                      std::chrono::milliseconds limit = std::chrono::seconds(10));

// The next client of a listening socket, non-blocking; none when there is none. Where the process or the host has no
// descriptor left, the client is turned away, so that a level-triggered loop does not turn on it for ever.
Fd accept_client(int socket);

struct Peer {
  int pid = 0;
  bool trusted = false;  // our own user, or root
};
Peer peer_of(int socket);

}  // namespace vmm
