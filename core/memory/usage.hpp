// SPDX-License-Identifier: Apache-2.0
// What a process really costs the host: its private pages, apart from those it shares and those that KSM merged.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "util/result.hpp"

namespace vmm {

// The mapping(s) of a guest's memory bear it in /proc/PID/smaps, where the host's kernel can name mappings.
inline constexpr const char* kGuestMemoryName = "clone-guest-memory";

struct MemoryUsage {
  uint64_t resident_bytes = 0;
  uint64_t private_bytes = 0;  // nobody else maps them: what ends with the process
  uint64_t shared_bytes = 0;   // without those that KSM merged, where the kernel tells
  std::optional<uint64_t> merged_bytes;  // by KSM; unset where the kernel does not tell
  uint64_t swapped_bytes = 0;
};

// Of the whole process (/proc/PID/smaps_rollup). Another user's process is an error: EACCES.
Result<MemoryUsage> memory_usage(int pid);

// What this process has in memory, without a walk over its mappings (/proc/self/statm).
std::optional<uint64_t> own_resident_bytes();

// Of its guest memory alone (/proc/PID/smaps): the mappings that bear kGuestMemoryName or, where the host's kernel
// names none, the largest one. Slower: the kernel walks every mapping.
Result<MemoryUsage> guest_memory_usage(int pid);

// The sums over a text in the format of smaps or smaps_rollup, for tests.
enum class SmapsPart { everything, guest_memory };
MemoryUsage sum_smaps(std::string_view smaps, SmapsPart part);

}  // namespace vmm
