// SPDX-License-Identifier: Apache-2.0
// The VMs of this user on this host: a directory for each, with its sockets, a description, and a lock that tells a
// live VM from what a dead one left behind (docs/control.md).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "util/fd.hpp"
#include "util/result.hpp"

namespace vmm {

// What the file vm.json in a VM's directory says.
struct InstanceRecord {
  std::string id;    // 8 hexadecimal digits
  std::string name;  // that of --name, or the id
  int pid = 0;
  std::string directory;
  uint32_t vcpus = 0;
  uint64_t memory_bytes = 0;
  int64_t started_ms = 0;  // since 1970
};

// Where the directories of VMs are: CLONE_RUNTIME_DIR; /run/clone for root; $XDG_RUNTIME_DIR/clone; ~/.clone/run.
Result<std::string> runtime_root();
// It, made when it is not there. An error when others could write to it.
Result<Fd> open_runtime_root();
// Waits for that lock file in it, which is held as long as the descriptor, and its copies in other processes, are open.
Result<Fd> lock_in_runtime_root(int root, const char* name);

// A VM's own directory, from its making to its removal.
class InstanceDirectory {
 public:
  // Clears directories that dead VMs left. `name` must not be that of a live VM; empty: the id serves.
  static Result<InstanceDirectory> create(std::string name, uint32_t vcpus, uint64_t memory_bytes);
  InstanceDirectory(InstanceDirectory&&) = default;
  InstanceDirectory& operator=(InstanceDirectory&&) = delete;
  ~InstanceDirectory();

  const InstanceRecord& record() const { return record_; }
  int fd() const { return directory_.get(); }

 private:
  InstanceDirectory(InstanceRecord record, Fd root, Fd directory)
      : record_(std::move(record)), root_(std::move(root)), directory_(std::move(directory)) {}

  InstanceRecord record_;
  Fd root_;
  Fd directory_;  // holds the lock
};

// The live ones, oldest first.
Result<std::vector<InstanceRecord>> list_instances();

// By name, id or process id; empty: the only one there is. An error lists what there is to choose from.
Result<InstanceRecord> find_instance(std::string_view what);

}  // namespace vmm
