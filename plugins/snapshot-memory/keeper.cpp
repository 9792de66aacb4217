// SPDX-License-Identifier: Apache-2.0
// clone-keeper NAME: holds a snapshot's files in memory and hands them out, until it is told to end or killed.
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <cstring>

#include "protocol.hpp"

namespace snapshot_memory {
namespace {

constexpr timeval kPatience{1, 0};  // with one client; the others wait meanwhile
constexpr useconds_t kRestUs = 10'000;

bool is_trusted(int client) {
  ucred peer{};
  socklen_t size = sizeof peer;
  return ::getsockopt(client, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && (peer.uid == ::geteuid() || peer.uid == 0);
}

void give(int client) {
  const int files[] = {kMemory, kState};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof files)]{};
  iovec text{const_cast<char*>(kGreeting), sizeof kGreeting};
  msghdr message{};
  message.msg_iov = &text;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  cmsghdr* const header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof files);
  std::memcpy(CMSG_DATA(header), files, sizeof files);
  ::sendmsg(client, &message, MSG_NOSIGNAL);
}

void serve(int client) {
  char request = 0;
  if (!is_trusted(client) || ::setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &kPatience, sizeof kPatience) != 0 ||
      ::setsockopt(client, SOL_SOCKET, SO_SNDTIMEO, &kPatience, sizeof kPatience) != 0 ||
      ::recv(client, &request, 1, 0) != 1)
    return;
  if (request == kGive) give(client);
  if (request == kEnd) {
    ::close_range(kListener, kState, 0);
    ::_exit(0);
  }
}

// Nothing of the process that started it stays: descriptors, signals, folder, session, parent.
bool leave_starter() {
  sigset_t none;
  sigemptyset(&none);
  if (::sigprocmask(SIG_SETMASK, &none, nullptr) != 0) return false;
  for (int number = 1; number < NSIG; ++number) ::signal(number, SIG_DFL);
  return ::close_range(kDescriptors, ~0u, 0) == 0 && ::chdir("/") == 0 && ::fork() == 0 && ::setsid() > 0 &&
         ::prctl(PR_SET_NAME, "clone-keeper") == 0;
}

bool be_published() {
  char answer = 0;
  const bool published = ::listen(kListener, SOMAXCONN) == 0 && ::send(kStarter, &kReady, 1, MSG_NOSIGNAL) == 1 &&
                         ::recv(kStarter, &answer, 1, 0) == 1 && answer == kPublished;
  ::close(kStarter);
  return published;
}

}  // namespace
}  // namespace snapshot_memory

int main() {
  using namespace snapshot_memory;
  if (!leave_starter() || !be_published()) return 0;
  for (;;) {
    const int client = ::accept4(kListener, nullptr, nullptr, SOCK_CLOEXEC);
    if (client < 0) {
      ::usleep(kRestUs);
      continue;
    }
    serve(client);
    ::close(client);
  }
}
