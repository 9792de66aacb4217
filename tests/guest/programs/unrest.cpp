// SPDX-License-Identifier: Apache-2.0
// `processors=N` write to `mib=N` all the time, `rest=N` pauses between two pages. Each write has the next number of all and
// goes to the next page, and only when that one holds what its last write left there: memory that is not of one instant is
// found within one pass. `?` asks after another pass, `.` ends.
#include "guest.hpp"

namespace {

constexpr uint16_t kInterruptEnable = kSerialPort + 1, kIdentification = kSerialPort + 2,
                   kFifoControl = kSerialPort + 2, kModemControl = kSerialPort + 4, kLineStatus = kSerialPort + 5;
constexpr uint64_t kStart = 16 << 20, kPageBytes = 4096;
// How long another processor may take between its number and its write.
constexpr uint64_t kPatience = 50'000'000;

volatile char command;
volatile bool over;
uint64_t pages, rest;
uint64_t last_number;
uint32_t damaged, stopped;

// Every fifth page becomes zeroes. (The number of pages is not a multiple of five, so that others do next time.)
uint64_t content(uint64_t number) { return number % 5 == 0 ? 0 : number; }

void write_next() {
  uint64_t number = 1;
  asm volatile("lock xaddq %0, %1" : "+r"(number), "+m"(last_number)::"memory", "cc");
  ++number;
  const uint64_t page = kStart + number % pages * kPageBytes;
  volatile uint64_t &first = at<uint64_t>(page), &last = at<uint64_t>(page + kPageBytes - sizeof(uint64_t));
  const uint64_t before = content(number <= pages ? 0 : number - pages);
  for (uint64_t waited = 0; first != before || last != before; ++waited) {
    if (waited == kPatience) {
      asm volatile("lock incl %0" : "+m"(damaged)::"cc");
      break;
    }
    pause();
  }
  first = content(number);
  last = content(number);
  for (uint64_t i = 0; i < rest; ++i) pause();
}

void be_another() {
  while (!over) write_next();
  asm volatile("lock incl %0" : "+m"(stopped)::"cc");
}

void receive() {
  while ((in8(kIdentification) & 1) == 0)
    while (in8(kLineStatus) & 1) command = static_cast<char>(in8(kSerialPort));
}

}  // namespace

void program() {
  pages = number_argument("mib") << 20 >> 12;
  rest = number_argument("rest");
  const auto others = static_cast<uint32_t>(number_argument("processors")) - 1;
  CHECK(pages % 5 != 0);
  handle_with(1, receive);
  route(4, 1);
  out8(kFifoControl, 0x07);
  out8(kModemControl, 0x0b);  // DTR, RTS, OUT2
  out8(kInterruptEnable, 1);
  asm volatile("sti" ::: "memory");
  if (others) start_processors(be_another);
  const auto number_now = [] { return at<uint64_t>(reinterpret_cast<uint64_t>(&last_number)); };
  while (number_now() < pages) write_next();
  print("ready\n");
  while (command != '.') {
    if (command == '?') {
      command = 0;
      for (const uint64_t until = number_now() + 2 * pages; number_now() < until;) write_next();
      print("numbers ", number_now(), " damaged ", at<uint32_t>(reinterpret_cast<uint64_t>(&damaged)));
      print("\n");
    }
    write_next();
  }
  over = true;
  while (at<uint32_t>(reinterpret_cast<uint64_t>(&stopped)) != others) pause();
  print("done\n");
}
