// SPDX-License-Identifier: Apache-2.0
// A client's side of a console's socket.
#include "console/attachment.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <string_view>

#include "console/output_stream.hpp"

namespace vmm {
namespace {

constexpr char kLeave = 0x11;  // Ctrl-Q
constexpr size_t kMostTypedBytes = 1 << 20;
// A pipe that poll(2) calls writable takes this much without blocking (pipe(7), PIPE_BUF).
constexpr size_t kWriteBytes = 4096;

bool may_pass() { return errno == EINTR || errno == EAGAIN; }

}  // namespace

Left carry_console(int socket, int input, int output, Typing typing) {
  const bool by_hand = ::isatty(input) != 0;
  const Fd reopened = reopen_nonblocking(output, O_WRONLY);
  if (reopened) output = reopened.get();
  std::string typed;  // and not sent yet
  char printed[16 * 1024];
  std::string_view shown;  // of `printed`, and not written yet
  bool leaving = false;
  while (true) {
    const size_t room_bytes = kMostTypedBytes - typed.size();
    pollfd wanted[] = {{socket, static_cast<short>((shown.empty() ? POLLIN : 0) | (typed.empty() ? 0 : POLLOUT)), 0},
                       {by_hand || room_bytes > 0 ? input : -1, POLLIN, 0},
                       {shown.empty() ? -1 : output, POLLOUT, 0}};
    // A hang-up would wake us all the time, while the last output is not written yet.
    if (wanted[0].events == 0) wanted[0].fd = -1;
    if (::poll(wanted, std::size(wanted), -1) < 0) {
      if (errno == EINTR) continue;
      return Left::by_user;
    }
    if (wanted[1].revents) {
      char bytes[16 * 1024];
      const ssize_t count = ::read(input, bytes, by_hand ? sizeof bytes : std::min(sizeof bytes, room_bytes));
      if (count > 0) {
        const std::string_view read(bytes, static_cast<size_t>(count));
        const size_t leave = read.find(kLeave);
        leaving = leave != std::string_view::npos;
        if (typing == Typing::sent) typed += read.substr(0, std::min(leave, room_bytes));
      }
      // At the end of a pipe what is printed still counts.
      if (leaving || count == 0 || (count < 0 && !may_pass())) input = -1;
    }
    if (!typed.empty()) {
      const ssize_t count = ::send(socket, typed.data(), typed.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
      if (count >= 0) {
        typed.erase(0, static_cast<size_t>(count));
      } else if (!may_pass()) {
        typing = Typing::only_to_leave;  // nobody reads it any more
        typed.clear();
      }
    }
    if (leaving && (typed.empty() || by_hand)) return Left::by_user;
    if (input < 0 && typing == Typing::sent && typed.empty()) {
      ::shutdown(socket, SHUT_WR);
      typing = Typing::only_to_leave;
    }
    if (wanted[2].revents) {
      const ssize_t count = ::write(output, shown.data(), std::min(shown.size(), kWriteBytes));
      if (count >= 0) {
        shown.remove_prefix(static_cast<size_t>(count));
      } else if (!may_pass()) {
        return Left::output_gone;
      }
    } else if (shown.empty() && (wanted[0].revents & ~POLLOUT)) {
      const ssize_t count = ::recv(socket, printed, sizeof printed, MSG_DONTWAIT);
      if (count == 0 || (count < 0 && !may_pass())) return Left::hung_up;
      if (count > 0) shown = {printed, static_cast<size_t>(count)};
    }
  }
}

}  // namespace vmm
