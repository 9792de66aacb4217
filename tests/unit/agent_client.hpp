// SPDX-License-Identifier: Apache-2.0
// Runs clone-agent on this machine, on a Unix socket, and speaks its protocol.
#pragma once

#include <doctest/doctest.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "guest-agent/frames.hpp"
#include "scratch_dir.hpp"

namespace agent_test {

using namespace agent_protocol;

inline std::string program_path() { return CLONE_TEST_LIBEXEC_DIR "/clone-agent"; }

inline int64_t now_ms() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Asks every 5 ms.
template <typename Condition>
bool within_ms(int64_t limit_ms, Condition condition) {
  for (const int64_t start_ms = now_ms(); !condition();) {
    if (now_ms() - start_ms > limit_ms) return false;
    ::usleep(5000);
  }
  return true;
}

class AgentProcess {
 public:
  explicit AgentProcess(std::string socket) : AgentProcess(socket, {program_path(), "--listen-unix", socket}) {}
  // `command` makes an agent listen there.
  AgentProcess(std::string socket, std::vector<std::string> command) : socket_(std::move(socket)) {
    std::vector<char*> words;
    for (auto& word : command) words.push_back(word.data());
    words.push_back(nullptr);
    REQUIRE(::posix_spawnp(&process_, words[0], nullptr, nullptr, words.data(), environ) == 0);
  }
  AgentProcess(const AgentProcess&) = delete;
  ~AgentProcess() { kill(); }

  void kill() {
    if (process_ <= 0) return;
    ::kill(process_, SIGKILL);
    ::waitpid(process_, nullptr, 0);
    process_ = 0;
  }
  pid_t process() const { return process_; }
  const std::string& socket() const { return socket_; }

 private:
  std::string socket_;
  pid_t process_ = 0;
};

struct Message {
  Type type{};
  std::vector<uint8_t> payload;
  Reader reader() const { return Reader(payload.data(), payload.size()); }
};

// The payload of a request, put together field by field.
class Payload {
 public:
  Payload& u16(uint64_t value) { return number(value, 2); }
  Payload& u32(uint64_t value) { return number(value, 4); }
  Payload& u64(uint64_t value) { return number(value, 8); }
  Payload& text(std::string_view value) {
    u32(value.size());
    bytes.insert(bytes.end(), value.begin(), value.end());
    return *this;
  }
  Payload& words(const std::vector<std::string>& values) {
    u32(values.size());
    for (const auto& value : values) text(value);
    return *this;
  }
  std::vector<uint8_t> bytes;

 private:
  Payload& number(uint64_t value, int size) {
    for (int i = 0; i < size; ++i) bytes.push_back(static_cast<uint8_t>(value >> (8 * i)));
    return *this;
  }
};

struct Failure {
  uint32_t code = 0;
  Type answered{};
  std::string message;
};

class Client {
 public:
  enum class Greeting { say_hello, none };

  explicit Client(const std::string& socket, Greeting greeting = Greeting::say_hello) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    REQUIRE(socket.size() < sizeof address.sun_path);
    std::memcpy(address.sun_path, socket.c_str(), socket.size());
    REQUIRE(within_ms(5000, [&] {
      if (fd_ >= 0) ::close(fd_);
      fd_ = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
      return ::connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
    }));
    if (greeting == Greeting::none) return;
    send(Type::hello, Payload().u32(kMagic).u16(kMajor).u16(kMinor).text("test").bytes);
    const auto hello = receive();
    REQUIRE(hello);
    REQUIRE(hello->type == Type::hello);
    REQUIRE(hello->reader().u32() == kMagic);
  }
  Client(const Client&) = delete;
  ~Client() { close(); }

