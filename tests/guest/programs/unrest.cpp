// SPDX-License-Identifier: Apache-2.0
// `processors=N` write to `mib=N` all the time, with `rest=N` turns of a loop between two writes. Each write has the next number
// of all and goes to the next few pages, and only when those hold what the last one left there: memory that is not of one
// instant is found within one pass. `?` asks after another pass, `.` ends.
#include "guest.hpp"

namespace {

constexpr uint64_t kStart = 4 << 20, kPageBytes = 4096;
constexpr uint64_t kPlaceBytes = 8 * kPageBytes;
// How long another processor may take between its number and its write, in turns of a loop.
constexpr uint64_t kPatience = 500'000'000;

volatile bool over;
uint64_t places, rest;
uint64_t last_number;
uint32_t damaged, stopped;

void turn() { asm volatile("" ::: "memory"); }

// Every fifth write leaves zeroes. (The number of places is not a multiple of five, so that it is others the next time.)
uint64_t content(uint64_t number) { return number % 5 == 0 ? 0 : number; }

bool holds(uint64_t place, uint64_t value) {
  bool same = true;
  for (uint64_t page = place; page < place + kPlaceBytes; page += kPageBytes)
    same = same && at<uint64_t>(page) == value && at<uint64_t>(page + kPageBytes - sizeof value) == value;
  return same;
}

void write_next() {
  uint64_t number = 1;
  asm volatile("lock xaddq %0, %1" : "+r"(number), "+m"(last_number)::"memory", "cc");
  ++number;
  const uint64_t place = kStart + number % places * kPlaceBytes;
  const uint64_t before = content(number <= places ? 0 : number - places);
  uint64_t waited = 0;
  while (!holds(place, before) && ++waited < kPatience) turn();
  if (waited == kPatience) asm volatile("lock incl %0" : "+m"(damaged)::"cc");
  for (uint64_t page = place; page < place + kPlaceBytes; page += kPageBytes) {
    at<uint64_t>(page) = content(number);
    at<uint64_t>(page + kPageBytes - sizeof number) = content(number);
  }
  for (uint64_t i = 0; i < rest; ++i) turn();
}

void be_another() {
  while (!over) write_next();
  asm volatile("lock incl %0" : "+m"(stopped)::"cc");
}

}  // namespace

void program() {
  places = (number_argument("mib") << 20) / kPlaceBytes;
  rest = number_argument("rest");
  const auto others = static_cast<uint32_t>(number_argument("processors")) - 1;
  CHECK(places % 5 != 0);
  take_commands();
  asm volatile("sti" ::: "memory");
  if (others) start_processors(be_another);
  const auto number_now = [] { return at<uint64_t>(reinterpret_cast<uint64_t>(&last_number)); };
  while (number_now() < places) write_next();
  print("ready\n");
  while (command != '.') {
    if (command == '?') {
      command = 0;
      for (const uint64_t until = number_now() + 2 * places; number_now() < until;) write_next();
      print("numbers ", number_now(), " damaged ", at<uint32_t>(reinterpret_cast<uint64_t>(&damaged)));
      print("\n");
    }
    write_next();
  }
  over = true;
  while (at<uint32_t>(reinterpret_cast<uint64_t>(&stopped)) != others) pause();
  print("done\n");
}
