// SPDX-License-Identifier: Apache-2.0
// Starting, reading and ending other programs.
#include "process.hpp"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <utility>

#include "progress.hpp"

namespace rootfs {

using vmm::errno_error;
using vmm::Error;
using vmm::Fd;
using vmm::Result;

namespace {

constexpr size_t kKeptLines = 6;
constexpr size_t kLongestLine = 2000;
constexpr int kTidyUpSeconds = 20;

std::vector<char*> pointers(std::vector<std::string>& words) {
  std::vector<char*> result;
  for (std::string& word : words) result.push_back(word.data());
  result.push_back(nullptr);
  return result;
}

}  // namespace

std::string find_program(const std::string& name) {
  const char* path = std::getenv("PATH");
  std::string folders = std::string(path ? path : "/usr/local/bin:/usr/bin:/bin") + ":/usr/local/sbin:/usr/sbin:/sbin:";
  for (size_t end; (end = folders.find(':')) != std::string::npos; folders.erase(0, end + 1)) {
    const std::string file = folders.substr(0, end) + "/" + name;
    if (end != 0 && ::access(file.c_str(), X_OK) == 0) return file;
  }
  return {};
}

std::string program_folder() {
  std::error_code ignored;
  return std::filesystem::read_symlink("/proc/self/exe", ignored).parent_path().string();
}

Result<Process> Process::start(std::vector<std::string> arguments, Options options) {
  const std::string file = find_program(arguments[0]);
  if (file.empty()) return Error{arguments[0] + " is not installed", ENOENT};
  int output[2];
  int messages[2];
  if (::pipe2(output, O_CLOEXEC) != 0) return errno_error("pipe");
  Fd output_read(output[0]), output_write(output[1]);
  if (::pipe2(messages, O_CLOEXEC) != 0) return errno_error("pipe");
  Fd messages_read(messages[0]), messages_write(messages[1]);

  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
  ::posix_spawn_file_actions_adddup2(&actions, output[1], 1);
  ::posix_spawn_file_actions_adddup2(&actions, messages[1], 2);
  posix_spawnattr_t attributes;
  ::posix_spawnattr_init(&attributes);
  sigset_t defaults;
  sigemptyset(&defaults);
  for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGPIPE}) sigaddset(&defaults, number);
  ::posix_spawnattr_setsigdefault(&attributes, &defaults);
  ::posix_spawnattr_setpgroup(&attributes, 0);
  ::posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGDEF);

  // What is added counts: the first of two entries is the one that programs see.
  std::vector<std::string> environment = options.environment;
  for (char** entry = environ; *entry; ++entry) environment.emplace_back(*entry);

  Process process;
  process.name_ = arguments[0];
  const int result = ::posix_spawn(&process.pid_, file.c_str(), &actions, &attributes, pointers(arguments).data(),
                                   pointers(environment).data());
  ::posix_spawn_file_actions_destroy(&actions);
  ::posix_spawnattr_destroy(&attributes);
  if (result != 0) return errno_error(file, result);
  process.output_ = std::move(output_read);
  process.messages_ = std::move(messages_read);
  process.options_ = std::move(options);
  return process;
}

Process::Process(Process&& other) noexcept
    : name_(std::move(other.name_)),
      pid_(std::exchange(other.pid_, -1)),
      output_(std::move(other.output_)),
      messages_(std::move(other.messages_)),
      line_(std::move(other.line_)),
      last_lines_(std::move(other.last_lines_)),
      options_(std::move(other.options_)) {}

Process::~Process() { kill_group(); }

void Process::kill_group() {
  if (pid_ <= 0) return;
  const pid_t pid = std::exchange(pid_, -1);
  // A writer that waits for us to read must be able to leave.
  output_.reset();
  messages_.reset();
  ::kill(-pid, SIGTERM);
  for (int tenths = 0; tenths < kTidyUpSeconds * 10; ++tenths) {
    if (::waitpid(pid, nullptr, WNOHANG) == pid) {
      ::kill(-pid, SIGKILL);  // what it left behind
      return;
    }
    ::usleep(100000);
  }
  ::kill(-pid, SIGKILL);
  ::waitpid(pid, nullptr, 0);
}

