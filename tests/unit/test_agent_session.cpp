// SPDX-License-Identifier: Apache-2.0
// What `clone exec` and `clone cp` say to an agent: one that is played here, hostile ones, and the real one.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <thread>

#include "agent/copy.hpp"
#include "agent/exec.hpp"
#include "agent_client.hpp"
#include "scratch_dir.hpp"

using namespace std::chrono_literals;
using agent_protocol::Type;
using agent_protocol::Writer;
using vmm::AgentSession;
using vmm::ExecEnd;
using vmm::Fd;
using vmm::Result;

namespace {

std::pair<Fd, Fd> socket_pair() {
  int fds[2];
  REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
  return {Fd(fds[0]), Fd(fds[1])};
}

// The agent's end of a stream: what `play` sends and reads there, on a thread of its own.
class FakeAgent {
 public:
  explicit FakeAgent(std::function<void(FakeAgent&)> play) {
    auto [ours, theirs] = socket_pair();
    stream = std::move(ours);
    fd_ = std::move(theirs);
    thread_ = std::thread([this, play = std::move(play)] {
      play(*this);
      ::shutdown(fd_.get(), SHUT_RDWR);
    });
  }
  ~FakeAgent() {
    stream.reset();
    if (thread_.joinable()) thread_.join();
  }

  void raw(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t sent = ::send(fd_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent <= 0) return;
      bytes.remove_prefix(static_cast<size_t>(sent));
    }
  }
  void hello(uint16_t major = agent_protocol::kMajor, uint32_t magic = agent_protocol::kMagic) {
    send(Type::hello, [&](Writer& writer) {
      writer.u32(magic);
      writer.u16(major);
      writer.u16(0);
      agent_protocol::put_text(writer, "fake");
    });
  }
  template <typename Fill>
  void send(Type type, Fill&& fill) {
    raw(agent_protocol::make_frame(type, fill));
  }
  void numbers(Type type, std::initializer_list<uint32_t> values) {
    send(type, [&](Writer& writer) {
      for (const uint32_t value : values) writer.u32(value);
    });
  }
  void bytes(Type type, std::string_view data) {
    send(type, [&](Writer& writer) { writer.bytes(data.data(), data.size()); });
  }
  void error(uint32_t code, std::string_view message) {
    send(Type::error, [&](Writer& writer) {
      writer.u32(code);
      writer.u16(0);
      agent_protocol::put_text(writer, message);
    });
  }
  void entry(uint32_t mode, uint64_t size_bytes, std::string_view path, std::string_view link = "") {
    send(Type::entry, [&](Writer& writer) {
      for (const uint32_t value : {mode, 0u, 0u}) writer.u32(value);
      writer.u64(1'000'000'000);
      writer.u32(5);
      writer.u64(size_bytes);
      agent_protocol::put_text(writer, path);
      agent_protocol::put_text(writer, link);
    });
  }
  // The next frame of the host's: its type, 0 at the end.
  Type receive(std::string* payload = nullptr) {
    agent_protocol::Frame frame;
    while (buffer_->next(frame) != agent_protocol::FrameBuffer::Next::frame) {
      uint8_t* space = buffer_->space();
      const ssize_t got = ::recv(fd_.get(), space, buffer_->space_bytes(), 0);
      if (got <= 0) return Type{};
      buffer_->added(static_cast<size_t>(got));
    }
    if (payload) *payload = agent_protocol::bytes_of(frame);
    return frame.type;
  }
  // Both hellos and the request.
  Type begin() {
    hello();
    return receive() == Type::hello ? receive() : Type{};
  }
  int fd() const { return fd_.get(); }

  Fd stream;

 private:
  Fd fd_;
  std::unique_ptr<agent_protocol::FrameBuffer> buffer_{new agent_protocol::FrameBuffer};
  std::thread thread_;
};

struct Pipe {
  Pipe() {
    int fds[2];
    REQUIRE(::pipe2(fds, O_CLOEXEC) == 0);
    out = Fd(fds[0]);
    in = Fd(fds[1]);
  }
  std::string read_all() {
    in.reset();
    std::string all;
    char part[65536];
    for (ssize_t got; (got = ::read(out.get(), part, sizeof part)) > 0;) all.append(part, static_cast<size_t>(got));
    return all;
  }
  Fd out, in;
};

const std::string& command() {
  static const std::string frame = *vmm::exec_frame({.arguments = {"true"}});
  return frame;
}

std::string exec_error(std::function<void(FakeAgent&)> play, AgentSession::Milliseconds limit = 2000ms) {
  FakeAgent agent(std::move(play));
  AgentSession session(std::move(agent.stream));
  Pipe output;
  const auto end = vmm::run_exec(session, command(), {.output = output.in.get(), .errors = output.in.get()}, limit);
  if (!end.ok()) return end.error().message;
  return "status " + std::to_string(end->status) + (end->message.empty() ? "" : ": " + end->message);
}

}  // namespace

