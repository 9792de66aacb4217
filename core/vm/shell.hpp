// SPDX-License-Identifier: Apache-2.0
// What a machine has of its host before it has devices. Most of its making is waiting for the kernel's grace periods, so
// it can be begun before it is known what machine it will be, and held ready for one that is to come.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kvm/kvm.hpp"
#include "kvm/vcpu.hpp"
#include "loop/thread.hpp"
#include "memory/guest_memory.hpp"
#include "snapshot/sections.hpp"
#include "util/result.hpp"
#include "vm/prefault.hpp"

namespace vmm {

class ShellAhead;

// What a machine starts from that does not boot. The files behind the extents do not change while it lives.
struct SavedMachine {
  Sections sections;
  std::vector<MemoryExtent> memory;
  std::string template_name;  // as its backend knows it; empty: of a machine that runs
  SnapshotImage* image = nullptr;  // of the template, for its notes; lasts as long as the machine
  PrefaultMode prefault = PrefaultMode::none;
  ShellAhead* shell = nullptr;  // its machine's, if one was begun
};

struct Shell {
  Kvm kvm;
  KvmVm vm;  // with its interrupt controllers
  std::optional<GuestMemory> memory;
  std::vector<KvmVcpu> vcpus;  // with memory: those of the saved machine
  bool has_slots = false;

  static Result<Shell> create();
  // Memory and vCPUs of a saved machine. KVM does not know of the memory yet.
  Result<void> fill(const MemoryConfig& config, uint32_t vcpu_count, const SavedMachine& saved);
  Result<void> set_slots();
};

// A shell that is made in a thread of its own. One process's: a child cannot use what KVM made for its parent.
class ShellAhead {
 public:
  ShellAhead();
  // One that is there already, with all that fill() does.
  explicit ShellAhead(Shell full) : shell_(std::move(full)) {}
  // Goes on with Shell::fill(). The saved machine lasts as long as this.
  void fill(const MemoryConfig& config, uint32_t vcpu_count, const SavedMachine& saved);
  // Waits for it. Once.
  Result<Shell> take();

 private:
  std::optional<Result<Shell>> shell_;
  Thread creating_;
  Thread filling_;  // waits for the other
};

// Gives KVM the memory of a machine that is about to run. Each slot waits until no vCPU can see the time before it, which
// a vCPU that sees the slot already need not wait for.
class SlotSetter {
 public:
  static Result<std::unique_ptr<SlotSetter>> start(KvmVm& vm, const GuestMemory& memory);

  // Returns when a vCPU, which is any that has not run, can reach all memory. [control]
  Result<void> wait_for(const KvmVcpu& vcpu);

 private:
  SlotSetter(KvmVm& vm, const GuestMemory& memory) : vm_(vm), memory_(memory) {}

  KvmVm& vm_;
  const GuestMemory& memory_;
  bool may_run_early_ = false;
  Result<void> result_;  // when done_
  std::atomic<bool> done_{false};
  Thread thread_;
};

}  // namespace vmm
