// SPDX-License-Identifier: Apache-2.0
// The console: escape keys, input with flow control from every kind of descriptor, output that never holds the guest
// up, the terminal given back.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <thread>

#include "console/console_hub.hpp"
#include "plugin/host_context.hpp"

using namespace std::chrono_literals;
using vmm::ConsoleHub;
using vmm::EscapeFilter;
using vmm::EventLoop;
using vmm::Fd;
using vmm::OutputStream;

namespace {

struct Pipe {
  Fd reader, writer;
  Pipe() {
    int ends[2];
    REQUIRE(::pipe2(ends, O_CLOEXEC) == 0);
    reader = Fd(ends[0]);
    writer = Fd(ends[1]);
  }
};

// What comes within `quiet` of the last byte.
std::string read_available(int fd, std::chrono::milliseconds quiet = 50ms) {
  std::string all;
  char bytes[4096];
  pollfd wanted{fd, POLLIN, 0};
  while (::poll(&wanted, 1, static_cast<int>(quiet.count())) == 1) {
    const ssize_t count = ::read(fd, bytes, sizeof bytes);
    if (count <= 0) break;
    all.append(bytes, static_cast<size_t>(count));
  }
  return all;
}

// Reads until `done(what came)`, for at most 10 s: on a busy machine a thread may wait long for its turn.
template <typename Done>
std::string read_until(int fd, Done done) {
  std::string all;
  char bytes[4096];
  pollfd wanted{fd, POLLIN, 0};
  while (!done(all) && ::poll(&wanted, 1, 10'000) == 1) {
    const ssize_t count = ::read(fd, bytes, sizeof bytes);
    if (count <= 0) break;
    all.append(bytes, static_cast<size_t>(count));
  }
  return all;
}
std::string read_until_end(int fd, std::string_view end) {
  return read_until(fd, [=](const std::string& all) { return all.ends_with(end); });
}

// A device with room for `room` bytes.
struct FakeDevice {
  std::string got;
  size_t room = SIZE_MAX;
  static uint64_t input(void* context, const void* data, uint64_t size_bytes) {
    auto& self = *static_cast<FakeDevice*>(context);
    const size_t count = std::min<size_t>(size_bytes, self.room);
    self.got.append(static_cast<const char*>(data), count);
    self.room -= count;
    return count;
  }
};

void run_for(EventLoop& loop, std::chrono::milliseconds time = 20ms) {
  loop.add_timer(time, [&] { loop.stop(); });
  loop.run();
}

struct Pty {
  Fd master, slave;
  Pty() {
    master = Fd(::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC));
    REQUIRE(::grantpt(master.get()) == 0);
    REQUIRE(::unlockpt(master.get()) == 0);
    slave = Fd(::open(::ptsname(master.get()), O_RDWR | O_NOCTTY | O_CLOEXEC));
    REQUIRE(slave);
  }
  bool raw() const {
    termios mode;
    REQUIRE(::tcgetattr(slave.get(), &mode) == 0);
    return (mode.c_lflag & (ICANON | ECHO)) == 0;
  }
  // A process that leads a session on this terminal, in the foreground; gives its wait status.
  template <typename Body>
  pid_t fork_in_foreground(Body&& body) const {
    const pid_t child = ::fork();
    if (child == 0) {
      ::setsid();
      ::ioctl(slave.get(), TIOCSCTTY, 0);
      body();
      ::_exit(0);
    }
    return child;
  }
};

int wait_for(pid_t child) {
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  return status;
}

template <typename Condition>
bool soon(Condition&& condition) {
  for (int i = 0; i < 500; ++i, std::this_thread::sleep_for(10ms))
    if (condition()) return true;
  return false;
}

}  // namespace