TEST_CASE("exec: the request has its fields in order") {
  const auto frame = vmm::exec_frame({.arguments = {"a", "b"},
                                      .environment = {"X=1"},
                                      .user = "u",
                                      .directory = "/d",
                                      .terminal = true,
                                      .input = true,
                                      .rows = 24,
                                      .columns = 80});
  REQUIRE(frame.ok());
  agent_protocol::Reader reader(frame->data() + 8, frame->size() - 8);
  CHECK(reader.u32() == (agent_protocol::kExecTerminal | agent_protocol::kExecInput));
  CHECK(reader.u16() == 24);
  CHECK(reader.u16() == 80);
  for (const char* text : {"u", "/d"}) CHECK(agent_protocol::printable(reader.text()) == text);
  CHECK(reader.u32() == 2);
  for (const char* text : {"a", "b"}) CHECK(agent_protocol::printable(reader.text()) == text);
  CHECK(reader.u32() == 1);
  CHECK(agent_protocol::printable(reader.text()) == "X=1");
  CHECK_FALSE(reader.failed());
  CHECK(reader.left_bytes() == 0);
  CHECK(vmm::exec_frame({.arguments = {std::string(70000, 'x')}}).error().message ==
        "the command and its environment are longer than 64 KiB");
}

TEST_CASE("exec: output, errors and status") {
  FakeAgent agent([](FakeAgent& self) {
    if (self.begin() != Type::exec) return;
    self.numbers(Type::started, {7});
    self.bytes(Type::output, "out");
    self.bytes(Type::errors, "err");
    self.bytes(Type::output, "put");
    self.numbers(Type::exited, {3, 0});
  });
  AgentSession session(std::move(agent.stream));
  Pipe output, errors;
  const auto end = vmm::run_exec(session, command(), {.output = output.in.get(), .errors = errors.in.get()}, 2000ms);
  REQUIRE_MESSAGE(end.ok(), end.error().message);
  CHECK(end->status == 3);
  CHECK(output.read_all() == "output");
  CHECK(errors.read_all() == "err");
}

TEST_CASE("exec: how a command ends, and what cannot run") {
  const auto refused = [](uint32_t code, std::string message) {
    return exec_error([=](FakeAgent& self) {
      self.begin();
      self.error(code, message);
    });
  };
  CHECK(refused(ENOENT, "no such\x1b[2J") == "status 127: no such?[2J");
  CHECK(refused(EACCES, "denied") == "status 126: denied");
  CHECK(refused(EINVAL, "no user") == "status 125: no user");
  const auto ended = [](uint32_t code, uint32_t signal) {
    return exec_error([=](FakeAgent& self) {
      self.begin();
      self.numbers(Type::started, {1});
      self.numbers(Type::exited, {code, signal});
    });
  };
  CHECK(ended(0, 0) == "status 0");
  CHECK(ended(255, 0) == "status 255");
  CHECK(ended(0, SIGKILL) == "status 137");
  CHECK(ended(256, 0) == "the agent sent an end that makes no sense");
  CHECK(ended(0, 400) == "the agent sent an end that makes no sense");
}

