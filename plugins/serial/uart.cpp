// SPDX-License-Identifier: Apache-2.0
// The registers of a 16550A UART.
#include "uart.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

namespace serial {
namespace {

// IER
constexpr uint8_t kReceivedEnable = 0x01;
constexpr uint8_t kTransmitterEnable = 0x02;
constexpr uint8_t kLineStatusEnable = 0x04;
constexpr uint8_t kModemStatusEnable = 0x08;
// IIR, the highest priority first
constexpr uint8_t kLineStatus = 0x06;
constexpr uint8_t kReceived = 0x04;
constexpr uint8_t kCharacterTimeout = 0x0c;  // less than the trigger level is there
constexpr uint8_t kTransmitterEmpty = 0x02;
constexpr uint8_t kModemStatus = 0x00;
constexpr uint8_t kNoInterrupt = 0x01;
constexpr uint8_t kFifosEnabled = 0xc0;
// FCR
constexpr uint8_t kFifoEnable = 0x01;
constexpr uint8_t kClearReceiver = 0x02;
constexpr uint8_t kTriggerLevel = 0xc0;
constexpr uint8_t kTriggerBytes[] = {1, 4, 8, 14};
// LCR
constexpr uint8_t kDivisorAccess = 0x80;
// MCR
constexpr uint8_t kDataTerminalReady = 0x01;
constexpr uint8_t kRequestToSend = 0x02;
constexpr uint8_t kOut1 = 0x04;
constexpr uint8_t kOut2 = 0x08;
constexpr uint8_t kLoopback = 0x10;
// LSR
constexpr uint8_t kDataReady = 0x01;
constexpr uint8_t kOverrun = 0x02;
constexpr uint8_t kTransmitterIdle = 0x60;  // holding register and shift register empty
constexpr uint8_t kLineErrors = 0x1e;
// MSR: the lines; the change of each is four bits lower.
constexpr uint8_t kClearToSend = 0x10;
constexpr uint8_t kDataSetReady = 0x20;
constexpr uint8_t kRing = 0x40;
constexpr uint8_t kCarrier = 0x80;

constexpr uint8_t kPollsToListen = 8;

}  // namespace

bool Uart::divisor_access() const { return (state_.line_control & kDivisorAccess) != 0; }
bool Uart::loopback() const { return (state_.modem_control & kLoopback) != 0; }
bool Uart::fifo_enabled() const { return (state_.fifo_control & kFifoEnable) != 0; }

uint8_t Uart::read(uint32_t offset) {
  if (offset == line_status) {
    if (state_.idle_polls < kPollsToListen) ++state_.idle_polls;
    const uint8_t errors = std::exchange(state_.line_errors, 0);
    return static_cast<uint8_t>(kTransmitterIdle | errors | (state_.received_count != 0 ? kDataReady : 0));
  }
  if (state_.idle_polls < kPollsToListen) state_.idle_polls = 0;
  switch (offset) {
    case data:
      return divisor_access() ? state_.divisor_low : take_received();
    case interrupt_enable:
      return divisor_access() ? state_.divisor_high : state_.interrupt_enable;
    case identification: {
      const uint8_t cause = identify();
      if (cause == kTransmitterEmpty) state_.transmitter_interrupt = 0;
      return cause | (fifo_enabled() ? kFifosEnabled : 0);
    }
    case line_control:
      return state_.line_control;
    case modem_control:
      return state_.modem_control;
    case modem_status:
      return modem_lines() | std::exchange(state_.modem_deltas, 0);
    default:
      return state_.scratch;
  }
}

std::optional<uint8_t> Uart::write(uint32_t offset, uint8_t value) {
  if (state_.idle_polls < kPollsToListen) state_.idle_polls = 0;
  switch (offset) {
    case data:
      if (divisor_access()) {
        state_.divisor_low = value;
        break;
      }
      state_.transmitter_interrupt = 1;  // it was sent before the guest can look
      if (!loopback()) return value;
      if (state_.received_count < kReceiveBytes)
        state_.received[state_.received_count++] = value;
      else
        state_.line_errors |= kOverrun;
      break;
    case interrupt_enable:
      if (divisor_access()) {
        state_.divisor_high = value;
        break;
      }
      // Enabling it with an empty transmitter interrupts at once; Linux calls a chip that does not do so broken.
      if ((value & ~state_.interrupt_enable & kTransmitterEnable) != 0) state_.transmitter_interrupt = 1;
      state_.interrupt_enable = value & 0x0f;
      break;
    case identification:
      write_fifo_control(value);
      break;
    case line_control:
      state_.line_control = value;
      break;
    case modem_control:
      write_modem_control(value);
      break;
    case scratch:
      state_.scratch = value;
      break;
    default:  // the status registers are read only
      break;
  }
  return std::nullopt;
}

size_t Uart::receive(std::span<const uint8_t> bytes) {
  if (!has_room()) return 0;
  const size_t count = std::min(bytes.size(), kReceiveBytes - state_.received_count);
  std::memcpy(state_.received + state_.received_count, bytes.data(), count);
  state_.received_count += static_cast<uint8_t>(count);
  return count;
}

bool Uart::listening() const {
  if (loopback()) return false;
  return (state_.interrupt_enable & kReceivedEnable) != 0 || (state_.modem_control & kRequestToSend) != 0 ||
         state_.idle_polls >= kPollsToListen;
}

bool Uart::interrupt() const { return (state_.modem_control & kOut2) != 0 && identify() != kNoInterrupt; }

bool Uart::set_state(const State& state) {
  const bool possible =
      state.interrupt_enable <= 0x0f && state.modem_control <= 0x1f && (state.line_errors & ~kLineErrors) == 0 &&
      state.modem_deltas <= 0x0f && (state.fifo_control & ~(kFifoEnable | kTriggerLevel)) == 0 &&
      state.transmitter_interrupt <= 1 && state.idle_polls <= kPollsToListen && state.received_count <= kReceiveBytes;
  if (possible) state_ = state;
  return possible;
}

uint8_t Uart::identify() const {
  const uint8_t enabled = state_.interrupt_enable;
  if ((enabled & kLineStatusEnable) != 0 && state_.line_errors != 0) return kLineStatus;
  if ((enabled & kReceivedEnable) != 0 && state_.received_count != 0) {
    const uint8_t trigger = kTriggerBytes[state_.fifo_control >> 6];
    return fifo_enabled() && state_.received_count < trigger ? kCharacterTimeout : kReceived;
  }
  if ((enabled & kTransmitterEnable) != 0 && state_.transmitter_interrupt != 0) return kTransmitterEmpty;
  if ((enabled & kModemStatusEnable) != 0 && state_.modem_deltas != 0) return kModemStatus;
  return kNoInterrupt;
}

// The other side is always there and ready; in loopback mode the four outputs of MCR come back (PC16550D §8.6.7).
uint8_t Uart::modem_lines() const {
  if (!loopback()) return kClearToSend | kDataSetReady | kCarrier;
  const uint8_t control = state_.modem_control;
  return static_cast<uint8_t>(((control & kRequestToSend) ? kClearToSend : 0) |
                              ((control & kDataTerminalReady) ? kDataSetReady : 0) | ((control & kOut1) ? kRing : 0) |
                              ((control & kOut2) ? kCarrier : 0));
}

void Uart::write_modem_control(uint8_t value) {
  const uint8_t before = modem_lines();
  state_.modem_control = value & 0x1f;
  const uint8_t now = modem_lines();
  uint8_t changed = before ^ now;
  if ((now & kRing) != 0) changed &= static_cast<uint8_t>(~kRing);  // only the end of a ring counts
  state_.modem_deltas |= changed >> 4;
}

void Uart::write_fifo_control(uint8_t value) {
  // Turning the FIFOs on or off empties them; the other bits count only while they are on.
  const bool switched = ((value ^ state_.fifo_control) & kFifoEnable) != 0;
  if (switched || (value & (kFifoEnable | kClearReceiver)) == (kFifoEnable | kClearReceiver)) state_.received_count = 0;
  state_.fifo_control = (value & kFifoEnable) != 0 ? value & (kFifoEnable | kTriggerLevel) : 0;
}

uint8_t Uart::take_received() {
  if (state_.received_count == 0) return 0;
  const uint8_t byte = state_.received[0];
  --state_.received_count;
  std::memmove(state_.received, state_.received + 1, state_.received_count);
  state_.received[state_.received_count] = 0;  // the same state is saved as the same bytes
  return byte;
}

}  // namespace serial