TEST_CASE("console: escape keys, also when the two come apart") {
  EscapeFilter filter;
  CHECK(filter.feed("plain\x7f\xff").typed == "plain\x7f\xff");
  auto output = filter.feed("a\x01");
  CHECK(output.typed == "a");
  CHECK_FALSE(output.leave);
  output = filter.feed("xb");
  CHECK(output.leave);
  CHECK(output.typed == "b");
  CHECK(filter.feed("\x01X").leave);
  CHECK(filter.feed("\x01\x01x").typed == "\x01x");
  CHECK(filter.feed(std::string("\x01") + "a" + "\x01" + "A").typed == "\x01\x01");
  output = filter.feed("\x01h");
  CHECK(output.help);
  CHECK(output.typed.empty());
  CHECK(filter.feed("\x01q").typed == "\x01q");
}

TEST_CASE("console: input of a pipe reaches the device as it has room, Ctrl-A X leaves, EOF is no end") {
  auto loop = *EventLoop::create();
  Pipe in, out;
  int leaves = 0;
  FakeDevice device;
  device.room = 3;
  ConsoleHub hub(*loop, {in.reader.get(), out.writer.get(), [&] { ++leaves; }});
  REQUIRE(hub.attach("serial.0", FakeDevice::input, &device));
  const auto second = hub.attach("other.0", FakeDevice::input, &device);
  REQUIRE_FALSE(second);
  CHECK(second.error().message.find("serial.0") != std::string::npos);
  REQUIRE(hub.start());

  REQUIRE(::write(in.writer.get(), "hello", 5) == 5);
  run_for(*loop);
  CHECK(device.got == "hel");
  REQUIRE(::write(in.writer.get(), " world", 6) == 6);
  run_for(*loop);
  CHECK(device.got == "hel");
  device.room = SIZE_MAX;
  std::thread([&] { hub.input_wanted(); }).join();
  run_for(*loop);
  CHECK(device.got == "hello world");

  REQUIRE(::write(in.writer.get(), "\x01x", 2) == 2);
  run_for(*loop);
  CHECK(leaves == 1);
  in.writer.reset();
  run_for(*loop);
  hub.write("still here");
  hub.flush();
  CHECK(read_available(out.reader.get()) == "still here");
  CHECK((::fcntl(in.reader.get(), F_GETFL) & O_NONBLOCK) == 0);
  CHECK((::fcntl(out.writer.get(), F_GETFL) & O_NONBLOCK) == 0);
}

