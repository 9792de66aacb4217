// SPDX-License-Identifier: Apache-2.0
// Whether the machine does something for someone, judged from a sample every half second. Calls nothing.
#pragma once

#include <stdint.h>

struct Sample {
  uint64_t busy_ticks;      // of all processors, without the agent's own (1/100 s)
  uint64_t kernel_ticks;    // those of them that the kernel took, the agent's own included
  uint64_t balloon_pages;   // given to the balloon and had back so far
  uint32_t run_queue;       // tasks that want a processor, without the agent
  uint64_t io_sectors;      // read and written so far, of 512 bytes
  uint64_t newest_input_s;  // when a terminal was last read from
  uint64_t time_ms;         // monotonic
};

// docs/agent.md has these numbers too.
class Activity {
 public:
  static constexpr uint64_t kSampleMs = 500;
  static constexpr uint64_t kBusyPermille = 50;        // of one processor: alone enough
  static constexpr uint64_t kQueuedBusyPermille = 20;  // enough where tasks waited in two samples together
  static constexpr uint64_t kIoBytesPerS = 1 << 20;
  static constexpr uint64_t kIdleAfterMs = 2000;    // without a sample that shows something
  static constexpr uint64_t kInputHoldsMs = 10000;  // times of terminals are kept to 8 s by the kernel

  bool is_active() const { return active_; }

  // Returns whether it has changed. The first sample is what the next is compared with, and counts as active.
  bool add(const Sample& sample) {
    const bool was_active = active_;
    if (has_last_) {
      const uint64_t passed_ms = sample.time_ms > last_.time_ms ? sample.time_ms - last_.time_ms : 1;
      uint64_t busy_ticks = grown(sample.busy_ticks, last_.busy_ticks);
      // The balloon's own work is not the machine's: it would have the host let the balloon go as soon as it asked for
      // it.
      const bool balloon_moves = sample.balloon_pages != last_.balloon_pages;
      if (balloon_moves || balloon_moved_) {
        const uint64_t kernel_ticks = grown(sample.kernel_ticks, last_.kernel_ticks);
        busy_ticks -= kernel_ticks < busy_ticks ? kernel_ticks : busy_ticks;
      }
      balloon_moved_ = balloon_moves;
      // A tick may fall to either side of a sample: one alone shows nothing.
      const uint64_t busy_permille = busy_ticks > 1 ? busy_ticks * 10 * 1000 / passed_ms : 0;
      const bool queued = sample.run_queue > 0 && last_.run_queue > 0;
      const uint64_t io_bytes_per_s = grown(sample.io_sectors, last_.io_sectors) * 512 * 1000 / passed_ms;
      if (busy_permille >= kBusyPermille || (queued && busy_permille >= kQueuedBusyPermille) ||
          io_bytes_per_s >= kIoBytesPerS)
        hold(sample.time_ms + kIdleAfterMs);
      if (sample.newest_input_s > last_.newest_input_s) hold(sample.time_ms + kInputHoldsMs);
    } else {
      hold(sample.time_ms + kIdleAfterMs);
    }
    last_ = sample;
    has_last_ = true;
    active_ = sample.time_ms < active_until_ms_;
    return active_ != was_active;
  }

 private:
  static uint64_t grown(uint64_t now, uint64_t before) { return now > before ? now - before : 0; }
  void hold(uint64_t until_ms) {
    if (until_ms > active_until_ms_) active_until_ms_ = until_ms;
  }

  Sample last_ = {};
  bool has_last_ = false;
  bool balloon_moved_ = false;  // in the last sample
  bool active_ = true;
  uint64_t active_until_ms_ = 0;
};
