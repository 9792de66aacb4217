// SPDX-License-Identifier: Apache-2.0
// Between virtqueues, Streams and Unix sockets.
#include "user_backend.hpp"

#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>

#include <cerrno>
#include <charconv>
#include <cstring>

namespace virtio_vsock {

using clone_sdk::errno_error;
using clone_sdk::Error;
using clone_sdk::Fd;
using clone_sdk::Queue;
using clone_sdk::Result;

namespace {

constexpr const char* kSocketName = "vsock.sock";
constexpr size_t kLongestGreeting = 32;
constexpr std::chrono::milliseconds kGreetingTime{5000};
constexpr std::chrono::milliseconds kTimerPeriod{1000};
constexpr std::chrono::milliseconds kListenerRest{100};
// What one round of the loop does at most before it looks for other events, and lets other threads in.
constexpr unsigned kChainsPerTurn = 64;
constexpr unsigned kTurns = 8;
constexpr unsigned kAcceptsPerRound = 64;

// A socket's address holds fewer bytes than a path may have; the directory's descriptor makes a short one.
sockaddr_un socket_address(int directory, const std::string& name) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string path = "/proc/self/fd/" + std::to_string(directory) + "/" + name;
  std::memcpy(address.sun_path, path.c_str(), std::min(path.size() + 1, sizeof address.sun_path - 1));
  return address;
}

bool is_trusted_peer(int fd) {
  ucred peer{};
  socklen_t size = sizeof peer;
  return ::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && (peer.uid == ::geteuid() || peer.uid == 0);
}

// The lowest free number is given to a descriptor: when only high ones are left, those are the VMM's.
bool is_scarce(int fd) {
  rlimit limit{};
  return ::getrlimit(RLIMIT_NOFILE, &limit) == 0 && static_cast<rlim_t>(fd) + kReservedStreams >= limit.rlim_cur;
}

std::chrono::milliseconds steady_now() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now().time_since_epoch());
}

// "CONNECT 1234": 1234.
std::optional<uint32_t> parse_greeting(std::string_view line) {
  constexpr std::string_view kCommand = "CONNECT ";
  if (!line.starts_with(kCommand)) return std::nullopt;
  line.remove_prefix(kCommand.size());
  if (line.ends_with('\r')) line.remove_suffix(1);
  uint32_t port = 0;
  const auto [end, error] = std::from_chars(line.data(), line.data() + line.size(), port);
  if (error != std::errc() || end != line.data() + line.size() || port == UINT32_MAX) return std::nullopt;
  return port;
}

uint32_t random_number() {
  uint32_t number = 0;
  if (::getrandom(&number, sizeof number, 0) != sizeof number) number = 0x5eed;
  return number;
}

}  // namespace

// Something in the epoll set, which names it by its address.
class UserBackend::Source {
 public:
  virtual ~Source() = default;
  virtual void ready(uint32_t events) = 0;
};

// A member function of the backend as a source.
class UserBackend::Signal final : public Source {
 public:
  Signal(UserBackend& backend, void (*call)(UserBackend&)) : backend_(backend), call_(call) {}
  void ready(uint32_t) override { call_(backend_); }

 private:
  UserBackend& backend_;
  void (*call_)(UserBackend&);
};

// A socket that a stream leads to.
class UserBackend::Client final : public Source, public Partner {
 public:
  Client(UserBackend& backend, Fd fd) : backend_(backend), fd_(std::move(fd)) {
    epoll_event event{0, {.ptr = static_cast<Source*>(this)}};
    watched_ = ::epoll_ctl(backend_.epoll_.get(), EPOLL_CTL_ADD, fd_.get(), &event) == 0;
  }
  ~Client() override { close(); }
  Client(const Client&) = delete;

  int fd() const { return fd_.get(); }
  bool is_watched() const { return watched_; }
  void close() {
    unwatch();
    fd_.reset();
  }

  void ready(uint32_t events) override {
    if (!fd_) return;
    const bool hung_up = (events & (EPOLLHUP | EPOLLERR)) != 0;
    if (!stream) {
      backend_.greet(*this);
      return;
    }
    if (hung_up) unwatch();  // it would be reported for ever
    backend_.streams_.ready(*stream, (events & EPOLLIN) != 0, (events & EPOLLOUT) != 0, hung_up);
  }

