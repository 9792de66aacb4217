// SPDX-License-Identifier: Apache-2.0
// Runs vCPUs in threads.
#include "kvm/vcpus.hpp"

#include <pthread.h>
#include <signal.h>
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <system_error>

#include "util/log.hpp"

namespace vmm {
namespace {

// Its only effect is that KVM_RUN returns: the handler is empty, and there is no SA_RESTART.
int kick_signal() { return SIGRTMIN; }

void install_kick_handler() {
  struct sigaction action {};
  action.sa_handler = [](int) {};
  ::sigaction(kick_signal(), &action, nullptr);
}

// What a vCPU's thread may be interrupted by: the kick, and faults, which must not be blocked.
sigset_t blocked_signals() {
  sigset_t set;
  ::sigfillset(&set);
  for (const int open : {kick_signal(), SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS, SIGABRT}) {
    ::sigdelset(&set, open);
  }
  return set;
}

uint64_t monotonic_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

void set_immediate_exit(const KvmVcpu& vcpu, bool on) {
  std::atomic_ref(vcpu.run_page().immediate_exit).store(on, std::memory_order_seq_cst);
}

std::string hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "%#llx", static_cast<unsigned long long>(value));
  return text;
}

std::string where(const KvmVcpu& vcpu) {
  const auto regs = vcpu.get<kvm_regs>();
  return "vCPU " + std::to_string(vcpu.id()) + (regs ? " at rip " + hex(regs->rip) : "");
}

std::string describe_internal_error(const kvm_run& run) {
  std::string text = "KVM internal error, suberror " + std::to_string(run.internal.suberror);
  if (run.internal.suberror != KVM_INTERNAL_ERROR_EMULATION) return text;
  text += ": this instruction cannot be emulated";
  const auto& failure = run.emulation_failure;
  constexpr uint32_t words_with_bytes = 3;  // of data[]: flags, and 16 bytes
  if (failure.ndata >= words_with_bytes && failure.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) {
    text += ':';
    for (size_t i = 0; i < std::min<size_t>(failure.insn_size, sizeof failure.insn_bytes); ++i) {
      char byte[8];
      std::snprintf(byte, sizeof byte, " %02x", failure.insn_bytes[i]);
      text += byte;
    }
  }
  return text;
}

// One KVM_EXIT_IO carries up to a page of elements of a string instruction.
bool dispatch_pio(const KvmVcpu& vcpu, Bus::View& bus) {
  const auto io = vcpu.run_page().io;
  const auto bytes = vcpu.run_bytes();
  const uint64_t total = uint64_t{io.size} * io.count;
  if (io.data_offset > bytes.size() || total > bytes.size() - io.data_offset) return false;
  std::byte* data = bytes.data() + io.data_offset;
  for (uint32_t i = 0; i < io.count; ++i, data += io.size) {
    if (io.direction == KVM_EXIT_IO_OUT) {
      bus.write(io.port, data, io.size);
    } else {
      bus.read(io.port, data, io.size);
    }
  }
  return true;
}

bool dispatch_mmio(const KvmVcpu& vcpu, Bus::View& bus) {
  auto& mmio = vcpu.run_page().mmio;
  if (mmio.len > sizeof mmio.data) return false;
  if (mmio.is_write) {
    bus.write(mmio.phys_addr, mmio.data, mmio.len);
  } else {
    bus.read(mmio.phys_addr, mmio.data, mmio.len);
  }
  return true;
}

}  // namespace

Vcpus::Vcpus(std::vector<KvmVcpu> vcpus, Bus& pio, Bus& mmio, std::function<void(const VcpuStop&)> on_stop)
    : pio_(pio), mmio_(mmio), on_stop_(std::move(on_stop)) {
  for (KvmVcpu& vcpu : vcpus) workers_.push_back(std::make_unique<Worker>(std::move(vcpu)));
}

VcpuState Vcpus::state(size_t index) const {
  std::lock_guard lock(mutex_);
  return workers_[index]->state;
}

Result<void> Vcpus::start() {
  install_kick_handler();
  request_.store(Request::run);
  stop_told_.store(false);
  // Threads inherit the mask: set here, so that there is no moment without it.
  const sigset_t blocked = blocked_signals();
  sigset_t before;
  ::pthread_sigmask(SIG_SETMASK, &blocked, &before);
  Result<void> result;
  for (auto& worker : workers_) {
    {
      std::lock_guard lock(mutex_);
      worker->state = VcpuState::running;
    }
    try {
      worker->thread = std::thread([this, &worker = *worker] { run_thread(worker); });
    } catch (const std::system_error& error) {
      std::lock_guard lock(mutex_);
      worker->state = VcpuState::stopped;
      result = errno_error("vCPU " + std::to_string(worker->vcpu.id()) + ": thread", error.code().value());
      break;
    }
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (!result) stop_all();
  return result;
}

bool Vcpus::pause_all() {
  request(Request::pause);
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] {
    return std::ranges::none_of(workers_, [](const auto& worker) { return worker->state == VcpuState::running; });
  });
  return std::ranges::none_of(workers_, [](const auto& worker) { return worker->state == VcpuState::stopped; });
}

void Vcpus::resume_all() {
  std::lock_guard lock(mutex_);
  if (request_.load() != Request::pause) return;
  request_.store(Request::run);
  // A pause that follows at once must wait for those that have not woken up yet.
  for (auto& worker : workers_) {
    if (worker->state == VcpuState::paused) worker->state = VcpuState::running;
  }
  changed_.notify_all();
}

