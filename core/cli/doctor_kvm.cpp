// SPDX-License-Identifier: Apache-2.0
// Looks at /dev/kvm: capabilities, and how fast a guest's loop runs.
#include "cli/doctor_kvm.hpp"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <fstream>

#include "kvm/api.hpp"
#include "util/fd.hpp"
#include "util/mapping.hpp"

namespace vmm {
namespace {

constexpr struct {
  int number;
  const char* name;
} kWanted[] = {
    {KVM_CAP_IRQCHIP, "in-kernel interrupt controllers (IRQCHIP)"},
    {KVM_CAP_IRQFD, "interrupts from eventfds (IRQFD)"},
    {KVM_CAP_IOEVENTFD, "notifications to eventfds (IOEVENTFD)"},
    {KVM_CAP_SIGNAL_MSI, "message-signalled interrupts (SIGNAL_MSI)"},
    {KVM_CAP_TSC_DEADLINE_TIMER, "the TSC deadline timer"},
    {KVM_CAP_XSAVE2, "saving large vector state (XSAVE2)"},
    {KVM_CAP_ADJUST_CLOCK, "setting the paravirtual clock (ADJUST_CLOCK)"},
    {KVM_CAP_IMMEDIATE_EXIT, "clean vCPU stops (IMMEDIATE_EXIT)"},
    {KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, "incremental dirty logs (MANUAL_DIRTY_LOG_PROTECT2)"},
};

std::string processor_extension() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    if (!line.starts_with("flags")) continue;
    if (line.find(" vmx") != std::string::npos) return "VMX";
    if (line.find(" svm") != std::string::npos) return "SVM";
    return "";
  }
  return "";
}

// Nanoseconds for each of 200,000 instructions of a counting loop in real mode; negative when it does not run.
double nanoseconds_per_instruction(int kvm) {
  static constexpr unsigned char code[] = {
      0x66, 0xb9, 0xa0, 0x86, 0x01, 0x00,  // mov ecx, 100000
      0x66, 0x49,                          // again: dec ecx
      0x75, 0xfc,                          // jnz again
      0xe6, 0x80,                          // out 0x80, al
  };
  Fd vm(::ioctl(kvm, KVM_CREATE_VM, 0));
  if (!vm) return -1;
  constexpr size_t memory_bytes = 4096;
  void* start = ::mmap(nullptr, memory_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return -1;
  Mapping memory(start, memory_bytes);
  std::memcpy(start, code, sizeof code);
  const kvm_userspace_memory_region region{0, 0, 0x1000, memory_bytes, reinterpret_cast<uintptr_t>(start)};
  if (::ioctl(vm.get(), KVM_SET_USER_MEMORY_REGION, &region) != 0) return -1;
  Fd vcpu(::ioctl(vm.get(), KVM_CREATE_VCPU, 0));
  if (!vcpu) return -1;
  const int run_bytes = ::ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
  void* run_start = ::mmap(nullptr, static_cast<size_t>(run_bytes), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu.get(), 0);
  if (run_start == MAP_FAILED) return -1;
  Mapping run_mapping(run_start, static_cast<size_t>(run_bytes));
  kvm_sregs sregs{};
  if (::ioctl(vcpu.get(), KVM_GET_SREGS, &sregs) != 0) return -1;
  sregs.cs.base = 0;
  sregs.cs.selector = 0;
  kvm_regs regs{};
  regs.rip = 0x1000;
  regs.rflags = 2;
  if (::ioctl(vcpu.get(), KVM_SET_SREGS, &sregs) != 0 || ::ioctl(vcpu.get(), KVM_SET_REGS, &regs) != 0) return -1;
  const auto begin = std::chrono::steady_clock::now();
  if (::ioctl(vcpu.get(), KVM_RUN, 0) != 0) return -1;
  const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - begin;
  if (static_cast<kvm_run*>(run_start)->exit_reason != KVM_EXIT_IO) return -1;
  return took.count() / 200'000;
}

}  // namespace

KvmExamination examine_kvm() {
  KvmExamination found;
  Fd kvm(::open("/dev/kvm", O_RDWR | O_CLOEXEC));
  if (!kvm) {
    found.detail = std::string("/dev/kvm: ") + std::strerror(errno);
    found.advice = errno == EACCES || errno == EPERM
                       ? "add yourself to the group kvm, or run as root"
                       : "enable virtualisation in the firmware and modprobe kvm_intel or kvm_amd";
    return found;
  }
  for (const auto& wanted : kWanted)
    if (::ioctl(kvm.get(), KVM_CHECK_EXTENSION, wanted.number) <= 0) found.missing_capabilities.push_back(wanted.name);
  auto capability = [&](int number) { return std::to_string(::ioctl(kvm.get(), KVM_CHECK_EXTENSION, number)); };
  found.limits = capability(KVM_CAP_MAX_VCPUS) + " vCPUs (" + capability(KVM_CAP_NR_VCPUS) + " recommended), " +
                 capability(KVM_CAP_NR_MEMSLOTS) + " memory slots";

  const double pace_ns = nanoseconds_per_instruction(kvm.get());
  char pace[48];
  std::snprintf(pace, sizeof pace, "%.1f ns for a guest instruction", pace_ns);
  const std::string extension = processor_extension();
  if (pace_ns < 0) {
    found.kind = KvmKind::software;
    found.detail = "/dev/kvm opens, but a few real-mode instructions do not run";
    found.advice = "stock kernels need another machine, or the test host (make run uses it by itself)";
  } else if (extension.empty() && pace_ns > 50) {
    // An emulator takes hundreds of nanoseconds for what a processor does in one.
    found.kind = KvmKind::software;
    found.detail = std::string("/dev/kvm emulates guest kernels in software (") + pace + ", no VMX or SVM)";
    found.advice = "stock kernels need another machine, or the test host (make run uses it by itself)";
  } else {
    found.kind = KvmKind::hardware;
    found.detail = "/dev/kvm with " + (extension.empty() ? "an unknown extension" : extension) + " (" + pace + ")";
  }
  return found;
}

}  // namespace vmm
