// SPDX-License-Identifier: Apache-2.0
// Builds CPUID. Leaves and bits: Intel SDM vol. 2A "CPUID", AMD APM vol. 3 appendix E, Linux virt/kvm/x86/cpuid.rst.
#include "kvm/cpuid.hpp"

#include <cpuid.h>

#include <asm/kvm_para.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <string_view>

namespace vmm {
namespace {

constexpr uint32_t kTimingLeaf = 0x4000'0010;
constexpr uint32_t kApicBusKhz = 1'000'000;  // KVM's APIC timer counts nanoseconds
constexpr uint32_t kLevelSmt = 1;
constexpr uint32_t kLevelCore = 2;
constexpr uint32_t kFirstSharedCacheLevel = 3;  // nearer ones belong to a core

// Paravirtual features that need a VMM's help: 15-bit APIC ids, exits on hypercalls, an MSR of ours.
constexpr uint32_t kFeaturesWithSetup =
    1u << KVM_FEATURE_MSI_EXT_DEST_ID | 1u << KVM_FEATURE_HC_MAP_GPA_RANGE | 1u << KVM_FEATURE_MIGRATION_CONTROL;

void set_bits(uint32_t& value, uint32_t low, uint32_t width, uint32_t field) {
  const uint32_t mask = ((1u << width) - 1) << low;
  value = (value & ~mask) | (field << low & mask);
}

void set_bit(uint32_t& value, uint32_t bit, bool on) { set_bits(value, bit, 1, on); }

constexpr uint32_t kBrandLeaf = 0x8000'0002;

class CpuidTable {
 public:
  explicit CpuidTable(std::span<const kvm_cpuid_entry2> entries) : entries_(entries.begin(), entries.end()) {}

  kvm_cpuid_entry2* find(uint32_t function, uint32_t index = 0) {
    const auto found = std::ranges::find_if(
        entries_, [=](const auto& entry) { return entry.function == function && entry.index == index; });
    return found == entries_.end() ? nullptr : &*found;
  }

  void replace(uint32_t function, std::initializer_list<kvm_cpuid_entry2> with) {
    std::erase_if(entries_, [=](const auto& entry) { return entry.function == function; });
    entries_.insert(entries_.end(), with);
  }

  bool vendor_is(std::string_view name) {
    const kvm_cpuid_entry2* leaf = find(0);
    if (!leaf) return false;
    char vendor[12];
    std::memcpy(vendor, &leaf->ebx, 4);
    std::memcpy(vendor + 4, &leaf->edx, 4);
    std::memcpy(vendor + 8, &leaf->ecx, 4);
    return std::string_view(vendor, sizeof vendor) == name;
  }

  // Calls change(entry) for each subleaf of a leaf.
  template <typename Change>
  void each(uint32_t function, Change change) {
    for (kvm_cpuid_entry2& entry : entries_) {
      if (entry.function == function) change(entry);
    }
  }

  std::vector<kvm_cpuid_entry2> take() && {
    std::ranges::sort(entries_, {}, [](const auto& entry) { return uint64_t{entry.function} << 32 | entry.index; });
    return std::move(entries_);
  }

