// SPDX-License-Identifier: Apache-2.0
// Takes the host's requests one after another, and reports in between.
#include "conversation.hpp"

#include <asm/errno.h>
#include <linux/fcntl.h>

#include "report.hpp"

using namespace agent_protocol;

namespace {

constexpr unsigned long shortest_interval_ms = 100;

Reporter reporter;

}  // namespace

void set_oom_score(const char* score) {
  const int fd = sys::open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
  if (fd < 0) return;
  sys::write(fd, score, length(score));
  sys::close(fd);
}

bool Conversation::greet() {
  uint8_t buffer[64];
  Writer writer(buffer, sizeof buffer);
  writer.u32(kMagic);
  writer.u16(kMajor);
  writer.u16(kMinor);
  writer.text(CLONE_VERSION, sizeof CLONE_VERSION - 1);
  Connection::Frame frame;
  if (!connection.send(Type::hello, writer.data(), writer.size_bytes()) || !connection.wait_for_frame(frame))
    return false;
  Reader reader = frame.reader();
  if (frame.type != Type::hello || reader.u32() != kMagic) {
    connection.error(-EPROTO, frame.type, "the first message is not a hello of this protocol");
    return false;
  }
  const uint16_t major = reader.u16();
  if (reader.failed() || major != kMajor) {
    Message message;
    message << "the protocol's version is " << static_cast<unsigned long>(major) << ", this agent speaks "
            << static_cast<unsigned long>(kMajor);
    connection.error(-EPROTO, Type::hello, message.c_str());
    return false;
  }
  return true;
}

void Conversation::run() {
  if (!greet()) return;
  while (!over_ && !connection.is_gone()) {
    if (freezer::left_ms() == 0) {
      freezer::thaw_all();
      connection.error(-ETIMEDOUT, Type::freeze, "the file systems were frozen for as long as they may be");
      break;
    }
    Connection::Frame frame;
    const Connection::Next next = connection.next(frame);
    if (next == Connection::Next::broken) break;
    if (next == Connection::Next::frame) {
      answer(frame);
      continue;
    }
    if (watching_ && sys::monotonic_ms() >= next_sample_ms_) sample(false);
    sys::Poll poll{connection.fd(), sys::poll_in, 0};
    if (sys::poll(&poll, 1, timeout_ms()) > 0) connection.receive();
  }
  if (freezer::is_frozen()) freezer::thaw_all();
}

// Until the next sample, or until what is frozen has to thaw.
int Conversation::timeout_ms() const {
  const int thaw_ms = freezer::left_ms();
  if (!watching_) return thaw_ms;
  const unsigned long now_ms = sys::monotonic_ms();
  const int sample_ms = next_sample_ms_ > now_ms ? static_cast<int>(next_sample_ms_ - now_ms) : 0;
  return thaw_ms >= 0 && thaw_ms < sample_ms ? thaw_ms : sample_ms;
}

void Conversation::answer(const Connection::Frame& frame) {
  const bool is_harmless = frame.type == Type::thaw || frame.type == Type::watch || frame.type == Type::hello;
  if (freezer::is_frozen() && !is_harmless) {
    connection.error(-EBUSY, frame.type, "not while file systems are frozen by this conversation");
    return;
  }
  switch (frame.type) {
    case Type::watch:
      return watch(frame);
    case Type::exec:
      return run_program(*this, frame);
    case Type::power:
      return set_power(*this, frame);
    case Type::identity:
      return set_identity(*this, frame);
    case Type::freeze:
      return freezer::freeze(*this, frame);
    case Type::thaw:
      return freezer::thaw(*this);
    case Type::copy_in:
      return take_copy(*this, frame);
    case Type::copy_out:
      return give_copy(*this, frame);
    // What crossed with the end of a program, or with the failure of a copy.
    case Type::input:
    case Type::resize:
    case Type::signal:
    case Type::entry:
    case Type::data:
    case Type::copy_end:
    case Type::done:
    case Type::error:
      return;
    default:
      connection.error(-ENOSYS, frame.type, "this agent does not know that message");
  }
}

void Conversation::watch(const Connection::Frame& frame) {
  Reader reader = frame.reader();
  interval_ms_ = reader.u32();
  if (reader.failed()) {
    connection.error(-EINVAL, Type::watch, "a malformed request");
    return;
  }
  if (interval_ms_ < shortest_interval_ms) interval_ms_ = shortest_interval_ms;
  watching_ = true;
  sample(true);
}

void Conversation::sample(bool is_first) {
  const bool has_changed = reporter.sample();
  const unsigned long now_ms = sys::monotonic_ms();
  next_sample_ms_ = now_ms + (interval_ms_ < Activity::kSampleMs ? interval_ms_ : Activity::kSampleMs);
  // The host has other worries than reports while something is frozen, and must not hold up the thaw with them.
  if (freezer::is_frozen()) return;
  if (!is_first && !has_changed && now_ms - last_report_ms_ + Activity::kSampleMs / 2 < interval_ms_) return;
  last_report_ms_ = now_ms;
  Report report;
  reporter.fill(report);
  connection.send(Type::report, &report, sizeof report);
}
