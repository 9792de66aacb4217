// SPDX-License-Identifier: Apache-2.0
// Wakes `processors=N` - 1 others; all add to one counter.
#include "guest.hpp"

namespace {

constexpr unsigned kRounds = 100;
uint32_t counter;
uint32_t arrived;
uint32_t ids_seen;

uint32_t load(const uint32_t& value) { return at<uint32_t>(reinterpret_cast<uint64_t>(&value)); }

void count() {
  for (unsigned i = 0; i < kRounds; ++i) asm volatile("lock incl %0" : "+m"(counter)::"cc");
  const uint32_t id = at<uint32_t>(kApicId) >> 24;
  asm volatile("lock orl %1, %0" : "+m"(ids_seen) : "r"(1u << id) : "cc");
  asm volatile("lock incl %0" : "+m"(arrived)::"cc");
}

}  // namespace

void program() {
  const auto processors = static_cast<uint32_t>(number_argument("processors"));
  start_processors(count);
  count();
  while (load(arrived) != processors) pause();
  CHECK_EQUAL(load(counter), processors * kRounds);
  CHECK_EQUAL(load(ids_seen), processors == 32 ? 0xffff'ffff : (1u << processors) - 1);
  print(processors, " processors counted to ", load(counter));
  print("\n");
}
