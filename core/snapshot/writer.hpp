// SPDX-License-Identifier: Apache-2.0
// Writes a snapshot beside a machine that goes on: a child process has the memory as it stood, copied as it is written.
#pragma once

#include <sys/types.h>

#include <functional>
#include <memory>
#include <string>

#include "loop/event_loop.hpp"
#include "memory/guest_memory.hpp"
#include "snapshot/backend.hpp"
#include "util/fd.hpp"
#include "util/result.hpp"

namespace vmm {

// On the main loop, all of it.
class SnapshotWriter {
 public:
  // Called once, unless the writer goes before.
  using Done = std::function<void(Result<void>)>;

  // The machine is paused, and may go on when this returns if its memory is private to it (no memfd); otherwise when it
  // is done. What is written is seen under its name when it is whole, whatever becomes of this process.
  static Result<std::unique_ptr<SnapshotWriter>> start(EventLoop& loop, std::unique_ptr<SnapshotBackend> backend,
                                                       const std::string& name, const GuestMemory& memory,
                                                       const Sections& sections, Done done);
  SnapshotWriter(const SnapshotWriter&) = delete;
  SnapshotWriter& operator=(const SnapshotWriter&) = delete;
  ~SnapshotWriter();

 private:
  SnapshotWriter(EventLoop& loop, Fd result, pid_t child, Done done)
      : loop_(loop), result_(std::move(result)), child_(child), done_(std::move(done)) {}

  void ready();

  EventLoop& loop_;
  Fd result_;
  pid_t child_;
  Done done_;
  std::string text_;
};

}  // namespace vmm
