// SPDX-License-Identifier: Apache-2.0
// The machine's console.
#include "console/console_hub.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "clone/sdk/error.hpp"
#include "plugin/host_context.hpp"

namespace vmm {
namespace {
constexpr char kEscape = 0x01;  // Ctrl-A
constexpr std::string_view kHelp =
    "\r\nCtrl-A X: stop the machine and leave   Ctrl-A Ctrl-A: send a Ctrl-A   Ctrl-A H: this help\r\n";
constexpr auto kForegroundCheck = std::chrono::milliseconds(500);
}  // namespace

EscapeFilter::Output EscapeFilter::feed(std::string_view bytes) {
  Output output;
  for (const char byte : bytes) {
    if (!std::exchange(pending_, false)) {
      if (byte == kEscape)
        pending_ = true;
      else
        output.typed += byte;
    } else if (byte == 'x' || byte == 'X') {
      output.leave = true;
    } else if (byte == 'h' || byte == 'H') {
      output.help = true;
    } else {
      output.typed += kEscape;
      if (byte != kEscape && byte != 'a' && byte != 'A') output.typed += byte;
    }
  }
  return output;
}

ConsoleHub::ConsoleHub(EventLoop& main_loop, Config config)
    : loop_(main_loop),
      config_(std::move(config)),
      output_(config_.output_fd),
      watchers_(main_loop, [this](std::string_view bytes) { return take_typed(bytes); }),
      terminal_(config_.input_fd) {}

ConsoleHub::~ConsoleHub() {
  *alive_ = false;
  unwatch_input();
  loop_.cancel_timer(foreground_timer_);
}

Result<void> ConsoleHub::start() {
  if (owner_.empty()) return {};
  TRY(output_.start());
  if (::fcntl(config_.input_fd, F_GETFL) < 0) return {};  // closed: no input
  input_open_ = true;
  input_is_terminal_ = ::isatty(config_.input_fd) != 0;
  nonblocking_input_ = reopen_nonblocking(config_.input_fd, O_RDONLY);
  watch_input();
  return {};
}

Result<void> ConsoleHub::attach(const std::string& owner, Input input, void* context) {
  if (!owner_.empty()) return Error{"the console is taken by " + owner_, 0, CLONE_ERR_BUSY};
  owner_ = owner;
  input_ = input;
  input_context_ = context;
  return {};
}

void ConsoleHub::detach(const std::string& owner) {
  if (owner != owner_) return;
  owner_.clear();
  input_ = nullptr;
  device_has_room_ = true;
}

void ConsoleHub::input_wanted() {
  loop_.post([this, alive = alive_] {
    if (!*alive) return;
    device_has_room_ = true;
    deliver();
    watch_input();
  });
}

void ConsoleHub::type(std::string_view bytes) {
  const EscapeFilter::Output output = filter_.feed(bytes);
  if (typed_.size() + output.typed.size() <= kInputBytes) typed_ += output.typed;
  deliver();
  if (output.help) write(kHelp);
  if (output.leave && config_.leave) config_.leave();
}

bool ConsoleHub::take_typed(std::string_view bytes) {
  if (typed_.size() + bytes.size() > kInputBytes) return false;
  typed_ += bytes;
  deliver();
  return true;
}

void ConsoleHub::watch_input() {
  if (!input_open_ || watching_) return;
  // A terminal is read whatever the device says: for the escape keys.
  if (!input_is_terminal_ && !typed_.empty()) return;
  if (terminal_.in_background()) {
    // To read now would stop the process (SIGTTIN).
    loop_.cancel_timer(foreground_timer_);
    foreground_timer_ = loop_.add_timer(kForegroundCheck, [this] { watch_input(); });
    return;
  }
  terminal_.enter_raw();
  watching_ = true;
  if (input_is_file_)
    return loop_.post([this, alive = alive_] {
      if (*alive) read_input();
    });
  const auto watched = loop_.add_fd(input_fd(), CLONE_READABLE, [this](uint32_t) { read_input(); });
  if (watched) return;
  watching_ = false;
  input_is_file_ = watched.error().code == EPERM;
  input_open_ = input_is_file_;
  watch_input();
}

void ConsoleHub::unwatch_input() {
  if (std::exchange(watching_, false) && !input_is_file_) loop_.remove_fd(input_fd());
}

void ConsoleHub::read_input() {
  if (terminal_.in_background()) {
    unwatch_input();
    return watch_input();
  }
  char bytes[4096];
  const ssize_t count = ::read(input_fd(), bytes, sizeof bytes);
  if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
  // The end of the input, or a terminal that went away, is no reason to end the machine.
  if (count <= 0) {
    unwatch_input();
    input_open_ = false;
    return;
  }
  if (input_is_file_) watching_ = false;
  type({bytes, static_cast<size_t>(count)});
  if (!input_is_terminal_ && !typed_.empty()) unwatch_input();
  watch_input();
}

void ConsoleHub::deliver() {
  if (typed_.empty() || !device_has_room_ || !input_) return;
  const uint64_t taken = input_(input_context_, typed_.data(), typed_.size());
  if (taken < typed_.size()) device_has_room_ = false;
  typed_.erase(0, taken);
}

namespace {

ConsoleHub& hub_of(const clone_host* host) { return *static_cast<HostContext*>(host->context)->console; }

clone_status attach(const clone_host* host, ConsoleHub::Input input, void* context, clone_err* err) noexcept {
  return clone_sdk::guarded(err, [&] { return hub_of(host).attach(host->name, input, context); });
}

void input_wanted(const clone_host* host) noexcept { hub_of(host).input_wanted(); }

void write(const clone_host* host, const void* data, uint64_t size_bytes) noexcept {
  hub_of(host).write({static_cast<const char*>(data), size_bytes});
}

}  // namespace

const clone_host_console* console_service() {
  static constexpr clone_host_console table = {sizeof(clone_host_console), 0, attach, input_wanted, write};
  return &table;
}

}  // namespace vmm
