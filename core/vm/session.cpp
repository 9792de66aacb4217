// SPDX-License-Identifier: Apache-2.0
// Signals, console and reboots around a machine.
#include "vm/session.hpp"

#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>

#include <algorithm>
#include <boost/json.hpp>
#include <optional>
#include <utility>

#include "console/console_hub.hpp"
#include "control/control_server.hpp"
#include "control/instances.hpp"
#include "loop/event_loop.hpp"
#include "plugin/crash_report.hpp"
#include "util/fd.hpp"
#include "util/local_socket.hpp"
#include "util/log.hpp"
#include "util/utf8.hpp"
#include "vm/machine.hpp"
#include "vm/snapshots.hpp"

namespace vmm {
namespace {

// SIGTERM, SIGINT and SIGHUP come through a descriptor; threads made later inherit the mask.
class Signals {
 public:
  Signals() {
    ::sigemptyset(&set_);
    for (int number : {SIGTERM, SIGINT, SIGHUP}) ::sigaddset(&set_, number);
    ::pthread_sigmask(SIG_BLOCK, &set_, &old_);
    fd_ = Fd(::signalfd(-1, &set_, SFD_CLOEXEC | SFD_NONBLOCK));
  }
  ~Signals() { ::pthread_sigmask(SIG_SETMASK, &old_, nullptr); }

  int fd() const { return fd_.get(); }
  bool take() {
    signalfd_siginfo info;
    return ::read(fd_.get(), &info, sizeof info) == sizeof info;
  }

 private:
  sigset_t set_;
  sigset_t old_;
  Fd fd_;
};

// Of every thread made later. In the usual 8 MiB a transparent huge page fits: 2 MiB for one thread's few KiB.
void use_small_stacks() {
  constexpr size_t stack_bytes = 1 << 20;
  pthread_attr_t attributes;
  ::pthread_attr_init(&attributes);
  ::pthread_attr_setstacksize(&attributes, stack_bytes);
  ::pthread_setattr_default_np(&attributes);
  ::pthread_attr_destroy(&attributes);
}

// ~0 stands for what is not known.
template <typename Number>
boost::json::value known(Number value) {
  if (value == static_cast<Number>(~Number{0})) return nullptr;
  return value;
}

// The machine, those who talk to it, and the reasons to end it. The parts stand in the order of their making.
class Run {
 public:
  Run(const CheckedPlan& plan, PluginLibrary& library, EventLoop& loop) : plan_(plan), library_(library), loop_(loop) {}

  Result<Ending> run(Timing& timing, TimingReport report, const SavedMachine* saved, int waiting);

 private:
  Result<void> offer_control();
  Result<void> add_methods();
  void end(Ending how, const std::string& detail);
  void on_signal();
  void on_waiting(int socket);
  void ask_or_stop();
  void ask_to_stop(std::chrono::milliseconds grace);
  Result<void> pause();
  void resume();
  boost::json::object info() const;
  const char* state() const { return ending_ ? "ended" : requests_ > 0 ? "stopping" : paused_ ? "paused" : "running"; }

