// SPDX-License-Identifier: Apache-2.0
// Forks the child, reads its verdicts within the time that it has, and buries it.
#include "plugin/check_recorder.hpp"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <exception>

#include "util/fd.hpp"

namespace vmm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr char kNextRule = 'n';
constexpr uint32_t kLongestText = 16384;

// A record: kind, length, text.
struct RecordHead {
  char kind;
  uint32_t size_bytes;
};

bool write_all(int fd, const void* data, size_t size_bytes) {
  for (const char* from = static_cast<const char*>(data); size_bytes != 0;) {
    const ssize_t written = ::write(fd, from, size_bytes);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return false;
    from += written;
    size_bytes -= static_cast<size_t>(written);
  }
  return true;
}

// False at the end, and when time is over.
bool read_all(int fd, void* data, size_t size_bytes, Clock::time_point deadline) {
  for (char* into = static_cast<char*>(data); size_bytes != 0;) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
    pollfd entry{fd, POLLIN, 0};
    const int ready = left > 0 ? ::poll(&entry, 1, static_cast<int>(left)) : 0;
    if (ready < 0 && errno == EINTR) continue;
    if (ready <= 0) return false;
    const ssize_t got = ::read(fd, into, size_bytes);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    into += got;
    size_bytes -= static_cast<size_t>(got);
  }
  return true;
}

[[noreturn]] void run_child(int fd, const std::function<void(CheckRecorder&)>& phase) {
  ::setpgid(0, 0);
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  const rlimit no_core{0, 0};
  ::setrlimit(RLIMIT_CORE, &no_core);
  for (int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT}) ::signal(number, SIG_DFL);
  ::signal(SIGPIPE, SIG_IGN);
  // What the plugin prints is not the check's output.
  const int null = ::open("/dev/null", O_RDWR | O_CLOEXEC);
  for (int standard : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) ::dup2(null, standard);
  CheckRecorder recorder(fd);
  phase(recorder);
  // Without destructors and exit handlers: those of the plugin's file are not part of its promises.
  ::_exit(0);
}

std::string describe_end(int status) {
  if (WIFSIGNALED(status)) return "crashed (signal " + std::to_string(WTERMSIG(status)) + ")";
  return "ended the process with exit(" + std::to_string(WEXITSTATUS(status)) + ")";
}

}  // namespace

void CheckRecorder::send(char kind, const std::string& text) {
  const RecordHead head{kind, static_cast<uint32_t>(std::min<size_t>(text.size(), kLongestText))};
  if (!write_all(fd_, &head, sizeof head) || !write_all(fd_, text.data(), head.size_bytes)) ::_exit(1);
}

bool CheckRecorder::rule(const std::string& what, const std::function<Verdict()>& body) {
  send(kNextRule, what);
  Verdict verdict;
  try {
    verdict = body();
  } catch (const std::exception& exception) {
    verdict = Verdict::failed(std::string("an exception crossed the interface: ") + exception.what());
  } catch (...) {
    verdict = Verdict::failed("an exception crossed the interface");
  }
  send(static_cast<char>(verdict.kind), verdict.detail);
  return verdict.kind != CheckVerdict::failed;
}

PhaseEnd run_check_phase(std::vector<CheckRow>& rows, unsigned limit_ms,
                         const std::function<void(CheckRecorder&)>& phase) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) {
    rows.push_back({CheckVerdict::failed, "the check can be run", errno_error("pipe").message});
    return PhaseEnd::died;
  }
  const Fd read_end(ends[0]);
  Fd write_end(ends[1]);
  const auto deadline = Clock::now() + std::chrono::milliseconds(limit_ms);
  const pid_t child = ::fork();
  if (child < 0) {
    rows.push_back({CheckVerdict::failed, "the check can be run", errno_error("fork").message});
    return PhaseEnd::died;
  }
  if (child == 0) run_child(write_end.get(), phase);
  write_end.reset();

  std::string current = "the plugin survives its check";
  bool at_rule = false;
  RecordHead head;
  while (read_all(read_end.get(), &head, sizeof head, deadline) && head.size_bytes <= kLongestText) {
    std::string text(head.size_bytes, '\0');
    if (!read_all(read_end.get(), text.data(), text.size(), deadline)) break;
    at_rule = head.kind == kNextRule;
    if (at_rule)
      current = std::move(text);
    else
      rows.push_back({static_cast<CheckVerdict>(head.kind), current, std::move(text)});
  }

  // The pipe's end comes before the process's; a thread that runs on, or hangs, is not waited for.
  int status = 0;
  pid_t ended = 0;
  while ((ended = ::waitpid(child, &status, WNOHANG)) == 0 && Clock::now() < deadline) ::usleep(500);
  const bool hung = ended == 0;
  ::kill(-child, SIGKILL);
  if (hung) ::waitpid(child, &status, 0);
  if (!hung && WIFEXITED(status) && WEXITSTATUS(status) == 0 && !at_rule) return PhaseEnd::completed;
  const std::string how = hung ? "hung (killed after " + std::to_string(limit_ms / 1000) + " s)" : describe_end(status);
  rows.push_back(
      {CheckVerdict::failed, current, how + (at_rule ? " while this was checked" : " after this was checked")});
  return PhaseEnd::died;
}

}  // namespace vmm
