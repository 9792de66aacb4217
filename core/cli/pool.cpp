// SPDX-License-Identifier: Apache-2.0
// The members of a pool listen on one socket; the kernel hands each client to one of them. Their parent, the keeper, sees
// to their number and is not in the way. A conversation: the member greets, the client sends descriptors and arguments,
// the member answers at the machine's end.
#include "cli/pool.hpp"

#include <fcntl.h>
#include <linux/capability.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <string_view>
#include <thread>
#include <vector>

#include "clone/abi/base.h"
#include "control/instances.hpp"
#include "util/local_socket.hpp"

namespace vmm {
namespace {

using namespace std::chrono_literals;

constexpr auto kGreetingLimit = 250ms;  // for one to be ready, and to be scheduled
constexpr auto kRequestLimit = 1s;
constexpr auto kEndingLimit = 5s;
constexpr auto kRefillDelay = 10ms;  // the machine that has just begun goes first
constexpr unsigned kMostFailures = 3;
constexpr uint32_t kMostArgumentBytes = 256 << 10;
constexpr size_t kDescriptors = 4;  // standard input, output and error, and the working directory

// The same program, with the same view of files, network and users, and the same rights, or they do not talk: a machine of
// the pool's must be able to do no more and no less than one of the client's.
struct Greeting {
  std::array<char, 32> version{};
  std::array<uint64_t, 7> files{};  // namespaces, root folder, program
  uint64_t umask = 0;
  uint64_t group = 0, groups = 0;  // a hash of the further ones, which the kernel keeps in order
  std::array<uint64_t, 3> capabilities{};
  uint64_t confinement = 0;  // no_new_privs, seccomp
  bool operator==(const Greeting&) const = default;
};

Greeting greeting() {
  Greeting greeting;
  std::snprintf(greeting.version.data(), greeting.version.size(), "clone pool %s", CLONE_VERSION);
  size_t next = 0;
  for (const char* path : {"/proc/self/ns/mnt", "/proc/self/ns/net", "/proc/self/ns/user", "/proc/self/ns/pid",
                           "/proc/self/ns/ipc", "/proc/self/root", "/proc/self/exe"}) {
    struct stat status {};
    if (::stat(path, &status) == 0) greeting.files[next] = status.st_ino;
    ++next;
  }
  const mode_t mask = ::umask(0);
  ::umask(mask);
  greeting.umask = mask;
  greeting.group = ::getegid();
  std::array<gid_t, 256> groups{};
  const int count = ::getgroups(groups.size(), groups.data());
  const std::string_view bytes(reinterpret_cast<const char*>(groups.data()), sizeof groups);
  greeting.groups = std::hash<std::string_view>()(bytes) + static_cast<uint64_t>(count);
  __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  std::array<__user_cap_data_struct, _LINUX_CAPABILITY_U32S_3> sets{};
  if (::syscall(SYS_capget, &header, sets.data()) == 0)
    for (const auto& set : sets)
      for (size_t kind = 0; const uint32_t bits : {set.effective, set.permitted, set.inheritable})
        greeting.capabilities[kind] = greeting.capabilities[kind] << 32 | bits, ++kind;
  const auto told = [](int option) { return static_cast<uint64_t>(::prctl(option, 0, 0, 0, 0)); };
  greeting.confinement = told(PR_GET_NO_NEW_PRIVS) << 32 | told(PR_GET_SECCOMP);
  return greeting;
}

// One of each kind at most; the last is one of the other two.
enum class AnswerKind : uint32_t { begun, ended, template_changed };
struct Answer {
  AnswerKind kind;
  int32_t exit_code;
};

// What a member tells its keeper.
enum class News : char { ready = 'r', taken = 't', template_changed = 'c' };

std::string socket_name(const PoolKey& key) {
  std::string text = key.store.backend;
  const auto add = [&](const std::string& part) { text += '\0' + part; };
  const auto add_path = [&](const std::string& path) {
    std::error_code no_folder;
    add(path.empty() ? path : std::filesystem::absolute(path, no_folder).lexically_normal().string());
  };
  add_path(key.store.folder);
  if (const char* home = std::getenv("HOME"); home && key.store.folder.empty()) add(home);  // the backend's own choice
  add(key.name);
  for (const std::string& folder : key.plugins.folders) add_path(folder);
  add(key.plugins.trust == PluginTrust::checked ? "checked" : "any");
  if (const char* folders = std::getenv("CLONE_PLUGIN_PATH")) add(folders);
  char name[32];
  std::snprintf(name, sizeof name, "pool-%016zx.sock", std::hash<std::string>()(text));
  return name;
}

template <typename Rep, typename Period>
bool wait_readable(int fd, std::chrono::duration<Rep, Period> limit) {
  pollfd entry{fd, POLLIN, 0};
  return ::poll(&entry, 1, static_cast<int>(std::chrono::milliseconds(limit).count())) > 0;
}

bool receive_all(int socket, void* into, size_t size_bytes) {
  return ::recv(socket, into, size_bytes, MSG_WAITALL) == static_cast<ssize_t>(size_bytes);
}

bool send_all(int socket, const void* data, size_t size_bytes) {
  return ::send(socket, data, size_bytes, MSG_NOSIGNAL) == static_cast<ssize_t>(size_bytes);
}

bool send_request(int socket, const Arguments& arguments) {
  std::string text;
  for (const std::string& argument : arguments) text += argument + '\0';
  if (text.size() > kMostArgumentBytes) return false;
  const Fd folder(::open(".", O_PATH | O_DIRECTORY | O_CLOEXEC));
  const Fd nothing(::open("/dev/null", O_RDWR | O_CLOEXEC));
  int descriptors[kDescriptors] = {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO, folder.get()};
  for (int& descriptor : descriptors)
    if (::fcntl(descriptor, F_GETFD) < 0) descriptor = nothing.get();

  auto size_bytes = static_cast<uint32_t>(text.size());
  iovec parts[] = {{&size_bytes, sizeof size_bytes}, {text.data(), text.size()}};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof descriptors)] = {};
  msghdr message{};
  message.msg_iov = parts;
  message.msg_iovlen = 2;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  cmsghdr* rights = CMSG_FIRSTHDR(&message);
  rights->cmsg_level = SOL_SOCKET;
  rights->cmsg_type = SCM_RIGHTS;
  rights->cmsg_len = CMSG_LEN(sizeof descriptors);
  std::memcpy(CMSG_DATA(rights), descriptors, sizeof descriptors);
  return ::sendmsg(socket, &message, MSG_NOSIGNAL) == static_cast<ssize_t>(sizeof size_bytes + text.size());
}

