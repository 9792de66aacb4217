// SPDX-License-Identifier: Apache-2.0
// Each part has a header with its size. Both ends are of one program, and one is the other's child.
#include "snapshot/stream.hpp"

#include <sys/socket.h>
#include <sys/uio.h>

#include <array>
#include <string>

#include "snapshot/backend.hpp"
#include "snapshot/handover.hpp"
#include "snapshot/parent_memory.hpp"

namespace vmm {
namespace {

struct Header {
  uint64_t offset;  // of memory, or kState
  uint64_t size_bytes;
};
constexpr uint64_t kState = ~uint64_t{0};
constexpr uint64_t kMostStateBytes = 3ull << 30;  // of sections with 1 GiB, as text

Result<void> send_part(int stream, const Header& header, std::span<const std::byte> bytes) {
  std::array<iovec, 2> parts{iovec{const_cast<Header*>(&header), sizeof header},
                             iovec{const_cast<std::byte*>(bytes.data()), bytes.size()}};
  msghdr message{};
  message.msg_iov = parts.data();
  message.msg_iovlen = parts.size();
  while (message.msg_iovlen > 0) {
    const ssize_t sent = ::sendmsg(stream, &message, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0) return errno_error("the process that writes the snapshot");
    auto left = static_cast<size_t>(sent);
    while (message.msg_iovlen > 0 && left >= message.msg_iov->iov_len) {
      left -= message.msg_iov->iov_len;
      ++message.msg_iov;
      --message.msg_iovlen;
    }
    if (message.msg_iovlen == 0) break;
    message.msg_iov->iov_base = static_cast<std::byte*>(message.msg_iov->iov_base) + left;
    message.msg_iov->iov_len -= left;
  }
  return {};
}

Result<void> receive(int stream, std::span<std::byte> into) {
  while (!into.empty()) {
    const ssize_t got = ::recv(stream, into.data(), into.size(), 0);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno_error("the machine's memory");
    if (got == 0) return Error{kCutOffStream};
    into = into.subspan(static_cast<size_t>(got));
  }
  return {};
}

}  // namespace

Result<std::pair<Fd, Fd>> make_snapshot_stream() {
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) return errno_error("socketpair");
  return std::pair(Fd(ends[0]), Fd(ends[1]));
}

Result<void> send_memory(int stream, uint64_t offset, std::span<const std::byte> bytes) {
  return send_part(stream, {offset, bytes.size()}, bytes);
}

Result<void> send_state(int stream, const Sections& sections) {
  const std::string text = boost::json::serialize(sections_to_json(sections));
  return send_part(stream, {kState, text.size()}, std::as_bytes(std::span(text)));
}

Result<void> receive_snapshot(int stream, SnapshotImage& image, ParentMemory* parent) {
  std::vector<std::byte> buffer;
  for (;;) {
    Header header{};
    TRY(receive(stream, std::as_writable_bytes(std::span(&header, 1))));
    if (header.size_bytes > (header.offset == kState ? kMostStateBytes : kSnapshotPieceBytes))
      return Error{"the machine's memory: a part of " + std::to_string(header.size_bytes) + " bytes"};
    buffer.resize(header.size_bytes);
    TRY(receive(stream, buffer));
    if (header.offset == kState) break;
    TRY(parent ? parent->write_difference(image, header.offset, buffer) : image.write_memory(header.offset, buffer));
  }
  boost::system::error_code failed;  // gives null, which are no sections
  const auto state = boost::json::parse({reinterpret_cast<const char*>(buffer.data()), buffer.size()}, failed);
  const Sections sections = TRY(sections_from_json(state));
  TRY(image.write(sections));
  return image.commit();
}

}  // namespace vmm
