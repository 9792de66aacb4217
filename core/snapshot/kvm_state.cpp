// SPDX-License-Identifier: Apache-2.0
// Saves and loads KVM's state in the order that KVM asks for (Linux Documentation/virt/kvm/api.rst).
#include "snapshot/kvm_state.hpp"

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <limits>

namespace vmm {
namespace {

constexpr const char* kOwner = kKvmSections;
constexpr uint32_t kVersion = 1;
constexpr uint32_t kTscMsr = 0x10;
constexpr size_t kMostCpuidEntries = 256;
constexpr size_t kMostMsrs = 1024;

// When the state was saved, and how fast time stamps counted.
struct SavedTime {
  uint64_t real_ns;  // since 1970
  uint64_t guest_ns;  // kvmclock
  uint32_t tsc_khz;   // 0: unknown
  uint32_t reserved;
};

uint64_t real_time_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_REALTIME, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

std::string vcpu_tag(uint32_t id, const char* what) { return "vcpu." + std::to_string(id) + "." + what; }

template <typename State>
Result<void> save_part(const KvmVcpu& vcpu, const char* what, Sections& sections) {
  const State state = TRY(vcpu.get<State>());
  return sections.put(kOwner, vcpu_tag(vcpu.id(), what), kVersion, state);
}

template <typename State>
Result<void> load_part(const KvmVcpu& vcpu, const char* what, const Sections& sections) {
  const auto state = TRY(sections.get<State>(kOwner, vcpu_tag(vcpu.id(), what), kVersion));
  return vcpu.set(state).context(vcpu_tag(vcpu.id(), what));
}

struct Chip {
  Irqchip chip;
  const char* tag;
};
constexpr Chip kChips[] = {
    {Irqchip::pic_master, "pic.master"}, {Irqchip::pic_slave, "pic.slave"}, {Irqchip::ioapic, "ioapic"}};

constexpr const char* kVcpuParts[] = {"mp-state", "registers", "system-registers", "xcrs",  "debug-registers",
                                      "lapic",    "events",    "xsave",            "cpuid", "msrs"};

enum class Register : uint8_t { eax, ebx, ecx, edx };

uint32_t value_of(const kvm_cpuid_entry2& entry, Register which) {
  const uint32_t values[] = {entry.eax, entry.ebx, entry.ecx, entry.edx};
  return values[static_cast<size_t>(which)];
}

// Registers of CPUID in which each bit is a feature, or a part of the XSAVE area.
struct FeatureWord {
  uint32_t function, index;
  Register which;
  uint32_t not_features;  // bits that say what a guest has set up, or how many there are
};
constexpr FeatureWord kFeatureWords[] = {
    {0x1, 0, Register::ecx, 1u << 27 | 1u << 31},  // OSXSAVE, hypervisor
    {0x1, 0, Register::edx, 0},
    {0x7, 0, Register::ebx, 0},
    {0x7, 0, Register::ecx, 1u << 4 | 0x1fu << 17},  // OSPKE, MAWAU
    {0x7, 0, Register::edx, 0},
    {0x7, 1, Register::eax, 0},
    {0x7, 1, Register::edx, 0},
    {0x7, 2, Register::edx, 0},
    {0xd, 0, Register::eax, 0},
    {0xd, 1, Register::eax, 0},
    {0x4000'0001, 0, Register::eax, 0},
    {0x8000'0001, 0, Register::ecx, 0},
    {0x8000'0001, 0, Register::edx, 0},
    {0x8000'0007, 0, Register::edx, 0},
    {0x8000'0008, 0, Register::ebx, 0},
    {0x8000'0021, 0, Register::eax, 0},
};

struct FeatureName {
  uint32_t function, index;
  Register which;
  uint32_t bit;
  const char* name;
};
constexpr FeatureName kFeatureNames[] = {
    {0x1, 0, Register::ecx, 0, "SSE3"},           {0x1, 0, Register::ecx, 1, "PCLMULQDQ"},
    {0x1, 0, Register::ecx, 9, "SSSE3"},          {0x1, 0, Register::ecx, 12, "FMA"},
    {0x1, 0, Register::ecx, 13, "CMPXCHG16B"},    {0x1, 0, Register::ecx, 17, "PCID"},
    {0x1, 0, Register::ecx, 19, "SSE4.1"},        {0x1, 0, Register::ecx, 20, "SSE4.2"},
    {0x1, 0, Register::ecx, 21, "x2APIC"},        {0x1, 0, Register::ecx, 22, "MOVBE"},
    {0x1, 0, Register::ecx, 23, "POPCNT"},        {0x1, 0, Register::ecx, 24, "TSC deadline"},
    {0x1, 0, Register::ecx, 25, "AES"},           {0x1, 0, Register::ecx, 26, "XSAVE"},
    {0x1, 0, Register::ecx, 28, "AVX"},           {0x1, 0, Register::ecx, 29, "F16C"},
    {0x1, 0, Register::ecx, 30, "RDRAND"},        {0x7, 0, Register::ebx, 0, "FSGSBASE"},
    {0x7, 0, Register::ebx, 3, "BMI1"},           {0x7, 0, Register::ebx, 5, "AVX2"},
    {0x7, 0, Register::ebx, 7, "SMEP"},           {0x7, 0, Register::ebx, 8, "BMI2"},
    {0x7, 0, Register::ebx, 9, "ERMS"},           {0x7, 0, Register::ebx, 10, "INVPCID"},
    {0x7, 0, Register::ebx, 16, "AVX512F"},       {0x7, 0, Register::ebx, 17, "AVX512DQ"},
    {0x7, 0, Register::ebx, 18, "RDSEED"},        {0x7, 0, Register::ebx, 19, "ADX"},
    {0x7, 0, Register::ebx, 20, "SMAP"},          {0x7, 0, Register::ebx, 21, "AVX512IFMA"},
    {0x7, 0, Register::ebx, 23, "CLFLUSHOPT"},    {0x7, 0, Register::ebx, 24, "CLWB"},
    {0x7, 0, Register::ebx, 28, "AVX512CD"},      {0x7, 0, Register::ebx, 29, "SHA"},
    {0x7, 0, Register::ebx, 30, "AVX512BW"},      {0x7, 0, Register::ebx, 31, "AVX512VL"},
    {0x7, 0, Register::ecx, 1, "AVX512VBMI"},     {0x7, 0, Register::ecx, 2, "UMIP"},
    {0x7, 0, Register::ecx, 3, "PKU"},            {0x7, 0, Register::ecx, 8, "GFNI"},
    {0x7, 0, Register::ecx, 9, "VAES"},           {0x7, 0, Register::ecx, 10, "VPCLMULQDQ"},
    {0x7, 0, Register::ecx, 11, "AVX512VNNI"},    {0x7, 0, Register::ecx, 16, "five-level paging"},
    {0x7, 0, Register::ecx, 22, "RDPID"},         {0x7, 0, Register::edx, 22, "AMX-BF16"},
    {0x7, 0, Register::edx, 24, "AMX-TILE"},      {0x7, 0, Register::edx, 25, "AMX-INT8"},
    {0x7, 1, Register::eax, 4, "AVX-VNNI"},       {0x7, 1, Register::eax, 5, "AVX512BF16"},
    {0xd, 0, Register::eax, 2, "AVX state"},      {0xd, 0, Register::eax, 5, "AVX-512 state"},
    {0xd, 0, Register::eax, 9, "PKRU state"},     {0xd, 0, Register::eax, 18, "AMX state"},
    {0xd, 1, Register::eax, 0, "XSAVEOPT"},       {0xd, 1, Register::eax, 1, "XSAVEC"},
    {0xd, 1, Register::eax, 3, "XSAVES"},         {0x4000'0001, 0, Register::eax, 3, "kvmclock"},
    {0x4000'0001, 0, Register::eax, 5, "KVM steal time"},
    {0x4000'0001, 0, Register::eax, 6, "KVM paravirtual end of interrupt"},
    {0x8000'0001, 0, Register::ecx, 5, "LZCNT"},  {0x8000'0001, 0, Register::ecx, 6, "SSE4A"},
    {0x8000'0001, 0, Register::edx, 20, "NX"},    {0x8000'0001, 0, Register::edx, 26, "1 GiB pages"},
    {0x8000'0001, 0, Register::edx, 27, "RDTSCP"},
    {0x8000'0007, 0, Register::edx, 8, "invariant TSC"},
};

std::string feature_name(const FeatureWord& word, uint32_t bit) {
  for (const FeatureName& known : kFeatureNames)
    if (known.function == word.function && known.index == word.index && known.which == word.which && known.bit == bit)
      return known.name;
  static constexpr const char* registers[] = {"EAX", "EBX", "ECX", "EDX"};
  char text[64];
  std::snprintf(text, sizeof text, "CPUID %#x.%u %s bit %u", word.function, word.index,
                registers[static_cast<size_t>(word.which)], bit);
  return text;
}

uint32_t word_in(std::span<const kvm_cpuid_entry2> entries, const FeatureWord& word) {
  for (const kvm_cpuid_entry2& entry : entries)
    if (entry.function == word.function && entry.index == word.index) return value_of(entry, word.which);
  return 0;
}

// "GenuineIntel": another maker's has other registers and other errata, whatever the features say.
std::string maker_of(std::span<const kvm_cpuid_entry2> entries) {
  std::string maker;
  for (const Register part : {Register::ebx, Register::edx, Register::ecx}) {
    const uint32_t letters = word_in(entries, {0, 0, part, 0});
    for (unsigned shift = 0; shift < 32; shift += 8)
      if (const char letter = static_cast<char>(letters >> shift); letter >= ' ' && letter <= '~') maker += letter;
  }
  return maker;
}

// What the time stamp counter has to be advanced by: kilohertz are counts a millisecond.
uint64_t counts(uint64_t ns, uint32_t tsc_khz) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(ns) * tsc_khz / 1'000'000);
}

uint64_t saved_tsc(std::span<const kvm_msr_entry> msrs) {
  const auto found = std::ranges::find(msrs, kTscMsr, &kvm_msr_entry::index);
  return found == msrs.end() ? 0 : found->data;
}

// KVM takes a time stamp that is within a second of what it expects as one to be kept in step with that, and what it
// expects of these vCPUs counts from when they were made. So their counters are first set far away from the saved ones.
Result<void> leave_own_time(VcpuPointers vcpus, const Sections& sections, uint64_t tsc_counts, uint32_t tsc_khz) {
  const auto msrs =
      TRY(sections.get_list<kvm_msr_entry>(kOwner, vcpu_tag(vcpus.front()->id(), "msrs"), kVersion));
  const uint64_t hour = uint64_t{tsc_khz} * 1000 * 3600;
  const kvm_msr_entry far_away{kTscMsr, 0, saved_tsc(msrs) + tsc_counts + hour};
  for (const KvmVcpu* vcpu : vcpus) TRY(vcpu->set_msrs({&far_away, 1}));
  return {};
}

Result<void> load_msrs(const KvmVcpu& vcpu, const Sections& sections, uint64_t tsc_counts) {
  auto msrs = TRY(sections.get_list<kvm_msr_entry>(kOwner, vcpu_tag(vcpu.id(), "msrs"), kVersion));
  if (msrs.size() > kMostMsrs)
    return Error{vcpu_tag(vcpu.id(), "msrs") + ": " + std::to_string(msrs.size()) + " registers", 0, CLONE_ERR_CORRUPT};
  // The counter first: the deadline timer compares with it.
  std::ranges::stable_sort(msrs, {}, [](const kvm_msr_entry& entry) { return entry.index != kTscMsr; });
  for (kvm_msr_entry& entry : msrs)
    if (entry.index == kTscMsr) entry.data += tsc_counts;
  return vcpu.set_msrs(msrs);
}

}  // namespace

std::vector<std::string> missing_features(std::span<const kvm_cpuid_entry2> needed,
                                          std::span<const kvm_cpuid_entry2> present) {
  std::vector<std::string> missing;
  if (const std::string maker = maker_of(needed); !maker.empty() && maker != maker_of(present))
    missing.push_back("the maker " + maker);
  for (const FeatureWord& word : kFeatureWords) {
    const uint32_t lacking = word_in(needed, word) & ~word_in(present, word) & ~word.not_features;
    for (uint32_t bit = 0; bit < 32; ++bit)
      if (lacking >> bit & 1) missing.push_back(feature_name(word, bit));
  }
  return missing;
}

Result<void> save_kvm(const Kvm& kvm, const KvmVm& vm, VcpuPointers vcpus, Sections& sections) {
  const auto indices = TRY(kvm.msr_indices());
  for (const KvmVcpu* vcpu : vcpus) {
    const uint32_t id = vcpu->id();
    // KVM_GET_MP_STATE first: it brings pending INIT and SIPI into the other parts.
    TRY(save_part<kvm_mp_state>(*vcpu, "mp-state", sections));
    TRY(save_part<kvm_regs>(*vcpu, "registers", sections));
    TRY(save_part<kvm_sregs>(*vcpu, "system-registers", sections));
    TRY(save_part<kvm_xcrs>(*vcpu, "xcrs", sections));
    TRY(save_part<kvm_debugregs>(*vcpu, "debug-registers", sections));
    TRY(save_part<kvm_lapic_state>(*vcpu, "lapic", sections));
    TRY(save_part<kvm_vcpu_events>(*vcpu, "events", sections));
    const auto xsave = TRY(vcpu->xsave());
    TRY(sections.put(kOwner, vcpu_tag(id, "xsave"), kVersion, std::span(xsave)));
    const auto cpuid = TRY(vcpu->cpuid());
    TRY(sections.put(kOwner, vcpu_tag(id, "cpuid"), kVersion, std::as_bytes(std::span(cpuid))));
    const auto msrs = TRY(vcpu->msrs(indices));
    TRY(sections.put(kOwner, vcpu_tag(id, "msrs"), kVersion, std::as_bytes(std::span(msrs))));
  }
  for (const Chip& chip : kChips) {
    const kvm_irqchip state = TRY(vm.irqchip(chip.chip));
    TRY(sections.put(kOwner, chip.tag, kVersion, state));
  }
  const kvm_pit_state2 pit = TRY(vm.pit());
  TRY(sections.put(kOwner, "pit", kVersion, pit));
  const kvm_clock_data clock = TRY(vm.clock());
  const auto tsc_khz = vcpus.front()->tsc_khz();
  const SavedTime time{real_time_ns(), clock.clock, tsc_khz.ok() ? *tsc_khz : 0, 0};
  return sections.put(kOwner, "time", kVersion, time);
}

Result<std::vector<KvmVcpu>> create_saved_vcpus(const Kvm& kvm, const KvmVm& vm, uint32_t count,
                                                const Sections& sections) {
  std::set<std::string, std::less<>> known = {"pit", "time"};
  for (const Chip& chip : kChips) known.insert(chip.tag);
  for (uint32_t id = 0; id < count; ++id)
    for (const char* part : kVcpuParts) known.insert(vcpu_tag(id, part));
  TRY(check_known(sections, kOwner, known));
  const auto time = TRY(sections.get<SavedTime>(kOwner, "time", kVersion));
  auto vcpus = TRY(create_vcpus(kvm, vm, {count}));
  // What a machine that boots here would see: some hosts have more than KVM lists as supported.
  const auto present = TRY(vcpus.front().cpuid());
  for (uint32_t id = 0; id < count; ++id) {
    const KvmVcpu& vcpu = vcpus[id];
    const auto cpuid = TRY(sections.get_list<kvm_cpuid_entry2>(kOwner, vcpu_tag(id, "cpuid"), kVersion));
    if (cpuid.size() > kMostCpuidEntries)
      return Error{vcpu_tag(id, "cpuid") + ": " + std::to_string(cpuid.size()) + " leaves", 0, CLONE_ERR_CORRUPT};
    if (const auto missing = missing_features(cpuid, present); id == 0 && !missing.empty()) {
      std::string names;
      for (const std::string& name : missing) names += (names.empty() ? "" : ", ") + name;
      return Error{"the snapshot's processor has what this host lacks: " + names, 0, CLONE_ERR_UNSUPPORTED};
    }
    TRY(vcpu.set_cpuid(cpuid));
    // Another frequency than the host's own needs scaling in hardware; without it the guest would count wrongly.
    const auto here_khz = vcpu.tsc_khz();
    if (time.tsc_khz && here_khz.ok() && *here_khz != time.tsc_khz)
      TRY(vcpu.set_tsc_khz(time.tsc_khz).context("the snapshot's time stamps count " +
                                                         std::to_string(time.tsc_khz) + " kHz, this host's " +
                                                         std::to_string(*here_khz)));
  }
  return vcpus;
}

Result<void> load_kvm(const KvmVm& vm, VcpuPointers vcpus, const Sections& sections) {
  for (const Chip& chip : kChips) {
    const auto state = TRY(sections.get<kvm_irqchip>(kOwner, chip.tag, kVersion));
    TRY(vm.set_irqchip(state).context(chip.tag));
  }
  const auto pit = TRY(sections.get<kvm_pit_state2>(kOwner, "pit", kVersion));
  TRY(vm.set_pit(pit).context("pit"));

  const auto time = TRY(sections.get<SavedTime>(kOwner, "time", kVersion));
  const uint64_t now_ns = real_time_ns();
  const uint64_t passed_ns = now_ns > time.real_ns ? now_ns - time.real_ns : 0;
  if (time.guest_ns > std::numeric_limits<uint64_t>::max() / 2 || passed_ns > std::numeric_limits<uint64_t>::max() / 2)
    return Error{"section kvm/time holds an impossible time", 0, CLONE_ERR_CORRUPT};
  kvm_clock_data clock{};
  clock.clock = time.guest_ns + passed_ns;
  TRY(vm.set_clock(clock));
  const uint64_t passed_counts = counts(passed_ns, time.tsc_khz);
  TRY(leave_own_time(vcpus, sections, passed_counts, time.tsc_khz));

  for (KvmVcpu* vcpu : vcpus) {
    const uint32_t id = vcpu->id();
    TRY(load_part<kvm_mp_state>(*vcpu, "mp-state", sections));
    TRY(load_part<kvm_regs>(*vcpu, "registers", sections));
    TRY(load_part<kvm_sregs>(*vcpu, "system-registers", sections));
    // The extent of XSAVE before its contents; both before events, which may hold a pending exception of theirs.
    TRY(load_part<kvm_xcrs>(*vcpu, "xcrs", sections));
    const auto xsave = TRY(sections.get(kOwner, vcpu_tag(id, "xsave"), kVersion));
    TRY(vcpu->set_xsave(xsave).context(vcpu_tag(id, "xsave")));
    TRY(load_part<kvm_debugregs>(*vcpu, "debug-registers", sections));
    // The local APIC before the registers that its timer needs.
    TRY(load_part<kvm_lapic_state>(*vcpu, "lapic", sections));
    TRY(load_msrs(*vcpu, sections, passed_counts));
    TRY(load_part<kvm_vcpu_events>(*vcpu, "events", sections));
    vcpu->tell_paused();
  }
  return {};
}

}  // namespace vmm