struct Request {
  std::array<Fd, kDescriptors> descriptors;
  Arguments arguments;
};

std::optional<Request> receive_request(int socket) {
  Request request;
  uint32_t size_bytes = 0;
  iovec part{&size_bytes, sizeof size_bytes};
  int descriptors[kDescriptors];
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof descriptors)] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  if (::recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_WAITALL) != sizeof size_bytes) return std::nullopt;
  const cmsghdr* rights = CMSG_FIRSTHDR(&message);
  if (!rights || rights->cmsg_type != SCM_RIGHTS) return std::nullopt;
  const size_t count = (rights->cmsg_len - CMSG_LEN(0)) / sizeof(int);
  std::memcpy(descriptors, CMSG_DATA(rights), count * sizeof(int));
  for (size_t i = 0; i < count; ++i) request.descriptors[i] = Fd(descriptors[i]);
  if (count != kDescriptors || size_bytes > kMostArgumentBytes) return std::nullopt;
  std::string text(size_bytes, '\0');
  if (!receive_all(socket, text.data(), text.size())) return std::nullopt;
  for (size_t start = 0, end; (end = text.find('\0', start)) != std::string::npos; start = end + 1)
    request.arguments.push_back(text.substr(start, end - start));
  return request;
}

// The terminal as it was, whatever the machine's process made of it and whether or not it could put it back.
class TerminalSettings {
 public:
  TerminalSettings() : known_(::tcgetattr(STDIN_FILENO, &settings_) == 0) {}
  ~TerminalSettings() {
    if (known_ && ::tcgetpgrp(STDIN_FILENO) == ::getpgrp()) ::tcsetattr(STDIN_FILENO, TCSADRAIN, &settings_);
  }

