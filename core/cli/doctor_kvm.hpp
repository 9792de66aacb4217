// SPDX-License-Identifier: Apache-2.0
// Which KVM this machine has, found out by asking it and by running a few guest instructions.
#pragma once

#include <string>
#include <vector>

namespace vmm {

enum class KvmKind {
  missing,   // no /dev/kvm, or not allowed
  software,  // guest code runs in an instruction emulator: a stock kernel would take hours
  hardware,
};

struct KvmExamination {
  KvmKind kind = KvmKind::missing;
  std::string detail;
  std::string advice;
  std::string limits;
  std::vector<std::string> missing_capabilities;
};

KvmExamination examine_kvm();

}  // namespace vmm