  void accepted(uint32_t host_port) override {
    if (answers) {
      const std::string answer = "OK " + std::to_string(host_port) + "\n";
      // The first bytes that go to it: there is room. Whoever is gone will be found to have hung up.
      static_cast<void>(::send(fd_.get(), answer.data(), answer.size(), MSG_NOSIGNAL | MSG_DONTWAIT));
    }
    std::byte scratch[4096];
    while (filler_bytes > 0) {
      const ssize_t count = ::recv(fd_.get(), scratch, std::min(filler_bytes, sizeof scratch), MSG_DONTWAIT);
      if (count <= 0) break;
      filler_bytes -= static_cast<size_t>(count);
    }
  }
  ssize_t read(std::span<const iovec> into) override {
    const ssize_t count = ::readv(fd_.get(), into.data(), static_cast<int>(std::min<size_t>(into.size(), IOV_MAX)));
    return count < 0 ? error() : count;
  }
  ssize_t write(std::span<const iovec> from) override {
    msghdr message{};
    message.msg_iov = const_cast<iovec*>(from.data());
    message.msg_iovlen = std::min<size_t>(from.size(), IOV_MAX);
    const ssize_t count = ::sendmsg(fd_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    return count < 0 ? error() : count;
  }
  void end_writing() override { ::shutdown(fd_.get(), SHUT_WR); }
  void end_reading() override { ::shutdown(fd_.get(), SHUT_RD); }
  void watch(bool readable, bool writable) override {
    const uint32_t wanted = (readable ? uint32_t{EPOLLIN} : 0) | (writable ? uint32_t{EPOLLOUT} : 0);
    if (!watched_ || wanted == events_) return;
    epoll_event event{wanted, {.ptr = static_cast<Source*>(this)}};
    ::epoll_ctl(backend_.epoll_.get(), EPOLL_CTL_MOD, fd_.get(), &event);
    events_ = wanted;
  }

  bool answers = false;     // with "OK PORT"
  size_t filler_bytes = 0;  // that make the other end unwritable until the guest accepts
  std::string greeting;     // as far as it came
  std::chrono::milliseconds greeting_deadline{0};

 private:
  static ssize_t error() { return errno == EINTR ? -EAGAIN : -errno; }
  void unwatch() {
    if (std::exchange(watched_, false)) ::epoll_ctl(backend_.epoll_.get(), EPOLL_CTL_DEL, fd_.get(), nullptr);
  }

  UserBackend& backend_;
  Fd fd_;
  bool watched_ = false;
  uint32_t events_ = 0;
};

Result<std::unique_ptr<UserBackend>> UserBackend::create(const clone_sdk::Host& host, uint32_t guest_cid,
                                                         int directory) {
  std::unique_ptr<UserBackend> backend(new UserBackend(host, guest_cid, directory));
  CLONE_TRY(backend->open());
  return backend;
}

UserBackend::UserBackend(const clone_sdk::Host& host, uint32_t guest_cid, int directory)
    : host_(host), directory_(directory), streams_(guest_cid, *this, random_number()) {}

UserBackend::~UserBackend() {
  watch_.stop();
  if (loop_) loop_table_->destroy(loop_);
  streams_.drop_all();
  retired_.clear();
  greeting_.clear();
  if (listener_) ::unlinkat(directory_, kSocketName, 0);
}

Result<void> UserBackend::open() {
  loop_table_ = CLONE_TRY(host_.service<clone_host_loop>(CLONE_HOST_LOOP));
  epoll_ = Fd(::epoll_create1(EPOLL_CLOEXEC));
  wake_ = Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  timer_ = Fd(::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
  if (!epoll_ || !wake_ || !timer_) return errno_error("backend=user");
  if (directory_ >= 0) CLONE_TRY(listen());

  const auto add = [this](int fd, void (*call)(UserBackend&)) {
    signals_.push_back(std::make_unique<Signal>(*this, call));
    epoll_event event{EPOLLIN, {.ptr = signals_.back().get()}};
    return ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) == 0;
  };
  const bool watched = add(wake_.get(),
                           [](UserBackend& backend) {
                             eventfd_t ignored;
                             ::eventfd_read(backend.wake_.get(), &ignored);
                           }) &&
                       add(timer_.get(), [](UserBackend& backend) { backend.expire(); }) &&
                       (!listener_ || add(listener_.get(), [](UserBackend& backend) { backend.accept_clients(); }));
  if (!watched) return errno_error("backend=user: epoll");
  if (listener_) listener_signal_ = signals_.back().get();
  // For the kicks of each queue; they are in the set while the queues are.
  signals_.push_back(std::make_unique<Signal>(*this, [](UserBackend& backend) {
    if (backend.rx_) backend.rx_.clear_kick();
  }));
  signals_.push_back(std::make_unique<Signal>(*this, [](UserBackend& backend) {
    if (backend.tx_) backend.tx_.clear_kick();
  }));
  return {};
}

Result<void> UserBackend::listen() {
  listener_ = Fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!listener_) return errno_error(kSocketName);
  // The directory is this VM's alone: what stands there is a leftover.
  ::unlinkat(directory_, kSocketName, 0);
  const sockaddr_un address = socket_address(directory_, kSocketName);
  if (::bind(listener_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
      ::listen(listener_.get(), SOMAXCONN) != 0) {
    Error error = errno_error(std::string(kSocketName) + " in the VM's directory");
    listener_.reset();
    return error;
  }
  return {};
}

// --- The life of the device ---

Result<void> UserBackend::activate(const clone_sdk::Activation& activation) {
  std::lock_guard lock(mutex_);
  const Queue rx = activation.queues[kRxQueue], tx = activation.queues[kTxQueue];
  if (!rx || !tx) return Error{"the driver did not enable the rx and tx queues", 0, CLONE_ERR_GUEST};
  const auto add = [this](const Queue& queue, const std::unique_ptr<Source>& source) {
    epoll_event event{EPOLLIN, {.ptr = source.get()}};
    return ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, queue.kick_fd(), &event) == 0;
  };
  if (!add(rx, signals_.end()[-2])) return errno_error("the rx queue's eventfd");
  if (!add(tx, signals_.end()[-1])) {
    Error error = errno_error("the tx queue's eventfd");
    ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, rx.kick_fd(), nullptr);
    return error;
  }
  rx_ = rx;
  tx_ = tx;
  port_ = activation.port;
  broken_ = false;
  rx_.disable_kick();
  wake();
  return {};
}

