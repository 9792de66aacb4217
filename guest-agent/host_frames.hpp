// SPDX-License-Identifier: Apache-2.0
// Frames of the agent's protocol as the host's programs take and make them. The agent may be hostile: what it sends is
// bounded and checked here.
#pragma once

#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "frames.hpp"

namespace agent_protocol {

constexpr size_t kMaxFrameBytes = sizeof(Header) + kMaxPayloadBytes;

inline std::string_view bytes_of(const Frame& frame) {
  return {reinterpret_cast<const char*>(frame.payload), frame.length_bytes};
}

// One recv(2): its result. Only when all frames were taken; they are gone then.
inline ssize_t receive(FrameBuffer& buffer, int fd) {
  uint8_t* const space = buffer.space();
  const ssize_t got = ::recv(fd, space, buffer.space_bytes(), MSG_DONTWAIT);
  if (got > 0) buffer.added(static_cast<size_t>(got));
  return got;
}

// One frame; empty when its payload would be too long. `fill(Writer&)` adds the payload.
template <typename Fill>
std::string make_frame(Type type, Fill&& fill) {
  const std::unique_ptr<uint8_t[]> buffer(new uint8_t[kMaxFrameBytes]);
  Writer writer(buffer.get(), kMaxFrameBytes);
  writer.begin(type);
  fill(writer);
  writer.end();
  if (writer.failed()) return {};
  return {reinterpret_cast<const char*>(writer.data()), writer.size_bytes()};
}
inline void put_text(Writer& writer, std::string_view text) { writer.text(text.data(), text.size()); }

inline std::string hello_frame(std::string_view version) {
  return make_frame(Type::hello, [&](Writer& writer) {
    writer.u32(kMagic);
    writer.u16(kMajor);
    writer.u16(kMinor);
    put_text(writer, version);
  });
}

// Text of the agent's for a person and for JSON: bounded, ASCII, and without what a terminal would obey.
inline std::string printable(Reader::Text text, size_t longest_bytes = 200) {
  std::string result(text.data, std::min(text.size_bytes, longest_bytes));
  for (char& letter : result)
    if (letter < ' ' || letter > '~') letter = '?';
  return result;
}

struct Hello {
  uint16_t major, minor;
  std::string version;
};
// Nothing when it is not this protocol.
inline std::optional<Hello> read_hello(const Frame& frame) {
  if (frame.type != Type::hello) return std::nullopt;
  Reader reader = frame.reader();
  const uint32_t magic = reader.u32();
  Hello hello{reader.u16(), reader.u16(), printable(reader.text(), 64)};
  if (reader.failed() || magic != kMagic) return std::nullopt;
  return hello;
}

// Nothing when it is too short; a later version may have fields behind these.
inline std::optional<Report> read_report(const Frame& frame) {
  Reader reader = frame.reader();
  Report report;
  for (uint32_t* field :
       {&report.activity, &report.process_count, &report.load_permille, &report.run_queue, &report.cpu_permille,
        &report.pressure_some_permille, &report.pressure_full_permille, &report.reserved})
    *field = reader.u32();
  for (uint64_t* field : {&report.total_bytes, &report.free_bytes, &report.available_bytes, &report.uptime_ms})
    *field = reader.u64();
  if (reader.failed()) return std::nullopt;
  return report;
}

struct Failure {
  uint32_t code;  // an errno value of Linux, 0 for none
  std::string message;
};
inline Failure read_failure(const Frame& frame) {
  Reader reader = frame.reader();
  Failure failure{reader.u32(), {}};
  reader.u16();
  failure.message = printable(reader.text());
  if (reader.failed()) failure = {0, {}};
  if (failure.code > 4095) failure.code = 0;
  if (failure.message.empty())
    failure.message = failure.code ? std::strerror(static_cast<int>(failure.code)) : "it failed without a reason";
  return failure;
}

}  // namespace agent_protocol
