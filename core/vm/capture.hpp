// SPDX-License-Identifier: Apache-2.0
// A machine as it stands at one instant: its memory is taken ahead, while it runs; the pause is for what is newer than
// that, and for the state.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "loop/event_loop.hpp"
#include "loop/thread_work.hpp"
#include "memory/guest_memory.hpp"
#include "snapshot/background.hpp"
#include "snapshot/sections.hpp"
#include "util/result.hpp"

namespace vmm {

// On the main loop, all of it.
class Capture {
 public:
  struct Job {
    // Where memory goes, more than once for some pages: the last counts. It may block. Then the state, once. From a
    // thread, or from a child process that has no descriptor but `keep`.
    std::function<Result<void>(uint64_t offset, std::span<const std::byte> bytes)> put_memory;
    std::function<Result<void>(const Sections&)> put_state;
    int keep = -1;
    // Adds the pages that were written since the last call. Absent when that is not known.
    std::function<Result<void>(PageSet&)> take_dirty_pages;
    bool ahead = false;  // whether memory is taken ahead; that needs to be known for it
    // Saves the paused machine, and calls that before it goes on.
    std::function<Result<void>(Sections&, const std::function<Result<void>()>& then)> while_paused;
    // Once, unless this object goes before; it may go in this call. All is put by then, or an error was met.
    std::function<void(Result<void>)> done;
  };

  // `pages`: nothing for all that may hold anything but zeroes. The memory lasts longer.
  static Result<std::unique_ptr<Capture>> start(EventLoop& loop, GuestMemory& memory, std::optional<PageSet> pages,
                                                Job job);
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;
  // What a thread puts comes to its end before; a child process is ended, and what it put is given up.
  ~Capture() = default;

 private:
  Capture(EventLoop& loop, GuestMemory& memory, std::optional<PageSet> pages, Job job)
      : loop_(loop), memory_(memory), job_(std::move(job)), left_(std::move(pages)) {}

  using Visit = std::function<Result<void>(uint64_t offset, std::span<const std::byte> bytes)>;
  // What is left.
  Result<void> visit_left(const Visit& visit) const;
  bool is_little_left() const;
  Result<void> take_newer();
  Result<void> begin_round();
  Result<void> end_round();
  Result<void> take_the_rest();

  EventLoop& loop_;
  GuestMemory& memory_;
  const Job job_;
  std::optional<PageSet> left_;  // to be put still; nothing: all
  unsigned rounds_ = 0;
  std::unique_ptr<BackgroundWork> child_;
  std::unique_ptr<ThreadWork> thread_;
};

}  // namespace vmm