void UserBackend::reset_queues() {
  std::lock_guard lock(mutex_);
  if (rx_) ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, rx_.kick_fd(), nullptr);
  if (tx_) ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, tx_.kick_fd(), nullptr);
  rx_ = tx_ = {};
  port_ = nullptr;
  streams_.drop_all();
  retired_.clear();
}

Result<void> UserBackend::resume() {
  if (!loop_) {
    clone_sdk::ErrorBuffer error;
    CLONE_TRY(error.result(loop_table_->create(host_.raw(), "vsock", &loop_, error)));
  }
  {
    std::lock_guard lock(mutex_);
    if (still_since_) still_for_ += steady_now() - *std::exchange(still_since_, std::nullopt);
  }
  watch_ =
      CLONE_TRY(clone_sdk::Watch::start<&UserBackend::serve>(loop_table_, loop_, epoll_.get(), CLONE_READABLE, this));
  wake();
  return {};
}

// Nothing is taken from a queue and not given back between rounds.
Result<void> UserBackend::quiesce() {
  watch_.stop();
  std::lock_guard lock(mutex_);
  if (!still_since_) still_since_ = steady_now();
  return {};
}

Result<void> UserBackend::end_streams() {
  std::lock_guard lock(mutex_);
  streams_.drop_all();
  retired_.clear();
  return {};
}

