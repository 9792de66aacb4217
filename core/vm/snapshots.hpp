// SPDX-License-Identifier: Apache-2.0
// The control methods that keep a machine as it stands, or hand it on to a fork, while it goes on.
#pragma once

#include <array>
#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "control/control_server.hpp"
#include "plan/plan.hpp"
#include "snapshot/backend.hpp"
#include "snapshot/background.hpp"
#include "vm/machine.hpp"

namespace vmm {

// On the main loop, all of it.
class Snapshots {
 public:
  // What the owner of the machine does for them.
  struct Owner {
    std::function<bool()> is_paused;
    std::function<Result<void>()> pause;
    std::function<void()> resume;
    std::function<void()> end;
  };

  Snapshots(const CheckedPlan& plan, PluginLibrary& library, EventLoop& loop, Owner owner)
      : plan_(plan), library_(library), loop_(loop), owner_(std::move(owner)) {}

  // vm.snapshot, vm.fork.
  Result<void> offer(ControlServer& control);
  // The machine from now on, or NULL, and what it started from: whoever waits for the one before is told that nothing
  // comes.
  void follow(Machine* machine, const SavedMachine* saved = nullptr);

 private:
  using Clock = std::chrono::steady_clock;
  using Reply = ControlServer::Reply;
  enum class Afterwards { as_before, end };

  // Work under way, and who waits for it.
  struct Pending {
    std::unique_ptr<BackgroundWork> work;
    std::string what;
    std::function<void(Result<void>)> done;
  };
  struct Pause {
    Clock::time_point begun;
    Clock::duration took{};
  };
  // A snapshot that was committed. Its id, in it, tells it from another one of its name.
  using Id = std::array<std::byte, 16>;
  struct Kept {
    std::string name;
    Id id;
    bool is_template = false;  // that the machine was started from: what it wrote since then, its memory tells
  };

  Result<void> snapshot(const boost::json::object& given, Reply& reply);
  Result<void> fork(const boost::json::object& given, Reply& reply);
  // In the pause of a snapshot: adds to `unsaved_`, or begins to.
  Result<void> note_dirty_pages();
  // Over the parent, as long as it is the one that the store has under its name.
  Result<SnapshotImage> begin_over_parent(const SnapshotBackend& backend, const std::string& name) const;
  // Saves the machine, paused for it, and calls `then`; paused it stays only if that succeeds and says so.
  Result<Pause> while_paused(Sections& sections, Afterwards afterwards, const std::function<Result<void>()>& then);
  Result<void> start(const char* what, const std::function<Result<void>()>& work,
                     std::function<void(Result<void>)> done, int keep = -1);

  const CheckedPlan& plan_;
  PluginLibrary& library_;
  EventLoop& loop_;
  const Owner owner_;
  Machine* machine_ = nullptr;
  std::optional<Pending> pending_;

  bool tracks_ = false;
  std::string cannot_track_;    // why not
  std::optional<Kept> parent_;  // of the next incremental snapshot: the machine's last one, or its template
  PageSet unsaved_;             // written since then, as of the last pause
};

}  // namespace vmm
