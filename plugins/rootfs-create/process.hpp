// SPDX-License-Identifier: Apache-2.0
// One program that we start: its arguments never pass a shell, its messages are kept for the case that it fails, and it
// ends with us.
#pragma once

#include <sys/types.h>

#include <deque>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "util/fd.hpp"
#include "util/result.hpp"

namespace rootfs {

enum class Ending { with_us, when_it_is_done };

class Process {
 public:
  struct Options {
    std::vector<std::string> environment;                // KEY=VALUE, beside ours
    std::function<void(std::string_view line)> on_line;  // what it says on standard error
    Ending ending = Ending::with_us;                     // whether a signal to us ends the wait for it
  };

  // Looked up in PATH and the folders of the system's own programs. In a process group of its own, standard input
  // empty.
  static vmm::Result<Process> start(std::vector<std::string> arguments, Options options);
  static vmm::Result<Process> start(std::vector<std::string> arguments) {
    return start(std::move(arguments), Options());
  }
  Process(Process&& other) noexcept;
  Process& operator=(Process&&) = delete;
  // Kills the group of a process that has not ended: SIGTERM, some seconds to tidy up, SIGKILL.
  ~Process();

  // Bytes of its standard output; 0 at the end.
  vmm::Result<size_t> read(std::span<char> buffer);
  // Waits for it; an error unless it ended with 0, with its last words.
  vmm::Result<void> finish();

  // Standard output as text, of at most `limit_bytes`.
  static vmm::Result<std::string> output(std::vector<std::string> arguments, size_t limit_bytes = 1 << 20);
  static vmm::Result<void> run(std::vector<std::string> arguments, Options options);
  static vmm::Result<void> run(std::vector<std::string> arguments) { return run(std::move(arguments), Options()); }

 private:
  Process() = default;
  void kill_group();
  void take_messages(std::string_view text);

  std::string name_;
  pid_t pid_ = -1;
  vmm::Fd output_;
  vmm::Fd messages_;
  std::string line_;
  std::deque<std::string> last_lines_;
  Options options_;
};

// The full path of a program, or an empty text.
std::string find_program(const std::string& name);

// The folder that this program stands in, PREFIX/libexec/clone.
std::string program_folder();

}  // namespace rootfs