Result<Fd> UserBackend::connect(uint32_t guest_port) {
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) != 0)
    return errno_error("a socket for port " + std::to_string(guest_port));
  Fd ours(ends[0]), theirs(ends[1]);
  // The caller's end is to be writable once the guest has accepted: until then it is full.
  static constexpr std::byte kFiller[4096]{};
  size_t filler_bytes = 0;
  for (pollfd entry{theirs.get(), POLLOUT, 0}; ::poll(&entry, 1, 0) == 1 && entry.revents & POLLOUT;) {
    const ssize_t count = ::send(theirs.get(), kFiller, sizeof kFiller, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (count <= 0) break;
    filler_bytes += static_cast<size_t>(count);
  }
  std::lock_guard lock(mutex_);
  if (!active()) return Error{"the guest's vsock driver is not there (yet)", 0, CLONE_ERR_STATE};
  if (full(PortRange::reserved))
    return Error{"the guest has " + std::to_string(kMostStreams) + " streams, which is all there can be", 0,
                 CLONE_ERR_BUSY};
  auto client = std::make_unique<Client>(*this, std::move(ours));
  if (!client->is_watched()) return errno_error("a socket for port " + std::to_string(guest_port));
  client->filler_bytes = filler_bytes;
  if (!streams_.open(guest_port, std::move(client), PortRange::reserved))
    return Error{"no port below 1024 is free", 0, CLONE_ERR_BUSY};
  wake();
  return theirs;
}

// --- The loop ---

void UserBackend::wake() const { ::eventfd_write(wake_.get(), 1); }

void UserBackend::serve() {
  std::lock_guard lock(mutex_);
  epoll_event events[64];
  const int count = ::epoll_wait(epoll_.get(), events, std::size(events), 0);
  for (int i = 0; i < count; ++i) static_cast<Source*>(events[i].data.ptr)->ready(events[i].events);
  exchange_packets();
  streams_.settle();
  retired_.clear();
  arm_timer();
}

void UserBackend::accept_clients() {
  for (unsigned i = 0; i < kAcceptsPerRound; ++i) {
    Fd fd(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!fd) {
      if (errno == EINTR || errno == ECONNABORTED) continue;
      // Whoever waits goes on to wait, and would be reported for ever.
      if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) watch_listener(false);
      return;
    }
    if (!is_trusted_peer(fd.get()) || full(PortRange::ordinary) || is_scarce(fd.get())) continue;
    auto client = std::make_unique<Client>(*this, std::move(fd));
    if (!client->is_watched()) continue;
    client->watch(true, false);
    client->greeting_deadline = now() + kGreetingTime;
    Client& added = *client;
    greeting_.emplace(&added, std::move(client));
  }
}

void UserBackend::watch_listener(bool watched) {
  epoll_event event{watched ? uint32_t{EPOLLIN} : 0, {.ptr = listener_signal_}};
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, listener_.get(), &event);
  listener_rests_ = !watched;
}

// "CONNECT PORT\n"; what follows it belongs to the stream, so it is looked at first and then taken.
void UserBackend::greet(Client& client) {
  char bytes[kLongestGreeting];
  const ssize_t count = ::recv(client.fd(), bytes, sizeof bytes, MSG_PEEK | MSG_DONTWAIT);
  if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (count <= 0) return forget(client);
  const auto* const line_end = static_cast<const char*>(std::memchr(bytes, '\n', static_cast<size_t>(count)));
  const size_t taken = line_end ? static_cast<size_t>(line_end - bytes) + 1 : static_cast<size_t>(count);
  if (client.greeting.size() + taken > kLongestGreeting ||
      ::recv(client.fd(), bytes, taken, MSG_DONTWAIT) != static_cast<ssize_t>(taken))
    return forget(client);
  client.greeting.append(bytes, line_end ? taken - 1 : taken);
  if (!line_end) return;
  const auto port = parse_greeting(client.greeting);
  if (!port || !active()) return forget(client);
  auto node = greeting_.extract(&client);
  client.greeting = {};
  client.answers = true;
  streams_.open(*port, std::move(node.mapped()), PortRange::ordinary);
}

void UserBackend::forget(Client& client) {
  auto node = greeting_.extract(&client);
  retire(std::move(node.mapped()));
}

void UserBackend::expire() {
  uint64_t ignored;
  [[maybe_unused]] const ssize_t size = ::read(timer_.get(), &ignored, sizeof ignored);
  if (listener_rests_) watch_listener(true);
  streams_.expire();
  std::vector<Client*> late;
  const auto time = now();
  for (const auto& [client, owned] : greeting_)
    if (client->greeting_deadline <= time) late.push_back(client);
  for (Client* client : late) forget(*client);
}

