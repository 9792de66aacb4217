// SPDX-License-Identifier: Apache-2.0
// What KVM holds of a machine (vCPUs, interrupt chips, clocks) as sections of the owner "kvm".
#pragma once

#include <span>
#include <vector>

#include "kvm/kvm.hpp"
#include "kvm/vcpu.hpp"
#include "snapshot/sections.hpp"
#include "util/result.hpp"

namespace vmm {

using VcpuPointers = std::span<KvmVcpu* const>;

// The vCPUs stand still.
Result<void> save_kvm(const Kvm& kvm, const KvmVm& vm, VcpuPointers vcpus, Sections& sections);

// vCPUs that see the processor that the saved ones saw. A feature of it that this host lacks is an error by name, and so is
// a section of KVM's that such a machine has no use for.
Result<std::vector<KvmVcpu>> create_saved_vcpus(const Kvm& kvm, const KvmVm& vm, uint32_t count,
                                                const Sections& sections);

// After create_saved_vcpus(), before the first of them runs, when they can reach memory. Time stamp counters and the
// clock go on by what time has passed since, by the host's real time: the guest's clocks are right, and never run
// backwards.
Result<void> load_kvm(const KvmVm& vm, VcpuPointers vcpus, const Sections& sections);

// The names of what `needed` has and `present` lacks, e.g. "AVX2": features only, and the parts of the XSAVE area.
std::vector<std::string> missing_features(std::span<const kvm_cpuid_entry2> needed,
                                          std::span<const kvm_cpuid_entry2> present);

}  // namespace vmm
