// SPDX-License-Identifier: Apache-2.0
// Starts keepers and talks to them; what comes back is taken as hostile.
#include "keepers.hpp"

#include <dlfcn.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <filesystem>

#include "protocol.hpp"

namespace snapshot_memory {
namespace {

namespace fs = std::filesystem;
using snapshot_file::system_error;

constexpr std::string_view kSuffix = ".sock";
constexpr timeval kLimit{3, 0};  // for whatever a keeper has to do
constexpr int kSeals = F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW;

std::string socket_name(const std::string& name) { return name + std::string(kSuffix); }

// The folder's descriptor makes a short path: a socket's address holds few bytes.
sockaddr_un address_in(int folder, const std::string& name) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string path = "/proc/self/fd/" + std::to_string(folder) + "/" + name;
  std::copy_n(path.data(), std::min(path.size(), sizeof address.sun_path - 1), address.sun_path);
  return address;
}

bool limit_waits(int socket) {
  return ::setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &kLimit, sizeof kLimit) == 0 &&
         ::setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &kLimit, sizeof kLimit) == 0;
}

Result<Fd> connect_to(int folder, const std::string& name) {
  const sockaddr_un address = address_in(folder, name);
  Fd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (!socket || !limit_waits(socket.get()) ||
      ::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
    return system_error();
  return socket;
}

// ECONNRESET, EPIPE: with our request unread.
Error hung_up() { return {"its keeper hung up", ECONNRESET, CLONE_ERR_SYSTEM}; }
Error silence() { return {"its keeper does not answer", ETIMEDOUT, CLONE_ERR_SYSTEM}; }

// One packet. Descriptors that come with it are ours to close, whatever they are.
struct Packet {
  std::array<char, sizeof kGreeting + 1> text;
  size_t size_bytes = 0;
  std::vector<Fd> files;
  bool cut = false;  // there were more of them, or more text
};
Result<Packet> receive(int socket) {
  Packet packet;
  alignas(cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))];
  iovec text{packet.text.data(), packet.text.size()};
  msghdr message{};
  message.msg_iov = &text;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  ssize_t got = 0;
  while ((got = ::recvmsg(socket, &message, MSG_CMSG_CLOEXEC)) < 0 && errno == EINTR) {
  }
  if (got < 0) return errno == EAGAIN ? silence() : errno == ECONNRESET ? hung_up() : system_error();
  packet.size_bytes = static_cast<size_t>(got);
  packet.cut = message.msg_flags & (MSG_CTRUNC | MSG_TRUNC);
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    for (size_t at = 0; at + CMSG_LEN(sizeof(int)) <= header->cmsg_len; at += sizeof(int)) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(header) + at, sizeof fd);
      packet.files.emplace_back(fd);
    }
  }
  return packet;
}

Result<struct stat> status_of_sealed(int file, const char* what) {
  struct stat status {};
  const int seals = ::fcntl(file, F_GET_SEALS);
  if (seals < 0 || (seals & kSeals) != kSeals || ::fstat(file, &status) != 0)
    return Error{std::string("its ") + what + " is not a file in memory that is sealed", 0, CLONE_ERR_CORRUPT};
  return status;
}

// Above all that posix_spawn puts in place one after the other.
Result<Fd> moved_up(int fd) {
  Fd copy(::fcntl(fd, F_DUPFD_CLOEXEC, kDescriptors));
  if (!copy) return system_error();
  return copy;
}

// Returns when the program has left this process. It has no parent then that would have to wait for it.
Result<void> spawn(int program, const std::string& name, const std::array<int, kDescriptors>& descriptors) {
  posix_spawn_file_actions_t actions;
  if (const int code = ::posix_spawn_file_actions_init(&actions)) return system_error(code);
  std::vector<Fd> copies;
  int code = 0;
  for (int i = 0; i < kDescriptors && !code; ++i) {
    auto copy = moved_up(descriptors[static_cast<size_t>(i)]);
    code = copy.ok() ? ::posix_spawn_file_actions_adddup2(&actions, copy->get(), i) : copy.error().code;
    if (copy.ok()) copies.push_back(std::move(copy).value());
  }
  auto executable = moved_up(program);
  if (!executable.ok() && !code) code = executable.error().code;
  pid_t child = -1;
  if (!code) {
    const std::string path = "/proc/self/fd/" + std::to_string(executable->get());
    char* const words[] = {const_cast<char*>("clone-keeper"), const_cast<char*>(name.c_str()), nullptr};
    char* const no_environment[] = {nullptr};
    code = ::posix_spawn(&child, path.c_str(), &actions, nullptr, words, no_environment);
  }
  ::posix_spawn_file_actions_destroy(&actions);
  if (code) return system_error(code);
  while (::waitpid(child, nullptr, 0) < 0 && errno == EINTR) {
  }
  return {};
}