TEST_CASE("exec: hostile agents") {
  CHECK(exec_error([](FakeAgent& self) { self.raw("HTTP/1.1 400 Bad Request\r\n\r\n"); }) ==
        "the agent sent a frame that this protocol does not have");
  CHECK(exec_error([](FakeAgent& self) { self.numbers(Type::started, {1}); }) ==
        "what answers in the guest is not the agent");
  CHECK(exec_error([](FakeAgent& self) { self.hello(1, 7); }) == "what answers in the guest is not the agent");
  CHECK(exec_error([](FakeAgent& self) { self.hello(2); }).starts_with("the agent speaks version 2.0"));
  CHECK(exec_error([](FakeAgent&) {}) == "no agent answers in the guest");
  CHECK(exec_error([](FakeAgent& self) { self.begin(); }) == "the agent closed the connection");
  CHECK(exec_error([](FakeAgent& self) {
          self.begin();
          self.bytes(Type::output, "x");
        }) == "the agent sent output of a command that it had not begun");
  CHECK(exec_error([](FakeAgent& self) {
          self.begin();
          self.raw(std::string("\x01\x00\x01\x00\x23\x00\x00\x00", 8));  // 65537 bytes
        }) == "the agent sent a frame that this protocol does not have");
  CHECK(exec_error([](FakeAgent& self) {
          self.begin();
          self.raw(std::string("\x00\x00\x00\x00\x21\x00\x01\x00", 8));  // flags
        }) == "the agent sent a frame that this protocol does not have");
  CHECK(exec_error([](FakeAgent& self) {
          self.begin();
          self.numbers(Type::started, {1});
          for (int i = 0; i < 100000; ++i) self.bytes(Type::output, "");
        }) == "the agent sends frames without end and without meaning");
  SUBCASE("one that never answers costs the limit and no more") {
    const auto start = std::chrono::steady_clock::now();
    CHECK(exec_error(
              [](FakeAgent& self) {
                self.hello();
                while (self.receive() != Type{}) {
                }
              },
              200ms) == "the agent did not begin the command in its time");
    const auto took = std::chrono::steady_clock::now() - start;
    CHECK(took >= 200ms);
    CHECK(took < 1500ms);
  }
}

TEST_CASE("exec: a slow reader gets everything, while input goes on") {
  constexpr size_t kOutputBytes = 8 << 20;
  constexpr size_t kInputBytes = 4 << 20;
  size_t input_bytes = 0;
  FakeAgent agent([&](FakeAgent& self) {
    if (self.begin() != Type::exec) return;
    self.numbers(Type::started, {1});
    std::thread output([&] {
      for (size_t sent = 0; sent < kOutputBytes; sent += 1 << 16) self.bytes(Type::output, std::string(1 << 16, 'o'));
    });
    std::string part;
    for (Type type; (type = self.receive(&part)) == Type::input && !part.empty();) input_bytes += part.size();
    output.join();
    self.numbers(Type::exited, {0, 0});
  });
  AgentSession session(std::move(agent.stream));
  Pipe input, output;
  std::thread writer([&] {
    const std::string part(1 << 16, 'i');
    for (size_t sent = 0; sent < kInputBytes; sent += part.size())
      if (::write(input.in.get(), part.data(), part.size()) < 0) break;
    input.in.reset();
  });
  size_t got_bytes = 0;
  std::thread reader([&] {
    std::this_thread::sleep_for(100ms);
    char part[65536];
    for (ssize_t got; (got = ::read(output.out.get(), part, sizeof part)) > 0;) got_bytes += static_cast<size_t>(got);
  });
  const auto end = vmm::run_exec(session, command(), {.input = input.out.get(), .output = output.in.get()}, 2000ms);
  output.in.reset();
  reader.join();
  writer.join();
  REQUIRE_MESSAGE(end.ok(), end.error().message);
  CHECK(got_bytes == kOutputBytes);
  CHECK(input_bytes == kInputBytes);
}

TEST_CASE("exec: a reader that left ends it quietly") {
  ::signal(SIGPIPE, SIG_IGN);
  FakeAgent agent([](FakeAgent& self) {
    self.begin();
    self.numbers(Type::started, {1});
    self.bytes(Type::output, "nobody reads this");
    while (self.receive() != Type{}) {
    }
  });
  AgentSession session(std::move(agent.stream));
  Pipe output;
  output.out.reset();
  const auto end = vmm::run_exec(session, command(), {.output = output.in.get()}, 2000ms);
  REQUIRE(end.ok());
  CHECK(end->status == 128 + SIGPIPE);
  CHECK(end->message.empty());
}

