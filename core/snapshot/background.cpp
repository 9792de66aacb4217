// SPDX-License-Identifier: Apache-2.0
// The child that works, and what it tells: "ok", or the error's line.
#include "snapshot/background.hpp"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <limits>
#include <string_view>

namespace vmm {
namespace {

constexpr std::string_view kSuccess = "ok";
constexpr size_t kLongestText = 4096;
constexpr int kLongestEndMs = 5000;  // the loop stands still for it

void close_between(int first, int last) {
  if (first <= last) ::close_range(static_cast<unsigned>(first), static_cast<unsigned>(last), 0);
}

int wait_for(pid_t child) {
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return status;
}

// Nothing of what the other process holds is touched: no destructors, no exit handlers.
[[noreturn]] void be_the_child(int result, int keep, const std::function<Result<void>()>& work) {
  const auto [low, high] = std::minmax(result, keep < 0 ? result : keep);
  close_between(STDERR_FILENO + 1, low - 1);
  close_between(low + 1, high - 1);
  close_between(high + 1, std::numeric_limits<int>::max());
  const Result<void> done = work();
  const std::string_view text = done.ok() ? kSuccess : std::string_view(done.error().message);
  const ssize_t told = ::write(result, text.data(), std::min(text.size(), kLongestText));
  ::_exit(done.ok() && told > 0 ? 0 : 1);
}

}  // namespace

Result<std::unique_ptr<BackgroundWork>> BackgroundWork::start(EventLoop& loop,
                                                              const std::function<Result<void>()>& work, Done done,
                                                              int keep, Abandoned abandoned) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return errno_error("pipe");
  Fd ours(ends[0]), theirs(ends[1]);
  const pid_t parent = ::getpid();
  const pid_t child = ::fork();
  if (child < 0) return errno_error("fork");
  if (child == 0) {
    const bool dies_along = abandoned == Abandoned::killed;
    if (dies_along && (::prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || ::getppid() != parent)) ::_exit(1);
    be_the_child(theirs.get(), keep, work);
  }
  std::unique_ptr<BackgroundWork> running(
      new BackgroundWork(loop, std::move(ours), child, std::move(done), abandoned));
  auto heard = loop.add_fd(running->result_.get(), CLONE_READABLE, [self = running.get()](uint32_t) { self->ready(); });
  if (heard.ok()) return running;
  ::kill(child, SIGKILL);
  return std::move(heard).error();
}

BackgroundWork::~BackgroundWork() {
  if (!result_) return;
  loop_.remove_fd(result_.get());
  pollfd end{result_.get(), POLLIN, 0};
  const bool ends = abandoned_ == Abandoned::awaited && ::poll(&end, 1, kLongestEndMs) > 0;
  if (!ends) ::kill(child_, SIGKILL);
  wait_for(child_);
}

void BackgroundWork::ready() {
  char part[512];
  for (;;) {
    const ssize_t got = ::read(result_.get(), part, sizeof part);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) break;
    if (text_.size() < kLongestText) text_.append(part, static_cast<size_t>(got));
  }
  loop_.remove_fd(result_.get());
  result_.reset();
  const int status = wait_for(child_);
  const Done done = std::move(done_);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0 && text_ == kSuccess) return done({});
  if (text_.empty())
    text_ = "the process that did it ended " +
            (WIFSIGNALED(status) ? "by signal " + std::to_string(WTERMSIG(status))
                                 : "with status " + std::to_string(WEXITSTATUS(status)));
  done(Error{text_, 0, CLONE_ERR_SYSTEM});
}

}  // namespace vmm
