// SPDX-License-Identifier: Apache-2.0
// A running `clone run`.
#include "vmm_process.hpp"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>

using namespace std::chrono_literals;

namespace {

constexpr auto kLimit = 60s;  // for everything a process does; the machine may be busy

struct Pipe {
  vmm::Fd read_end;
  vmm::Fd write_end;

  Pipe() {
    int fds[2];
    REQUIRE(::pipe2(fds, O_CLOEXEC) == 0);
    read_end = vmm::Fd(fds[0]);
    write_end = vmm::Fd(fds[1]);
  }
};

// False at the end of the file.
bool read_into(std::string& text, vmm::Fd& fd) {
  char buffer[4096];
  const ssize_t count = ::read(fd.get(), buffer, sizeof buffer);
  if (count > 0) text.append(buffer, static_cast<size_t>(count));
  return count > 0;
}

}  // namespace

namespace {

std::vector<std::string> run_arguments(const std::string& program, const std::vector<std::string>& arguments) {
  std::vector<std::string> words{"run", "--kernel", CLONE_GUEST_PROGRAM_DIR "/" + program + ".elf"};
  words.insert(words.end(), arguments.begin(), arguments.end());
  return words;
}

}  // namespace

VmmProcess::VmmProcess(const std::string& program, const std::vector<std::string>& arguments)
    : VmmProcess(run_arguments(program, arguments)) {}

VmmProcess::VmmProcess(const std::vector<std::string>& arguments) : start_(std::chrono::steady_clock::now()) {
  std::vector<std::string> words{CLONE_BINARY};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);

  Pipe input, output, errors;
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_adddup2(&actions, input.read_end.get(), STDIN_FILENO);
  ::posix_spawn_file_actions_adddup2(&actions, output.write_end.get(), STDOUT_FILENO);
  ::posix_spawn_file_actions_adddup2(&actions, errors.write_end.get(), STDERR_FILENO);
  const int error = ::posix_spawn(&pid_, CLONE_BINARY, &actions, nullptr, argv.data(), environ);
  ::posix_spawn_file_actions_destroy(&actions);
  REQUIRE(error == 0);
  input_ = std::move(input.write_end);
  output_ = std::move(output.read_end);
  errors_ = std::move(errors.read_end);
}

VmmProcess::~VmmProcess() {
  if (pid_ < 0) return;
  ::kill(pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
}

bool VmmProcess::read_some(std::chrono::steady_clock::time_point end) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(end - std::chrono::steady_clock::now());
  if (left <= 0ms || (!output_ && !errors_)) return false;
  pollfd fds[] = {{output_ ? output_.get() : -1, POLLIN, 0}, {errors_ ? errors_.get() : -1, POLLIN, 0}};
  if (::poll(fds, 2, static_cast<int>(left.count())) <= 0) return false;
  if (fds[0].revents && !read_into(result_.output, output_)) output_.reset();
  if (fds[1].revents && !read_into(result_.errors, errors_)) errors_.reset();
  return true;
}

bool VmmProcess::wait_for(const std::string& text) {
  while (result_.output.find(text) == std::string::npos)
    if (!read_some(start_ + kLimit)) return false;
  return true;
}

bool VmmProcess::wait_for_line(const std::string& text, std::string& line) {
  for (;;) {
    const size_t begin = result_.output.find(text, passed_);
    const size_t end = begin == std::string::npos ? begin : result_.output.find('\n', begin);
    if (end != std::string::npos) {
      line = result_.output.substr(begin, end - begin);
      passed_ = end;
      return true;
    }
    if (!read_some(start_ + kLimit)) return false;
  }
}

void VmmProcess::type(const std::string& text) {
  REQUIRE(::write(input_.get(), text.data(), text.size()) == static_cast<ssize_t>(text.size()));
}

void VmmProcess::signal(int number) { REQUIRE(::kill(pid_, number) == 0); }

VmmResult VmmProcess::finish() {
  input_.reset();
  while (read_some(start_ + kLimit)) {
  }
  if (output_ || errors_) {
    result_.timed_out = true;
    ::kill(pid_, SIGKILL);
  }
  int status = 0;
  ::waitpid(std::exchange(pid_, -1), &status, 0);
  result_.status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  result_.took = std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - start_);
  return std::move(result_);
}

VmmResult run_guest(const std::string& program, const std::vector<std::string>& arguments, const std::string& input) {
  VmmProcess process(program, arguments);
  if (!input.empty()) process.type(input);
  return process.finish();
}

void ends_well(VmmProcess& vm) {
  vm.type(".");
  const VmmResult result = vm.finish();
  CHECK(result.output.ends_with("done\n"));
  CHECK(result.output.find("FAILED") == std::string::npos);
  CHECK(result.errors == "");
  CHECK(result.status == 0);
}

VmmResult run_command(const std::vector<std::string>& arguments) { return VmmProcess(arguments).finish(); }