void Vcpus::stop_all() {
  request(Request::stop);
  for (auto& worker : workers_) {
    if (worker->thread.joinable()) worker->thread.join();
  }
}

// A stop is never taken back but by start(). The order matters against run_until_stop(): the request is visible before
// immediate_exit is set and in_kvm looked at.
void Vcpus::request(Request wanted) {
  std::lock_guard lock(mutex_);
  if (request_.load() != Request::stop) request_.store(wanted);
  for (auto& worker : workers_) {
    if (worker->state != VcpuState::running) continue;
    set_immediate_exit(worker->vcpu, true);
    if (worker->in_kvm.load()) ::pthread_kill(worker->self, kick_signal());
  }
  changed_.notify_all();
}

void Vcpus::run_thread(Worker& worker) {
  worker.self = ::pthread_self();
  ::pthread_setname_np(worker.self, ("vcpu" + std::to_string(worker.vcpu.id())).c_str());
  const std::optional<VcpuStop> stop = run_until_stop(worker);
  if (stop) request(Request::stop);
  {
    std::lock_guard lock(mutex_);
    worker.state = VcpuState::stopped;
    changed_.notify_all();
  }
  if (stop && !stop_told_.exchange(true)) on_stop_(*stop);
}

// Returns nothing when asked to stop, and the reason when the vCPU cannot go on.
std::optional<VcpuStop> Vcpus::run_until_stop(Worker& worker) {
  const KvmVcpu& vcpu = worker.vcpu;
  Bus::View pio(pio_);
  Bus::View mmio(mmio_);
  bool entered = vcpu.id() != 0 || first_entry_ns_.load() != 0;
  for (;;) {
    set_immediate_exit(vcpu, false);
    worker.in_kvm.store(true);
    const bool asked = request_.load() != Request::run;
    if (asked) {
      // Nobody needs to kick us now. KVM finishes the last access when the vCPU is entered again; immediate_exit makes
      // it go no further (Documentation/virt/kvm/api.rst, KVM_RUN). That may take more than one exit.
      worker.in_kvm.store(false);
      set_immediate_exit(vcpu, true);
    } else if (!entered) {
      first_entry_ns_.store(monotonic_ns());
      entered = true;
    }
    const int code = vcpu.run();
    worker.in_kvm.store(false, std::memory_order_release);

    if (code == 0) {
      if (auto stop = dispatch(worker, pio, mmio)) return stop;
    } else if (code != EINTR && code != EAGAIN) {
      return VcpuStop{StopReason::error, vcpu.id(), where(vcpu) + ": KVM_RUN: " + std::strerror(code)};
    } else if (asked && code == EINTR) {
      if (!park(worker)) return {};
      vcpu.tell_paused();
    }
  }
}

// Waits to be resumed; false if asked to stop.
bool Vcpus::park(Worker& worker) {
  std::unique_lock lock(mutex_);
  while (request_.load() == Request::pause) {
    worker.state = VcpuState::paused;
    changed_.notify_all();
    changed_.wait(lock, [&] { return request_.load() != Request::pause || worker.state != VcpuState::paused; });
  }
  worker.state = VcpuState::running;
  return request_.load() != Request::stop;
}

std::optional<VcpuStop> Vcpus::dispatch(Worker& worker, Bus::View& pio, Bus::View& mmio) {
  const KvmVcpu& vcpu = worker.vcpu;
  const kvm_run& run = vcpu.run_page();
  const auto stop = [&](StopReason reason, const std::string& text) {
    return VcpuStop{reason, vcpu.id(), where(vcpu) + ": " + text};
  };
  switch (run.exit_reason) {
    case KVM_EXIT_IO:
      if (dispatch_pio(vcpu, pio)) return {};
      return stop(StopReason::error, "KVM_EXIT_IO beyond the vCPU's shared page");
    case KVM_EXIT_MMIO:
      if (dispatch_mmio(vcpu, mmio)) return {};
      return stop(StopReason::error, "KVM_EXIT_MMIO of more than 8 bytes");
    case KVM_EXIT_INTR:
    case KVM_EXIT_IRQ_WINDOW_OPEN:
      return {};
    case KVM_EXIT_HLT:
      return stop(StopReason::halt, "halted");
    case KVM_EXIT_SHUTDOWN:
      return stop(StopReason::reset, "triple fault");
    case KVM_EXIT_SYSTEM_EVENT:
      switch (run.system_event.type) {
        case KVM_SYSTEM_EVENT_SHUTDOWN:
          return stop(StopReason::shutdown, "shutdown");
        case KVM_SYSTEM_EVENT_RESET:
          return stop(StopReason::reset, "reset");
        case KVM_SYSTEM_EVENT_CRASH:
          return stop(StopReason::crash, "the guest reports a crash");
        default:
          return stop(StopReason::error, "unknown system event " + std::to_string(run.system_event.type));
      }
    case KVM_EXIT_INTERNAL_ERROR:
      return stop(StopReason::emulation_failed, describe_internal_error(run));
    case KVM_EXIT_FAIL_ENTRY:
      return stop(StopReason::entry_failed,
                  "the CPU refuses to enter the guest, reason " + hex(run.fail_entry.hardware_entry_failure_reason));
    default:
      return stop(StopReason::error, "unknown exit " + std::to_string(run.exit_reason) + " from KVM");
  }
}

}  // namespace vmm
