// SPDX-License-Identifier: Apache-2.0
// Tells what is being done: on a terminal one line that is redrawn, elsewhere a line for each stage. And the end by a
// signal: loops that take long ask interrupted() and leave by the error that it gives.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "util/result.hpp"

namespace rootfs {

// SIGINT, SIGTERM and SIGHUP no longer end the process; SIGPIPE is ignored.
void catch_signals();
// 0, or the signal that came.
int signal_caught();
// An error once a signal has come.
vmm::Result<void> interrupted();

enum class Loudness { normal, quiet };

class Progress {
 public:
  explicit Progress(Loudness loudness);
  ~Progress() { clear(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // A new stage; its name is what a failure is told with.
  void stage(std::string name);
  const std::string& stage_name() const { return stage_; }
  // `total` 0: unknown.
  void bytes(uint64_t done, uint64_t total);
  void detail(std::string_view text);
  // A line that stays.
  void note(std::string_view text);
  // Takes the redrawn line away.
  void clear();

 private:
  void draw(bool at_once);

  bool terminal_;
  bool quiet_;
  bool drawn_ = false;
  std::string stage_;
  std::string detail_;
  uint64_t done_ = 0;
  uint64_t total_ = 0;
  int64_t last_drawn_ms_ = 0;
};

}  // namespace rootfs
