// SPDX-License-Identifier: Apache-2.0
// Makes shells, and gives KVM their memory.
#include "vm/shell.hpp"

#include <chrono>
#include <utility>

#include "snapshot/kvm_state.hpp"

namespace vmm {
namespace {

Result<void> set_slots(KvmVm& vm, const GuestMemory& memory) {
  for (uint32_t slot = 0; slot < memory.regions().size(); ++slot)
    TRY(vm.set_memory_slot(slot, memory.regions()[slot]));
  return {};
}

}  // namespace

Result<Shell> Shell::create() {
  Kvm kvm = TRY(Kvm::open());
  KvmVm vm = TRY(KvmVm::create(kvm));
  TRY(vm.create_irqchip());
  return Shell{std::move(kvm), std::move(vm), std::nullopt, {}, false};
}

Result<void> Shell::fill(const MemoryConfig& config, uint32_t vcpu_count, const SavedMachine& saved) {
  memory = TRY(GuestMemory::restore(config, saved.memory));
  vcpus = TRY(create_saved_vcpus(kvm, vm, vcpu_count, saved.sections));
  return {};
}

Result<void> Shell::set_slots() {
  TRY(vmm::set_slots(vm, *memory));
  has_slots = true;
  return {};
}

// Without a thread it is made where it is needed.
ShellAhead::ShellAhead() {
  auto thread = spawn_thread("clone-shell", [this] { shell_ = Shell::create(); });
  if (thread.ok()) creating_ = std::move(*thread);
}

void ShellAhead::fill(const MemoryConfig& config, uint32_t vcpu_count, const SavedMachine& saved) {
  if (!creating_.joinable() && shell_) return;
  auto thread = spawn_thread("clone-fill", [this, config, vcpu_count, &saved] {
    creating_.join();
    if (!shell_) shell_ = Shell::create();
    if (!shell_->ok()) return;
    if (auto filled = (*shell_)->fill(config, vcpu_count, saved); !filled.ok()) shell_ = std::move(filled).error();
  });
  if (thread.ok()) filling_ = std::move(*thread);
}

Result<Shell> ShellAhead::take() {
  filling_.join();
  creating_.join();
  return shell_ ? *std::exchange(shell_, std::nullopt) : Shell::create();
}

Result<std::unique_ptr<SlotSetter>> SlotSetter::start(KvmVm& vm, const GuestMemory& memory) {
  std::unique_ptr<SlotSetter> setter(new SlotSetter(vm, memory));
  // KVM counts out pages for shadow tables behind the last slot's wait, and a vCPU without any does not run.
  setter->may_run_early_ = vm.reserve_shadow_pages(memory.size_bytes() / kPageSize).ok();
  setter->thread_ = TRY(spawn_thread("clone-slots", [self = setter.get()] {
    self->result_ = set_slots(self->vm_, self->memory_);
    self->done_.store(true, std::memory_order_release);
  }));
  return setter;
}

Result<void> SlotSetter::wait_for(const KvmVcpu& vcpu) {
  constexpr auto pause = std::chrono::microseconds(20);
  const GuestMemory::Region& last = memory_.regions().back();
  while (may_run_early_ && !done_.load(std::memory_order_acquire)) {
    if (vcpu.reaches(last.start)) return {};
    std::this_thread::sleep_for(pause);
  }
  thread_.join();
  return result_;
}

}  // namespace vmm
