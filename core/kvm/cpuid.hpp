// SPDX-License-Identifier: Apache-2.0
// The CPUID of a vCPU: what KVM supports, with the topology of the VM in place of the host's.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "kvm/api.hpp"

namespace vmm {

struct CpuidConfig {
  uint32_t vcpus = 1;
  uint32_t tsc_khz = 0;  // 0: unknown, the timing leaf is left out
  bool tsc_deadline_timer = false;
  bool nested_virtualization = false;
  // The processor's name, leaves 0x80000002 to 4, which KVM leaves empty; all zero: left as KVM has them.
  std::array<uint32_t, 12> brand{};
};

// The name of the processor that this runs on.
std::array<uint32_t, 12> host_brand();

// One package of `vcpus` cores, one thread each; x2APIC id `apic_id`. The result is in ascending order.
std::vector<kvm_cpuid_entry2> build_cpuid(std::span<const kvm_cpuid_entry2> supported, const CpuidConfig& config,
                                          uint32_t apic_id);

}  // namespace vmm
