// SPDX-License-Identifier: Apache-2.0
// Work on a machine's memory as it stood, beside a machine that goes on: a child process has it, copied as it is written.
#pragma once

#include <sys/types.h>

#include <functional>
#include <memory>
#include <string>

#include "loop/event_loop.hpp"
#include "util/fd.hpp"
#include "util/result.hpp"

namespace vmm {

// On the main loop, all of it.
class BackgroundWork {
 public:
  // Called once, unless this object goes before, or this process dies. Nobody is told then.
  using Done = std::function<void(Result<void>)>;
  // What becomes of the child then: one that sees by itself that its work is over can put away what it has begun, for
  // some seconds.
  enum class Abandoned { killed, awaited };

  // `work` runs in the child, where neither this process's threads nor its descriptors exist, but for `keep`, so that no
  // lock or device of the machine outlives it: it opens what it needs, and waits for nobody. For work on its memory the
  // machine is paused and that its own (GuestMemory::make_private); when this returns it may go on.
  static Result<std::unique_ptr<BackgroundWork>> start(EventLoop& loop, const std::function<Result<void>()>& work,
                                                       Done done, int keep = -1,
                                                       Abandoned abandoned = Abandoned::killed);
  BackgroundWork(const BackgroundWork&) = delete;
  BackgroundWork& operator=(const BackgroundWork&) = delete;
  ~BackgroundWork();

 private:
  BackgroundWork(EventLoop& loop, Fd result, pid_t child, Done done, Abandoned abandoned)
      : loop_(loop), result_(std::move(result)), child_(child), done_(std::move(done)), abandoned_(abandoned) {}

  void ready();

  EventLoop& loop_;
  Fd result_;
  pid_t child_;
  Done done_;
  const Abandoned abandoned_;
  std::string text_;
};

}  // namespace vmm