 private:
  termios settings_{};
  bool known_;
};

// Signals to stop go to the machine's process. One that goes away before it has begun has changed nothing.
Answer await_answer(int socket) {
  sigset_t signals, before;
  ::sigemptyset(&signals);
  for (const int number : {SIGTERM, SIGINT, SIGHUP}) ::sigaddset(&signals, number);
  ::sigprocmask(SIG_BLOCK, &signals, &before);
  const Fd signal_fd(::signalfd(-1, &signals, SFD_CLOEXEC));
  Answer answer{AnswerKind::template_changed, 0};
  for (;;) {
    pollfd entries[] = {{socket, POLLIN, 0}, {signal_fd.get(), POLLIN, 0}};
    if (::poll(entries, 2, -1) < 0 && errno != EINTR) break;
    if (entries[0].revents) {
      const bool has_begun = answer.kind == AnswerKind::begun;
      if (!receive_all(socket, &answer, sizeof answer)) {
        answer = {AnswerKind::template_changed, 0};
        if (has_begun)
          answer = {AnswerKind::ended, static_cast<int>(fail(Error{"the machine's process ended without a word"},
                                                             ExitCode::kvm_failed))};
        break;
      }
      if (answer.kind != AnswerKind::begun) break;
    }
    if (signalfd_siginfo info; entries[1].revents && ::read(signal_fd.get(), &info, sizeof info) > 0)
      send_all(socket, "", 1);
  }
  ::sigprocmask(SIG_SETMASK, &before, nullptr);
  return answer;
}

// The keeper, and what becomes of its children.
class Keeper {
 public:
  Keeper(Fd listener, unsigned count, const PoolMember& member)
      : listener_(std::move(listener)), count_(count), member_(member) {}

  // Tells `ready` once when all are. Returns when the pool is to end.
  void run(Fd ready);

 private:
  struct Waiting {
    pid_t process;
    Fd news;
    bool ready = false;
  };

  bool start_one();
  void hear(Waiting& waiting);
  [[noreturn]] void be_member(const Fd& news);
  std::optional<Request> next_request(const Greeting& hello, Fd& client);

  Fd listener_;
  const unsigned count_;
  const PoolMember& member_;
  std::vector<Waiting> waiting_;
  unsigned failures_ = 0;
  bool over_ = false;
  sigset_t mask_before_{};
};

void become_silent() {
  const Fd nothing(::open("/dev/null", O_RDWR | O_CLOEXEC));
  for (const int standard : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) ::dup2(nothing.get(), standard);
}

// What whoever started this program left open, which would wait for its end. All that this program opens is closed on exec.
void close_inherited() {
  std::vector<int> inherited;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd", error)) {
    const int fd = std::atoi(entry.path().filename().c_str());
    if (const int flags = ::fcntl(fd, F_GETFD); fd > STDERR_FILENO && flags >= 0 && !(flags & FD_CLOEXEC))
      inherited.push_back(fd);
  }
  for (const int fd : inherited) ::close(fd);
}

