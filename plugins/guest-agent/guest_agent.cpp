// SPDX-License-Identifier: Apache-2.0
// guest-agent: what the agent in the guest reports and does, for the host: clone.guest/1, commands, metrics.
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <list>
#include <memory>
#include <optional>
#include <vector>

#include "clone/abi/control.h"
#include "clone/abi/guest.h"
#include "clone/abi/vsock.h"
#include "clone/sdk/plugin.hpp"
#include "conversation.hpp"
#include "parameters.hpp"

namespace {

namespace protocol = agent_protocol;
using clone_sdk::Error;
using clone_sdk::ErrorBuffer;
using clone_sdk::Fd;
using clone_sdk::Options;
using clone_sdk::Result;
using clone_sdk::Watch;
using protocol::Frame;
using protocol::Type;
using protocol::Writer;

constexpr uint64_t kFirstRetryMs = 100;
constexpr uint64_t kLongestRetryMs = 1000;
// In a machine that was loaded the agent is there. What the driver may end is the connection that came before its
// reset.
constexpr uint64_t kFirstRetryAfterLoadMs = 1;
// Whoever waits for a machine that was loaded has a question of their own, and comes before the agent's reports.
constexpr uint64_t kFirstReportMs = 250;
// A session that held this long was a good one: the next begins soon after its end.
constexpr uint64_t kGoodSessionMs = 5000;
// File systems take their time to write everything out.
constexpr uint64_t kFreezeMs = 60'000;
constexpr uint64_t kLongestFrozenMs = 60'000;  // as the agent has it
constexpr uint64_t kLongestWaitMs = 600'000;
constexpr size_t kMostConversations = 512;
constexpr uint32_t kWarnings = 3;
constexpr uint32_t kUnknown = ~0u;
// A guest is told the time again when its answer took longer: for as long may the time have been on its way.
constexpr uint64_t kClockToleranceMs = 20;
constexpr uint32_t kTimesToldAtOnce = 3;
constexpr uint32_t kMostTimesTold = 20;

uint64_t host_clock_ns() {
  timespec now;
  ::clock_gettime(CLOCK_REALTIME, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

std::string clock_frame() {
  return protocol::make_frame(Type::identity, [](Writer& writer) {
    writer.u32(protocol::kIdentityClock);
    writer.u64(host_clock_ns());
  });
}

// The caller of a command, answered once; nobody where the VMM itself asks.
class Caller {
 public:
  Caller() = default;
  explicit Caller(const clone_reply& reply) : reply_(reply) {}
  Caller(Caller&& other) noexcept : reply_(other.take()) {}
  Caller& operator=(Caller&& other) noexcept {
    reply_ = other.take();
    return *this;
  }

  void succeed(const std::string& json) {
    if (auto reply = take()) reply->succeed(reply->context, json.c_str());
  }
  void succeed(const std::string& json, int fd) {
    if (auto reply = take()) reply->succeed_with_fd(reply->context, json.c_str(), fd);
  }
  void fail(const Error& error) {
    if (auto reply = take()) reply->fail(reply->context, error.message.c_str());
  }

 private:
  std::optional<clone_reply> take() { return std::exchange(reply_, std::nullopt); }
  std::optional<clone_reply> reply_;
};

std::string hello() { return protocol::hello_frame("1.0.0"); }

class GuestAgent final : public clone_sdk::Device {
 public:
  using Device::Device;
  static const clone_descriptor descriptor;

  ~GuestAgent() override {
    running_ = false;
    drop_session();
    end_all({"the machine has ended"});
  }

  Result<void> configure(const Options& options) override;
  Result<void> start() override;
  Result<void> quiesce() override;
  Result<void> resume() override;
  Result<void> reset_device() override;
  // What there is to know, the guest tells again.
  Result<void> save(const clone_sdk::Writer&) override { return {}; }
  Result<void> load(const clone_sdk::Reader&) override {
    identity_due_ = true;
    return {};
  }

 private:
  class Session;
  class Stream;
  class Request;
  // A caller of `connect` whose next try is due at `next_ms`.
  struct Waiting {
    Caller caller;
    uint64_t next_ms, deadline_ms;
  };
  struct Listener {
    void (*changed)(void* listener);
    void* listener;
  };

  Result<void> add_commands(const clone_host_control& control);
  Result<void> add_metrics(const clone_host_control& control);

  void tick();
  void wake_in(uint64_t ms);
  void wake_at_next_event();
  Result<Fd> connect();
  void connect_session();
  void drop_session();
  void connect_stream(Waiting waiting);
  void wait_or_fail(Waiting waiting, const Error& why);
  void end_all(const Error& why);
  void lost(const Error& why);
  void reported(const protocol::Report& report);
  uint64_t age_ms() const;
  void changed();
  void released(const Request& request);
  Result<std::string> own_identity() const;
  void took_identity(const std::string& failure);
  template <typename T, typename... Arguments>
  T* converse(Arguments&&... arguments);

  // Commands.
  void open_stream(const Parameters& parameters, Caller caller);
  void status(const Parameters& parameters, Caller caller);
  void identity(const Parameters& parameters, Caller caller);
  void freeze(const Parameters& parameters, Caller caller);
  void thaw(const Parameters& parameters, Caller caller);
  void power(const Parameters& parameters, Caller caller);
  Request* request(std::string frame, uint64_t limit_ms, Caller caller);
  clone_status request_power(uint32_t what, clone_err* err);
  void fill(clone_guest_report& report) const;

  clone_guest guest_{
      sizeof(clone_guest),
      0,
      this,
      [](void* self, clone_guest_report* report) noexcept { static_cast<GuestAgent*>(self)->fill(*report); },
      [](void* self, void (*call)(void*), void* listener) noexcept {
        static_cast<GuestAgent*>(self)->listeners_.push_back({call, listener});
      },
      [](void* self, uint32_t what, clone_err* err) noexcept {
        return static_cast<GuestAgent*>(self)->request_power(what, err);
      }};
  uint64_t interval_ms_ = 0;
  uint64_t timeout_ms_ = 0;
  const clone_host_machine* machine_ = nullptr;
  Conversation::Loop loop_;
  const clone_vsock* vsock_ = nullptr;
  Fd timer_;
  Watch timer_watch_;
  bool running_ = false;
  uint64_t paused_ms_ = 0;  // when; 0: never, or it runs

  std::list<std::unique_ptr<Conversation>> conversations_;
  std::list<Waiting> waiting_;
  Session* session_ = nullptr;  // the conversation that watches
  Request* frozen_ = nullptr;   // the one that keeps the file systems frozen
  uint64_t connect_at_ms_ = 0;
  uint64_t retry_ms_ = kFirstRetryMs;
  uint64_t session_since_ms_ = 0;
  uint32_t warnings_ = 0;
  bool identity_due_ = false;  // the guest goes on from a saved state, and its agent has not taken that in

  // The last report; its session may be gone.
  bool connected_ = false;
  std::string last_error_;  // why it is not connected
  std::string version_;
  protocol::Report report_{};
  uint64_t reported_ms_ = 0;
  std::vector<Listener> listeners_;
};

// The conversation that reports, as long as the agent is there. Before anything else, a machine that was loaded is told
// who it is now, and reports begin a little later; the clock is told to an agent that listens, and again while it may
// have been late: at once at first, then after each report.
class GuestAgent::Session final : public Conversation {
 public:
  Session(GuestAgent& device, Fd fd)
      : Conversation(device.loop_, std::move(fd), now_ms() + device.timeout_ms_),
        device_(device),
        identity_asked_(device.identity_due_) {
    send(identity_asked_ ? hello() : hello() + watch_frame());
  }
  void drop() { finish(); }
  uint64_t watch_at_ms() const { return watch_at_ms_; }
  // Has the agent report.
  void watch() {
    watch_at_ms_ = kNever;
    send(watch_frame());
  }

 private:
  std::string watch_frame() const {
    return protocol::make_frame(Type::watch,
                                [&](Writer& writer) { writer.u32(static_cast<uint32_t>(device_.interval_ms_)); });
  }
  void greeted(const protocol::Hello& hello) override {
    device_.version_ = hello.version;
    if (!identity_asked_) return;
    Result<std::string> identity = device_.own_identity();
    if (!identity.ok()) return end(identity.error());
    tell_time(*identity);
  }
  void tell_time(const std::string& frame) {
    ++times_told_;
    told_ms_ = now_ms();
    answer_due_ = true;
    send(frame);
  }
  Result<void> received(const Frame& frame) override {
    const bool failed = frame.type == Type::error;
    if ((failed || frame.type == Type::done) && std::exchange(answer_due_, false)) {
      was_late_ = !failed && now_ms() - told_ms_ > kClockToleranceMs && times_told_ < kMostTimesTold;
      if (device_.identity_due_) {
        watch_at_ms_ = now_ms() + kFirstReportMs;
        set_deadline_ms(watch_at_ms_ + device_.timeout_ms_);
        device_.took_identity(failed ? protocol::read_failure(frame).message : "");
      }
      if (times_told_ < kTimesToldAtOnce && std::exchange(was_late_, false)) tell_time(clock_frame());
      return {};
    }
    if (failed) return Error{"watch: " + protocol::read_failure(frame).message};
    if (frame.type != Type::report) return {};  // of a later version
    const auto report = protocol::read_report(frame);
    if (!report) return Error{"the agent sent a report that is too short"};
    set_deadline_ms(now_ms() + device_.timeout_ms_ + 2 * device_.interval_ms_);
    device_.reported(*report);
    if (std::exchange(was_late_, false)) tell_time(clock_frame());
    return {};
  }
  void ended(const Error& why) override { device_.lost(why); }

  GuestAgent& device_;
  const bool identity_asked_;
  uint64_t watch_at_ms_ = kNever;
  bool answer_due_ = false;  // to what told the time, and maybe more
  bool was_late_ = false;
  uint64_t told_ms_ = 0;
  uint32_t times_told_ = 0;
};

// A stream for the caller of `connect`: begun here, handed over when the agent has taken it.
class GuestAgent::Stream final : public Conversation {
 public:
  Stream(GuestAgent& device, Fd fd, Waiting waiting)
      : Conversation(device.loop_, std::move(fd), std::min(waiting.deadline_ms, now_ms() + device.timeout_ms_)),
        device_(device),
        waiting_(std::move(waiting)) {}

 private:
  void connected() override {
    char first;
    const ssize_t got = ::recv(fd(), &first, 1, MSG_PEEK | MSG_DONTWAIT);
    if (got == 0 || (got < 0 && errno != EAGAIN)) return end({"the agent closed the connection"});
    waiting_.caller.succeed("{}", fd());
    finish();
    device_.wake_in(0);
  }
  void greeted(const protocol::Hello&) override {}
  Result<void> received(const Frame&) override { return {}; }
  // A guest that boots refuses, until its agent runs.
  void ended(const Error& why) override { device_.wait_or_fail(std::move(waiting_), why); }

  GuestAgent& device_;
  Waiting waiting_;
};

// One request and its answer. That of `freeze` stays, for as long as the file systems are to be frozen.
class GuestAgent::Request final : public Conversation {
 public:
  Request(GuestAgent& device, Fd fd, std::string frame, uint64_t limit_ms, Caller caller)
      : Conversation(device.loop_, std::move(fd), now_ms() + device.timeout_ms_),
        device_(device),
        limit_ms_(limit_ms),
        caller_(std::move(caller)) {
    send(hello() + std::move(frame));
  }
  // Another request behind the answered one; then the connection ends.
  void ask_last(std::string frame, Caller caller) {
    hold_ = false;
    caller_ = std::move(caller);
    send(std::move(frame));
    set_deadline_ms(now_ms() + limit_ms_);
    device_.wake_in(0);
  }
  void hold() { hold_ = true; }
  bool answered() const { return answered_; }

 private:
  void greeted(const protocol::Hello&) override {
    set_deadline_ms(now_ms() + limit_ms_);
    device_.wake_in(0);
  }
  Result<void> received(const Frame& frame) override {
    if (frame.type == Type::error) return Error{"the agent: " + protocol::read_failure(frame).message};
    if (frame.type != Type::done) return Error{"the agent sent an answer that does not belong to the question"};
    answered_ = true;
    protocol::Reader reader = frame.reader();
    const uint32_t count = reader.u32();
    Caller caller = std::exchange(caller_, Caller());
    // Where nothing is frozen nothing is to be held.
    if (hold_ && count > 0) {
      set_deadline_ms(kNever);
    } else {
      hold_ = false;
      finish();
      device_.released(*this);
    }
    caller.succeed(reader.failed() ? "{}" : "{\"file_systems\":" + std::to_string(count) + "}");
    device_.wake_in(0);
    return {};
  }
  void ended(const Error& why) override {
    if (hold_ && answered_) device_.host().log(CLONE_LOG_WARNING, "the guest's file systems thaw: " + why.message);
    device_.released(*this);
    caller_.fail(why);
    device_.wake_in(0);
  }

  GuestAgent& device_;
  uint64_t limit_ms_;
  Caller caller_;
  bool hold_ = false;
  bool answered_ = false;
};

Result<void> GuestAgent::configure(const Options& options) {
  interval_ms_ = options.number("interval");
  timeout_ms_ = options.number("timeout");
  machine_ = CLONE_TRY(host().service<clone_host_machine>(CLONE_HOST_MACHINE));
  loop_.table = CLONE_TRY(host().service<clone_host_loop>(CLONE_HOST_LOOP));
  loop_.loop = loop_.table->main_loop(host().raw());
  timer_ = Fd(::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
  if (!timer_) return clone_sdk::errno_error("timerfd");
  if (auto publish = host().service<clone_host_publish>(CLONE_HOST_PUBLISH); publish.ok()) {
    ErrorBuffer error;
    CLONE_TRY(error.result((*publish)->publish(host().raw(), CLONE_GUEST, &guest_, error)));
  }
  const auto control = host().service<clone_host_control>(CLONE_HOST_CONTROL);
  if (!control.ok()) return {};  // a machine without a control socket
  CLONE_TRY(add_commands(**control));
  return add_metrics(**control);
}

Result<void> GuestAgent::start() {
  const auto vsock = host().service<clone_vsock>(CLONE_VSOCK);
  if (vsock.ok()) vsock_ = *vsock;
  return resume();
}

Result<void> GuestAgent::quiesce() {
  if (!std::exchange(running_, false)) return {};
  paused_ms_ = now_ms();
  timer_watch_.stop();
  for (const auto& conversation : conversations_) conversation->pause();
  return {};
}

// The agent is asked anew at once: after a restore it runs where nobody has spoken with it. Until that fails, what it
// said before holds.
Result<void> GuestAgent::resume() {
  if (std::exchange(running_, true) || !vsock_) return {};
  timer_watch_ =
      CLONE_TRY(Watch::start<&GuestAgent::tick>(loop_.table, loop_.loop, timer_.get(), CLONE_READABLE, this));
  drop_session();
  const uint64_t pause_ms = paused_ms_ ? now_ms() - paused_ms_ : 0;
  paused_ms_ = 0;
  if (reported_ms_) reported_ms_ += pause_ms;
  for (Waiting& waiting : waiting_) waiting.deadline_ms += pause_ms;
  for (const auto& conversation : conversations_) {
    conversation->postpone(pause_ms);
    conversation->go_on();
  }
  retry_ms_ = identity_due_ ? kFirstRetryAfterLoadMs : kFirstRetryMs;
  connect_at_ms_ = 0;
  wake_in(0);
  return {};
}

Result<void> GuestAgent::reset_device() {
  drop_session();
  end_all({"the machine was reset"});
  if (std::exchange(connected_, false)) changed();
  return {};
}

// --- Connections ---

void GuestAgent::wake_in(uint64_t ms) {
  itimerspec when{};
  when.it_value.tv_sec = static_cast<time_t>(ms / 1000);
  when.it_value.tv_nsec = ms ? static_cast<long>(ms % 1000 * 1'000'000) : 1;  // 0 would disarm it
  ::timerfd_settime(timer_.get(), 0, &when, nullptr);
}

// Everything that is due. Conversations are destroyed here, and nowhere else while the machine runs.
void GuestAgent::tick() {
  uint64_t expirations;
  if (::read(timer_.get(), &expirations, sizeof expirations) < 0) return;
  const uint64_t now = now_ms();
  for (const auto& conversation : conversations_)
    if (!conversation->over() && conversation->deadline_ms() <= now)
      conversation->end({"the agent in the guest did not answer within its time"});
  std::list<Waiting> due;
  for (auto waiting = waiting_.begin(); waiting != waiting_.end();) {
    const auto next = std::next(waiting);
    if (waiting->next_ms <= now) due.splice(due.end(), waiting_, waiting);
    waiting = next;
  }
  for (Waiting& waiting : due) connect_stream(std::move(waiting));
  if (session_ && session_->watch_at_ms() <= now) session_->watch();
  if (!session_ && connect_at_ms_ <= now) connect_session();
  std::erase_if(conversations_, [](const auto& conversation) { return conversation->over(); });
  wake_at_next_event();
}

void GuestAgent::wake_at_next_event() {
  uint64_t next_ms = session_ ? session_->watch_at_ms() : connect_at_ms_;
  for (const auto& conversation : conversations_) next_ms = std::min(next_ms, conversation->deadline_ms());
  for (const Waiting& waiting : waiting_) next_ms = std::min(next_ms, waiting.next_ms);
  if (next_ms == Conversation::kNever) return;
  const uint64_t now = now_ms();
  wake_in(next_ms > now ? next_ms - now : 0);
}

Result<Fd> GuestAgent::connect() {
  if (!vsock_) return Error{"this machine has no device for streams to the guest (virtio-vsock)"};
  if (!running_) return Error{"the machine is paused"};
  if (conversations_.size() + waiting_.size() >= kMostConversations)
    return Error{"the agent is asked " + std::to_string(kMostConversations) + " things already"};
  int32_t fd = -1;
  ErrorBuffer error;
  CLONE_TRY(error.result(vsock_->connect(vsock_->context, protocol::kPort, &fd, error)));
  return Fd(fd);
}

template <typename T, typename... Arguments>
T* GuestAgent::converse(Arguments&&... arguments) {
  auto owned = std::make_unique<T>(*this, std::forward<Arguments>(arguments)...);
  T* conversation = owned.get();
  conversations_.push_back(std::move(owned));
  wake_in(0);  // for its deadline
  return conversation;
}

void GuestAgent::connect_session() {
  Result<Fd> fd = connect();
  session_since_ms_ = now_ms();
  if (!fd.ok()) return lost(fd.error());
  session_ = converse<Session>(std::move(*fd));
  session_->go_on();
}

void GuestAgent::drop_session() {
  if (Session* session = std::exchange(session_, nullptr)) session->drop();
}

void GuestAgent::lost(const Error& why) {
  const uint64_t now = now_ms();
  session_ = nullptr;
  const bool good = connected_ && now - session_since_ms_ >= kGoodSessionMs;
  if (good) retry_ms_ = kFirstRetryMs;
  connect_at_ms_ = now + retry_ms_;
  retry_ms_ = std::min(2 * retry_ms_, kLongestRetryMs);
  const bool warn = connected_ && warnings_ < kWarnings;
  if (warn) ++warnings_;
  host().log(warn ? CLONE_LOG_WARNING : CLONE_LOG_DEBUG, why.message);
  last_error_ = why.message;
  if (std::exchange(connected_, false)) changed();
  wake_in(0);
}

void GuestAgent::reported(const protocol::Report& report) {
  const bool news = !connected_ || report.activity != report_.activity;
  connected_ = true;
  report_ = report;
  reported_ms_ = now_ms();
  if (news) changed();
}

// Of the last report; it does not grow in a pause, in which there is nothing to report.
uint64_t GuestAgent::age_ms() const { return (paused_ms_ ? paused_ms_ : now_ms()) - reported_ms_; }

void GuestAgent::changed() {
  for (size_t i = 0; i < listeners_.size(); ++i) {
    const Listener listener = listeners_[i];
    listener.changed(listener.listener);
  }
}

void GuestAgent::released(const Request& request) {
  if (frozen_ == &request) frozen_ = nullptr;
}

void GuestAgent::connect_stream(Waiting waiting) {
  // A program that began before would draw the random numbers that each other copy of the machine draws.
  if (identity_due_ && vsock_ && running_)
    return wait_or_fail(std::move(waiting), {last_error_.empty() ? "the agent has not answered yet" : last_error_});
  Result<Fd> fd = connect();
  if (fd.ok()) return converse<Stream>(std::move(*fd), std::move(waiting))->go_on();
  // The guest has no driver yet, or as many streams begin as can.
  const bool may_pass = fd.error().status == CLONE_ERR_STATE || fd.error().status == CLONE_ERR_BUSY;
  if (!may_pass) return waiting.caller.fail(fd.error());
  wait_or_fail(std::move(waiting), fd.error());
}

void GuestAgent::wait_or_fail(Waiting waiting, const Error& why) {
  const uint64_t now = now_ms();
  if (now + kFirstRetryMs < waiting.deadline_ms && running_) {
    waiting.next_ms = now + kFirstRetryMs;
    waiting_.push_back(std::move(waiting));
  } else {
    waiting.caller.fail(why);
  }
  wake_in(0);
}

// Only outside of their callbacks.
void GuestAgent::end_all(const Error& why) {
  for (const auto& conversation : conversations_) conversation->end(why);
  conversations_.clear();
  for (Waiting& waiting : waiting_) waiting.caller.fail(why);
  waiting_.clear();
}

// --- clone.guest/1 ---

void GuestAgent::fill(clone_guest_report& report) const {
  clone_guest_report full{};
  full.size = report.size;
  full.connected = connected_;
  full.activity = report_.activity == CLONE_ACTIVITY_IDLE || report_.activity == CLONE_ACTIVITY_ACTIVE
                      ? report_.activity
                      : CLONE_ACTIVITY_UNKNOWN;
  full.age_ms = static_cast<uint32_t>(std::min<uint64_t>(age_ms(), kUnknown));
  full.process_count = report_.process_count;
  full.load_permille = report_.load_permille;
  full.pressure_some_permille = report_.pressure_some_permille;
  full.pressure_full_permille = report_.pressure_full_permille;
  full.total_bytes = report_.total_bytes;
  full.free_bytes = report_.free_bytes;
  full.available_bytes = report_.available_bytes;
  if (!connected_) {
    full.activity = CLONE_ACTIVITY_UNKNOWN;
    full.process_count = full.load_permille = full.pressure_some_permille = full.pressure_full_permille = kUnknown;
    full.total_bytes = full.free_bytes = full.available_bytes = ~uint64_t{0};
    if (!reported_ms_) full.age_ms = kUnknown;
  }
  std::memcpy(&report, &full, std::min<size_t>(report.size, sizeof full));
}

std::string power_frame(protocol::Power what) {
  return protocol::make_frame(Type::power, [&](Writer& writer) { writer.u32(static_cast<uint32_t>(what)); });
}

clone_status GuestAgent::request_power(uint32_t what, clone_err* err) {
  if (what != CLONE_GUEST_POWER_OFF && what != CLONE_GUEST_REBOOT)
    return clone_sdk::report(err, {"request " + std::to_string(what) + ": allowed is power off or reboot"});
  if (!connected_) return CLONE_EMPTY;
  const auto power = what == CLONE_GUEST_REBOOT ? protocol::Power::reboot : protocol::Power::off;
  return clone_sdk::guarded(err, [&]() -> Result<void> {
    Fd fd = CLONE_TRY(connect());
    converse<Request>(std::move(fd), power_frame(power), timeout_ms_, Caller())->go_on();
    return {};
  });
}

// --- Commands ---

template <typename T>
Result<std::optional<T>> parameter(const Parameters& parameters, const char* name, const char* allowed) {
  const auto found = parameters.find(name);
  if (found == parameters.end()) return std::optional<T>();
  if (const T* value = std::get_if<T>(&found->second)) return std::optional<T>(*value);
  return Error{std::string(name) + ": allowed is " + allowed};
}

Result<void> only(const Parameters& parameters, std::initializer_list<std::string_view> allowed) {
  for (const auto& [name, value] : parameters)
    if (std::find(allowed.begin(), allowed.end(), name) == allowed.end()) {
      std::string known;
      for (const std::string_view each : allowed) known += (known.empty() ? "" : ", ") + std::string(each);
      return Error{"unknown parameter '" + name + "'; " + (known.empty() ? "there are none" : "there are: " + known)};
    }
  return {};
}

GuestAgent::Request* GuestAgent::request(std::string frame, uint64_t limit_ms, Caller caller) {
  Result<Fd> fd = connect();
  if (!fd.ok()) {
    caller.fail(fd.error());
    return nullptr;
  }
  Request* request = converse<Request>(std::move(*fd), std::move(frame), limit_ms, std::move(caller));
  request->go_on();
  return request->over() ? nullptr : request;
}

void GuestAgent::open_stream(const Parameters& parameters, Caller caller) {
  Result<void> known = only(parameters, {"timeout_ms"});
  if (!known.ok()) return caller.fail(known.error());
  const auto limit_ms = parameter<uint64_t>(parameters, "timeout_ms", "a number of milliseconds");
  if (!limit_ms.ok()) return caller.fail(limit_ms.error());
  const uint64_t now = now_ms();
  connect_stream({std::move(caller), now, now + std::min(limit_ms->value_or(timeout_ms_), kLongestWaitMs)});
}

// As a JSON string. The guest's text is no UTF-8 that could be relied on.
std::string quoted(std::string_view text) {
  std::string json = "\"";
  for (const char letter : text) {
    if (letter == '"' || letter == '\\') json += '\\';
    json += letter < ' ' || letter == 0x7f ? '?' : letter;
  }
  return json + "\"";
}

void GuestAgent::status(const Parameters& parameters, Caller caller) {
  if (Result<void> known = only(parameters, {}); !known.ok()) return caller.fail(known.error());
  std::string json = "{\"connected\":";
  json += connected_ ? "true" : "false";
  const auto number = [&](const char* name, uint64_t value, uint64_t unknown) {
    json += std::string(",\"") + name + "\":" + (value == unknown ? "null" : std::to_string(value));
  };
  json += std::string(",\"frozen\":") + (frozen_ && frozen_->answered() ? "true" : "false");
  number("cid", vsock_ ? vsock_->cid : kUnknown, kUnknown);
  if (connected_) {
    json += ",\"version\":" + quoted(version_);
    number("age_ms", age_ms(), ~uint64_t{0});
    json += std::string(",\"activity\":") + (report_.activity == CLONE_ACTIVITY_IDLE     ? "\"idle\""
                                             : report_.activity == CLONE_ACTIVITY_ACTIVE ? "\"active\""
                                                                                         : "null");
    number("process_count", report_.process_count, kUnknown);
    number("load_permille", report_.load_permille, kUnknown);
    number("run_queue", report_.run_queue, kUnknown);
    number("cpu_permille", report_.cpu_permille, kUnknown);
    number("pressure_some_permille", report_.pressure_some_permille, kUnknown);
    number("pressure_full_permille", report_.pressure_full_permille, kUnknown);
    number("total_bytes", report_.total_bytes, ~uint64_t{0});
    number("free_bytes", report_.free_bytes, ~uint64_t{0});
    number("available_bytes", report_.available_bytes, ~uint64_t{0});
    number("uptime_ms", report_.uptime_ms, ~uint64_t{0});
  }
  if (!connected_ && !last_error_.empty()) json += ",\"error\":" + quoted(last_error_);
  caller.succeed(json + "}");
}

Result<std::string> from_hex(std::string_view hex) {
  const auto digit = [](char letter) {
    if (letter >= '0' && letter <= '9') return letter - '0';
    if (letter >= 'a' && letter <= 'f') return letter - 'a' + 10;
    if (letter >= 'A' && letter <= 'F') return letter - 'A' + 10;
    return -1;
  };
  std::string bytes;
  for (size_t i = 0; i + 1 < hex.size() && digit(hex[i]) >= 0 && digit(hex[i + 1]) >= 0; i += 2)
    bytes += static_cast<char>(digit(hex[i]) * 16 + digit(hex[i + 1]));
  if (hex.size() % 2 || bytes.size() != hex.size() / 2 || bytes.empty() || bytes.size() > 4096)
    return Error{"entropy: allowed are 1 to 4096 bytes as hexadecimal digits"};
  return bytes;
}

Result<std::string> identity_frame(const Parameters& parameters) {
  CLONE_TRY(only(parameters, {"hostname", "address", "gateway", "cid", "entropy", "clock"}));
  const auto hostname = CLONE_TRY(parameter<std::string>(parameters, "hostname", "a name"));
  const auto address = CLONE_TRY(parameter<std::string>(parameters, "address", "\"192.0.2.5/24\""));
  const auto gateway = CLONE_TRY(parameter<std::string>(parameters, "gateway", "\"192.0.2.1\""));
  const auto cid = CLONE_TRY(parameter<uint64_t>(parameters, "cid", "a number"));
  const auto entropy = CLONE_TRY(parameter<std::string>(parameters, "entropy", "hexadecimal digits"));
  const auto clock_parameter = parameters.find("clock");
  std::optional<uint64_t> clock_ns;
  if (clock_parameter != parameters.end()) {
    if (const auto* number = std::get_if<uint64_t>(&clock_parameter->second)) {
      clock_ns = *number;
    } else if (const auto* host = std::get_if<bool>(&clock_parameter->second); host && *host) {
      clock_ns = host_clock_ns();
    } else {
      return Error{"clock: allowed is a number of nanoseconds since 1970, or true for the host's clock"};
    }
  }
  if (gateway && !address) return Error{"gateway: needs address"};
  if (parameters.empty())
    return Error{"identity: nothing is given; there are: hostname, address, gateway, cid, entropy, clock"};
  std::string bytes;
  if (entropy) bytes = CLONE_TRY(from_hex(*entropy));
  std::string frame = protocol::make_frame(Type::identity, [&](Writer& writer) {
    writer.u32((hostname ? protocol::kIdentityHostname : 0u) | (address ? protocol::kIdentityAddress : 0u) |
               (cid ? protocol::kIdentityCid : 0u) | (entropy ? protocol::kIdentityEntropy : 0u) |
               (clock_ns ? protocol::kIdentityClock : 0u));
    if (hostname) protocol::put_text(writer, *hostname);
    if (address) {
      protocol::put_text(writer, *address);
      protocol::put_text(writer, gateway.value_or(""));
    }
    if (cid) writer.u64(*cid);
    if (entropy) protocol::put_text(writer, bytes);
    if (clock_ns) writer.u64(*clock_ns);
  });
  if (frame.empty()) return Error{"identity: the parameters are too long"};
  return frame;
}

// What a machine that goes on from a saved state needs to be one of its own.
Result<std::string> GuestAgent::own_identity() const {
  char entropy[32];
  if (::getrandom(entropy, sizeof entropy, 0) != ssize_t{sizeof entropy}) return clone_sdk::errno_error("getrandom");
  const std::string_view name = machine_->size > offsetof(clone_host_machine, name) ? machine_->name(host().raw()) : "";
  return protocol::make_frame(Type::identity, [&](Writer& writer) {
    writer.u32((name.empty() ? 0u : protocol::kIdentityHostname) | protocol::kIdentityEntropy |
               protocol::kIdentityClock);
    if (!name.empty()) protocol::put_text(writer, name);
    protocol::put_text(writer, {entropy, sizeof entropy});
    writer.u64(host_clock_ns());
  });
}

// An agent that cannot do all of it has done what it could: it is not asked again.
void GuestAgent::took_identity(const std::string& failure) {
  identity_due_ = false;
  for (Waiting& waiting : waiting_) waiting.next_ms = 0;
  wake_in(0);
  if (!failure.empty()) host().log(CLONE_LOG_WARNING, "the guest keeps a part of the identity it had: " + failure);
}

void GuestAgent::identity(const Parameters& parameters, Caller caller) {
  Result<std::string> frame = identity_frame(parameters);
  if (!frame.ok()) return caller.fail(frame.error());
  request(std::move(*frame), timeout_ms_, std::move(caller));
}

void GuestAgent::freeze(const Parameters& parameters, Caller caller) {
  if (Result<void> known = only(parameters, {"limit_ms"}); !known.ok()) return caller.fail(known.error());
  const auto limit_ms = parameter<uint64_t>(parameters, "limit_ms", "1 to 60000 milliseconds");
  if (!limit_ms.ok()) return caller.fail(limit_ms.error());
  const uint64_t frozen_ms = limit_ms->value_or(kLongestFrozenMs);
  if (frozen_ms < 1 || frozen_ms > kLongestFrozenMs)
    return caller.fail({"limit_ms: allowed is 1 to 60000 milliseconds"});
  if (frozen_) return caller.fail({"the guest's file systems are frozen already"});
  frozen_ =
      request(protocol::make_frame(Type::freeze, [&](Writer& writer) { writer.u32(static_cast<uint32_t>(frozen_ms)); }),
              kFreezeMs, std::move(caller));
  if (frozen_) frozen_->hold();
}

void GuestAgent::thaw(const Parameters& parameters, Caller caller) {
  if (Result<void> known = only(parameters, {}); !known.ok()) return caller.fail(known.error());
  if (!frozen_ || !frozen_->answered()) return caller.fail({"the guest's file systems are not frozen"});
  if (!running_) return caller.fail({"the machine is paused"});
  frozen_->ask_last(protocol::make_frame(Type::thaw, [](Writer&) {}), std::move(caller));
  frozen_ = nullptr;
}

void GuestAgent::power(const Parameters& parameters, Caller caller) {
  if (Result<void> known = only(parameters, {"action"}); !known.ok()) return caller.fail(known.error());
  const auto found = parameters.find("action");
  const auto* action = found == parameters.end() ? nullptr : std::get_if<std::string>(&found->second);
  if (!action || (*action != "off" && *action != "reboot"))
    return caller.fail({"action: allowed is \"off\" or \"reboot\""});
  request(power_frame(*action == "off" ? protocol::Power::off : protocol::Power::reboot), timeout_ms_,
          std::move(caller));
}

Result<void> GuestAgent::add_commands(const clone_host_control& control) {
  const auto add = [&]<void (GuestAgent::*command)(const Parameters&, Caller)>(const char* name,
                                                                               const char* help) -> Result<void> {
    ErrorBuffer error;
    return error.result(control.add_command(
        host().raw(), name, help,
        [](void* self, const char* json, const clone_reply* reply) noexcept {
          Caller caller(*reply);
          Result<Parameters> parameters = ParameterParser::parse(json);
          if (!parameters.ok()) return caller.fail(parameters.error());
          (static_cast<GuestAgent*>(self)->*command)(*parameters, std::move(caller));
        },
        this, error));
  };
  using Self = GuestAgent;
  CLONE_TRY(add.operator()<&Self::open_stream>(
      "connect", "A stream to the agent in the guest, as a descriptor beside the answer. {\"timeout_ms\": N}"));
  CLONE_TRY(add.operator()<&Self::status>("status", "What the agent in the guest last reported."));
  CLONE_TRY(add.operator()<&Self::identity>(
      "identity",
      "Gives the guest another identity. {\"hostname\", \"address\", \"gateway\", \"cid\", \"entropy\", "
      "\"clock\"}"));
  CLONE_TRY(add.operator()<&Self::freeze>(
      "freeze", "Freezes the guest's writable file systems, until thaw or its time is over. {\"limit_ms\": N}"));
  CLONE_TRY(add.operator()<&Self::thaw>("thaw", "Thaws what freeze froze."));
  return add.operator()<&Self::power>("power",
                                      "Asks the guest to end or to start anew. {\"action\": \"off\" or \"reboot\"}");
}

Result<void> GuestAgent::add_metrics(const clone_host_control& control) {
  const auto add = [&]<auto field>(const char* name, const char* help)->Result<void> {
    ErrorBuffer error;
    return error.result(control.add_metric(
        host().raw(), name, help, CLONE_METRIC_GAUGE,
        [](void* self) noexcept -> double {
          clone_guest_report report{};
          report.size = sizeof report;
          static_cast<GuestAgent*>(self)->fill(report);
          const auto value = report.*field;
          return value == static_cast<decltype(value)>(~uint64_t{0}) ? std::nan("") : static_cast<double>(value);
        },
        this, error));
  };
  using Report = clone_guest_report;
  CLONE_TRY(add.operator()<&Report::connected>("guest_connected", "1 while the agent in the guest answers."));
  CLONE_TRY(add.operator()<&Report::activity>("guest_activity", "0 unknown, 1 idle, 2 active."));
  CLONE_TRY(add.operator()<&Report::load_permille>("guest_load_permille",
                                                   "Load average of 1 minute, in thousandths of one processor."));
  CLONE_TRY(add.operator()<&Report::process_count>("guest_processes", "Processes in the guest."));
  CLONE_TRY(add.operator()<&Report::total_bytes>("guest_memory_total_bytes", "Memory that the guest's kernel has."));
  CLONE_TRY(add.operator()<&Report::free_bytes>("guest_memory_free_bytes", "Memory that the guest does not use."));
  CLONE_TRY(add.operator()<&Report::available_bytes>("guest_memory_available_bytes",
                                                     "Memory that the guest could use without swapping."));
  CLONE_TRY(add.operator()<&Report::pressure_some_permille>(
      "guest_pressure_some_permille", "Time in which some task waited for memory, in thousandths of 10 s."));
  return add.operator()<&Report::pressure_full_permille>(
      "guest_pressure_full_permille", "Time in which every task waited for memory, in thousandths of 10 s.");
}

constexpr clone_option interval = clone_sdk::number_option(
    "interval", "2000", "Milliseconds after which the agent reports at the latest.", 100, 600'000);
constexpr clone_option timeout =
    clone_sdk::number_option("timeout", "5000", "Milliseconds in which the agent has to answer.", 100, 600'000);
constexpr const clone_option* options[] = {&interval, &timeout, nullptr};

constexpr clone_descriptor GuestAgent::descriptor = {sizeof(clone_descriptor),
                                                     CLONE_CAN_SAVE | CLONE_CAN_MIGRATE,
                                                     "guest-agent",
                                                     "The host's half of the agent in the guest.",
                                                     options,
                                                     ""};

}  // namespace

CLONE_SDK_PLUGIN("guest-agent", "1.0.0", "clone", "Apache-2.0", "Reports and requests of the agent in the guest.",
                 CLONE_PROVIDES("device", "guest-agent", "default"))
CLONE_SDK_DEVICES(GuestAgent)
