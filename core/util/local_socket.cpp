// SPDX-License-Identifier: Apache-2.0
// Unix sockets in a directory.
#include "util/local_socket.hpp"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>

namespace vmm {
namespace {

constexpr int kBacklog = 64;

Result<sockaddr_un> address_in(int directory_fd, const std::string& name) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string path = "/proc/self/fd/" + std::to_string(directory_fd) + "/" + name;
  if (path.size() >= sizeof address.sun_path) return Error{name + ": the name is too long for a socket"};
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  return address;
}

}  // namespace

Result<Fd> listen_in(int directory_fd, const std::string& name) {
  const sockaddr_un address = TRY(address_in(directory_fd, name));
  Fd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  // Linux gives a socket's file the permissions of the socket.
  if (!socket || ::fchmod(socket.get(), 0600) != 0 ||
      ::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
      ::listen(socket.get(), kBacklog) != 0)
    return errno_error(name);
  return socket;
}

Result<Fd> connect_in(int directory_fd, const std::string& name, std::chrono::milliseconds limit) {
  const sockaddr_un address = TRY(address_in(directory_fd, name));
  const long limit_us = std::max<long>(limit.count(), 1) * 1000;  // 0 would be none
  const timeval time{limit_us / 1'000'000, limit_us % 1'000'000};
  Fd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!socket || ::setsockopt(socket.get(), SOL_SOCKET, SO_SNDTIMEO, &time, sizeof time) != 0) return errno_error(name);
  if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) return socket;
  // The listener's queue is full, and nobody takes from it.
  if (errno == EAGAIN) return Error{name + ": nobody answers there", ETIMEDOUT};
  return errno_error(name);
}

Fd accept_client(int socket) {
  static constinit std::mutex mutex;
  static constinit int spare = -1;  // kept for the moment in which there is no other
  const std::lock_guard lock(mutex);
  if (spare < 0) spare = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
  Fd client(::accept4(socket, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (client || (errno != EMFILE && errno != ENFILE)) return client;
  if (spare < 0) return {};
  ::close(spare);
  Fd turned_away(::accept4(socket, nullptr, nullptr, SOCK_CLOEXEC));
  turned_away.reset();
  spare = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
  return {};
}

Peer peer_of(int socket) {
  ucred credentials{};
  socklen_t size = sizeof credentials;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) return {};
  return {credentials.pid, credentials.uid == ::geteuid() || credentials.uid == 0};
}

}  // namespace vmm
