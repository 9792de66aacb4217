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
#include "vm/capture.hpp"
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
  // It stands still, and ends when its last snapshot is written.
  bool holds_machine() const { return pending_ && pending_->is_to_resume; }

 private:
  using Clock = std::chrono::steady_clock;
  using Reply = ControlServer::Reply;
  enum class Afterwards { as_before, end };

  // What is under way, and who waits for it.
  struct Pending {
    ~Pending();
    const char* what;
    Reply reply;
    // Of a snapshot: who writes it, what it is sent through, and why that came to no end.
    std::unique_ptr<BackgroundWork> writer{};
    Fd stream{};
    std::optional<Error> failure{};
    bool is_to_resume = false;  // if it fails
    std::unique_ptr<Capture> capture{};
    std::unique_ptr<ThreadWork> finishing{};
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
  Result<void> hand_on_memfd(Reply& reply);
  Result<void> hand_on_copy(Reply& reply);
  // Begins, or is done with an error.
  void capture(std::optional<PageSet> pages, const Capture::Job& job);
  Result<void> check_idle() const;
  // From now on, if this machine can: which pages are written since its last snapshot.
  bool track();
  Result<void> take_dirty_pages(PageSet& pages);
  // Over the parent, as long as it is the one that the store has under its name.
  Result<void> write_over_parent(const SnapshotBackend& backend, const std::string& name, int stream) const;
  // Saves the machine, paused for it, calls `then`, and says in the answer how long it stood still. Paused it stays only
  // if all of that succeeds and it is to end.
  Result<void> while_paused(Sections& sections, Afterwards afterwards, boost::json::object& answer,
                            const std::function<Result<void>()>& then);

  const CheckedPlan& plan_;
  PluginLibrary& library_;
  EventLoop& loop_;
  const Owner owner_;
  Machine* machine_ = nullptr;
  std::unique_ptr<Pending> pending_;

  bool tracks_ = false;
  std::string cannot_track_;    // why not
  std::optional<Kept> parent_;  // of the next incremental snapshot: the machine's last one, or its template
  PageSet unsaved_;             // written since then, as far as they were taken
};

}  // namespace vmm