void UserBackend::arm_timer() {
  const bool wanted = streams_.has_deadlines() || !greeting_.empty();
  const auto period = listener_rests_ ? kListenerRest : wanted ? kTimerPeriod : std::chrono::milliseconds{0};
  if (period == timer_period_) return;
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(period);
  const timespec time = {seconds.count(), std::chrono::nanoseconds(period - seconds).count()};
  const itimerspec setting = {time, time};
  ::timerfd_settime(timer_.get(), 0, &setting, nullptr);
  timer_period_ = period;
}

std::chrono::milliseconds UserBackend::now() { return still_since_.value_or(steady_now()) - still_for_; }

std::unique_ptr<Partner> UserBackend::dial(uint32_t host_port) {
  if (directory_ < 0 || full(PortRange::ordinary)) return nullptr;
  Fd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  const sockaddr_un address = socket_address(directory_, std::string(kSocketName) + "_" + std::to_string(host_port));
  if (!fd || is_scarce(fd.get()) ||
      ::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
      !is_trusted_peer(fd.get()))
    return nullptr;
  auto client = std::make_unique<Client>(*this, std::move(fd));
  if (!client->is_watched()) return nullptr;
  return client;
}

void UserBackend::retire(std::unique_ptr<Partner> partner) {
  auto& client = static_cast<Client&>(*partner);
  client.stream = nullptr;
  client.close();
  retired_.push_back(std::move(partner));
}

// --- The queues ---

void UserBackend::exchange_packets() {
  bool more = active();
  for (unsigned turn = 0; more && active(); ++turn) {
    if (turn == kTurns || (turn > 0 && mutex_.contended())) {
      wake();
      break;
    }
    const bool took = take_packets();
    const bool gave = active() && give_packets();
    more = took || gave;
  }
  if (!active()) return;
  tx_.signal();
  rx_.signal();
}

void UserBackend::driver_broke() {
  host_.log(CLONE_LOG_DEBUG, "the driver broke a rule of its queue");
  broken_ = true;
  streams_.drop_all();
  port_->needs_reset(port_->context);
}

// From the guest. False when there was nothing, or there is no room for answers.
bool UserBackend::take_packets() {
  unsigned chains = 0;
  for (; chains < kChainsPerTurn && streams_.takes_packets(); ++chains) {
    if (chains > 0 && mutex_.contended()) break;
    const Queue::Pop popped = tx_.pop(chain_);
    if (popped == Queue::Pop::broken) driver_broke();
    if (popped != Queue::Pop::chain) break;
    // Without a whole header there is nobody to answer.
    if (virtio_vsock_hdr wire; chain_.read(0, &wire, sizeof wire)) {
      payload_of(chain_.readable(), parts_);
      streams_.receive(decode(wire), parts_);
    }
    tx_.push(chain_, 0);
  }
  return chains > 0;
}

// To the guest. False when there was nothing, or the guest has no buffers.
bool UserBackend::give_packets() {
  unsigned chains = 0;
  for (; chains < kChainsPerTurn && streams_.has_packets(); ++chains) {
    if (chains > 0 && mutex_.contended()) break;
    Queue::Pop popped = rx_.pop(chain_);
    if (popped == Queue::Pop::empty) {
      if (!rx_.enable_kick()) break;
      popped = rx_.pop(chain_);
    }
    rx_.disable_kick();
    if (popped == Queue::Pop::broken) driver_broke();
    if (popped != Queue::Pop::chain) break;
    uint32_t written_bytes = 0;
    // A buffer too short for a header is given back empty.
    if (chain_.writable_bytes() >= sizeof(virtio_vsock_hdr)) {
      payload_of(chain_.writable(), parts_);
      const Packet packet = streams_.next(parts_);
      const virtio_vsock_hdr wire = encode(packet);
      static_cast<void>(chain_.write(0, &wire, sizeof wire));
      written_bytes = static_cast<uint32_t>(sizeof wire) + packet.size_bytes;
    }
    rx_.push(chain_, written_bytes);
  }
  return chains > 0;
}

}  // namespace virtio_vsock
