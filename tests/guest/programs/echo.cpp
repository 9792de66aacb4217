// SPDX-License-Identifier: Apache-2.0
// The serial port by interrupts both ways: gives back what comes in, in capitals, until a '.'.
#include "guest.hpp"

namespace {

constexpr uint16_t kInterruptEnable = kSerialPort + 1, kIdentification = kSerialPort + 2,
                   kFifoControl = kSerialPort + 2, kLineControl = kSerialPort + 3, kModemControl = kSerialPort + 4,
                   kLineStatus = kSerialPort + 5;
constexpr uint8_t kReceived = 1, kTransmitterEmpty = 2;

volatile char queue[256];
volatile uint8_t head, tail;  // of the queue: what is between is to be sent
volatile bool seen_end;
volatile unsigned received_interrupts, sent_interrupts;

void send_next() {
  if (head == tail) return;
  out8(kSerialPort, static_cast<uint8_t>(queue[tail]));
  tail = static_cast<uint8_t>(tail + 1);
}

void serve() {
  for (;;) {
    const uint8_t cause = in8(kIdentification) & 0x0f;
    if (cause == 0x04 || cause == 0x0c) {
      received_interrupts = received_interrupts + 1;
      const bool idle = head == tail;
      while (in8(kLineStatus) & 1) {
        auto c = static_cast<char>(in8(kSerialPort));
        if (c >= 'a' && c <= 'z') c = static_cast<char>(c - 'a' + 'A');
        if (c == '.') seen_end = true;
        queue[head] = c;
        head = static_cast<uint8_t>(head + 1);
      }
      // The first byte starts the transmitter; its interrupts bring the others.
      if (idle) send_next();
    } else if (cause == 0x02) {
      sent_interrupts = sent_interrupts + 1;
      send_next();
    } else {
      return;
    }
  }
}

}  // namespace

void program() {
  out8(kLineControl, 0x03);
  out8(kFifoControl, 0x07);
  out8(kModemControl, 0x0b);  // DTR, RTS, OUT2
  handle_with(0, serve);
  route(4, 0);
  print("ready\n");
  out8(kInterruptEnable, kReceived | kTransmitterEmpty);
  sleep_until([] { return seen_end && head == tail; });
  out8(kInterruptEnable, 0);
  CHECK(received_interrupts > 0);
  CHECK(sent_interrupts > 10);
  print("\ndone\n");
}
