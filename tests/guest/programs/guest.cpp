// SPDX-License-Identifier: Apache-2.0
// What bare guests are written with.
#include "guest.hpp"

extern "C" {
void* memcpy(void* to, const void* from, size_t count) {
  void* const result = to;
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count)::"memory");
  return result;
}
void* memset(void* at, int value, size_t count) {
  void* const result = at;
  asm volatile("rep stosb" : "+D"(at), "+c"(count) : "a"(value) : "memory");
  return result;
}

extern char trampoline[], trampoline_end[], trampoline_page_tables[];
extern const uint64_t interrupt_entries[4];
[[noreturn]] void enter_program();
[[noreturn]] void enter_processor();
void handle_interrupt(uint32_t number);
}

namespace {

constexpr uint64_t kIoApic = 0xfec0'0000;
constexpr uint64_t kTrampoline = 0x30000;
constexpr unsigned kInterrupts = 4;

struct Gate {
  uint64_t low;
  uint64_t high;
};
Gate interrupt_table[kFirstVector + kInterrupts];
Handler handlers[kInterrupts];
void (*volatile processor_entry)();

void set_up_interrupts() {
  for (unsigned i = 0; i < kInterrupts; ++i) {
    const uint64_t entry = interrupt_entries[i];
    // A present 64-bit interrupt gate of segment 0x10 (Intel SDM vol. 3, §6.14.1).
    interrupt_table[kFirstVector + i] = {
        (entry & 0xffff) | 0x10ull << 16 | 0x8eull << 40 | (entry >> 16 & 0xffff) << 48, entry >> 32};
  }
  const struct [[gnu::packed]] {
    uint16_t limit = sizeof interrupt_table - 1;
    uint64_t base = reinterpret_cast<uint64_t>(interrupt_table);
  } pointer;
  asm volatile("lidt %0" ::"m"(pointer));
  // All lines of the two PICs off: they reach the processor as well as the IOAPIC.
  out8(0x21, 0xff);
  out8(0xa1, 0xff);
  at<uint32_t>(kApicSpurious) = 0x1ff;  // enabled
}

const char* command_line() { return reinterpret_cast<const char*>(uint64_t{at<uint32_t>(kBootInfo + 0x228)}); }

}  // namespace

void enter_program() {
  set_up_interrupts();
  program();
  power_off();
}

void enter_processor() {
  processor_entry();
  halt_forever();
  __builtin_unreachable();
}

void handle_interrupt(uint32_t number) {
  if (handlers[number]) handlers[number]();
  at<uint32_t>(kApicEnd) = 0;
}

void handle_with(unsigned number, Handler handler) { handlers[number] = handler; }

void route(uint32_t gsi, unsigned number, Trigger trigger) {
  const auto write = [](uint32_t index, uint32_t value) {
    at<uint32_t>(kIoApic) = index;
    at<uint32_t>(kIoApic + 0x10) = value;
  };
  write(0x11 + 2 * gsi, 0);  // to APIC 0
  write(0x10 + 2 * gsi, (kFirstVector + number) | static_cast<uint32_t>(trigger));
}

void start_processors(void (*entry)()) {
  processor_entry = entry;
  uint64_t page_tables;
  asm volatile("mov %%cr3, %0" : "=r"(page_tables));
  memcpy(trampoline_page_tables, &page_tables, sizeof(uint32_t));
  memcpy(reinterpret_cast<void*>(kTrampoline), trampoline, static_cast<size_t>(trampoline_end - trampoline));
  constexpr uint32_t all_others = 3 << 18, init = 0x4500, start = 0x4600;
  at<uint32_t>(kApicCommandLow) = all_others | init;
  at<uint32_t>(kApicCommandLow) = all_others | start | (kTrampoline >> 12);
}

void print(char c) { out8(kSerialPort, static_cast<uint8_t>(c)); }

void print(const char* text) {
  while (*text) print(*text++);
}

void print(uint64_t value) {
  char digits[24];
  unsigned count = 0;
  do digits[count++] = static_cast<char>('0' + value % 10);
  while (value /= 10);
  while (count) print(digits[--count]);
}

void print(Hex value) {
  print("0x");
  int shift = 60;
  while (shift > 0 && value.value >> shift == 0) shift -= 4;
  for (; shift >= 0; shift -= 4) print("0123456789abcdef"[value.value >> shift & 0xf]);
}

void power_off() {
  constexpr uint16_t soft_off = 5 << 10, sleep_enable = 1 << 13;
  out16(kPmControl, soft_off | sleep_enable);
  halt_forever();
  __builtin_unreachable();
}

const char* argument(const char* name) {
  for (const char* word = command_line(); *word;) {
    const char* wanted = name;
    while (*wanted && *word == *wanted) ++word, ++wanted;
    if (!*wanted && *word == '=') return word + 1;
    if (!*wanted && (*word == ' ' || !*word)) return word;
    while (*word && *word != ' ') ++word;
    while (*word == ' ') ++word;
  }
  return nullptr;
}

bool argument_is(const char* name, const char* value) {
  const char* given = argument(name);
  if (!given) return false;
  while (*value && *given == *value) ++given, ++value;
  return !*value && (*given == ' ' || !*given);
}

uint64_t number_argument(const char* name) {
  const char* digit = argument(name);
  uint64_t value = 0;
  while (digit && *digit >= '0' && *digit <= '9') value = value * 10 + static_cast<uint64_t>(*digit++ - '0');
  return value;
}

volatile char command;

namespace {

constexpr uint16_t kInterruptEnable = kSerialPort + 1, kIdentification = kSerialPort + 2,
                   kFifoControl = kSerialPort + 2, kModemControl = kSerialPort + 4, kLineStatus = kSerialPort + 5;

void receive_command() {
  while ((in8(kIdentification) & 1) == 0)
    while (in8(kLineStatus) & 1) command = static_cast<char>(in8(kSerialPort));
}

}  // namespace

void take_commands() {
  handle_with(1, receive_command);
  route(4, 1);
  out8(kFifoControl, 0x07);
  out8(kModemControl, 0x0b);  // DTR, RTS, OUT2
  out8(kInterruptEnable, 1);
}

char next_command() {
  sleep_until([] { return command != 0; });
  const char asked = command;
  command = 0;
  return asked;
}

bool same(uint64_t address, const char* bytes, unsigned size_bytes) {
  for (unsigned i = 0; i < size_bytes; ++i)
    if (at<char>(address + i) != bytes[i]) return false;
  return true;
}

uint64_t find(const char* bytes, unsigned size_bytes, uint64_t start) {
  for (uint64_t address = start; address < 0x10'0000; ++address)
    if (same(address, bytes, size_bytes)) return address;
  return 0;
}

uint32_t event_line(uint64_t device) {
  const uint64_t interrupt = find("\x89\x06\x00\x03\x01", 5, device);
  CHECK(interrupt != 0 && interrupt < device + 64);
  return at<uint32_t>(interrupt + 5);
}
