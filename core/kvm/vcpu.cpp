// SPDX-License-Identifier: Apache-2.0
// Calls to KVM that concern one vCPU.
#include "kvm/vcpu.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "kvm/cpuid.hpp"
#include "kvm/ioctl.hpp"
#include "util/log.hpp"

namespace vmm {
namespace {

constexpr size_t kXsaveBytes = sizeof(kvm_xsave);  // of the old KVM_GET_XSAVE
constexpr size_t kCpuidEntriesMax = 256;
constexpr uint32_t kPvEoiMsr = 0x4b564d04;

// The ioctls behind get() and set().
template <typename State>
struct StateCalls;

#define STATE_CALLS(State, get_request, set_request)                                                               \
  template <>                                                                                                      \
  struct StateCalls<State> {                                                                                       \
    static Result<int> get(int fd, State* state) { return kvm_ioctl(fd, get_request, #get_request, state); }       \
    static Result<int> set(int fd, const State* state) { return kvm_ioctl(fd, set_request, #set_request, state); } \
  }
STATE_CALLS(kvm_regs, KVM_GET_REGS, KVM_SET_REGS);
STATE_CALLS(kvm_sregs, KVM_GET_SREGS, KVM_SET_SREGS);
STATE_CALLS(kvm_xcrs, KVM_GET_XCRS, KVM_SET_XCRS);
STATE_CALLS(kvm_lapic_state, KVM_GET_LAPIC, KVM_SET_LAPIC);
STATE_CALLS(kvm_vcpu_events, KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS);
STATE_CALLS(kvm_mp_state, KVM_GET_MP_STATE, KVM_SET_MP_STATE);
STATE_CALLS(kvm_debugregs, KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS);
#undef STATE_CALLS

// Intel SDM vol. 3, §11.4.1: local APIC registers, and LVT entries (§11.5.1).
constexpr size_t kApicLint0 = 0x350;
constexpr size_t kApicLint1 = 0x360;
constexpr uint32_t kApicDeliverNmi = 0x400;
constexpr uint32_t kApicDeliverExtInt = 0x700;

kvm_segment segment_of(const SegmentState& from) {
  kvm_segment segment{};
  segment.base = from.base;
  segment.limit = from.limit;
  segment.selector = from.selector;
  segment.type = from.type;
  segment.present = from.present;
  segment.dpl = from.dpl;
  segment.db = from.db;
  segment.s = from.s;
  segment.l = from.l;
  segment.g = from.g;
  return segment;
}

std::string leaf_name(uint32_t function) {
  char text[32];
  std::snprintf(text, sizeof text, "CPUID leaf %#x", function);
  return text;
}

Result<int> set_cpuid_list(int fd, std::span<const kvm_cpuid_entry2> entries) {
  FlexibleStruct<kvm_cpuid2, kvm_cpuid_entry2> list(entries.size());
  list->nent = static_cast<uint32_t>(entries.size());
  std::ranges::copy(entries, list.entries().begin());
  return KVM_CALL(fd, KVM_SET_CPUID2, list.get());
}

}  // namespace

std::string msr_name(uint32_t index) {
  static constexpr struct {
    uint32_t index;
    const char* name;
  } known[] = {
      {0x10, "IA32_TIME_STAMP_COUNTER"},
      {0x11, "MSR_KVM_WALL_CLOCK"},
      {0x12, "MSR_KVM_SYSTEM_TIME"},
      {0x1b, "IA32_APIC_BASE"},
      {0x3a, "IA32_FEATURE_CONTROL"},
      {0x3b, "IA32_TSC_ADJUST"},
      {0x48, "IA32_SPEC_CTRL"},
      {0x49, "IA32_PRED_CMD"},
      {0x8b, "IA32_BIOS_SIGN_ID"},
      {0xce, "MSR_PLATFORM_INFO"},
      {0xe1, "IA32_UMWAIT_CONTROL"},
      {0xfe, "IA32_MTRRCAP"},
      {0x10a, "IA32_ARCH_CAPABILITIES"},
      {0x122, "IA32_TSX_CTRL"},
      {0x140, "MSR_MISC_FEATURES"},
      {0x174, "IA32_SYSENTER_CS"},
      {0x175, "IA32_SYSENTER_ESP"},
      {0x176, "IA32_SYSENTER_EIP"},
      {0x17a, "IA32_MCG_STATUS"},
      {0x17b, "IA32_MCG_CTL"},
      {0x1a0, "IA32_MISC_ENABLE"},
      {0x1c4, "IA32_XFD"},
      {0x1c5, "IA32_XFD_ERR"},
      {0x1d9, "IA32_DEBUGCTL"},
      {0x277, "IA32_PAT"},
      {0x2ff, "IA32_MTRR_DEF_TYPE"},
      {0x345, "IA32_PERF_CAPABILITIES"},
      {0x6e0, "IA32_TSC_DEADLINE"},
      {0xd90, "IA32_BNDCFGS"},
      {0xda0, "IA32_XSS"},
      {0x4b564d00, "MSR_KVM_WALL_CLOCK_NEW"},
      {0x4b564d01, "MSR_KVM_SYSTEM_TIME_NEW"},
      {0x4b564d02, "MSR_KVM_ASYNC_PF_EN"},
      {0x4b564d03, "MSR_KVM_STEAL_TIME"},
      {kPvEoiMsr, "MSR_KVM_PV_EOI_EN"},
      {0x4b564d05, "MSR_KVM_POLL_CONTROL"},
      {0x4b564d06, "MSR_KVM_ASYNC_PF_INT"},
      {0x4b564d07, "MSR_KVM_ASYNC_PF_ACK"},
      {0xc0000080, "IA32_EFER"},
      {0xc0000081, "IA32_STAR"},
      {0xc0000082, "IA32_LSTAR"},
      {0xc0000083, "IA32_CSTAR"},
      {0xc0000084, "IA32_FMASK"},
      {0xc0000100, "IA32_FS_BASE"},
      {0xc0000101, "IA32_GS_BASE"},
      {0xc0000102, "IA32_KERNEL_GS_BASE"},
      {0xc0000103, "IA32_TSC_AUX"},
      {0xc0000104, "MSR_AMD64_TSC_RATIO"},
      {0xc0010015, "MSR_K7_HWCR"},
      {0xc0010117, "MSR_VM_HSAVE_PA"},
      {0xc001011f, "MSR_AMD64_VIRT_SPEC_CTRL"},
  };
  char text[64];
  const auto found = std::ranges::find(known, index, [](const auto& entry) { return entry.index; });
  if (found != std::end(known)) {
    std::snprintf(text, sizeof text, "MSR %#x (%s)", index, found->name);
  } else {
    std::snprintf(text, sizeof text, "MSR %#x", index);
  }
  return text;
}

Result<KvmVcpu> KvmVcpu::create(const Kvm& kvm, const KvmVm& vm, uint32_t id) {
  const auto size_bytes = static_cast<size_t>(TRY(KVM_CALL(kvm.fd(), KVM_GET_VCPU_MMAP_SIZE, 0)));
  if (size_bytes < sizeof(kvm_run)) return Error{"KVM_GET_VCPU_MMAP_SIZE: " + std::to_string(size_bytes), EPROTO};
  Fd fd(TRY(KVM_CALL(vm.fd(), KVM_CREATE_VCPU, static_cast<unsigned long>(id)).context("vCPU " + std::to_string(id))));
  void* page = ::mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (page == MAP_FAILED) return errno_error("vCPU " + std::to_string(id) + ": mmap");
  ::madvise(page, size_bytes, MADV_DONTFORK);  // a child that has it would keep the VM
  const auto xsave_bytes = static_cast<size_t>(vm.capability(KVM_CAP_XSAVE2));
  return KvmVcpu(std::move(fd), id, Mapping(page, size_bytes), xsave_bytes);
}

int KvmVcpu::run() const { return ::ioctl(fd_.get(), KVM_RUN, 0) < 0 ? errno : 0; }

template <typename State>
Result<State> KvmVcpu::get() const {
  State state{};
  TRY(StateCalls<State>::get(fd_.get(), &state));
  return state;
}

template <typename State>
Result<void> KvmVcpu::set(const State& state) const {
  TRY(StateCalls<State>::set(fd_.get(), &state));
  return {};
}

#define INSTANTIATE(State)                            \
  template Result<State> KvmVcpu::get<State>() const; \
  template Result<void> KvmVcpu::set<State>(const State&) const
INSTANTIATE(kvm_regs);
INSTANTIATE(kvm_sregs);
INSTANTIATE(kvm_xcrs);
INSTANTIATE(kvm_lapic_state);
INSTANTIATE(kvm_vcpu_events);
INSTANTIATE(kvm_mp_state);
INSTANTIATE(kvm_debugregs);
#undef INSTANTIATE

Result<std::vector<std::byte>> KvmVcpu::xsave() const {
  std::vector<std::byte> state(std::max(xsave_bytes_, kXsaveBytes));
  TRY(xsave_bytes_ ? KVM_CALL(fd_.get(), KVM_GET_XSAVE2, state.data())
                   : KVM_CALL(fd_.get(), KVM_GET_XSAVE, state.data()));
  return state;
}

Result<void> KvmVcpu::set_xsave(std::span<const std::byte> state) const {
  const size_t expected = std::max(xsave_bytes_, kXsaveBytes);
  if (state.size() != expected) {
    return Error{"XSAVE state: " + std::to_string(state.size()) + " bytes, KVM here takes " + std::to_string(expected),
                 EINVAL};
  }
  TRY(KVM_CALL(fd_.get(), KVM_SET_XSAVE, state.data()));
  return {};
}

// KVM_GET_MSRS and KVM_SET_MSRS stop at the first that is refused and tell how many were done.
Result<std::vector<kvm_msr_entry>> KvmVcpu::msrs(std::span<const uint32_t> indices) const {
  std::vector<kvm_msr_entry> known;
  while (!indices.empty()) {
    FlexibleStruct<kvm_msrs, kvm_msr_entry> list(indices.size());
    list->nmsrs = static_cast<uint32_t>(indices.size());
    for (size_t i = 0; i < indices.size(); ++i) list.entries()[i].index = indices[i];
    const auto done = static_cast<size_t>(TRY(KVM_CALL(fd_.get(), KVM_GET_MSRS, list.get())));
    const auto read = list.entries().first(done);
    known.insert(known.end(), read.begin(), read.end());
    if (done == indices.size()) break;
    warn(msr_name(indices[done]) + ": cannot be read from KVM");
    indices = indices.subspan(done + 1);
  }
  return known;
}

Result<void> KvmVcpu::set_msrs(std::span<const kvm_msr_entry> entries) const {
  while (!entries.empty()) {
    FlexibleStruct<kvm_msrs, kvm_msr_entry> list(entries.size());
    list->nmsrs = static_cast<uint32_t>(entries.size());
    std::ranges::copy(entries, list.entries().begin());
    const auto done = static_cast<size_t>(TRY(KVM_CALL(fd_.get(), KVM_SET_MSRS, list.get())));
    if (done == entries.size()) break;
    warn(msr_name(entries[done].index) + ": refused by KVM");
    entries = entries.subspan(done + 1);
  }
  return {};
}

Result<std::vector<kvm_cpuid_entry2>> KvmVcpu::cpuid() const {
  FlexibleStruct<kvm_cpuid2, kvm_cpuid_entry2> list(kCpuidEntriesMax);
  list->nent = kCpuidEntriesMax;
  TRY(KVM_CALL(fd_.get(), KVM_GET_CPUID2, list.get()));
  const auto entries = list.entries().first(std::min<size_t>(list->nent, kCpuidEntriesMax));
  return std::vector(entries.begin(), entries.end());
}

// KVM does not tell which leaf it dislikes: the one without which it takes the rest.
Result<void> KvmVcpu::set_cpuid(std::span<const kvm_cpuid_entry2> entries) const {
  auto result = set_cpuid_list(fd_.get(), entries);
  if (result) return {};
  if (result.error().code == EINVAL) {
    for (const kvm_cpuid_entry2& suspect : entries) {
      if (suspect.index != 0) continue;
      std::vector<kvm_cpuid_entry2> rest(entries.begin(), entries.end());
      std::erase_if(rest, [&](const kvm_cpuid_entry2& entry) { return entry.function == suspect.function; });
      if (!set_cpuid_list(fd_.get(), rest)) continue;
      warn(leaf_name(suspect.function) + ": refused by KVM");
      return {};
    }
  }
  return std::move(result).error().context("vCPU " + std::to_string(id_));
}

Result<uint32_t> KvmVcpu::tsc_khz() const {
  return static_cast<uint32_t>(TRY(KVM_CALL(fd_.get(), KVM_GET_TSC_KHZ, 0)));
}

Result<void> KvmVcpu::set_tsc_khz(uint32_t khz) const {
  TRY(KVM_CALL(fd_.get(), KVM_SET_TSC_KHZ, static_cast<unsigned long>(khz)));
  return {};
}

// The page for paravirtual ends of interrupts has to be in a slot when it is announced.
bool KvmVcpu::reaches(GuestAddress page) const {
  constexpr uint64_t enabled = 1;
  FlexibleStruct<kvm_msrs, kvm_msr_entry> list(1);
  list->nmsrs = 1;
  const auto announce = [&](uint64_t value) {
    list.entries()[0] = {kPvEoiMsr, 0, value};
    return ::ioctl(fd_.get(), KVM_SET_MSRS, list.get()) == 1;
  };
  return announce(page.value | enabled) && announce(0);
}

void KvmVcpu::tell_paused() const { ::ioctl(fd_.get(), KVM_KVMCLOCK_CTRL, 0); }

void KvmVcpu::warn(const std::string& message) const {
  if (id_ == 0) log_warning(message);
}

Result<void> KvmVcpu::set_boot_state() const {
  static constexpr kvm_msr_entry boot_msrs[] = {
      {0x10, 0, 0},                       // TSC: writing 0 keeps the vCPUs' counters together
      {0x1a0, 0, 1},                      // MISC_ENABLE: fast strings
      {0x277, 0, 0x0007'0406'0007'0406},  // PAT: the value at reset
      {0x2ff, 0, 0x806},                  // MTRRs on, write-back where none says otherwise
  };
  TRY(set_msrs(boot_msrs));
  if (id_ != 0) return {};

  auto apic = TRY(get<kvm_lapic_state>());
  std::memcpy(apic.regs + kApicLint0, &kApicDeliverExtInt, sizeof kApicDeliverExtInt);
  std::memcpy(apic.regs + kApicLint1, &kApicDeliverNmi, sizeof kApicDeliverNmi);
  return set(apic);
}

Result<void> KvmVcpu::apply_entry(const EntryState& entry) const {
  auto sregs = TRY(get<kvm_sregs>());  // keeps the APIC's base
  sregs.cs = segment_of(entry.code);
  sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = segment_of(entry.data);
  sregs.tr = segment_of(entry.task);
  sregs.gdt = {};
  sregs.gdt.base = entry.gdt_base;
  sregs.gdt.limit = entry.gdt_limit;
  sregs.idt = {};
  sregs.cr0 = entry.cr0;
  sregs.cr3 = entry.cr3;
  sregs.cr4 = entry.cr4;
  sregs.efer = entry.efer;
  TRY(set(sregs));

  kvm_regs regs{};
  regs.rip = entry.rip;
  regs.rsp = entry.rsp;
  regs.rsi = entry.rsi;
  regs.rbx = entry.rbx;
  regs.rflags = entry.rflags;
  return set(regs);
}

Result<std::vector<KvmVcpu>> create_vcpus(const Kvm& kvm, const KvmVm& vm, const VcpuConfig& config) {
  TRY(kvm.check_vcpu_count(config.count));
  const auto supported = TRY(kvm.supported_cpuid());
  const auto brand = host_brand();
  std::vector<KvmVcpu> vcpus;
  for (uint32_t id = 0; id < config.count; ++id) {
    vcpus.push_back(TRY(KvmVcpu::create(kvm, vm, id)));
    const CpuidConfig cpuid{
        .vcpus = config.count,
        // Without a fixed frequency there is none to tell.
        .tsc_khz = kvm.capability(KVM_CAP_GET_TSC_KHZ) ? TRY(vcpus[id].tsc_khz()) : 0,
        .tsc_deadline_timer = kvm.capability(KVM_CAP_TSC_DEADLINE_TIMER) != 0,
        .nested_virtualization = config.nested_virtualization,
        .brand = brand,
    };
    TRY(vcpus[id].set_cpuid(build_cpuid(supported, cpuid, id)));
    TRY(vcpus[id].set_boot_state());
  }
  return vcpus;
}

}  // namespace vmm
