// SPDX-License-Identifier: Apache-2.0
// Frames over a non-blocking socket.
#include "connection.hpp"

#include <asm/errno.h>

using namespace agent_protocol;

namespace {

// -EAGAIN and -EINTR are no end.
bool is_over(long count) { return count == 0 || (count < 0 && count != -EAGAIN && count != -EINTR); }

}  // namespace

bool Connection::receive() {
  uint8_t* const space = input_.space();
  const long count = sys::read(fd_, space, input_.space_bytes());
  if (is_over(count)) gone_ = true;
  if (count > 0) input_.added(static_cast<size_t>(count));
  return !gone_;
}

bool Connection::wait_for_frame(Frame& frame) {
  for (;;) {
    const Next next = input_.next(frame);
    if (next == Next::frame) return true;
    if (next == Next::broken || gone_) return false;
    sys::Poll poll{fd_, sys::poll_in, 0};
    sys::poll(&poll, 1, -1);
    if (!receive()) return false;
  }
}

void Connection::end_frame(Type type, size_t payload_bytes) {
  Writer header(output_, sizeof(Header));
  header.u32(static_cast<uint32_t>(payload_bytes));
  header.u16(static_cast<uint16_t>(type));
  header.u16(0);
  output_bytes_ = sizeof(Header) + payload_bytes;
  sent_bytes_ = 0;
}

bool Connection::flush() {
  while (!gone_ && !is_idle()) {
    const long count = sys::write(fd_, output_ + sent_bytes_, output_bytes_ - sent_bytes_);
    if (count == -EAGAIN) return true;
    if (is_over(count)) gone_ = true;
    if (count > 0) sent_bytes_ += static_cast<size_t>(count);
  }
  return !gone_;
}

bool Connection::wait_until_sent() {
  while (flush() && !is_idle()) {
    sys::Poll poll{fd_, sys::poll_out, 0};
    if (sys::poll(&poll, 1, patience_ms_) == 0) gone_ = true;
  }
  return !gone_;
}

bool Connection::send(Type type, const void* payload, size_t size_bytes) {
  if (!wait_until_sent()) return false;
  if (size_bytes > 0) __builtin_memcpy(begin_frame(), payload, size_bytes);
  end_frame(type, size_bytes);
  return wait_until_sent();
}

bool Connection::send_numbers(Type type, const uint32_t* numbers, size_t count) {
  return send(type, numbers, count * sizeof *numbers);  // little-endian, as x86 is
}

bool Connection::error(long result, Type answered, const char* message) {
  uint8_t buffer[1200];
  Writer writer(buffer, sizeof buffer);
  writer.u32(static_cast<uint32_t>(-result));
  writer.u16(static_cast<uint16_t>(answered));
  writer.text(message, length(message));
  return send(Type::error, writer.data(), writer.size_bytes());
}
