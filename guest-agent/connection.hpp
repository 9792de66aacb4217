// SPDX-License-Identifier: Apache-2.0
// One conversation with the host: frames in, frames out, over a socket that never blocks a call but wait…().
#pragma once

#include "errors.hpp"
#include "frames.hpp"
#include "syscalls.hpp"

class Connection {
 public:
  using Frame = agent_protocol::Frame;
  using Next = agent_protocol::FrameBuffer::Next;

  // The socket has to be non-blocking.
  void open(int fd) { fd_ = fd; }
  int fd() const { return fd_; }
  bool is_gone() const { return gone_; }
  void give_up() { gone_ = true; }

  Next next(Frame& frame) { return input_.next(frame); }
  // Takes what has arrived; false when the host is gone.
  bool receive();
  // Waits for a whole frame; false when the host is gone or breaks the protocol.
  bool wait_for_frame(Frame& frame);

  // A payload may be read straight into the frame that goes out next: call begin_frame(), put at most
  // kMaxPayloadBytes there, then end_frame(). Only while is_idle().
  bool is_idle() const { return sent_bytes_ == output_bytes_; }
  uint8_t* begin_frame() { return output_ + sizeof(agent_protocol::Header); }
  void end_frame(agent_protocol::Type type, size_t payload_bytes);
  // Sends what the socket takes; false when the host is gone.
  bool flush();
  // Sends all of it; false when the host is gone.
  bool wait_until_sent();

  // A host that takes nothing for that long is gone; below 0, as at first: it may be as slow as it likes.
  void set_patience_ms(int patience_ms) { patience_ms_ = patience_ms; }

  // Whole frames, sent before they return.
  bool send(agent_protocol::Type type, const void* payload, size_t size_bytes);
  bool send_numbers(agent_protocol::Type type, const uint32_t* numbers, size_t count);
  bool done() { return send(agent_protocol::Type::done, nullptr, 0); }
  bool error(long result, agent_protocol::Type answered, const char* message);

 private:
  int fd_ = -1;
  bool gone_ = false;
  int patience_ms_ = -1;
  agent_protocol::FrameBuffer input_;
  uint8_t output_[sizeof(agent_protocol::Header) + agent_protocol::kMaxPayloadBytes];
  size_t output_bytes_ = 0;
  size_t sent_bytes_ = 0;
};
