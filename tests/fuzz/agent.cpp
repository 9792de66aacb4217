// SPDX-License-Identifier: Apache-2.0
// Fuzzes the messages of the guest's agent: the input is a stream of frames, which arrives in pieces, and each payload
// is taken apart as every kind of request in the guest, as every kind of answer on the host, and as the parameters of a
// command. Beside what the sanitizers see: nothing that is accepted leaves its bounds.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "agent/copy.cpp"  // its parser of entries is nobody else's
#include "guest-agent/host_frames.hpp"
#include "guest-agent/requests.hpp"
#include "plugins/guest-agent/parameters.hpp"

using namespace agent_protocol;

namespace {

void require(bool holds, int line = __builtin_LINE()) {
  if (holds) return;
  std::fprintf(stderr, "%s:%d does not hold\n", __FILE__, line);
  std::abort();
}

struct Requests {
  FrameBuffer frames;
  ExecRequest exec;
  IdentityRequest identity;
  CopyRequest copy;
  Entry entry;
};

size_t words(const char* const* list, size_t count) {
  size_t size = 0;
  for (size_t i = 0; i < count; ++i) size += std::strlen(list[i]) + 1;
  require(list[count] == nullptr);
  return size;
}

// Of a path in a tree, which begins below it and stays there.
void require_below(const char* path) {
  require(std::strlen(path) < kPathBytes && path[0] != '/' && std::strstr(path, "//") == nullptr);
  const size_t size = std::strlen(path);
  require(std::strcmp(path, "..") != 0 && std::strncmp(path, "../", 3) != 0 && std::strstr(path, "/../") == nullptr);
  require(size < 3 || std::strcmp(path + size - 3, "/..") != 0);
}

void take_request(Requests& requests, const Frame& frame) {
  if (requests.exec.parse(frame.reader())) {
    ExecRequest& exec = requests.exec;
    require(exec.argument_count > 0 && exec.arguments()[0][0] != 0);
    const size_t size = words(exec.arguments(), exec.argument_count) + words(exec.variables, exec.variable_count) +
                        std::strlen(exec.user) + std::strlen(exec.directory);
    require(size <= kMaxPayloadBytes);
    for (size_t i = 0; i < exec.variable_count; ++i) require(std::strchr(exec.variables[i], '=') > exec.variables[i]);
  }
  if (requests.identity.parse(frame.reader())) {
    Address address{};
    if (requests.identity.fields & kIdentityAddress && address.parse(requests.identity.address, true))
      require(address.prefix_bits <= 32);
    if (requests.identity.fields & kIdentityHostname)
      require(std::strlen(requests.identity.hostname) < kMaxPayloadBytes);
    if (requests.identity.fields & kIdentityEntropy)
      require(requests.identity.entropy.size_bytes <= frame.length_bytes);
  }
  if (requests.copy.parse(frame.reader())) {
    require(requests.copy.path[0] == '/' && std::strchr(requests.copy.name, '/') == nullptr);
    require(std::strlen(requests.copy.path) + std::strlen(requests.copy.name) < kPathBytes);
  }
  if (requests.entry.parse(frame.reader())) require_below(requests.entry.path);
}

// For a person's terminal and for JSON.
void require_printable(const std::string& text, size_t longest_bytes) {
  require(text.size() <= longest_bytes);
  require(std::all_of(text.begin(), text.end(), [](char letter) { return letter >= ' ' && letter <= '~'; }));
}

void take_answer(Frame frame) {
  const Failure failure = read_failure(frame);
  require(failure.code <= 4095 && !failure.message.empty());
  require_printable(failure.message, 200);
  if (const auto entry = vmm::read_entry(frame); entry.ok()) {
    require(entry->path.find('\0') == std::string::npos && entry->link.find('\0') == std::string::npos);
    require(entry->link.size() < kPathBytes && entry->mtime.tv_nsec >= 0 && entry->mtime.tv_nsec < 1'000'000'000);
    require_below(entry->path.c_str());
  } else {
    require_printable(entry.error().message, 300);
  }
  if (read_report(frame)) require(frame.length_bytes >= sizeof(Report));
  frame.type = Type::hello;
  if (const auto hello = read_hello(frame)) require_printable(hello->version, 64);
}

void take_parameters(std::string_view json) {
  const auto parameters = ParameterParser::parse(json);
  if (!parameters.ok()) return;
  size_t size = 0;
  for (const auto& [name, value] : *parameters) {
    const auto* const text = std::get_if<std::string>(&value);
    for (const std::string_view part : {std::string_view(name), text ? std::string_view(*text) : std::string_view()}) {
      size += part.size();
      for (const char letter : part) require(static_cast<unsigned char>(letter) >= ' ');
    }
  }
  require(size < json.size());
}

void take_apart(Requests& requests, const Frame& frame) {
  require(frame.length_bytes <= kMaxPayloadBytes);
  take_request(requests, frame);
  take_answer(frame);
  take_parameters(bytes_of(frame));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto requests = std::make_unique<Requests>();
  requests->frames = {};
  const size_t piece = size == 0 ? 1 : 1 + data[size - 1] * size_t{37} % 5000;
  size_t frame_bytes = 0;
  for (size_t at = 0; at < size;) {
    uint8_t* const space = requests->frames.space();
    const size_t room = requests->frames.space_bytes();
    require(room > 0);
    const size_t count = std::min({piece, size - at, room});
    std::memcpy(space, data + at, count);
    requests->frames.added(count);
    at += count;
    for (;;) {
      Frame frame;
      const auto next = requests->frames.next(frame);
      if (next == FrameBuffer::Next::broken) return 0;
      if (next == FrameBuffer::Next::incomplete) break;
      frame_bytes += sizeof(Header) + frame.length_bytes;
      require(frame_bytes <= at);
      take_apart(*requests, frame);
    }
  }
  return 0;
}
