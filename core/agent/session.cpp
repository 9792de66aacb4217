// SPDX-License-Identifier: Apache-2.0
// A conversation with the agent in a guest.
#include "agent/session.hpp"

#include <poll.h>
#include <sys/socket.h>

#include <cerrno>

namespace vmm {

using namespace agent_protocol;

AgentSession::AgentSession(Fd stream) : stream_(std::move(stream)), out_(hello_frame(CLONE_VERSION)) {}

Result<void> AgentSession::flush() {
  while (pending()) {
    const ssize_t sent =
        peer_reads_ ? ::send(fd(), out_.data(), out_.size(), MSG_DONTWAIT | MSG_NOSIGNAL) : ssize_t(out_.size());
    if (sent >= 0) {
      out_.erase(0, static_cast<size_t>(sent));
    } else if (errno == EAGAIN) {
      return {};
    } else if (errno == EPIPE || errno == ECONNRESET) {
      peer_reads_ = false;  // it may have said why
    } else if (errno != EINTR) {
      return errno_error("send to the agent");
    }
  }
  return {};
}

Result<void> AgentSession::fill() {
  const ssize_t got = agent_protocol::receive(*in_, fd());
  if (got > 0 || (got < 0 && (errno == EAGAIN || errno == EINTR))) return {};
  if (got == 0 || errno == ECONNRESET)
    return Error{greeted_ ? "the agent closed the connection" : "no agent answers in the guest", ECONNRESET};
  return errno_error("read from the agent");
}

Result<std::optional<Frame>> AgentSession::take() {
  Frame frame;
  while (true) {
    const FrameBuffer::Next next = in_->next(frame);
    if (next == FrameBuffer::Next::incomplete) return std::optional<Frame>();
    if (next == FrameBuffer::Next::broken) return Error{"the agent sent a frame that this protocol does not have"};
    if (greeted_) return std::optional<Frame>(frame);
    const auto hello = read_hello(frame);
    // An agent that refuses us says so instead.
    if (!hello && frame.type == Type::error) return agent_error(frame);
    if (!hello) return Error{"what answers in the guest is not the agent"};
    if (hello->major != kMajor)
      return Error{"the agent speaks version " + std::to_string(hello->major) + "." + std::to_string(hello->minor) +
                   " of its protocol, this clone version " + std::to_string(kMajor) + "." + std::to_string(kMinor)};
    greeted_ = true;
  }
}

Result<void> AgentSession::wait(short events, Milliseconds limit) {
  const auto end = std::chrono::steady_clock::now() + limit;
  while (true) {
    const auto left = std::chrono::duration_cast<Milliseconds>(end - std::chrono::steady_clock::now());
    pollfd entry{fd(), events, 0};
    const int ready = ::poll(&entry, 1, static_cast<int>(std::max<int64_t>(left.count(), 0)));
    if (ready > 0) return {};
    if (ready < 0 && errno != EINTR) return errno_error("poll");
    if (left.count() <= 0)
      return Error{"the agent did not answer within " + std::to_string((limit.count() + 999) / 1000) + " s", ETIMEDOUT};
  }
}

// Of an agent that is not asked yet nothing is expected: a flood of other things is an end too.
Result<void> AgentSession::take_nothing() {
  TRY(fill());
  const auto frame = TRY(take());
  if (!frame) return {};
  if (frame->type == Type::error) return agent_error(*frame);
  return Error{"the agent answered before the request was complete"};
}

Result<void> AgentSession::send(Milliseconds limit) {
  while (true) {
    TRY(flush());
    if (!pending()) return {};
    TRY(wait(POLLIN | POLLOUT, limit));
    TRY(take_nothing());
  }
}

Result<void> AgentSession::greet(Milliseconds limit) {
  while (!greeted_) {
    TRY(flush());
    TRY(wait(static_cast<short>(POLLIN | (pending() ? POLLOUT : 0)), limit));
    TRY(take_nothing());
  }
  return {};
}

Result<Frame> AgentSession::receive(Milliseconds limit) {
  while (true) {
    if (const auto frame = TRY(take())) return *frame;
    TRY(send(limit));
    // Sending may have read a frame's beginning, never a whole one.
    TRY(wait(POLLIN, limit));
    TRY(fill());
  }
}

Error agent_error(const Frame& frame) {
  const Failure failure = read_failure(frame);
  return Error{failure.message, static_cast<int>(failure.code)};
}

}  // namespace vmm
