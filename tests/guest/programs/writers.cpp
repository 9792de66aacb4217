// SPDX-License-Identifier: Apache-2.0
// Processors that write to memory without a pause, each to pages of its own, and look at what they wrote before they
// write anew: nothing may be lost, and nothing come from another machine. `?` tells how far they are, `.` ends.
#include "guest.hpp"

namespace {

constexpr uint16_t kLineStatus = kSerialPort + 5;
constexpr uint64_t kStart = 16 << 20, kPageBytes = 4096, kPages = 32;
constexpr uint64_t kGeneration = 0x6010;  // in the identity page: no two machines have the same
constexpr uint32_t kMostWriters = 4;

struct alignas(64) Writer {
  uint64_t passes, pages, errors, last_time;
};
Writer writers[kMostWriters];
uint32_t begun = 1, ended;  // the first processor has number 0
uint64_t pages_of_all;
volatile bool end;

template <typename T>
volatile T& fresh(T& value) {
  return at<T>(reinterpret_cast<uint64_t>(&value));
}

uint64_t content(uint64_t address, uint64_t pass, uint64_t generation) {
  return pass == 0 ? 0 : ((address << 20) + pass) * 0x9e3779b97f4a7c15 ^ generation;
}

uint64_t time_stamp() {
  uint32_t low, high;
  asm volatile("rdtsc" : "=a"(low), "=d"(high));
  return low | uint64_t{high} << 32;
}

void tell() {
  uint64_t least = ~0ull, errors = 0;
  for (uint32_t i = 0; i < fresh(begun); ++i) {
    const uint64_t passes = fresh(writers[i].passes);
    if (passes < least) least = passes;
    errors += fresh(writers[i].errors);
  }
  print("writers ", fresh(begun), " passes ", least);
  print(" errors ", errors, " generation ", Hex{at<uint64_t>(kGeneration)});
  print("\n");
}

void obey() {
  if (!(in8(kLineStatus) & 1)) return;
  const char asked = static_cast<char>(in8(kSerialPort));
  if (asked == '?') tell();
  if (asked == '.') end = true;
}

void write(uint32_t number) {
  Writer& own = writers[number];
  const uint64_t start = kStart + number * kPages * kPageBytes;
  uint64_t last_generation = 0;
  while (!end) {
    // A fork has another one from its first instruction on. What it writes in the pass under way is still the old
    // one's.
    const uint64_t generation = at<uint64_t>(kGeneration);
    for (uint64_t address = start; address < start + kPages * kPageBytes; address += kPageBytes) {
      volatile uint64_t& word = at<uint64_t>(address);
      own.errors += word != content(address, own.passes, last_generation);
      word = content(address, own.passes + 1, generation);
      ++own.pages;
      if (number == 0) obey();
      asm volatile("lock incq %0" : "+m"(pages_of_all)::"cc", "memory");
    }
    const uint64_t now = time_stamp();
    own.errors += now < own.last_time;
    own.last_time = now;
    last_generation = generation;
    fresh(own.passes) = own.passes + 1;
  }
  asm volatile("lock incl %0" : "+m"(ended)::"cc");
}

}  // namespace

void program() {
  const auto processors = static_cast<uint32_t>(number_argument("processors"));
  if (!CHECK(processors >= 1 && processors <= kMostWriters)) return;
  print("ready\n");
  start_processors([] {
    uint32_t number = 1;
    asm volatile("lock xaddl %0, %1" : "+r"(number), "+m"(begun)::"cc");
    write(number);
  });
  write(0);
  while (fresh(ended) != processors) pause();
  uint64_t pages = 0;
  for (const Writer& writer : writers) pages += writer.pages;
  CHECK_EQUAL(pages, pages_of_all);
  tell();
}
