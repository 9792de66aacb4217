// SPDX-License-Identifier: Apache-2.0
// The machine's console: between the one device that is it and those who watch and type.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "clone/abi/console.h"
#include "console/console_watchers.hpp"
#include "console/output_stream.hpp"
#include "console/terminal.hpp"
#include "loop/event_loop.hpp"
#include "util/result.hpp"

namespace vmm {

// Takes the commands out of what is typed. Ctrl-A begins one: X leaves, H helps, A or Ctrl-A sends one Ctrl-A to the
// guest. With any other key both go to the guest.
class EscapeFilter {
 public:
  struct Output {
    std::string typed;
    bool leave = false;
    bool help = false;
  };
  Output feed(std::string_view bytes);

 private:
  bool pending_ = false;  // a Ctrl-A came last
};

// Standard input and output serve as the console's terminal. Input that the device has no room for is kept, so that
// Ctrl-A X works when the guest does not listen; a pipe or file then waits, a terminal's surplus is dropped.
class ConsoleHub {
 public:
  struct Config {
    int input_fd = 0;
    int output_fd = 1;
    std::function<void()> leave;  // on the main loop, at Ctrl-A X
  };

  // The loop lasts longer. [control]
  ConsoleHub(EventLoop& main_loop, Config config);
  ConsoleHub(const ConsoleHub&) = delete;
  ConsoleHub& operator=(const ConsoleHub&) = delete;
  // Gives the terminal back. Nobody may call write() or input_wanted() any more.
  ~ConsoleHub();

  // [control] Puts the terminal into raw mode and begins to read. Without an attached device it leaves both alone.
  Result<void> start();
  // [control] Before the VM ends: writes what is buffered, for at most so long.
  void flush(std::chrono::milliseconds limit = std::chrono::seconds(2)) {
    output_.flush(limit);
    watchers_.flush(limit / 4);
  }

  // The functions of clone.host-console/1.
  using Input = uint64_t (*)(void* context, const void* data, uint64_t size_bytes);
  Result<void> attach(const std::string& owner, Input input, void* context);
  // The device goes; another may become the console. Harmless for one that is not the console.
  void detach(const std::string& owner);
  void input_wanted();
  void write(std::string_view bytes) {
    output_.write(bytes);
    watchers_.write(bytes);
  }

  // [control] Something was typed at the terminal.
  void type(std::string_view bytes);
  // Those who watch through a socket; what they type has no escape keys here.
  ConsoleWatchers& watchers() { return watchers_; }

 private:
  static constexpr size_t kInputBytes = 64 * 1024;

  int input_fd() const { return nonblocking_input_ ? nonblocking_input_.get() : config_.input_fd; }
  void watch_input();
  void unwatch_input();
  void read_input();
  void deliver();
  bool take_typed(std::string_view bytes);

  EventLoop& loop_;
  Config config_;
  OutputStream output_;
  ConsoleWatchers watchers_;
  Terminal terminal_;
  EscapeFilter filter_;

  std::string owner_;  // of the attached device; empty: none
  Input input_ = nullptr;
  void* input_context_ = nullptr;
  bool device_has_room_ = true;
  std::string typed_;  // not yet taken by the device

  Fd nonblocking_input_;
  bool input_is_terminal_ = false;
  bool input_is_file_ = false;  // epoll refuses it; it is always ready
  bool input_open_ = false;
  bool watching_ = false;
  EventLoop::TimerId foreground_timer_ = 0;
  // Calls posted to the loop may outlive the hub; they look here first. [control]
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

// The hub is that of the HostContext behind the host.
const clone_host_console* console_service();

}  // namespace vmm