// Taken away again unless it got its name.
class TemporarySocket {
 public:
  TemporarySocket(int folder, std::string name) : folder_(folder), name_(std::move(name)) {}
  TemporarySocket(const TemporarySocket&) = delete;
  ~TemporarySocket() {
    if (!name_.empty()) ::unlinkat(folder_, name_.c_str(), 0);
  }
  Result<Fd> bind() const {
    const sockaddr_un address = address_in(folder_, name_);
    Fd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    // Linux gives a socket's file the permissions of the socket.
    if (!socket || ::fchmod(socket.get(), 0600) != 0 ||
        ::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
      return system_error();
    return socket;
  }
  bool rename_to(const std::string& name) {
    if (::renameat2(folder_, name_.c_str(), folder_, name.c_str(), RENAME_NOREPLACE) != 0) return false;
    name_.clear();
    return true;
  }

 private:
  int folder_;
  std::string name_;
};

}  // namespace

std::string Keepers::path_of(const std::string& name) const { return store_.path_of(socket_name(name)); }

Result<std::vector<std::string>> Keepers::names() const {
  std::vector<std::string> names;
  for (const std::string& file : CLONE_TRY(snapshot_file::names_in(store_.fd()).context(path()))) {
    if (!file.ends_with(kSuffix)) continue;
    std::string name = file.substr(0, file.size() - kSuffix.size());
    if (snapshot_file::check_name("", name).ok()) names.push_back(std::move(name));
  }
  std::sort(names.begin(), names.end());
  return names;
}

Result<Fd> Keepers::connect(const std::string& name) const {
  auto socket = connect_to(store_.fd(), socket_name(name));
  if (socket.ok()) return socket;
  const int code = socket.error().code;
  const std::string missing = "there is no snapshot '" + name + "' in " + path();
  if (code == ENOENT) return Error{missing, code, CLONE_ERR_NOT_FOUND};
  if (code == ECONNREFUSED) return Error{missing + ": its keeper has ended", code, CLONE_ERR_NOT_FOUND};
  return (code == EAGAIN ? silence() : std::move(socket).error()).context(path_of(name));
}

Result<Fd> Keepers::request(const std::string& name, char what) const {
  Fd socket = CLONE_TRY(connect(name));
  if (::send(socket.get(), &what, 1, MSG_NOSIGNAL) != 1)
    return (errno == EPIPE || errno == ECONNRESET ? hung_up() : system_error()).context(path_of(name));
  return socket;
}

Result<KeptFiles> Keepers::ask(const std::string& name) const {
  const Fd socket = CLONE_TRY(request(name, kGive));
  Packet packet = CLONE_TRY(receive(socket.get()).context(path_of(name)));
  if (!packet.size_bytes) return hung_up().context(path_of(name));
  if (packet.cut || packet.size_bytes != sizeof kGreeting || packet.files.size() != 2 ||
      std::memcmp(packet.text.data(), kGreeting, sizeof kGreeting) != 0)
    return Error{path_of(name) + ": its answer is not a keeper's", 0, CLONE_ERR_CORRUPT};
  KeptFiles files{std::move(packet.files[0]), std::move(packet.files[1])};
  const auto memory = CLONE_TRY(status_of_sealed(files.memory.get(), "memory").context(path_of(name)));
  const auto state = CLONE_TRY(status_of_sealed(files.state.get(), "state").context(path_of(name)));
  files.memory_bytes = static_cast<uint64_t>(memory.st_size);
  files.state_bytes = static_cast<uint64_t>(state.st_size);
  files.stored_bytes = static_cast<uint64_t>(memory.st_blocks + state.st_blocks) * 512;
  return files;
}

