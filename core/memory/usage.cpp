// SPDX-License-Identifier: Apache-2.0
// Reads /proc/PID/smaps and what stands beside it (proc(5)).
#include "memory/usage.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <string>

#include "util/fd.hpp"

namespace vmm {
namespace {

Result<std::string> read_proc(int pid, const char* name) {
  const std::string path = "/proc/" + std::to_string(pid) + "/" + name;
  const Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return errno_error(path);
  std::string text;
  char part[16 << 10];
  for (;;) {
    const ssize_t got = ::read(fd.get(), part, sizeof part);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno_error(path);
    if (got == 0) return text;
    text.append(part, static_cast<size_t>(got));
  }
}

// The number at the start of `text`, behind blanks.
std::optional<uint64_t> leading_number(std::string_view text) {
  text.remove_prefix(std::min(text.find_first_not_of(" \t"), text.size()));
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end != text.data() ? std::optional(value) : std::nullopt;
}

void add(MemoryUsage& sum, const MemoryUsage& more) {
  sum.resident_bytes += more.resident_bytes;
  sum.private_bytes += more.private_bytes;
  sum.shared_bytes += more.shared_bytes;
  sum.swapped_bytes += more.swapped_bytes;
  if (more.merged_bytes) sum.merged_bytes = sum.merged_bytes.value_or(0) + *more.merged_bytes;
}

struct MappingUsage {
  std::string_view name;
  uint64_t size_bytes = 0;
  MemoryUsage usage;
};

void take_row(MappingUsage& mapping, std::string_view key, uint64_t bytes) {
  MemoryUsage& usage = mapping.usage;
  const bool huge = key.ends_with("_Hugetlb");  // hugetlbfs pages are not part of Rss
  if (key == "Size") mapping.size_bytes = bytes;
  if (key == "Rss" || huge) usage.resident_bytes += bytes;
  if (key.starts_with("Private_")) usage.private_bytes += bytes;
  if (key.starts_with("Shared_")) usage.shared_bytes += bytes;
  if (key == "Swap") usage.swapped_bytes += bytes;
  if (key == "KSM") usage.merged_bytes = usage.merged_bytes.value_or(0) + bytes;
}

// Of the process as a whole, in kernels whose smaps have no row for it (before 6.8).
std::optional<uint64_t> merged_of_process(int pid) {
  const auto text = read_proc(pid, "ksm_merging_pages");
  if (!text.ok()) return std::nullopt;
  const auto pages = leading_number(*text);
  if (!pages) return std::nullopt;
  return *pages * static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
}

Result<MemoryUsage> usage_of(int pid, const char* file, SmapsPart part) {
  const std::string text = TRY(read_proc(pid, file));
  if (text.empty()) return Error{"process " + std::to_string(pid) + " has no memory of its own", ESRCH};
  MemoryUsage usage = sum_smaps(text, part);
  // KSM is only let at the guest's memory: the number of the process is that of the guest.
  if (!usage.merged_bytes) usage.merged_bytes = merged_of_process(pid);
  // For smaps a merged page is a shared one, unless nobody else has the like any more.
  usage.shared_bytes -= std::min(usage.shared_bytes, usage.merged_bytes.value_or(0));
  return usage;
}

}  // namespace

MemoryUsage sum_smaps(std::string_view smaps, SmapsPart part) {
  MemoryUsage everything, named, largest;
  uint64_t largest_bytes = 0;
  bool any_named = false;
  MappingUsage mapping;
  const auto finish = [&] {
    add(everything, mapping.usage);
    if (mapping.name.find(kGuestMemoryName) != std::string_view::npos) {
      add(named, mapping.usage);
      any_named = true;
    }
    if (mapping.size_bytes > largest_bytes) {
      largest = mapping.usage;
      largest_bytes = mapping.size_bytes;
    }
    mapping = {};
  };
  while (!smaps.empty()) {
    const size_t end = smaps.find('\n');
    const std::string_view line = smaps.substr(0, end);
    smaps.remove_prefix(end == std::string_view::npos ? smaps.size() : end + 1);
    // "Rss:  12 kB", or "7f00-7f01 rw-p 0000 00:00 0   [heap]", which begins a mapping.
    const size_t word = std::min(line.find(' '), line.size());
    if (word == 0 || line[word - 1] != ':') {
      finish();
      mapping.name = line.substr(word);
    } else if (line.ends_with(" kB")) {
      if (const auto kib = leading_number(line.substr(word))) take_row(mapping, line.substr(0, word - 1), *kib << 10);
    }
  }
  finish();
  if (part == SmapsPart::everything) return everything;
  return any_named ? named : largest;
}

std::optional<uint64_t> own_resident_bytes() {
  const auto text = read_proc(::getpid(), "statm");
  if (!text.ok()) return std::nullopt;
  const auto pages = leading_number(std::string_view(*text).substr(std::min(text->find(' '), text->size())));
  if (!pages) return std::nullopt;
  return *pages * static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
}

Result<MemoryUsage> memory_usage(int pid) { return usage_of(pid, "smaps_rollup", SmapsPart::everything); }

Result<MemoryUsage> guest_memory_usage(int pid) { return usage_of(pid, "smaps", SmapsPart::guest_memory); }

}  // namespace vmm
