// SPDX-License-Identifier: Apache-2.0
// The threads that run a VM's vCPUs: they carry the guest's accesses to the buses, and pause, resume and stop together.
#pragma once

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "bus/bus.hpp"
#include "kvm/vcpu.hpp"
#include "util/result.hpp"

namespace vmm {

enum class StopReason {
  reset,             // triple fault, or KVM_SYSTEM_EVENT_RESET
  shutdown,          // KVM_SYSTEM_EVENT_SHUTDOWN
  crash,             // KVM_SYSTEM_EVENT_CRASH
  halt,              // HLT in a VM without irqchip
  emulation_failed,  // KVM met an instruction that it cannot emulate, or another internal error
  entry_failed,      // the CPU refused to enter the guest
  error,             // KVM_RUN failed, or returned for a reason we do not know
};

// Why a vCPU stopped for good.
struct VcpuStop {
  StopReason reason;
  uint32_t vcpu_id;
  std::string message;  // one line
};

enum class VcpuState { created, running, paused, stopped };

class Vcpus {
 public:
  // The first vCPU that stops for good makes the others stop, and calls `on_stop` once, from its own thread: it must
  // not wait for this object. The buses outlive it.
  Vcpus(std::vector<KvmVcpu> vcpus, Bus& pio, Bus& mmio, std::function<void(const VcpuStop&)> on_stop);
  Vcpus(const Vcpus&) = delete;
  Vcpus& operator=(const Vcpus&) = delete;
  ~Vcpus() { stop_all(); }

  size_t count() const { return workers_.size(); }
  // State may be read and written unless running.
  KvmVcpu& vcpu(size_t index) { return workers_[index]->vcpu; }
  VcpuState state(size_t index) const;

  // [control], none of them from inside a bus handler. After stop_all() the VM may be started again.
  Result<void> start();
  // Returns when each is parked with its last access complete, as KVM requires for saving. False if some have stopped.
  bool pause_all();
  void resume_all();
  void stop_all();

  // CLOCK_MONOTONIC just before vCPU 0 entered the guest for the first time; 0 until then. [any]
  uint64_t first_entry_ns() const { return first_entry_ns_.load(std::memory_order_relaxed); }

 private:
  enum class Request { run, pause, stop };

  struct Worker {
    explicit Worker(KvmVcpu kvm_vcpu) : vcpu(std::move(kvm_vcpu)) {}
    KvmVcpu vcpu;
    VcpuState state = VcpuState::created;  // guarded by mutex_
    std::atomic<bool> in_kvm{false};       // only then a kick may hit the thread
    pthread_t self{};                      // valid once in_kvm has been set
    std::thread thread;
  };

  void run_thread(Worker& worker);
  std::optional<VcpuStop> run_until_stop(Worker& worker);
  std::optional<VcpuStop> dispatch(Worker& worker, Bus::View& pio, Bus::View& mmio);
  void request(Request request);
  bool park(Worker& worker);

  std::vector<std::unique_ptr<Worker>> workers_;
  Bus& pio_;
  Bus& mmio_;
  const std::function<void(const VcpuStop&)> on_stop_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;  // a worker's state, or request_
  std::atomic<Request> request_{Request::run};
  std::atomic<bool> stop_told_{false};
  std::atomic<uint64_t> first_entry_ns_{0};
};

}  // namespace vmm
