// SPDX-License-Identifier: Apache-2.0
// What bare guests are written with: ports, the serial line, interrupts, the end. One processor unless said otherwise.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <initializer_list>

extern "C" void* memcpy(void* to, const void* from, size_t count);
extern "C" void* memset(void* at, int value, size_t count);

// What every program has; it returns to power off.
void program();

inline void out8(uint16_t port, uint8_t value) { asm volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
inline void out16(uint16_t port, uint16_t value) { asm volatile("outw %0, %1" ::"a"(value), "Nd"(port)); }
inline void out32(uint16_t port, uint32_t value) { asm volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }
inline uint8_t in8(uint16_t port) {
  uint8_t value;
  asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
  return value;
}
inline uint16_t in16(uint16_t port) {
  uint16_t value;
  asm volatile("inw %1, %0" : "=a"(value) : "Nd"(port));
  return value;
}
inline uint32_t in32(uint16_t port) {
  uint32_t value;
  asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
  return value;
}

template <typename T>
volatile T& at(uint64_t address) {
  return *reinterpret_cast<volatile T*>(address);
}

inline void full_fence() { asm volatile("lock orl $0, (%%rsp)" ::: "memory", "cc"); }
inline void pause() { asm volatile("pause" ::: "memory"); }
inline void halt_forever() {
  for (;;) asm volatile("cli; hlt");
}

constexpr uint16_t kSerialPort = 0x3f8;
constexpr uint16_t kPmStatus = 0x600;
constexpr uint16_t kPmEnable = 0x602;
constexpr uint16_t kPmControl = 0x604;
constexpr uint16_t kPmTimer = 0x608;
constexpr uint32_t kPmTimerHz = 3'579'545;
constexpr uint16_t kPmReset = 0x60c;
constexpr uint16_t kPowerButton = 1 << 8;
constexpr uint16_t kKeyboardCommand = 0x64;
constexpr uint64_t kBootInfo = 0x7000;

// print("disk ", 1, " holds ", Hex{value}, "\n")
struct Hex {
  uint64_t value;
};
void print(char c);
void print(const char* text);
void print(uint64_t value);
void print(Hex value);
inline void print(int value) { print(static_cast<uint64_t>(value)); }
inline void print(uint32_t value) { print(uint64_t{value}); }
template <typename... Rest>
requires(sizeof...(Rest) > 1) void print(Rest... rest) { (print(rest), ...); }

// A condition that does not hold is printed; the test then fails on the host.
#define CHECK(condition) \
  ((condition) ? true : (print("FAILED ", __FILE_NAME__, ":", __LINE__, ": " #condition "\n"), false))
#define CHECK_EQUAL(left, right)                                                                                     \
  do {                                                                                                               \
    const uint64_t left_value = (left), right_value = (right);                                                       \
    if (left_value != right_value)                                                                                   \
      print("FAILED ", __FILE_NAME__, ":", __LINE__, ": " #left " is ", Hex{left_value}, ", not ", Hex{right_value}, \
            "\n");                                                                                                   \
  } while (0)

[[noreturn]] void power_off();

// Of the command line: `name=value` or the word `name`; null when it is not there.
const char* argument(const char* name);
bool argument_is(const char* name, const char* value);
uint64_t number_argument(const char* name);

// --- Interrupts ---

constexpr uint8_t kFirstVector = 0x40;
// Interrupt 0 to 3 at vector kFirstVector and up. Called with interrupts off; the end of interrupt is told after it.
using Handler = void (*)();
void handle_with(unsigned number, Handler handler);
enum class Trigger : uint32_t { edge = 0, level = 1 << 15 };
// The IOAPIC's line `gsi` becomes interrupt `number` of the first processor.
void route(uint32_t gsi, unsigned number, Trigger trigger = Trigger::edge);
// Sleeps until the condition holds; what makes it true interrupts.
template <typename Condition>
void sleep_until(Condition condition) {
  for (;;) {
    asm volatile("cli" ::: "memory");
    if (condition()) break;
    asm volatile("sti; hlt" ::: "memory");
  }
  asm volatile("sti" ::: "memory");
}

// --- Commands ---

// The last letter that was typed and not taken; 0 for none.
extern volatile char command;
// From now on, by interrupt 1.
void take_commands();
// Sleeps until there is one.
char next_command();

// --- Tables ---

bool same(uint64_t address, const char* bytes, unsigned size_bytes);
// The first place below 1 MiB, from `start` on, that holds them; 0 for none.
uint64_t find(const char* bytes, unsigned size_bytes, uint64_t start = 0xe'0000);
// Of the event device whose name is at that address: the line of its extended interrupt (ACPI 6.5 §6.4.3.6), an edge.
uint32_t event_line(uint64_t device);

// --- Local APIC and other processors ---

constexpr uint64_t kLocalApic = 0xfee0'0000;
constexpr uint64_t kApicId = kLocalApic + 0x20;
constexpr uint64_t kApicEnd = kLocalApic + 0xb0;
constexpr uint64_t kApicSpurious = kLocalApic + 0xf0;
constexpr uint64_t kApicCommandLow = kLocalApic + 0x300;
constexpr uint64_t kApicCommandHigh = kLocalApic + 0x310;

// Wakes the others (INIT, SIPI); each calls `entry` on a stack of its own and then halts.
void start_processors(void (*entry)());

// Small, and always the same for the same seed.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint32_t next() {
    state_ = state_ * 6364136223846793005 + 1442695040888963407;
    return static_cast<uint32_t>(state_ >> 33);
  }
  uint32_t below(uint32_t limit) { return next() % limit; }

 private:
  uint64_t state_;
};
