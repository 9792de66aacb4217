// SPDX-License-Identifier: Apache-2.0
// What the host's kernel same-page merging does (Documentation/admin-guide/mm/ksm.rst).
#pragma once

#include <cstdint>
#include <string>

namespace vmm {

struct KsmState {
  bool exists = false;  // the kernel has it
  bool runs = false;
  uint64_t merged_bytes = 0;  // kept once for several (pages_shared)
  uint64_t saved_bytes = 0;   // not needed because of that (pages_sharing)
};

KsmState read_ksm();
// One line: "KSM runs: 12M kept once save 96M".
std::string ksm_text(const KsmState& state);

}  // namespace vmm
