// SPDX-License-Identifier: Apache-2.0
// The folder of the keepers' sockets, NAME.sock: who answers there, who does not any more, and how a new one comes.
#pragma once

#include <string>
#include <vector>

#include "snapshot-file/store.hpp"

namespace snapshot_memory {

using clone_sdk::Error;
using clone_sdk::Fd;
using clone_sdk::Result;
using snapshot_file::Store;

// What a keeper handed out. Nobody can change it: both are sealed.
struct KeptFiles {
  Fd memory, state;
  uint64_t memory_bytes = 0, state_bytes = 0;  // sizes of the files
  uint64_t stored_bytes = 0;                   // of both, holes apart
};

class Keepers {
 public:
  explicit Keepers(Store store) : store_(std::move(store)) {}

  const std::string& path() const { return store_.path(); }
  // For messages: the socket of `name`.
  std::string path_of(const std::string& name) const;
  // Snapshots with a socket, sorted; who held them may be dead.
  Result<std::vector<std::string>> names() const;

  // One without a keeper is CLONE_ERR_NOT_FOUND.
  Result<KeptFiles> ask(const std::string& name) const;
  Result<void> end(const std::string& name) const;

  // Refused when that name has a keeper. Sockets of dead ones are cleared.
  Result<void> expect_free(const std::string& name) const;
  // Hands sealed files to a new keeper, which answers under the name once this succeeds. `program`: its executable.
  Result<void> publish(const std::string& name, int program, int memory, int state) const;

 private:
  // Of the names that are sockets, those of dead ones go. Under the lock: who is about to listen would be one of them.
  void clear_dead() const;
  Error already_there(const std::string& name) const;
  Result<Fd> connect(const std::string& name) const;
  Result<Fd> request(const std::string& name, char what) const;

  Store store_;
};

// Read, checked for its owner: the program of PREFIX/libexec/clone where this plugin is in PREFIX/lib/clone/plugins.
Result<Fd> open_keeper_program();

}  // namespace snapshot_memory
