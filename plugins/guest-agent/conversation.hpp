// SPDX-License-Identifier: Apache-2.0
// One connection to the agent in the guest, without blocking: hello both ways, then frames.
#pragma once

#include <cstdint>
#include <string>

#include "clone/abi/loop.h"
#include "clone/sdk/fd.hpp"
#include "clone/sdk/result.hpp"
#include "host_frames.hpp"

uint64_t now_ms();  // monotonic

// All on the main loop. It ends once: over() holds then, and its owner may destroy it outside of its callbacks.
class Conversation {
 public:
  using Error = clone_sdk::Error;
  template <typename T>
  using Result = clone_sdk::Result<T>;
  struct Loop {
    const clone_host_loop* table = nullptr;
    clone_loop* loop = nullptr;
  };
  static constexpr uint64_t kNever = ~uint64_t{0};

  // `deadline_ms`: until when the agent has to have said hello.
  Conversation(Loop loop, clone_sdk::Fd fd, uint64_t deadline_ms)
      : loop_(loop), fd_(std::move(fd)), deadline_ms_(deadline_ms) {}
  Conversation(const Conversation&) = delete;
  virtual ~Conversation() { pause(); }

  // Watches the connection, from the start or after pause().
  void go_on();
  void pause();
  // Ends it, unless it is over.
  void end(const Error& why);

  void postpone(uint64_t ms) {
    if (!over_ && deadline_ms_ != kNever) deadline_ms_ += ms;
  }

  bool over() const { return over_; }
  uint64_t deadline_ms() const { return deadline_ms_; }
  int fd() const { return fd_.get(); }

 protected:
  void send(std::string frame);
  void set_deadline_ms(uint64_t deadline_ms) { deadline_ms_ = deadline_ms; }
  // It went as it should: nothing more to say.
  void finish();

 private:
  // The stream is there.
  virtual void connected() {}
  virtual void greeted(const agent_protocol::Hello& hello) = 0;
  // An error ends the conversation.
  virtual Result<void> received(const agent_protocol::Frame& frame) = 0;
  // Of an end other than finish().
  virtual void ended(const Error& why) = 0;

  void ready(uint32_t events);
  Result<void> flush();
  Result<void> receive();
  Result<void> handle(const agent_protocol::Frame& frame);
  uint32_t wanted_events() const { return CLONE_READABLE | (!connected_ || !out_.empty() ? CLONE_WRITABLE : 0); }

  Loop loop_;
  clone_sdk::Fd fd_;
  uint64_t deadline_ms_;
  agent_protocol::FrameBuffer in_;
  std::string out_;
  uint64_t second_ms_ = 0;  // what frames are counted from, for a second
  uint32_t frames_in_second_ = 0;
  bool watched_ = false;
  bool connected_ = false;
  bool greeted_ = false;
  bool over_ = false;
};