 private:
  std::vector<kvm_cpuid_entry2> entries_;
};

void set_features(CpuidTable& table, const CpuidConfig& config) {
  if (kvm_cpuid_entry2* leaf = table.find(1)) {
    set_bit(leaf->ecx, 3, false);  // MONITOR/MWAIT would keep a host CPU from idling
    set_bit(leaf->ecx, 24, config.tsc_deadline_timer);
    set_bit(leaf->ecx, 31, true);                                     // a hypervisor is present
    if (!config.nested_virtualization) set_bit(leaf->ecx, 5, false);  // VMX
  }
  if (kvm_cpuid_entry2* leaf = table.find(5)) leaf->eax = leaf->ebx = leaf->ecx = leaf->edx = 0;  // MONITOR's sizes
  if (kvm_cpuid_entry2* leaf = table.find(0x8000'0001); leaf && !config.nested_virtualization) {
    set_bit(leaf->ecx, 2, false);  // SVM
  }
  if (kvm_cpuid_entry2* leaf = table.find(KVM_CPUID_FEATURES)) leaf->eax &= ~kFeaturesWithSetup;
  if (kvm_cpuid_entry2* signature = table.find(KVM_CPUID_SIGNATURE); signature && config.tsc_khz) {
    signature->eax = std::max(signature->eax, kTimingLeaf);
    kvm_cpuid_entry2 timing{};
    timing.function = kTimingLeaf;
    timing.eax = config.tsc_khz;
    timing.ebx = kApicBusKhz;
    table.replace(kTimingLeaf, {timing});
  }
}

void set_topology(CpuidTable& table, uint32_t cores, uint32_t apic_id) {
  // Bits of an APIC id that number the cores, and the ids that they span.
  const auto id_bits = static_cast<uint32_t>(std::bit_width(cores - 1));
  const uint32_t ids = 1u << id_bits;

  if (kvm_cpuid_entry2* leaf = table.find(1)) {
    set_bits(leaf->ebx, 24, 8, apic_id);
    set_bits(leaf->ebx, 16, 8, ids);
    set_bit(leaf->edx, 28, cores > 1);  // HTT: the number of ids is valid
  }
  table.each(4, [&](kvm_cpuid_entry2& cache) {
    const uint32_t type = cache.eax & 0x1f;
    const uint32_t level = cache.eax >> 5 & 0x7;
    if (type == 0) return;
    set_bits(cache.eax, 26, 6, ids - 1);
    set_bits(cache.eax, 14, 12, level < kFirstSharedCacheLevel ? 0 : ids - 1);
  });

  // Extended topology. Zeroed leaves, as KVM reports, would be "not supported".
  kvm_cpuid_entry2* basic = table.find(0);
  if (basic) basic->eax = std::max(basic->eax, 0xbu);
  const bool has_version_2 = basic && basic->eax >= 0x1f;
  for (const uint32_t function : {0xbu, 0x1fu}) {
    if (function == 0x1f && !has_version_2) continue;
    const auto level = [&](uint32_t index, uint32_t type, uint32_t id_shift, uint32_t processors) {
      kvm_cpuid_entry2 entry{};
      entry.function = function;
      entry.index = index;
      entry.flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
      entry.eax = id_shift;
      entry.ebx = processors;
      entry.ecx = type << 8 | index;
      entry.edx = apic_id;
      return entry;
    };
    table.replace(function, {level(0, kLevelSmt, 0, 1), level(1, kLevelCore, id_bits, cores), level(2, 0, 0, 0)});
  }
}

void set_amd_topology(CpuidTable& table, uint32_t cores, uint32_t apic_id) {
  if (kvm_cpuid_entry2* leaf = table.find(0x8000'0001)) set_bit(leaf->ecx, 1, cores > 1);  // CmpLegacy
  if (kvm_cpuid_entry2* leaf = table.find(0x8000'0008)) {
    set_bits(leaf->ecx, 0, 8, cores - 1);
    set_bits(leaf->ecx, 12, 4, static_cast<uint32_t>(std::bit_width(cores - 1)));
  }
  table.each(0x8000'001d, [&](kvm_cpuid_entry2& cache) {
    const uint32_t type = cache.eax & 0x1f;
    const uint32_t level = cache.eax >> 5 & 0x7;
    if (type != 0) set_bits(cache.eax, 14, 12, level < kFirstSharedCacheLevel ? 0 : cores - 1);
  });
  if (kvm_cpuid_entry2* leaf = table.find(0x8000'001e)) {
    leaf->eax = apic_id;
    leaf->ebx = apic_id & 0xff;  // the core's id; one thread in it
    leaf->ecx = 0;               // node 0, the only one
    leaf->edx = 0;
  }
}

void set_brand(CpuidTable& table, const std::array<uint32_t, 12>& brand) {
  if (brand[0] == 0) return;
  for (uint32_t leaf = 0; leaf < 3; ++leaf) {
    const uint32_t* words = &brand[leaf * 4];
    table.replace(
        kBrandLeaf + leaf,
        {{.function = kBrandLeaf + leaf, .eax = words[0], .ebx = words[1], .ecx = words[2], .edx = words[3]}});
  }
}

}  // namespace

std::array<uint32_t, 12> host_brand() {
  std::array<uint32_t, 12> brand{};
  for (uint32_t leaf = 0; leaf < 3; ++leaf) {
    uint32_t* words = &brand[leaf * 4];
    if (!__get_cpuid(kBrandLeaf + leaf, &words[0], &words[1], &words[2], &words[3])) return {};
  }
  return brand;
}

std::vector<kvm_cpuid_entry2> build_cpuid(std::span<const kvm_cpuid_entry2> supported, const CpuidConfig& config,
                                          uint32_t apic_id) {
  CpuidTable table(supported);
  set_features(table, config);
  set_brand(table, config.brand);
  set_topology(table, config.vcpus, apic_id);
  if (table.vendor_is("AuthenticAMD") || table.vendor_is("HygonGenuine")) {
    set_amd_topology(table, config.vcpus, apic_id);
  }
  return std::move(table).take();
}

}  // namespace vmm
