// SPDX-License-Identifier: Apache-2.0
// Cuts what arrives from a stream into frames (protocol.hpp), within one buffer of fixed size.
#pragma once

#include "protocol.hpp"

namespace agent_protocol {

struct Frame {
  Type type{};
  const uint8_t* payload = nullptr;  // until the next call of next() or space()
  uint32_t length_bytes = 0;
  Reader reader() const { return Reader(payload, length_bytes); }
};

class FrameBuffer {
 public:
  enum class Next { frame, incomplete, broken };

  // Where to put what arrives next: at least one byte after next() said `incomplete`.
  uint8_t* space() {
    if (start_ > 0) {
      __builtin_memmove(bytes_, bytes_ + start_, end_ - start_);
      end_ -= start_;
      start_ = 0;
    }
    return bytes_ + end_;
  }
  size_t space_bytes() const { return sizeof bytes_ - (end_ - start_); }
  void added(size_t size_bytes) { end_ += size_bytes; }

  // `broken` stays: a stream is of no use after a frame that is too long or has flags.
  Next next(Frame& frame) {
    if (broken_) return Next::broken;
    const size_t left_bytes = end_ - start_;
    if (left_bytes < sizeof(Header)) return Next::incomplete;
    Reader header(bytes_ + start_, sizeof(Header));
    const uint32_t length_bytes = header.u32();
    const uint16_t type = header.u16();
    const uint16_t flags = header.u16();
    if (length_bytes > kMaxPayloadBytes || flags != 0) {
      broken_ = true;
      return Next::broken;
    }
    if (left_bytes - sizeof(Header) < length_bytes) return Next::incomplete;
    frame = {static_cast<Type>(type), bytes_ + start_ + sizeof(Header), length_bytes};
    start_ += sizeof(Header) + length_bytes;
    if (start_ == end_) start_ = end_ = 0;
    return Next::frame;
  }

 private:
  uint8_t bytes_[sizeof(Header) + kMaxPayloadBytes];
  size_t start_ = 0;
  size_t end_ = 0;
  bool broken_ = false;
};

}  // namespace agent_protocol