void Keeper::run(Fd ready) {
  sigset_t signals;
  ::sigemptyset(&signals);
  for (const int number : {SIGTERM, SIGINT, SIGHUP, SIGCHLD}) ::sigaddset(&signals, number);
  ::sigprocmask(SIG_BLOCK, &signals, &mask_before_);
  const Fd signal_fd(::signalfd(-1, &signals, SFD_CLOEXEC));
  const auto all_ready = [this] {
    return waiting_.size() == count_ && std::ranges::all_of(waiting_, &Waiting::ready);
  };
  while (waiting_.size() < count_ && start_one()) {
  }
  while (!over_ && failures_ < kMostFailures) {
    if (ready && all_ready()) {
      become_silent();
      (void)!::write(ready.get(), "r", 1);
      ready.reset();
    }
    std::vector<pollfd> entries{{signal_fd.get(), POLLIN, 0}};
    for (const Waiting& waiting : waiting_) entries.push_back({waiting.news.get(), POLLIN, 0});
    const bool refill = waiting_.size() < count_;
    const int found = ::poll(entries.data(), entries.size(), refill ? static_cast<int>(kRefillDelay.count()) : -1);
    if (found == 0 && !start_one()) ++failures_;
    if (found <= 0) continue;
    for (size_t i = waiting_.size(); i-- > 0;)
      if (entries[i + 1].revents) hear(waiting_[i]);
    std::erase_if(waiting_, [](const Waiting& waiting) { return !waiting.news; });
    if (signalfd_siginfo info; entries[0].revents && ::read(signal_fd.get(), &info, sizeof info) > 0) {
      if (info.ssi_signo != SIGCHLD) return;
      while (::waitpid(-1, nullptr, WNOHANG) > 0) {
      }
    }
  }
}

bool Keeper::start_one() {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return false;
  Fd ours(ends[0]), theirs(ends[1]);
  const pid_t keeper = ::getpid();
  const pid_t process = ::fork();
  if (process < 0) return false;
  if (process == 0) {
    ours.reset();
    waiting_.clear();
    ::sigprocmask(SIG_SETMASK, &mask_before_, nullptr);
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != keeper) ::_exit(0);
    be_member(theirs);
  }
  waiting_.push_back({process, std::move(ours)});
  return true;
}

// One that has come to its end before it was ready has failed; several in a row, and there is no use in going on.
void Keeper::hear(Waiting& waiting) {
  News news{};
  const bool told = ::read(waiting.news.get(), &news, 1) == 1;
  if (told && news == News::ready) {
    waiting.ready = true;
    failures_ = 0;
    return;
  }
  if (!told && !waiting.ready) ++failures_;
  over_ |= told && news == News::template_changed;
  waiting.news.reset();
}

// The next client that is of our own and says what it wants.
std::optional<Request> Keeper::next_request(const Greeting& hello, Fd& client) {
  pollfd entry{listener_.get(), POLLIN, 0};
  if (::poll(&entry, 1, -1) <= 0) return std::nullopt;
  client = accept_client(listener_.get());
  if (!client || !peer_of(client.get()).trusted) return std::nullopt;
  const timeval limit{kRequestLimit.count(), 0};
  ::setsockopt(client.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  ::fcntl(client.get(), F_SETFL, 0);
  if (!send_all(client.get(), &hello, sizeof hello) || !wait_readable(client.get(), kRequestLimit))
    return std::nullopt;
  return receive_request(client.get());
}

void Keeper::be_member(const Fd& news) {
  const auto tell = [&](News what) { return ::write(news.get(), &what, 1) == 1; };
  ::signal(SIGPIPE, SIG_IGN);  // the keeper may be gone
  if (const auto prepared = member_.prepare(); !prepared.ok()) ::_exit(static_cast<int>(fail(prepared.error())));
  become_silent();
  const Greeting hello = greeting();
  tell(News::ready);
  Fd client;
  std::optional<Request> request;
  while (!request) request = next_request(hello, client);

  ::prctl(PR_SET_PDEATHSIG, 0);
  listener_.reset();
  Answer answer{AnswerKind::template_changed, 0};
  if (member_.is_current()) {
    const Answer begun{AnswerKind::begun, 0};
    if (!send_all(client.get(), &begun, sizeof begun)) ::_exit(0);
    tell(News::taken);
    for (const int standard : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO})
      ::dup2(request->descriptors[static_cast<size_t>(standard)].get(), standard);
    (void)!::fchdir(request->descriptors[3].get());
    request->descriptors = {};
    answer = {AnswerKind::ended, static_cast<int>(member_.run(request->arguments, client.get()))};
    std::fflush(nullptr);
  } else {
    tell(News::template_changed);
  }
  send_all(client.get(), &answer, sizeof answer);
  ::_exit(answer.exit_code);
}

}  // namespace

