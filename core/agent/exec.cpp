// SPDX-License-Identifier: Apache-2.0
// A command in the guest.
#include "agent/exec.hpp"

#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace vmm {
namespace {

using namespace agent_protocol;
using Clock = std::chrono::steady_clock;

// A pipe that poll(2) calls writable takes this much without blocking (pipe(7), PIPE_BUF).
constexpr size_t kWriteBytes = 4096;
constexpr size_t kReadBytes = 32 * 1024;
// Frames without effect that an agent of a later version may send.
constexpr uint32_t kMostIdleFrames = 1000;

class ExecLoop {
 public:
  ExecLoop(AgentSession& session, const ExecStreams& streams) : session_(session), streams_(streams) {}

  Result<ExecEnd> run(AgentSession::Milliseconds limit) {
    const auto end = Clock::now() + limit;
    while (!end_) {
      int wait_ms = -1;
      if (!started_) {
        const auto left = std::chrono::duration_cast<AgentSession::Milliseconds>(end - Clock::now());
        if (left.count() <= 0) return Error{"the agent did not begin the command in its time", ETIMEDOUT};
        wait_ms = static_cast<int>(left.count()) + 1;
      }
      TRY(step(wait_ms));
    }
    return *end_;
  }

 private:
  // While output waits for its reader nothing more is read of the agent; what goes the other way goes on.
  Result<void> step(int wait_ms) {
    if (resized_ && started_ && !session_.pending()) send_size();
    const bool writing = !left_.empty();
    const bool reading = started_ && streams_.input >= 0 && !session_.pending();
    pollfd entries[] = {
        {session_.fd(), static_cast<short>((writing ? 0 : POLLIN) | (session_.pending() ? POLLOUT : 0)), 0},
        {writing ? target_ : -1, POLLOUT, 0},
        {reading ? streams_.input : -1, POLLIN, 0},
        {streams_.signals, POLLIN, 0}};
    // An agent that is gone would wake us all the time, while its last output is not written yet.
    if (entries[0].events == 0) entries[0].fd = -1;
    if (::poll(entries, std::size(entries), wait_ms) < 0) {
      if (errno == EINTR) return {};
      return errno_error("poll");
    }
    if (entries[3].revents) take_signal();
    if (end_) return {};
    if (entries[2].revents) read_input();
    if (entries[1].revents) TRY(write_output());
    TRY(session_.flush());
    if (!writing && entries[0].revents) {
      TRY(session_.fill());
    } else if (writing && left_.empty()) {
      // The frames behind the one that was written.
    } else {
      return {};
    }
    while (left_.empty() && !end_) {
      const auto frame = TRY(session_.take());
      if (!frame) break;
      TRY(handle(*frame));
    }
    return {};
  }

  Result<void> handle(const Frame& frame) {
    Reader reader = frame.reader();
    switch (frame.type) {
      case Type::started:
        started_ = true;
        return {};
      case Type::output:
      case Type::errors:
        if (!started_) return Error{"the agent sent output of a command that it had not begun"};
        if (frame.length_bytes == 0) break;
        left_ = bytes_of(frame);
        target_ = frame.type == Type::output ? streams_.output : streams_.errors;
        if (target_ < 0) left_ = {};
        return {};
      case Type::exited: {
        const uint32_t code = reader.u32();
        const uint32_t signal = reader.u32();
        if (reader.failed() || code > 255 || signal > 64) return Error{"the agent sent an end that makes no sense"};
        end_ = ExecEnd{static_cast<int>(signal ? kExecSignalBase + signal : code), {}};
        return {};
      }
      case Type::error:
        // Later ones answer what was sent to a command that had just ended.
        if (started_) break;
        end_ = refusal(agent_error(frame));
        return {};
      default:
        break;
    }
    if (++idle_frames_ > kMostIdleFrames) return Error{"the agent sends frames without end and without meaning"};
    return {};
  }

  static ExecEnd refusal(const Error& error) {
    switch (error.code) {
      case ENOENT:
        return {kExecNotFound, error.message};
      case EACCES:
      case EPERM:
      case ENOEXEC:
      case EISDIR:
      case ENOTDIR:
      case ELOOP:
      case ETXTBSY:
      case E2BIG:
        return {kExecCannotExecute, error.message};
      default:
        return {kExecFailed, error.message};
    }
  }

  Result<void> write_output() {
    const ssize_t written = ::write(target_, left_.data(), std::min(left_.size(), kWriteBytes));
    if (written >= 0) {
      left_.remove_prefix(static_cast<size_t>(written));
    } else if (errno == EPIPE) {
      // As a program whose reader left; the agent ends the command when we are gone.
      end_ = ExecEnd{kExecSignalBase + SIGPIPE, {}};
    } else if (errno != EINTR && errno != EAGAIN) {
      return errno_error(target_ == streams_.output ? "standard output" : "standard error");
    }
    return {};
  }

  void read_input() {
    char bytes[kReadBytes];
    const ssize_t got = ::read(streams_.input, bytes, sizeof bytes);
    if (got < 0 && (errno == EINTR || errno == EAGAIN)) return;
    const size_t size_bytes = got > 0 ? static_cast<size_t>(got) : 0;
    session_.queue(make_frame(Type::input, [&](Writer& writer) { writer.bytes(bytes, size_bytes); }));
    if (got <= 0) streams_.input = -1;  // its end, or as good as that
  }

  void take_signal() {
    signalfd_siginfo info;
    if (::read(streams_.signals, &info, sizeof info) != sizeof info) return;
    if (info.ssi_signo == SIGWINCH) {
      resized_ = true;
      return;
    }
    if (++signals_ > 1 || !started_) {
      end_ = ExecEnd{static_cast<int>(kExecSignalBase + info.ssi_signo), {}};
      return;
    }
    session_.queue(make_frame(Type::signal, [&](Writer& writer) { writer.u32(info.ssi_signo); }));
  }

  void send_size() {
    resized_ = false;
    winsize size{};
    if (streams_.terminal < 0 || ::ioctl(streams_.terminal, TIOCGWINSZ, &size) != 0) return;
    session_.queue(make_frame(Type::resize, [&](Writer& writer) {
      writer.u16(size.ws_row);
      writer.u16(size.ws_col);
    }));
  }

  AgentSession& session_;
  ExecStreams streams_;
  std::string_view left_;  // of the output frame that is being written
  int target_ = -1;
  bool started_ = false;
  bool resized_ = false;
  uint32_t signals_ = 0;
  uint32_t idle_frames_ = 0;
  std::optional<ExecEnd> end_;
};

}  // namespace

Result<std::string> exec_frame(const ExecRequest& request) {
  std::string frame = make_frame(Type::exec, [&](Writer& writer) {
    writer.u32((request.terminal ? kExecTerminal : 0u) | (request.input ? kExecInput : 0u));
    writer.u16(request.rows);
    writer.u16(request.columns);
    put_text(writer, request.user);
    put_text(writer, request.directory);
    for (const auto* list : {&request.arguments, &request.environment}) {
      writer.u32(static_cast<uint32_t>(list->size()));
      for (const std::string& each : *list) put_text(writer, each);
    }
  });
  if (frame.empty()) return Error{"the command and its environment are longer than 64 KiB"};
  return frame;
}

Result<ExecEnd> run_exec(AgentSession& session, const std::string& request, const ExecStreams& streams,
                         AgentSession::Milliseconds limit) {
  session.queue(request);
  return ExecLoop(session, streams).run(limit);
}

}  // namespace vmm