TEST_CASE("console: standard input may be a file, /dev/null, or closed") {
  auto loop = *EventLoop::create();
  Pipe out;
  char name[] = "/tmp/clone-test-console-XXXXXX";
  const Fd file(::mkstemp(name));
  ::unlink(name);
  const std::string text(200'000, 'z');
  REQUIRE(::write(file.get(), text.data(), text.size()) == static_cast<ssize_t>(text.size()));
  REQUIRE(::lseek(file.get(), 0, SEEK_SET) == 0);
  {
    FakeDevice device;
    device.room = 100;
    ConsoleHub hub(*loop, {file.get(), out.writer.get(), {}});
    REQUIRE(hub.attach("serial.0", FakeDevice::input, &device));
    REQUIRE(hub.start());
    run_for(*loop);
    CHECK(device.got.size() == 100);
    CHECK(::lseek(file.get(), 0, SEEK_CUR) < 100'000);  // it waits
    device.room = SIZE_MAX;
    hub.input_wanted();
    run_for(*loop, 100ms);
    CHECK(device.got == text);
  }
  const Fd null(::open("/dev/null", O_RDONLY | O_CLOEXEC));
  for (const int fd : {null.get(), -1}) {
    FakeDevice device;
    ConsoleHub hub(*loop, {fd, out.writer.get(), {}});
    REQUIRE(hub.attach("serial.0", FakeDevice::input, &device));
    CHECK(hub.start());
    run_for(*loop, 5ms);
    CHECK(device.got.empty());
    hub.input_wanted();  // outlives the hub
  }
  run_for(*loop, 5ms);
}

TEST_CASE("console: output to a pipe is complete and in order, and does not cost a write for each byte") {
  Pipe out;
  OutputStream stream(out.writer.get());
  stream.write("before ");
  REQUIRE(stream.start());
  std::string expected = "before ";
  std::string got;
  std::thread reader([&] {
    got = read_until(out.reader.get(), [](const std::string& all) { return all.size() >= 300'000; });
  });
  for (int i = 0; i < 300'000; ++i) {
    const char byte = static_cast<char>('a' + i % 26);
    stream.write({&byte, 1});
    expected += byte;
  }
  CHECK(stream.flush(10s));
  reader.join();
  CHECK(got == expected);
}

TEST_CASE("console: a single byte is out at once") {
  Pipe out;
  OutputStream stream(out.writer.get());
  REQUIRE(stream.start());
  auto quickest = std::chrono::steady_clock::duration::max();
  for (int i = 0; i < 20; ++i) {
    const auto start = std::chrono::steady_clock::now();
    stream.write("k");
    char byte;
    REQUIRE(::read(out.reader.get(), &byte, 1) == 1);
    quickest = std::min(quickest, std::chrono::steady_clock::now() - start);
  }
  CHECK(quickest < 20ms);
}

TEST_CASE("console: a stuck pipe costs one short wait and then a note; the writer is never held") {
  Pipe out;
  OutputStream stream(out.writer.get());
  REQUIRE(stream.start());
  const std::string block(64 * 1024, 'b');
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 64; ++i) stream.write(block);
  CHECK(std::chrono::steady_clock::now() - start < 2s);
  CHECK_FALSE(stream.flush(20ms));

  std::string got;
  std::thread reader([&] { got = read_until_end(out.reader.get(), "the end"); });
  CHECK(stream.flush(10s));
  stream.write("the end");
  CHECK(stream.flush(10s));
  reader.join();
  const size_t note = got.find(" bytes of console output were lost]\r\n");
  REQUIRE(note != std::string::npos);
  CHECK(got.ends_with("lost]\r\nthe end"));
  CHECK(got.size() > OutputStream::kBufferBytes / 2);
}

TEST_CASE("console: a stream whose reader is stuck can be destroyed; a reader that left is no error") {
  {
    Pipe out;
    OutputStream stream(out.writer.get());
    REQUIRE(stream.start());
    stream.write(std::string(200'000, 's'));
  }
  Pipe out;
  OutputStream stream(out.writer.get());
  REQUIRE(stream.start());
  out.reader.reset();
  stream.write("nobody");
  CHECK(stream.flush(10s));
  stream.write("reads");
  CHECK(stream.flush(10s));

  int ends[2];
  REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
  Fd near(ends[0]), far(ends[1]);
  OutputStream socket(near.get());
  REQUIRE(socket.start());
  socket.write("hello");
  CHECK(socket.flush(2s));
  CHECK(read_available(far.get()) == "hello");
  far.reset();
  socket.write("nobody");
  CHECK(socket.flush(2s));
}

TEST_CASE("console: the table of plugins") {
  auto loop = *EventLoop::create();
  Pipe in, out;
  ConsoleHub hub(*loop, {in.reader.get(), out.writer.get(), {}});
  vmm::HostContext context;
  context.console = &hub;
  clone_host host{};
  host.context = &context;
  host.name = "serial.0";
  const clone_host_console* table = vmm::console_service();
  clone_err err{sizeof(clone_err), 0, {}};
  FakeDevice device;
  REQUIRE(table->attach(&host, FakeDevice::input, &device, &err) == CLONE_OK);
  CHECK(table->attach(&host, FakeDevice::input, &device, &err) == CLONE_ERR_BUSY);
  CHECK(std::string(err.message).find("serial.0") != std::string::npos);
  REQUIRE(hub.start());
  table->write(&host, "abc", 3);
  hub.flush();
  CHECK(read_available(out.reader.get()) == "abc");
}

TEST_CASE("console: a terminal is raw while the hub lives, also while the guest does not listen") {
  const Pty pty;
  CHECK_FALSE(pty.raw());
  const pid_t child = pty.fork_in_foreground([&] {
    auto loop = *EventLoop::create();
    FakeDevice device;
    device.room = 0;
    ConsoleHub hub(*loop, {pty.slave.get(), pty.slave.get(), [&] { loop->stop(); }});
    if (!hub.attach("serial.0", FakeDevice::input, &device) || !hub.start()) ::_exit(1);
    hub.write("up\n");
    loop->run();
    hub.write("down\n");
    hub.flush();
  });
  CHECK(read_until_end(pty.master.get(), "up\n") == "up\n");  // no CR: output is raw too
  CHECK(pty.raw());
  REQUIRE(::write(pty.master.get(), "\x03typed\x01x", 8) == 8);
  CHECK(read_until_end(pty.master.get(), "down\n").ends_with("down\n"));
  CHECK(wait_for(child) == 0);
  CHECK_FALSE(pty.raw());
}

TEST_CASE("console: signals that end the process give the terminal back and end it all the same") {
  for (const int signal : {SIGSEGV, SIGABRT, SIGTERM, SIGINT, SIGHUP}) {
    CAPTURE(signal);
    const Pty pty;
    const pid_t child = pty.fork_in_foreground([&] {
      for (const int number : {SIGSEGV, SIGABRT, SIGTERM, SIGINT, SIGHUP}) ::signal(number, SIG_DFL);
      vmm::Terminal terminal(pty.slave.get());
      if (!terminal.enter_raw()) ::_exit(1);
      while (true) ::pause();
    });
    CHECK(soon([&] { return pty.raw(); }));
    ::kill(child, signal);
    const int status = wait_for(child);
    CHECK(WIFSIGNALED(status));
    CHECK(WTERMSIG(status) == signal);
    CHECK_FALSE(pty.raw());
  }
}

TEST_CASE("console: a real fault reaches the handler that was there before; SIGCONT makes the terminal raw again") {
  const Pty pty;
  const pid_t child = pty.fork_in_foreground([&] {
    struct sigaction action {};
    action.sa_sigaction = [](int, siginfo_t* info, void*) { ::_exit(info->si_addr == nullptr ? 42 : 43); };
    action.sa_flags = SA_SIGINFO;
    ::sigaction(SIGSEGV, &action, nullptr);
    vmm::Terminal terminal(pty.slave.get());
    if (!terminal.enter_raw()) ::_exit(1);
    ::raise(SIGSTOP);
    // The shell left the terminal in its own mode; SIGCONT came before this line.
    termios mode;
    ::tcgetattr(pty.slave.get(), &mode);
    if (mode.c_lflag & ICANON) ::_exit(2);
    // In assembly: a sanitizer would report the null pointer instead of letting it fault.
    __asm__ volatile("movl $1, (%0)" : : "r"(nullptr) : "memory");
  });
  int status = 0;
  REQUIRE(::waitpid(child, &status, WUNTRACED) == child);
  REQUIRE(WIFSTOPPED(status));
  termios mode;
  REQUIRE(::tcgetattr(pty.slave.get(), &mode) == 0);
  mode.c_lflag |= ICANON | ECHO;
  REQUIRE(::tcsetattr(pty.slave.get(), TCSANOW, &mode) == 0);
  ::kill(child, SIGCONT);
  status = wait_for(child);
  REQUIRE(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 42);
  CHECK_FALSE(pty.raw());
}

TEST_CASE("console: what is no terminal is left alone") {
  Pipe pipe;
  vmm::Terminal terminal(pipe.reader.get());
  CHECK_FALSE(terminal.enter_raw());
  CHECK_FALSE(terminal.in_background());
  // A process group in the background would be stopped; a terminal of nobody's session can be used.
  const Pty pty;
  const pid_t child = pty.fork_in_foreground([&] {
    if (::fork() == 0) {
      ::setpgid(0, 0);
      vmm::Terminal background(pty.slave.get());
      ::_exit(background.in_background() && !background.enter_raw() ? 0 : 1);
    }
    int status = 0;
    ::wait(&status);
    ::_exit(status == 0 ? 0 : 1);
  });
  CHECK(wait_for(child) == 0);
  CHECK_FALSE(pty.raw());

  const Pty free;
  {
    vmm::Terminal mine(free.slave.get());
    CHECK_FALSE(mine.in_background());
    CHECK(mine.enter_raw());
    CHECK(free.raw());
  }
  CHECK_FALSE(free.raw());
}
