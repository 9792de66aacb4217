// SPDX-License-Identifier: Apache-2.0
// A conversation with the agent in a guest, over a stream that the VM handed out. The agent may be hostile: what it
// sends is bounded, and nothing waits for it longer than a limit.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "guest-agent/host_frames.hpp"
#include "util/fd.hpp"
#include "util/result.hpp"

namespace vmm {

class AgentSession {
 public:
  using Milliseconds = std::chrono::milliseconds;
  using Frame = agent_protocol::Frame;

  // Our hello goes first, in front of what is queued.
  explicit AgentSession(Fd stream);

  int fd() const { return stream_.get(); }
  // Frames to send, in order; empty is a frame that was too long. Keep it short: wait until nothing is pending().
  void queue(std::string_view frame) { out_ += frame; }
  bool pending() const { return !out_.empty(); }

  // What does not wait, for loops of one's own.
  // Sends what the stream takes now. A peer that is gone shows when it is read.
  Result<void> flush();
  // One read; the frames taken before are gone. The end of the stream is an error.
  Result<void> fill();
  // The next whole frame, if there is one. The agent's hello is checked here and not given out.
  Result<std::optional<Frame>> take();

  // Sends all that is queued. A limit is for silence, not for the whole. An error that the agent sends meanwhile ends
  // it.
  Result<void> send(Milliseconds limit);
  // Sends what is queued until the agent has said hello.
  Result<void> greet(Milliseconds limit);
  // The next frame, after everything queued is sent.
  Result<Frame> receive(Milliseconds limit);

 private:
  Result<void> wait(short events, Milliseconds limit);
  Result<void> take_nothing();

  Fd stream_;
  std::unique_ptr<agent_protocol::FrameBuffer> in_{new agent_protocol::FrameBuffer};
  std::string out_;
  bool greeted_ = false;
  bool peer_reads_ = true;
};

// What an `error` frame says.
Error agent_error(const agent_protocol::Frame& frame);

}  // namespace vmm
