// SPDX-License-Identifier: Apache-2.0
// Work in a child process: what it tells, and that it is gone with who started it, whichever way that went.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <optional>
#include <thread>

#include "snapshot/background.hpp"

using namespace vmm;
using namespace std::chrono_literals;

namespace {

struct Stage {
  std::unique_ptr<EventLoop> loop = EventLoop::create().value();
  std::optional<Result<void>> told;

  std::unique_ptr<BackgroundWork> start(const std::function<Result<void>()>& work, int keep = -1) {
    const auto done = [this](Result<void> result) {
      told = std::move(result);
      loop->stop();
    };
    auto started = BackgroundWork::start(*loop, work, done, keep);
    REQUIRE(started.ok());
    return std::move(*started);
  }
  void run() const {
    const EventLoop::TimerId limit = loop->add_timer(10s, [this] { loop->stop(); });
    loop->run();
    loop->cancel_timer(limit);
  }
};

struct Pipe {
  Fd read_end, write_end;
  Pipe() {
    int ends[2];
    REQUIRE(::pipe2(ends, O_CLOEXEC) == 0);
    read_end = Fd(ends[0]);
    write_end = Fd(ends[1]);
  }
  // The child's id, which it writes when it works.
  pid_t child() const {
    pid_t id = 0;
    REQUIRE(::read(read_end.get(), &id, sizeof id) == sizeof id);
    return id;
  }
};

// Works until it is killed.
Result<void> work_for_ever(int pipe) {
  const pid_t id = ::getpid();
  if (::write(pipe, &id, sizeof id) != sizeof id) return Error{"nobody listens"};
  for (;;) ::pause();
}

bool is_gone(pid_t process) {
  const auto end = std::chrono::steady_clock::now() + 10s;
  while (::kill(process, 0) == 0 && std::chrono::steady_clock::now() < end) std::this_thread::sleep_for(1ms);
  return ::kill(process, 0) != 0 && errno == ESRCH;
}

}  // namespace

TEST_CASE("background work: success, an error and a sudden death are told") {
  Stage stage;
  std::unique_ptr<BackgroundWork> work = stage.start([] { return Result<void>(); });
  stage.run();
  REQUIRE(stage.told);
  CHECK(stage.told->ok());
  work = stage.start([]() -> Result<void> { return Error{"no room"}; });
  stage.run();
  CHECK(stage.told->error().message == "no room");
  work = stage.start([]() -> Result<void> { ::_exit(3); });
  stage.run();
  CHECK(stage.told->error().message == "the process that did it ended with status 3");
  Pipe pipe;
  work = stage.start([&] { return work_for_ever(pipe.write_end.get()); }, pipe.write_end.get());
  ::kill(pipe.child(), SIGKILL);
  stage.run();
  CHECK(stage.told->error().message == "the process that did it ended by signal 9");
}

TEST_CASE("background work: who gives it up leaves no process, and none that nobody has waited for") {
  Stage stage;
  Pipe pipe;
  std::unique_ptr<BackgroundWork> work =
      stage.start([&] { return work_for_ever(pipe.write_end.get()); }, pipe.write_end.get());
  const pid_t child = pipe.child();
  REQUIRE(::kill(child, 0) == 0);
  work.reset();
  CHECK(::kill(child, 0) != 0);
  CHECK(errno == ESRCH);
  CHECK(!stage.told);
}

TEST_CASE("background work: it dies with the process that started it") {
  // Whose parent died would have another one now: ours, which sees it as its child, or none.
  REQUIRE(::prctl(PR_SET_CHILD_SUBREAPER, 1) == 0);
  Pipe pipe;
  const pid_t starter = ::fork();
  REQUIRE(starter >= 0);
  if (starter == 0) {
    Stage stage;
    const auto work = stage.start([&] { return work_for_ever(pipe.write_end.get()); }, pipe.write_end.get());
    for (;;) ::pause();
  }
  const pid_t child = pipe.child();
  REQUIRE(::kill(child, 0) == 0);
  REQUIRE(::kill(starter, SIGKILL) == 0);
  REQUIRE(::waitpid(starter, nullptr, 0) == starter);
  int status = 0;
  CHECK(::waitpid(child, &status, 0) == child);
  CHECK(WIFSIGNALED(status));
  CHECK(WTERMSIG(status) == SIGKILL);
  CHECK(is_gone(child));
  REQUIRE(::prctl(PR_SET_CHILD_SUBREAPER, 0) == 0);
}
