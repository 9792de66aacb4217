// SPDX-License-Identifier: Apache-2.0
// One vCPU of KVM: its registers and other state, its entry into a kernel, KVM_RUN.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "boot/entry.hpp"
#include "kvm/api.hpp"
#include "kvm/kvm.hpp"
#include "util/fd.hpp"
#include "util/mapping.hpp"
#include "util/result.hpp"

namespace vmm {

// "MSR 0x10a (IA32_ARCH_CAPABILITIES)"
std::string msr_name(uint32_t index);

// State is read and written while the vCPU does not run, by any one thread.
class KvmVcpu {
 public:
  // The id is the local APIC's as well.
  static Result<KvmVcpu> create(const Kvm& kvm, const KvmVm& vm, uint32_t id);

  uint32_t id() const { return id_; }
  int fd() const { return fd_.get(); }
  kvm_run& run_page() const { return *reinterpret_cast<kvm_run*>(run_page_.data()); }
  std::span<std::byte> run_bytes() const { return {run_page_.data(), run_page_.size_bytes()}; }

  // Enters the guest. 0 with run_page().exit_reason set, or an errno value: EINTR when kicked, EAGAIN when woken.
  int run() const;

  // State of fixed size: kvm_regs, kvm_sregs, kvm_xcrs, kvm_lapic_state, kvm_vcpu_events, kvm_mp_state, kvm_debugregs.
  template <typename State>
  Result<State> get() const;
  template <typename State>
  Result<void> set(const State& state) const;

  // As many bytes as KVM_CAP_XSAVE2 says of the VM.
  Result<std::vector<std::byte>> xsave() const;
  Result<void> set_xsave(std::span<const std::byte> state) const;

  // MSRs and CPUID leaves that KVM refuses are left out, with a warning that names them (of the first vCPU only: the
  // others fare alike).
  Result<std::vector<kvm_msr_entry>> msrs(std::span<const uint32_t> indices) const;
  Result<void> set_msrs(std::span<const kvm_msr_entry> entries) const;
  Result<std::vector<kvm_cpuid_entry2>> cpuid() const;
  Result<void> set_cpuid(std::span<const kvm_cpuid_entry2> entries) const;

  Result<uint32_t> tsc_khz() const;
  Result<void> set_tsc_khz(uint32_t khz) const;
  // Whether KVM shows this vCPU memory at this address. Before it runs: an MSR of KVM's own is 0 afterwards.
  bool reaches(GuestAddress page) const;
  // Tells the guest's kvmclock that the vCPU stood still, so that no watchdog barks. Does nothing without kvmclock.
  void tell_paused() const;

  // What firmware leaves behind: memory write-back, fast strings, time stamp 0; on vCPU 0 the APIC in virtual wire
  // mode. After set_cpuid().
  Result<void> set_boot_state() const;
  // The registers that a kernel finds at its first instruction.
  Result<void> apply_entry(const EntryState& entry) const;

 private:
  KvmVcpu(Fd fd, uint32_t id, Mapping run_page, size_t xsave_bytes)
      : fd_(std::move(fd)), id_(id), run_page_(std::move(run_page)), xsave_bytes_(xsave_bytes) {}

  void warn(const std::string& message) const;

  Fd fd_;
  uint32_t id_;
  Mapping run_page_;
  size_t xsave_bytes_;  // 0: KVM has no KVM_GET_XSAVE2
};

struct VcpuConfig {
  uint32_t count = 1;
  bool nested_virtualization = false;  // VMX or SVM in CPUID; state of a nested guest is not saved
};

// vCPUs 0 to count - 1 with their CPUID and boot state; all but the first wait for INIT and SIPI. After
// create_irqchip().
Result<std::vector<KvmVcpu>> create_vcpus(const Kvm& kvm, const KvmVm& vm, const VcpuConfig& config);

}  // namespace vmm