// Its socket goes last: as long as there is a keeper, it can be found.
Result<void> Keepers::end(const std::string& name) const {
  const auto lock = CLONE_TRY(store_.lock());
  const Fd socket = CLONE_TRY(request(name, kEnd));
  const Packet packet = CLONE_TRY(receive(socket.get()).context(path_of(name)));
  if (packet.size_bytes) return Error{path_of(name) + ": its answer is not a keeper's", 0, CLONE_ERR_CORRUPT};
  if (connect_to(store_.fd(), socket_name(name)).ok())
    return Error{path_of(name) + ": its keeper goes on", 0, CLONE_ERR_SYSTEM};
  clear_dead();
  return {};
}

void Keepers::clear_dead() const {
  const auto names = snapshot_file::names_in(store_.fd());
  if (!names.ok()) return;
  for (const std::string& name : *names) {
    struct stat status {};
    if (::fstatat(store_.fd(), name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0 || !S_ISSOCK(status.st_mode)) continue;
    const auto socket = connect_to(store_.fd(), name);
    if (!socket.ok() && socket.error().code == ECONNREFUSED) ::unlinkat(store_.fd(), name.c_str(), 0);
  }
}

Error Keepers::already_there(const std::string& name) const {
  return {"there is a snapshot '" + name + "' in " + path() + " already; allowed is another name, or to remove it",
          EEXIST, CLONE_ERR_BUSY};
}

Result<void> Keepers::expect_free(const std::string& name) const {
  const auto lock = CLONE_TRY(store_.lock());
  clear_dead();
  if (CLONE_TRY(store_.has(socket_name(name)))) return already_there(name);
  return {};
}

// Whoever dies on the way, no keeper stays that cannot be found: without kPublished it ends.
Result<void> Keepers::publish(const std::string& name, int program, int memory, int state) const {
  for (const int file : {memory, state})
    if (::fcntl(file, F_ADD_SEALS, kSeals) != 0) return system_error().context("a file in memory cannot be sealed");
  const auto lock = CLONE_TRY(store_.lock());
  clear_dead();
  uint32_t random = 0;
  if (::getrandom(&random, sizeof random, 0) != ssize_t{sizeof random}) return system_error().context("getrandom");
  TemporarySocket socket(store_.fd(), "." + name + "." + std::to_string(random));
  Fd listener = CLONE_TRY(socket.bind().context(path_of(name)));
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) return system_error().context("socketpair");
  Fd ours(ends[0]), theirs(ends[1]);
  CLONE_TRY(spawn(program, name, {listener.get(), memory, state, theirs.get()}).context("clone-keeper"));
  listener.reset();
  theirs.reset();
  char answer = 0;
  if (!limit_waits(ours.get()) || ::recv(ours.get(), &answer, 1, 0) != 1 || answer != kReady)
    return Error{"clone-keeper does not start", 0, CLONE_ERR_SYSTEM};
  if (!socket.rename_to(socket_name(name))) {
    if (errno == EEXIST) return already_there(name);
    return system_error().context(path_of(name));
  }
  if (::send(ours.get(), &kPublished, 1, MSG_NOSIGNAL) == 1) return {};
  ::unlinkat(store_.fd(), socket_name(name).c_str(), 0);
  return Error{"clone-keeper ended before it was asked", 0, CLONE_ERR_SYSTEM};
}

Result<Fd> open_keeper_program() {
  Dl_info plugin{};
  if (::dladdr(reinterpret_cast<const void*>(&open_keeper_program), &plugin) == 0)
    return Error{"clone-keeper: the place of this plugin is not known", 0, CLONE_ERR_SYSTEM};
  std::error_code error;
  fs::path prefix = fs::canonical(plugin.dli_fname, error);
  if (error) return system_error(error.value()).context(plugin.dli_fname);
  for (int i = 0; i < 4; ++i) prefix = prefix.parent_path();
  const std::string path = (prefix / "libexec/clone/clone-keeper").string();
  return std::move(CLONE_TRY(snapshot_file::open_own(AT_FDCWD, path, snapshot_file::Kind::file, path)).fd);
}

}  // namespace snapshot_memory