std::optional<ExitCode> fork_from_pool(const PoolKey& key, const Arguments& arguments) {
  const auto pools = open_runtime_root();
  if (!pools.ok()) return std::nullopt;
  const auto socket = connect_in(pools->get(), socket_name(key), kGreetingLimit);
  if (!socket.ok() || !peer_of(socket->get()).trusted) return std::nullopt;
  Greeting hello;
  if (!wait_readable(socket->get(), kGreetingLimit) || !receive_all(socket->get(), &hello, sizeof hello) ||
      hello != greeting())
    return std::nullopt;
  // The terminal has its own idea of who may use it, which the pool's processes are not part of.
  if (::isatty(STDIN_FILENO) && ::tcgetpgrp(STDIN_FILENO) != ::getpgrp()) return std::nullopt;
  const TerminalSettings terminal;
  if (!send_request(socket->get(), arguments)) return std::nullopt;
  const Answer answer = await_answer(socket->get());
  if (answer.kind != AnswerKind::ended) return std::nullopt;
  return static_cast<ExitCode>(answer.exit_code);
}

Result<bool> end_pool(const PoolKey& key) {
  const Fd pools = TRY(open_runtime_root());
  const std::string socket = socket_name(key);
  const auto until = std::chrono::steady_clock::now() + kEndingLimit;
  for (bool found = false;; found = true) {
    // The listener's credentials are those of the keeper, who made it.
    const auto connected = connect_in(pools.get(), socket, kGreetingLimit);
    if (!connected.ok() && connected.error().code != ETIMEDOUT) return found;
    if (std::chrono::steady_clock::now() > until) return Error{"the pool of '" + key.name + "' does not end"};
    if (connected.ok()) {
      const Peer keeper = peer_of(connected->get());
      // 0: a process that this one cannot see.
      if (!keeper.trusted || keeper.pid <= 0) return Error{"the pool of '" + key.name + "' is not of this user here"};
      if (::kill(keeper.pid, SIGTERM) != 0 && errno != ESRCH)
        return errno_error("the pool's process " + std::to_string(keeper.pid));
    }
    std::this_thread::sleep_for(5ms);
  }
}

Result<int> start_pool(const PoolKey& key, unsigned count, const PoolMember& member) {
  const Fd pools = TRY(open_runtime_root());
  Fd lock = TRY(lock_in_runtime_root(pools.get(), ".pools"));  // until the new one is there
  TRY(end_pool(key));
  const std::string socket = socket_name(key);
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return errno_error("pipe");
  Fd ours(ends[0]), theirs(ends[1]);
  std::fflush(nullptr);
  const pid_t process = ::fork();
  if (process < 0) return errno_error("fork");
  if (process == 0) {
    ours.reset();
    lock.reset();
    ::setsid();
    ::prctl(PR_SET_NAME, "clone-pool");
    close_inherited();
    ::unlinkat(pools.get(), socket.c_str(), 0);
    auto listener = listen_in(pools.get(), socket);
    if (!listener.ok()) ::_exit(static_cast<int>(fail(listener.error())));
    (void)!::chdir("/");
    Keeper keeper(std::move(*listener), count, member);
    keeper.run(std::move(theirs));
    ::unlinkat(pools.get(), socket.c_str(), 0);  // as long as it is this one's
    ::_exit(0);
  }
  theirs.reset();
  char byte;
  if (::read(ours.get(), &byte, 1) == 1) return static_cast<int>(process);
  ::waitpid(process, nullptr, 0);
  return Error{"the pool of '" + key.name + "' could not be started"};
}

}  // namespace vmm
