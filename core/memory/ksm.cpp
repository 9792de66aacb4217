// SPDX-License-Identifier: Apache-2.0
// /sys/kernel/mm/ksm.
#include "memory/ksm.hpp"

#include <unistd.h>

#include <fstream>
#include <optional>

namespace vmm {
namespace {

std::optional<uint64_t> read_number(const char* name) {
  std::ifstream file(std::string("/sys/kernel/mm/ksm/") + name);
  uint64_t value = 0;
  if (!(file >> value)) return std::nullopt;
  return value;
}

std::string mebibytes(uint64_t bytes) { return std::to_string((bytes + (1 << 19)) >> 20) + " MiB"; }

}  // namespace

KsmState read_ksm() {
  KsmState state;
  const auto run = read_number("run");
  if (!run) return state;
  const uint64_t page_bytes = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  state.exists = true;
  state.runs = *run == 1;
  state.merged_bytes = read_number("pages_shared").value_or(0) * page_bytes;
  state.saved_bytes = read_number("pages_sharing").value_or(0) * page_bytes;
  return state;
}

std::string ksm_text(const KsmState& state) {
  if (!state.exists) return "KSM: not in this kernel";
  if (!state.runs) return "KSM is off (echo 1 > /sys/kernel/mm/ksm/run turns it on)";
  return "KSM runs: " + mebibytes(state.merged_bytes) + " kept once save " + mebibytes(state.saved_bytes);
}

}  // namespace vmm
