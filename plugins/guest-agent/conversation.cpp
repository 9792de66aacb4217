// SPDX-License-Identifier: Apache-2.0
// One connection to the agent in the guest.
#include "conversation.hpp"

#include <sys/socket.h>
#include <time.h>

#include "clone/sdk/error.hpp"

using agent_protocol::Frame;
using agent_protocol::FrameBuffer;
using clone_sdk::Error;
using clone_sdk::Result;

namespace {
// Far more than an agent has to say in a second; one that says more floods us.
constexpr uint32_t kMostFramesASecond = 200;

Error closed() { return {"the agent closed the connection", ECONNRESET, CLONE_ERR_SYSTEM}; }
}  // namespace

uint64_t now_ms() {
  timespec now;
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000 + static_cast<uint64_t>(now.tv_nsec) / 1'000'000;
}

void Conversation::go_on() {
  if (over_ || watched_) return;
  clone_sdk::ErrorBuffer error;
  const Result<void> added = error.result(loop_.table->add_fd(
      loop_.loop, fd_.get(), wanted_events(),
      [](void* self, uint32_t events) noexcept { static_cast<Conversation*>(self)->ready(events); }, this, error));
  watched_ = added.ok();
  if (!added.ok()) end(added.error());
}

void Conversation::pause() {
  if (std::exchange(watched_, false)) loop_.table->remove_fd(loop_.loop, fd_.get());
}

void Conversation::finish() {
  over_ = true;
  deadline_ms_ = 0;
  pause();
  fd_.reset();
}

void Conversation::end(const Error& why) {
  if (over_) return;
  finish();
  ended(why);
}

void Conversation::send(std::string frame) {
  out_ += frame;
  if (watched_) loop_.table->change_fd(loop_.loop, fd_.get(), wanted_events());
}

void Conversation::ready(uint32_t events) {
  if (over_) return;
  if (!connected_ && (events & CLONE_WRITABLE)) {
    int error = 0;
    socklen_t size_bytes = sizeof error;
    ::getsockopt(fd_.get(), SOL_SOCKET, SO_ERROR, &error, &size_bytes);
    if (error) return end(clone_sdk::errno_error("no agent answers in the guest", error));
    connected_ = true;
    connected();
    if (over_) return;
  }
  if (!connected_) {
    if (events & CLONE_HANGUP) end(closed());
    return;
  }
  Result<void> result = flush();
  // What the agent said before it closed still counts.
  if (Result<void> read = receive(); result.ok()) result = std::move(read);
  if (!result.ok()) return end(result.error());
  if (watched_) loop_.table->change_fd(loop_.loop, fd_.get(), wanted_events());
}

Result<void> Conversation::flush() {
  while (!out_.empty()) {
    const ssize_t sent = ::send(fd_.get(), out_.data(), out_.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0 && errno == EAGAIN) return {};
    if (sent < 0) return clone_sdk::errno_error("send to the agent");
    out_.erase(0, static_cast<size_t>(sent));
  }
  return {};
}

// One read a round, so that a flood costs the main loop little.
Result<void> Conversation::receive() {
  if (over_) return {};
  const ssize_t got = agent_protocol::receive(in_, fd_.get());
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return {};
  if (got < 0) return clone_sdk::errno_error("read from the agent");
  if (got == 0) return closed();
  Frame frame;
  FrameBuffer::Next next = FrameBuffer::Next::incomplete;
  while (!over_ && (next = in_.next(frame)) == FrameBuffer::Next::frame) CLONE_TRY(handle(frame));
  if (next == FrameBuffer::Next::broken) return Error{"the agent sent a frame that is too long"};
  return {};
}

Result<void> Conversation::handle(const Frame& frame) {
  const uint64_t now = now_ms();
  if (now - second_ms_ >= 1000) {
    second_ms_ = now;
    frames_in_second_ = 0;
  }
  if (++frames_in_second_ > kMostFramesASecond) return Error{"the agent sends more than it may"};
  if (greeted_) return received(frame);

  const auto hello = agent_protocol::read_hello(frame);
  if (!hello) return Error{"what answers in the guest is not the agent"};
  if (hello->major != agent_protocol::kMajor)
    return Error{"the agent speaks version " + std::to_string(hello->major) + "." + std::to_string(hello->minor) +
                 " of the protocol, this clone speaks " + std::to_string(agent_protocol::kMajor) + "." +
                 std::to_string(agent_protocol::kMinor)};
  greeted_ = true;
  greeted(*hello);
  return {};
}
