// SPDX-License-Identifier: Apache-2.0
// A client of a control socket.
#include "control/client.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>

#include "util/local_socket.hpp"

namespace vmm {
namespace {
constexpr size_t kMaxLineBytes = 16 << 20;
}

Result<ControlClient> ControlClient::connect(const InstanceRecord& instance, Milliseconds limit) {
  const Fd directory(::open(instance.directory.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
  if (!directory) return errno_error(instance.directory).context("VM " + instance.name);
  Fd socket = TRY(connect_in(directory.get(), "control.sock", limit).context("VM " + instance.name));
  return ControlClient(std::move(socket), instance.name);
}

Result<ControlClient::Reply> ControlClient::call(std::string_view method, boost::json::object parameters,
                                                 Milliseconds limit) {
  const int64_t id = next_id_++;
  const boost::json::object request = {
      {"jsonrpc", "2.0"}, {"id", id}, {"method", method}, {"params", std::move(parameters)}};
  const std::string line = boost::json::serialize(request) + "\n";
  const auto end = std::chrono::steady_clock::now() + limit;
  for (size_t sent = 0; sent < line.size();) {
    const ssize_t count = ::send(socket_.get(), line.data() + sent, line.size() - sent, MSG_NOSIGNAL);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && errno == EAGAIN) return Error{"VM " + name_ + ": it does not read", ETIMEDOUT};
    if (count < 0 && errno == EPIPE) break;  // it may have said why
    if (count < 0) return errno_error("VM " + name_);
    sent += static_cast<size_t>(count);
  }
  while (true) {
    boost::json::value answer = TRY(next_line(end));
    const auto* object = answer.if_object();
    const auto* answered = object ? object->if_contains("id") : nullptr;
    const auto* error = object ? object->if_contains("error") : nullptr;
    // An error without an id is about all that we ask: too many clients, for one. The rest are notifications.
    const bool refused = error && answered && answered->is_null();
    if (!refused && (!answered || !answered->is_int64() || answered->get_int64() != id)) continue;
    if (error) {
      const auto* fields = error->if_object();
      const auto* message = fields ? fields->if_contains("message") : nullptr;
      return Error{"VM " + name_ + ": " +
                   (message && message->is_string() ? std::string(message->get_string()) : std::string("failed"))};
    }
    const auto* result = object->if_contains("result");
    if (!result) return Error{"VM " + name_ + ": an answer without a result"};
    return Reply{*result, std::move(received_fd_)};
  }
}

Result<boost::json::value> ControlClient::next_notification(Milliseconds limit) {
  return next_line(std::chrono::steady_clock::now() + limit);
}

Result<boost::json::value> ControlClient::next_line(std::chrono::steady_clock::time_point end) {
  size_t searched = 0;
  while (true) {
    if (const size_t newline = received_.find('\n', searched); newline != std::string::npos) {
      const std::string line = received_.substr(0, newline);
      received_.erase(0, newline + 1);
      boost::system::error_code error;
      boost::json::value value = boost::json::parse(line, error);
      if (error) return Error{"VM " + name_ + ": an answer that is no JSON"};
      return value;
    }
    searched = received_.size();
    if (searched > kMaxLineBytes) return Error{"VM " + name_ + ": an answer without end"};
    const auto left = std::chrono::duration_cast<Milliseconds>(end - std::chrono::steady_clock::now());
    if (left.count() <= 0) return Error{"VM " + name_ + ": no answer in time", ETIMEDOUT};
    pollfd wanted{socket_.get(), POLLIN, 0};
    if (::poll(&wanted, 1, static_cast<int>(std::min<int64_t>(left.count() + 1, 1 << 30))) <= 0) continue;

    char bytes[16 * 1024];
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
    iovec part{bytes, sizeof bytes};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    const ssize_t count = ::recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && errno != ECONNRESET) return errno_error("VM " + name_);
    if (count <= 0) return Error{"VM " + name_ + ": it has ended", ECONNRESET};
    for (cmsghdr* header = CMSG_FIRSTHDR(&message); header; header = CMSG_NXTHDR(&message, header))
      if (header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS &&
          header->cmsg_len == CMSG_LEN(sizeof(int))) {
        int fd;
        std::memcpy(&fd, CMSG_DATA(header), sizeof fd);
        received_fd_ = Fd(fd);
      }
    received_.append(bytes, static_cast<size_t>(count));
  }
}

}  // namespace vmm
