// SPDX-License-Identifier: Apache-2.0
// Those who watch a console through its socket: each gets what was printed before it came and all that follows; one
// types.
#pragma once

#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "console/output_stream.hpp"
#include "loop/event_loop.hpp"
#include "util/fd.hpp"
#include "util/result.hpp"

namespace vmm {

class ConsoleWatchers {
 public:
  // `type` takes what was typed; false, and nothing taken, when there is no room at the moment. [control]
  ConsoleWatchers(EventLoop& loop, std::function<bool(std::string_view)> type) : loop_(loop), type_(std::move(type)) {}
  ConsoleWatchers(const ConsoleWatchers&) = delete;
  ConsoleWatchers& operator=(const ConsoleWatchers&) = delete;
  ~ConsoleWatchers();

  // [control] `socket` listens; whoever may connect to it is the caller's to have ensured, but for the peer's user.
  Result<void> listen(Fd socket);
  // [any] Never waits for a watcher: one that is slow misses output, and is told how much.
  void write(std::string_view bytes);
  void flush(std::chrono::milliseconds limit);

  // [any] The last of what was printed.
  std::string history() const;
  struct Info {
    int pid = 0;
    bool types = false;
  };
  // [control] In the order in which they came. The first that has not said that it only watches types.
  std::vector<Info> list() const;

 private:
  struct Watcher {
    Fd socket;
    int pid = 0;
    bool only_watches = false;
    EventLoop::TimerId retry = 0;
    std::string typed;  // that had no room
    std::unique_ptr<OutputStream> output;
  };
  using Entry = std::list<Watcher>::iterator;

  void accept_watchers();
  void read_from(Entry watcher, uint32_t events);
  void pass_on(Entry watcher);
  bool types(const Watcher& watcher) const;
  void remove(Entry watcher);

  EventLoop& loop_;
  std::function<bool(std::string_view)> type_;
  Fd socket_;
  mutable std::mutex mutex_;  // of the history and of the list, which changes on [control] only
  std::string history_;
  std::list<Watcher> watchers_;
};

}  // namespace vmm