  const CheckedPlan& plan_;
  PluginLibrary& library_;
  EventLoop& loop_;
  Signals signals_;
  std::optional<InstanceDirectory> directory_;
  std::optional<ControlServer> control_;
  ConsoleHub console_{loop_, {STDIN_FILENO, STDOUT_FILENO, [this] { end(Ending::stopped, ""); }}};
  // Made after the console, and so gone before it: its devices write there to the last.
  std::unique_ptr<Machine> machine_;
  Snapshots snapshots_{plan_, library_, loop_,
                       {[this] { return paused_; }, [this] { return pause(); }, [this] { resume(); },
                        [this] { end(Ending::stopped, ""); }}};
  std::optional<Ending> ending_;
  unsigned requests_ = 0;  // to stop
  EventLoop::TimerId grace_timer_ = 0;
  std::chrono::steady_clock::time_point grace_ends_{};
  bool paused_ = false;
};

Result<void> Run::offer_control() {
  if (!plan_.plan.control) return {};
  directory_.emplace(TRY(InstanceDirectory::create(plan_.plan.name, plan_.plan.vcpus, plan_.plan.memory.size_bytes)));
  const std::string& path = directory_->record().directory;
  control_.emplace(loop_, TRY(listen_in(directory_->fd(), "control.sock").context(path)));
  TRY(add_methods());
  TRY(control_->start());
  return console_.watchers().listen(TRY(listen_in(directory_->fd(), "console.sock").context(path)));
}

Result<void> Run::add_methods() {
  namespace json = boost::json;
  using Reply = ControlServer::Reply;
  auto add = [this](const char* name, const char* help, ControlServer::Call call) {
    return control_->add_method("", name, help, std::move(call));
  };
  TRY(add("vm.info", "What this VM is and does.", [this](const json::object&, Reply reply) { reply.succeed(info()); }));
  TRY(add("vm.pause", "Stops the virtual processors until vm.resume.", [this](const json::object&, Reply reply) {
    if (const auto paused = pause(); !paused.ok()) return reply.fail(paused.error().message);
    reply.succeed(info());
  }));
  TRY(add("vm.resume", "Lets the virtual processors go on.", [this](const json::object&, Reply reply) {
    if (snapshots_.holds_machine()) return reply.fail("this VM ends when its last snapshot is written");
    resume();
    reply.succeed(info());
  }));
  TRY(add(
      "vm.stop",
      "Asks the guest to power off; after \"grace_ms\" (--grace) it is stopped. {\"force\": true} stops it at once.",
      [this](const json::object& given, Reply reply) {
        const json::value* force = given.if_contains("force");
        const json::value* grace = given.if_contains("grace_ms");
        if ((force && !force->is_bool()) ||
            (grace && (!grace->is_int64() || grace->get_int64() < 0 || grace->get_int64() > 3'600'000)))
          return reply.fail("vm.stop: allowed are {\"force\": true|false, \"grace_ms\": 0 to 3600000}");
        reply.succeed(json::object{});
        if (force && force->get_bool()) return end(Ending::stopped, "");
        ask_to_stop(std::chrono::milliseconds(grace ? grace->get_int64() : static_cast<int64_t>(plan_.plan.grace_ms)));
      }));
  TRY(add("vm.balloon", "What the balloon holds and the guest's driver tells.",
          [this](const json::object&, Reply reply) {
            clone_balloon_state state{};
            if (!machine_ || !machine_->read_balloon(state)) return reply.fail("this machine has no balloon");
            reply.succeed(json::object{{"ready", state.ready != 0},
                                       {"target_bytes", known(state.target_bytes)},
                                       {"balloon_bytes", known(state.balloon_bytes)},
                                       {"reported_bytes", known(state.reported_bytes)},
                                       {"guest_free_bytes", known(state.guest_free_bytes)},
                                       {"guest_available_bytes", known(state.guest_available_bytes)},
                                       {"guest_total_bytes", known(state.guest_total_bytes)}});
          }));
  TRY(add("vm.guest", "What the agent in the guest tells.", [this](const json::object&, Reply reply) {
    clone_guest_report report{};
    if (!machine_ || !machine_->read_guest(report)) return reply.fail("this machine has nobody who asks its guest");
    static constexpr const char* activities[] = {"unknown", "idle", "active"};
    reply.succeed(json::object{{"connected", report.connected != 0},
                               {"activity", activities[report.activity < 3 ? report.activity : 0]},
                               {"age_ms", known(report.age_ms)},
                               {"process_count", known(report.process_count)},
                               {"load_permille", known(report.load_permille)},
                               {"pressure_some_permille", known(report.pressure_some_permille)},
                               {"pressure_full_permille", known(report.pressure_full_permille)},
                               {"total_bytes", known(report.total_bytes)},
                               {"free_bytes", known(report.free_bytes)},
                               {"available_bytes", known(report.available_bytes)}});
  }));
  TRY(add("console.read", "The last of what the console printed: {\"text\"}.",
          [this](const json::object&, Reply reply) {
            reply.succeed(json::object{{"text", valid_utf8(console_.watchers().history())}});
          }));
  TRY(add("console.clients", "Who is attached to console.sock, and which of them types.",
          [this](const json::object&, Reply reply) {
            json::array clients;
            for (const auto& client : console_.watchers().list())
              clients.push_back({{"pid", client.pid}, {"types", client.types}});
            reply.succeed(std::move(clients));
          }));
  TRY(add("log.read", "The VMM's own last messages: {\"lines\"}.", [](const json::object&, Reply reply) {
    json::array lines;
    for (const std::string& line : log_history()) lines.emplace_back(valid_utf8(line));
    reply.succeed(json::object{{"lines", std::move(lines)}});
  }));
  TRY(snapshots_.offer(*control_));
  const Timing::Clock::time_point started = Timing::Clock::now();
  control_->add_metric("", {"uptime_seconds", "Since the VM was made.", CLONE_METRIC_GAUGE, "", [started] {
                              return std::chrono::duration<double>(Timing::Clock::now() - started).count();
                            }});
  control_->add_metric("", {"vcpus", "Virtual processors.", CLONE_METRIC_GAUGE, "",
                            [this] { return static_cast<double>(plan_.plan.vcpus); }});
  control_->add_metric("", {"memory_bytes", "The guest's memory.", CLONE_METRIC_GAUGE, "",
                            [this] { return static_cast<double>(plan_.plan.memory.size_bytes); }});
  control_->add_metric("",
                       {"paused", "1 while paused.", CLONE_METRIC_GAUGE, "", [this] { return paused_ ? 1.0 : 0.0; }});
  return {};
}

boost::json::object Run::info() const {
  const InstanceRecord& record = directory_->record();
  boost::json::array devices;
  for (const CheckedDevice& device : plan_.devices) devices.emplace_back(device.instance);
  return {{"id", record.id},
          {"name", record.name},
          {"pid", record.pid},
          {"state", state()},
          {"vcpus", record.vcpus},
          {"memory_bytes", record.memory_bytes},
          {"started_ms", record.started_ms},
          {"kernel", valid_utf8(plan_.plan.kernel)},
          {"devices", std::move(devices)},
          {"version", CLONE_VERSION}};
}

void Run::end(Ending how, const std::string& detail) {
  if (ending_) return;
  ending_ = how;
  if (!detail.empty()) log_error(detail);
  loop_.stop();
}

Result<void> Run::pause() {
  if (paused_) return {};
  if (ending_) return Error{"the machine has ended", 0, CLONE_ERR_STATE};
  TRY(machine_->pause());
  paused_ = true;
  if (control_) control_->notify("vm.paused", {});
  return {};
}

// A machine with a device that does not go on is of no use to its guest.
void Run::resume() {
  if (!std::exchange(paused_, false)) return;
  if (const auto resumed = machine_->resume(); !resumed.ok()) return end(Ending::kvm_failed, resumed.error().message);
  if (control_) control_->notify("vm.resumed", {});
}

void Run::on_signal() {
  while (signals_.take()) ask_or_stop();
}

void Run::on_waiting(int socket) {
  char byte;
  const ssize_t got = ::recv(socket, &byte, 1, MSG_DONTWAIT);
  if (got > 0) return ask_or_stop();
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
  loop_.remove_fd(socket);
  end(Ending::stopped, "");
}

void Run::ask_or_stop() {
  if (requests_ > 0) return end(Ending::stopped, "");
  ask_to_stop(std::chrono::milliseconds(plan_.plan.grace_ms));
}

// The guest is asked once; who asks again may shorten its time.
void Run::ask_to_stop(std::chrono::milliseconds grace) {
  if (snapshots_.holds_machine()) {  // it ends by itself
    ++requests_;
    return;
  }
  const auto until = std::chrono::steady_clock::now() + grace;
  if (++requests_ == 1 || until < grace_ends_) {
    loop_.cancel_timer(grace_timer_);
    grace_ends_ = until;
    grace_timer_ =
        loop_.add_timer(grace, [this] { end(Ending::stopped, "the guest did not power off in time; stopping it"); });
  }
  if (requests_ > 1) return;
  resume();  // a machine that stands still cannot power off
  if (auto asked = machine_->ask_to_power_off(); !asked.ok()) {
    log_warning(asked.error().message + "; stopping it");
    return end(Ending::stopped, "");
  }
}

Result<Ending> Run::run(Timing& first_timing, TimingReport report, const SavedMachine* saved, int waiting) {
  TRY(offer_control());
  if (waiting >= 0) TRY(loop_.add_fd(waiting, CLONE_READABLE, [this, waiting](uint32_t) { on_waiting(waiting); }));
  TRY(loop_.add_fd(signals_.fd(), CLONE_READABLE, [this](uint32_t) { on_signal(); }));
  for (bool first = true;; first = false) {
    Timing again;
    Timing& timing = first ? first_timing : again;
    ending_.reset();
    paused_ = false;
    const Machine::Surroundings around{loop_, console_, control_ ? &*control_ : nullptr,
                                       directory_ ? &*directory_ : nullptr, saved != nullptr};
    machine_ = TRY(
        Machine::create(plan_, around, timing, [this](Ending how, const std::string& detail) { end(how, detail); },
                        first ? saved : nullptr));
    snapshots_.follow(machine_.get(), first ? saved : nullptr);
    if (first) TRY(console_.start());
    TRY(machine_->start(timing));
    if (report == TimingReport::print && first) {
      timing.mark_at("first instruction", machine_->first_instruction());
      std::fputs(timing.report().c_str(), stderr);
    }
    loop_.run();
    // Asked to power off, a guest that reboots instead does not get another run.
    const bool over = *ending_ != Ending::reset || plan_.plan.on_reboot == OnReboot::exit || requests_ > 0;
    if (control_) control_->notify(over ? "vm.ended" : "vm.reset", {});
    snapshots_.follow(nullptr);
    machine_.reset();
    console_.flush();
    if (over) return *ending_;
  }
}

// Streams into the guest take a descriptor each; the usual soft limit of 1024 is for programs that use select(2).
void raise_descriptor_limit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = std::min<rlim_t>(limit.rlim_max, 65536);
  ::setrlimit(RLIMIT_NOFILE, &limit);
}

}  // namespace

Result<Ending> Session::run() {
  raise_descriptor_limit();
  use_small_stacks();
  install_crash_handler();
  ::signal(SIGPIPE, SIG_IGN);
  ::signal(SIGXFSZ, SIG_IGN);  // a file size limit (ulimit -f) is an I/O error of one disk
  const auto loop = TRY(EventLoop::create());
  return Run(plan_, library_, *loop).run(timing_, report_, saved_, waiting_);
}

}  // namespace vmm