void Process::take_messages(std::string_view text) {
  for (const char c : text) {
    // A progress line that is redrawn ends with a carriage return.
    if (c != '\n' && c != '\r') {
      if (line_.size() < kLongestLine) line_ += c;
      continue;
    }
    if (line_.empty()) continue;
    if (options_.on_line) options_.on_line(line_);
    last_lines_.push_back(std::exchange(line_, {}));
    if (last_lines_.size() > kKeptLines) last_lines_.pop_front();
  }
}

Result<size_t> Process::read(std::span<char> buffer) {
  while (output_) {
    pollfd polled[] = {{output_.get(), POLLIN, 0}, {messages_.get(), POLLIN, 0}};
    const int ready = ::poll(polled, messages_ ? 2 : 1, 200);
    if (options_.ending == Ending::with_us) TRY(interrupted());
    if (ready < 0 && errno != EINTR) return errno_error("poll");
    if (ready <= 0) continue;
    if (messages_ && polled[1].revents) {
      char text[4096];
      const ssize_t count = ::read(messages_.get(), text, sizeof text);
      if (count > 0) take_messages({text, static_cast<size_t>(count)});
      if (count == 0) messages_.reset();
    }
    if (polled[0].revents) {
      const ssize_t count = ::read(output_.get(), buffer.data(), buffer.size());
      if (count < 0 && errno != EINTR) return errno_error(name_);
      if (count > 0) return static_cast<size_t>(count);
      if (count == 0) output_.reset();
    }
  }
  return size_t{0};
}

Result<void> Process::finish() {
  char scrap[65536];
  while (TRY(read(scrap)) > 0) {
  }
  int status = 0;
  for (;;) {
    if (options_.ending == Ending::with_us) TRY(interrupted());
    if (messages_) {
      pollfd polled{messages_.get(), POLLIN, 0};
      if (::poll(&polled, 1, 100) > 0) {
        const ssize_t count = ::read(messages_.get(), scrap, sizeof scrap);
        if (count > 0) take_messages({scrap, static_cast<size_t>(count)});
        if (count == 0) messages_.reset();
        if (count > 0) continue;
      }
    } else {
      ::usleep(2000);
    }
    const pid_t ended = ::waitpid(pid_, &status, WNOHANG);
    if (ended < 0 && errno != EINTR) return errno_error(name_);
    if (ended == pid_) break;
  }
  pid_ = -1;
  for (pollfd polled{messages_.get(), POLLIN, 0}; messages_ && ::poll(&polled, 1, 0) > 0;) {
    const ssize_t count = ::read(messages_.get(), scrap, sizeof scrap);
    if (count <= 0) break;
    take_messages({scrap, static_cast<size_t>(count)});
  }
  take_messages("\n");
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return {};
  std::string message =
      name_ + (WIFEXITED(status) ? " failed with status " + std::to_string(WEXITSTATUS(status))
                                 : std::string(" was ended by SIG") + ::sigabbrev_np(WTERMSIG(status)));
  for (const std::string& line : last_lines_) message += "\n" + name_ + ": " + line;
  return Error{message};
}

Result<std::string> Process::output(std::vector<std::string> arguments, size_t limit_bytes) {
  Process process = TRY(start(std::move(arguments)));
  std::string text;
  char buffer[65536];
  while (const size_t count = TRY(process.read(buffer))) {
    if (text.size() + count > limit_bytes) return Error{process.name_ + " says more than expected"};
    text.append(buffer, count);
  }
  TRY(process.finish());
  return text;
}

Result<void> Process::run(std::vector<std::string> arguments, Options options) {
  Process process = TRY(start(std::move(arguments), std::move(options)));
  return process.finish();
}

}  // namespace rootfs
