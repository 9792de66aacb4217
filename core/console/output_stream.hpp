// SPDX-License-Identifier: Apache-2.0
// A buffered way out to one descriptor, which a slow or stuck reader cannot turn against the writer.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>

#include "loop/thread.hpp"
#include "util/fd.hpp"
#include "util/result.hpp"

namespace vmm {

// A descriptor for the same file that does not block, without a change to the one that other processes share: a pipe
// or terminal is opened again. An empty Fd where that cannot be done.
Fd reopen_nonblocking(int fd, int access_mode);

// A thread of its own writes. The first byte after a pause goes out at once, then there is at most one write a
// millisecond: output that comes byte by byte does not cost a system call for each.
//
// When the buffer is full, a writer waits for room for a moment unless the reader is a terminal, once; from then on,
// until the reader moves again, output is dropped, and a line in its place tells how much.
class OutputStream {
 public:
  static constexpr size_t kBufferBytes = 1 << 20;

  // `fd` stays the caller's and is open as long as this. Nothing is written before start().
  explicit OutputStream(int fd);
  // A writer waits so long for a full reader, once.
  OutputStream(int fd, std::chrono::milliseconds patience);
  OutputStream(const OutputStream&) = delete;
  OutputStream& operator=(const OutputStream&) = delete;
  // What is not flushed is lost.
  ~OutputStream();

  Result<void> start();
  // [any] A reader that went away is no error: the output is dropped.
  void write(std::string_view bytes);
  // [any] Waits until everything is written, or for so long. True when it is.
  bool flush(std::chrono::milliseconds limit);

 private:
  enum class Kind { file, socket, other };
  using Clock = std::chrono::steady_clock;

  void run();
  // Returns early when the reader is gone or the stream is stopped.
  void write_out(std::string_view bytes);

  int fd_;
  Kind kind_;
  std::chrono::milliseconds patience_;
  Fd nonblocking_;
  Fd stop_event_;
  Thread thread_;

  std::mutex mutex_;
  std::condition_variable changed_;  // for the thread
  std::condition_variable written_;  // for those who wait for room or for the end
  std::string pending_;
  uint64_t lost_bytes_ = 0;
  bool writing_ = false;
  bool stuck_ = false;   // nothing moved for `patience_`
  bool urgent_ = false;  // somebody waits in flush()
  bool broken_ = false;  // the reader is gone
  bool stopping_ = false;
};

}  // namespace vmm
