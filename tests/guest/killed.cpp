// SPDX-License-Identifier: Apache-2.0
// Kills a command of `clone` at a step of its own.
#include "killed.hpp"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>

#include "util/fd.hpp"

namespace {

constexpr int kCallStop = SIGTRAP | 0x80;  // PTRACE_O_TRACESYSGOOD

pid_t start_traced(std::vector<std::string> words, const std::string& input) {
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  int ends[2];
  REQUIRE(::pipe2(ends, O_CLOEXEC) == 0);
  const vmm::Fd read_end(ends[0]), write_end(ends[1]), nowhere(::open("/dev/null", O_RDWR | O_CLOEXEC));
  REQUIRE(::write(write_end.get(), input.data(), input.size()) == static_cast<ssize_t>(input.size()));
  const pid_t pid = ::fork();
  REQUIRE(pid >= 0);
  if (pid == 0) {
    ::setpgid(0, 0);  // to wait for its threads, and no others
    ::dup2(read_end.get(), STDIN_FILENO);
    ::dup2(nowhere.get(), STDOUT_FILENO);
    ::dup2(nowhere.get(), STDERR_FILENO);
    ::setenv("ASAN_OPTIONS", "detect_leaks=0", 1);  // which cannot be done under a tracer
    ::ptrace(PTRACE_TRACEME, 0, nullptr, nullptr);
    ::execv(argv.front(), argv.data());
    ::_exit(127);
  }
  int status = 0;
  REQUIRE(::waitpid(pid, &status, 0) == pid);
  REQUIRE(WIFSTOPPED(status));
  REQUIRE(::ptrace(PTRACE_SETOPTIONS, pid, nullptr, PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACECLONE | PTRACE_O_EXITKILL) == 0);
  REQUIRE(::ptrace(PTRACE_SYSCALL, pid, nullptr, nullptr) == 0);
  return pid;
}

}  // namespace

Killed killed_after(size_t steps, const std::vector<std::string>& arguments, const std::string& input) {
  std::vector<std::string> words{CLONE_BINARY};
  words.insert(words.end(), arguments.begin(), arguments.end());
  const pid_t pid = start_traced(std::move(words), input);
  size_t count = 0;
  int status = 0, end = 0;
  for (pid_t thread = 0; (thread = ::waitpid(-pid, &status, __WALL)) > 0;) {
    if (!WIFSTOPPED(status)) {  // a thread ended, or, as the last, the process
      if (thread == pid) end = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
      continue;
    }
    const int signal = WSTOPSIG(status);
    if (signal == kCallStop && ++count == steps) ::kill(pid, SIGKILL);
    // A new thread's first stop is no signal that it was sent; nor is the stop of the one that began it.
    const bool sent = signal != kCallStop && signal != SIGSTOP && status >> 16 == 0;
    ::ptrace(PTRACE_SYSCALL, thread, nullptr, sent ? signal : 0);
  }
  return {std::min(count, steps), end};
}

size_t steps_of(const std::vector<std::string>& arguments, const std::string& input) {
  const Killed whole = killed_after(SIZE_MAX, arguments, input);
  REQUIRE(whole.status == 0);
  return whole.steps;
}