TEST_CASE("exec: signals are passed on, the second one leaves") {
  sigset_t set, before;
  ::sigemptyset(&set);
  ::sigaddset(&set, SIGHUP);
  ::pthread_sigmask(SIG_BLOCK, &set, &before);
  const Fd signals(::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
  const pthread_t main_thread = ::pthread_self();
  std::atomic<uint32_t> number{0};
  FakeAgent agent([&](FakeAgent& self) {
    self.begin();
    self.numbers(Type::started, {1});
    self.bytes(Type::output, "x");
    std::string payload;
    while (true) {
      const Type type = self.receive(&payload);
      if (type == Type{}) return;
      if (type != Type::signal) continue;
      number = agent_protocol::Reader(payload.data(), payload.size()).u32();
      ::pthread_kill(main_thread, SIGHUP);
    }
  });
  AgentSession session(std::move(agent.stream));
  Pipe output;
  // The first comes when the command runs: its output is there.
  std::thread first([&] {
    char letter;
    if (::read(output.out.get(), &letter, 1) == 1) ::pthread_kill(main_thread, SIGHUP);
  });
  const auto end = vmm::run_exec(session, command(), {.output = output.in.get(), .signals = signals.get()}, 2000ms);
  first.join();
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  REQUIRE_MESSAGE(end.ok(), end.error().message);
  CHECK(number == SIGHUP);
  CHECK(end->status == 128 + SIGHUP);
}

TEST_CASE("exec: the terminal's size is passed on when it changes") {
  sigset_t set, before;
  ::sigemptyset(&set);
  ::sigaddset(&set, SIGWINCH);
  ::pthread_sigmask(SIG_BLOCK, &set, &before);
  const Fd signals(::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
  const Fd terminal(::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC));
  REQUIRE(terminal);
  const winsize size{41, 99, 0, 0};
  REQUIRE(::ioctl(terminal.get(), TIOCSWINSZ, &size) == 0);
  const pthread_t main_thread = ::pthread_self();
  uint16_t rows = 0, columns = 0;
  FakeAgent agent([&](FakeAgent& self) {
    self.begin();
    ::pthread_kill(main_thread, SIGWINCH);  // before it runs: told when it does
    std::this_thread::sleep_for(50ms);
    self.numbers(Type::started, {1});
    std::string payload;
    if (self.receive(&payload) != Type::resize) return;
    agent_protocol::Reader reader(payload.data(), payload.size());
    rows = reader.u16();
    columns = reader.u16();
    self.numbers(Type::exited, {0, 0});
  });
  AgentSession session(std::move(agent.stream));
  const auto end = vmm::run_exec(session, command(), {.signals = signals.get(), .terminal = terminal.get()}, 2000ms);
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  REQUIRE_MESSAGE(end.ok(), end.error().message);
  CHECK(rows == 41);
  CHECK(columns == 99);
}

// --- Copies ---

namespace {

std::string copy_out_error(const std::string& target, std::function<void(FakeAgent&)> play) {
  FakeAgent agent([play = std::move(play)](FakeAgent& self) {
    if (self.begin() != Type::copy_out) return;
    play(self);
    self.send(Type::copy_end, [](Writer&) {});
  });
  AgentSession session(std::move(agent.stream));
  const auto copied = vmm::copy_out_of_guest(session, "/tree", target, {.answer = 2000ms, .silence = 2000ms});
  return copied.ok() ? "" : copied.error().message;
}

std::string content(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

TEST_CASE("copy out: a tree with its modes and times") {
  ScratchDir scratch;
  REQUIRE(copy_out_error(scratch.path(), [](FakeAgent& self) {
            self.entry(S_IFDIR | 0750, 0, "");
            self.entry(S_IFDIR | 0500, 0, "sealed");
            self.entry(S_IFREG | 06755, 5, "sealed/file");
            self.bytes(Type::data, "he");
            self.bytes(Type::data, "llo");
            self.entry(S_IFREG | 0600, 0, "empty");
            self.entry(S_IFLNK | 0777, 0, "link", "/etc/passwd");
            self.entry(S_IFIFO | 0600, 0, "fifo");
          }) == "");
  const std::string tree = scratch.path() + "/tree";
  CHECK(content(tree + "/sealed/file") == "hello");
  struct stat status {};
  REQUIRE(::lstat((tree + "/sealed/file").c_str(), &status) == 0);
  CHECK((status.st_mode & 07777) == 0755);  // no set-user-id of a guest's
  CHECK(status.st_mtim.tv_sec == 1'000'000'000);
  CHECK(status.st_mtim.tv_nsec == 5);
  REQUIRE(::stat((tree + "/sealed").c_str(), &status) == 0);
  CHECK((status.st_mode & 07777) == 0500);
  CHECK(status.st_mtim.tv_sec == 1'000'000'000);
  REQUIRE(::lstat((tree + "/link").c_str(), &status) == 0);
  CHECK(std::filesystem::read_symlink(tree + "/link") == "/etc/passwd");
  CHECK(status.st_mtim.tv_sec == 1'000'000'000);
  CHECK_FALSE(std::filesystem::exists(tree + "/fifo"));
  ::chmod((tree + "/sealed").c_str(), 0700);
}

TEST_CASE("copy out: what is left out is told of, but not without end") {
  ScratchDir scratch;
  const std::string log = scratch.path() + "/log";
  const int stderr_before = ::fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 0);
  const Fd file(::open(log.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
  ::dup2(file.get(), STDERR_FILENO);
  const std::string error = copy_out_error(scratch.path(), [](FakeAgent& self) {
    self.entry(S_IFDIR | 0750, 0, "");
    for (int i = 0; i < 100; ++i) self.entry(S_IFIFO | 0600, 0, "fifo\x1b" + std::to_string(i));
  });
  ::dup2(stderr_before, STDERR_FILENO);
  ::close(stderr_before);
  CHECK(error == "");
  const std::string text = content(log);
  CHECK(std::count(text.begin(), text.end(), '\n') == 21);
  CHECK(text.find("fifo?19: left out") != std::string::npos);
  CHECK(text.find("left out: 80 more") != std::string::npos);
  CHECK(text.find("fifo\x1b") == std::string::npos);
}

TEST_CASE("copy out: the old file stays until the new one is whole") {
  ScratchDir scratch;
  const std::string old = scratch.write("file", "old");
  const auto count = [&] {
    return std::distance(std::filesystem::directory_iterator(scratch.path()), std::filesystem::directory_iterator());
  };
  CHECK(copy_out_error(old, [](FakeAgent& self) {
          self.entry(S_IFREG | 0644, 5, "");
          self.bytes(Type::data, "new");
        }) == "the agent ended in the middle of a file");
  CHECK(content(old) == "old");
  CHECK(count() == 1);
  CHECK(copy_out_error(old, [&](FakeAgent& self) {
          self.entry(S_IFREG | 0644, 3, "");
          self.bytes(Type::data, "new");
        }) == "");
  CHECK(content(old) == "new");
  CHECK(copy_out_error(old, [&](FakeAgent& self) { self.entry(S_IFLNK | 0777, 0, "", "target"); }) == "");
  CHECK(std::filesystem::read_symlink(old) == "target");
  CHECK(count() == 1);
  std::filesystem::create_directories(scratch.path() + "/into/tree/sub");
  CHECK(copy_out_error(scratch.path() + "/into", [](FakeAgent& self) {
          self.entry(S_IFDIR | 0755, 0, "");
          self.entry(S_IFREG | 0644, 3, "sub");
        }) == scratch.path() + "/into: sub: Is a directory");
}

TEST_CASE("copy out: nothing is written outside of the tree") {
  ScratchDir scratch;
  const std::string outside = scratch.write("outside/file", "safe");
  const std::string into = scratch.path() + "/into";
  const auto error_of = [&](const std::string& path) {
    return copy_out_error(into, [&](FakeAgent& self) {
      self.entry(S_IFDIR | 0755, 0, "");
      self.entry(S_IFREG | 0644, 4, path);
      self.bytes(Type::data, "evil");
    });
  };
  for (const char* path : {"../outside/file", "a/../../outside/file", "/etc/x", "a//b", ".", "a/."})
    CHECK(error_of(path).starts_with("the agent sent an entry outside of the tree"));
  CHECK(error_of(std::string("a\0b", 3)) == "the agent sent a malformed entry");
  // Through a link that the agent made itself, and through one in the place of the file.
  CHECK(copy_out_error(into, [&](FakeAgent& self) {
          self.entry(S_IFDIR | 0755, 0, "");
          self.entry(S_IFLNK | 0777, 0, "way", scratch.path() + "/outside");
          self.entry(S_IFREG | 0644, 4, "way/file");
          self.bytes(Type::data, "evil");
        }) != "");
  CHECK(copy_out_error(into, [&](FakeAgent& self) {
          self.entry(S_IFDIR | 0755, 0, "");
          self.entry(S_IFLNK | 0777, 0, "file", outside);
          self.entry(S_IFREG | 0644, 4, "file");
          self.bytes(Type::data, "evil");
        }) == "");
  CHECK(content(outside) == "safe");
}

TEST_CASE("copy out: an agent that breaks its word") {
  ScratchDir scratch;
  const std::string into = scratch.path() + "/into";
  CHECK(copy_out_error(into, [](FakeAgent&) {}) == "the agent sent nothing");
  CHECK(copy_out_error(into, [](FakeAgent& self) { self.error(ENOENT, "/tree: no such file"); }) ==
        "/tree: no such file");
  CHECK(copy_out_error(into, [](FakeAgent& self) { self.entry(S_IFREG | 0600, 5, ""); }) ==
        "the agent ended in the middle of a file");
  CHECK(copy_out_error(into, [](FakeAgent& self) {
          self.entry(S_IFREG | 0600, 1, "");
          self.bytes(Type::data, "two");
        }) == "the agent sent more data than a file's size");
  CHECK(copy_out_error(into, [](FakeAgent& self) { self.entry(S_IFREG | 0600, 1, "below"); }) ==
        "the agent sent a tree without a root, or with two");
  // What it names things is shown without what a terminal would obey.
  CHECK(copy_out_error(into, [](FakeAgent& self) {
          self.entry(S_IFDIR | 0700, 0, "");
          self.entry(S_IFREG | 0600, 0, "a\x1b[2J\n\xc2\x9b\xff/b");
        }) == into + ": a?[2J??\?\?/b: No such file or directory");
  CHECK(copy_out_error(into, [](FakeAgent& self) { self.error(0, "\x9b\xffno"); }) == "??no");
  CHECK(copy_out_error(scratch.path() + "/no/such", [](FakeAgent& self) {
          self.entry(S_IFREG, 0, "");
        }).ends_with("/no/: No such file or directory"));
}

TEST_CASE("copy in: the agent has its time to answer, and another one once it has") {
  ScratchDir scratch;
  scratch.write("file", std::string(1 << 20, 'x'));
  const auto copy = [&](std::function<void(FakeAgent&)> play, AgentSession::Milliseconds silence) {
    FakeAgent agent(std::move(play));
    AgentSession session(std::move(agent.stream));
    const auto start = std::chrono::steady_clock::now();
    const auto copied =
        vmm::copy_into_guest(session, scratch.path() + "/file", "/file", {.answer = 200ms, .silence = silence});
    CHECK(std::chrono::steady_clock::now() - start < 5s);
    return copied.ok() ? "" : copied.error().message;
  };
  std::string late = "the agent did not answer within 1 s";
  CHECK(copy(
            [](FakeAgent& self) {
              while (self.receive() != Type{}) {
              }
            },
            60s) == late);
  CHECK(copy(
            [](FakeAgent& self) {
              self.hello();
              while (self.receive() != Type{}) {
              }
            },
            400ms) == late);
  CHECK(copy(
            [](FakeAgent& self) {
              self.hello();
              while (self.receive() != Type::copy_end) {
              }
              std::this_thread::sleep_for(600ms);
              self.send(Type::done, [](Writer&) {});
            },
            60s) == "");
  CHECK(copy(
            [](FakeAgent& self) {
              self.hello();
              self.error(EROFS, "/file: no");
              while (self.receive() != Type{}) {
              }
            },
            60s) == "/file: no");
}

// --- The agent itself, on this machine ---

namespace {

struct RealAgent {
  ScratchDir scratch;
  agent_test::AgentProcess process{scratch.path() + "/agent"};

  AgentSession session() {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strcpy(address.sun_path, process.socket().c_str());
    Fd fd;
    REQUIRE(agent_test::within_ms(5000, [&] {
      fd = Fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
      return ::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
    }));
    return AgentSession(std::move(fd));
  }
  // Status, output and errors.
  std::string run(const std::vector<std::string>& words) {
    AgentSession stream = session();
    Pipe output, errors;
    const auto end = vmm::run_exec(stream, *vmm::exec_frame({.arguments = words, .directory = "/"}),
                                   {.output = output.in.get(), .errors = errors.in.get()}, 5000ms);
    if (!end.ok()) return end.error().message;
    return std::to_string(end->status) + "|" + output.read_all() + "|" + errors.read_all();
  }
};

}  // namespace

TEST_CASE("agent and exec together") {
  RealAgent agent;
  CHECK(agent.run({"sh", "-c", "echo out; echo err >&2; exit 7"}) == "7|out\n|err\n");
  CHECK(agent.run({"sh", "-c", "kill -TERM $$"}) == "143||");
  CHECK(agent.run({"/no/such/program"}) == "127||");
  CHECK(agent.run({"/etc/passwd"}) == "126||");

  AgentSession stream = agent.session();
  Pipe output;
  size_t got_bytes = 0;
  std::thread reader([&] {
    char part[65536];
    for (ssize_t got; (got = ::read(output.out.get(), part, sizeof part)) > 0;) got_bytes += static_cast<size_t>(got);
  });
  const auto end = vmm::run_exec(stream, *vmm::exec_frame({.arguments = {"head", "-c", "20971520", "/dev/zero"}}),
                                 {.output = output.in.get()}, 5000ms);
  output.in.reset();
  reader.join();
  REQUIRE_MESSAGE(end.ok(), end.error().message);
  CHECK(end->status == 0);
  CHECK(got_bytes == 20971520);
}

TEST_CASE("agent and cp together: a tree goes in and comes out again") {
  RealAgent agent;
  ScratchDir scratch;
  const std::string big(300'000, 'b');
  scratch.write("from/one", "1");
  scratch.write("from/deep/er/big", big);
  REQUIRE(::symlink("one", (scratch.path() + "/from/link").c_str()) == 0);
  REQUIRE(::chmod((scratch.path() + "/from/one").c_str(), 0640) == 0);
  const timespec times[2] = {{1'000'000'000, 7}, {1'000'000'000, 7}};
  for (const char* name : {"/from/one", "/from/deep", "/from/link"})
    REQUIRE(::utimensat(AT_FDCWD, (scratch.path() + name).c_str(), times, AT_SYMLINK_NOFOLLOW) == 0);
  const vmm::CopyOptions options = {.answer = 5000ms, .silence = 5000ms};
  {
    AgentSession session = agent.session();
    const auto copied = vmm::copy_into_guest(session, scratch.path() + "/from", scratch.path() + "/guest", options);
    REQUIRE_MESSAGE(copied.ok(), copied.error().message);
  }
  REQUIRE(::mkdir((scratch.path() + "/back").c_str(), 0700) == 0);
  {
    AgentSession session = agent.session();
    const auto copied = vmm::copy_out_of_guest(session, scratch.path() + "/guest", scratch.path() + "/back", options);
    REQUIRE_MESSAGE(copied.ok(), copied.error().message);
  }
  for (const std::string tree : {"/guest", "/back/guest"}) {
    CAPTURE(tree);
    const std::string path = scratch.path() + tree;
    CHECK(content(path + "/one") == "1");
    CHECK(content(path + "/deep/er/big") == big);
    CHECK(std::filesystem::read_symlink(path + "/link") == "one");
    struct stat status {};
    REQUIRE(::stat((path + "/one").c_str(), &status) == 0);
    CHECK((status.st_mode & 07777) == 0640);
    for (const char* name : {"/one", "/deep", "/link"}) {
      REQUIRE(::lstat((path + name).c_str(), &status) == 0);
      CHECK(status.st_mtim.tv_sec == 1'000'000'000);
      CHECK(status.st_mtim.tv_nsec == 7);
    }
  }
  AgentSession session = agent.session();
  const auto missing = vmm::copy_into_guest(session, scratch.path() + "/from", "/no/such/folder", options);
  REQUIRE_FALSE(missing.ok());
  CHECK(missing.error().message.find("/no/such/folder") != std::string::npos);
}