  int fd() const { return fd_; }
  void close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }

  bool send_raw(const void* data, size_t size) {
    const auto* at = static_cast<const char*>(data);
    while (size > 0) {
      const ssize_t count = ::send(fd_, at, size, MSG_NOSIGNAL);
      if (count <= 0) return false;
      at += count;
      size -= static_cast<size_t>(count);
    }
    return true;
  }
  bool send(Type type, std::span<const uint8_t> payload = {}) {
    Payload frame;
    frame.u32(payload.size()).u16(static_cast<uint16_t>(type)).u16(0);
    frame.bytes.insert(frame.bytes.end(), payload.begin(), payload.end());
    return send_raw(frame.bytes.data(), frame.bytes.size());
  }
  bool send(Type type, std::string_view text) {
    return send(type, std::span(reinterpret_cast<const uint8_t*>(text.data()), text.size()));
  }

  // Nothing when the agent has closed the connection or stays silent for that long.
  std::optional<Message> receive(int64_t limit_ms = 20000) {
    const int64_t start_ms = now_ms();
    for (;;) {
      Frame frame;
      const auto next = buffer_->next(frame);
      REQUIRE(next != FrameBuffer::Next::broken);
      if (next == FrameBuffer::Next::frame)
        return Message{frame.type, {frame.payload, frame.payload + frame.length_bytes}};
      const int64_t left_ms = limit_ms - (now_ms() - start_ms);
      pollfd poll{fd_, POLLIN, 0};
      if (left_ms <= 0 || ::poll(&poll, 1, static_cast<int>(left_ms)) <= 0) return {};
      uint8_t* const space = buffer_->space();
      const ssize_t count = ::recv(fd_, space, buffer_->space_bytes(), 0);
      if (count <= 0) {
        is_closed_ = true;
        return {};
      }
      buffer_->added(static_cast<size_t>(count));
    }
  }
  bool is_closed() const { return is_closed_; }
  bool ends_within_ms(int64_t limit_ms) {
    while (receive(limit_ms)) {
    }
    return is_closed_;
  }

  static Failure failure_of(const Message& message) {
    REQUIRE(message.type == Type::error);
    Reader reader = message.reader();
    Failure failure;
    failure.code = reader.u32();
    failure.answered = static_cast<Type>(reader.u16());
    const auto text = reader.text();
    REQUIRE_FALSE(reader.failed());
    failure.message.assign(text.data, text.size_bytes);
    return failure;
  }
  Failure receive_failure() {
    const auto message = receive();
    REQUIRE(message);
    return failure_of(*message);
  }

 private:
  int fd_ = -1;
  bool is_closed_ = false;
  std::unique_ptr<FrameBuffer> buffer_ = std::make_unique<FrameBuffer>();
};

struct Exec {
  std::vector<std::string> arguments;
  uint32_t flags = 0;
  uint16_t rows = 0, columns = 0;
  std::string user, directory;
  std::vector<std::string> environment;

  std::vector<uint8_t> payload() const {
    return Payload()
        .u32(flags)
        .u16(rows)
        .u16(columns)
        .text(user)
        .text(directory)
        .words(arguments)
        .words(environment)
        .bytes;
  }
};

struct Outcome {
  pid_t process = 0;
  std::string output, errors;
  std::optional<Failure> failure;
  bool has_exited = false;
  uint32_t code = 0, signal = 0;
};

// Takes what a program says until it has ended.
inline Outcome finish(Client& client, int64_t limit_ms = 30000) {
  Outcome outcome;
  for (const int64_t start_ms = now_ms(); now_ms() - start_ms < limit_ms;) {
    const auto message = client.receive(limit_ms);
    if (!message) break;
    Reader reader = message->reader();
    if (message->type == Type::started) outcome.process = static_cast<pid_t>(reader.u32());
    if (message->type == Type::output) outcome.output.append(message->payload.begin(), message->payload.end());
    if (message->type == Type::errors) outcome.errors.append(message->payload.begin(), message->payload.end());
    if (message->type == Type::error) {
      outcome.failure = Client::failure_of(*message);
      return outcome;
    }
    if (message->type == Type::exited) {
      outcome.code = reader.u32();
      outcome.signal = reader.u32();
      outcome.has_exited = !reader.failed();
      return outcome;
    }
  }
  return outcome;
}

inline Outcome run(Client& client, const Exec& exec) {
  REQUIRE(client.send(Type::exec, exec.payload()));
  return finish(client);
}

inline Exec shell(std::string script) { return {.arguments = {"sh", "-c", std::move(script)}}; }

}  // namespace agent_test
