// SPDX-License-Identifier: Apache-2.0
// The registers of a 16550A UART (National Semiconductor PC16550D), apart from ports, interrupts and consoles.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include <span>

namespace serial {

constexpr uint32_t kRegisterCount = 8;

// Sends at once, so that the transmitter is always empty; receives without loss: whoever feeds it asks for room first.
class Uart {
 public:
  static constexpr size_t kReceiveBytes = 64;  // more than the chip's 16: fewer turns with the host

  // Every byte of it is state, as it is saved.
  struct State {
    uint8_t interrupt_enable = 0;
    uint8_t fifo_control = 0;
    uint8_t line_control = 0;
    uint8_t modem_control = 0;
    uint8_t line_errors = 0;   // of LSR
    uint8_t modem_deltas = 0;  // of MSR
    uint8_t scratch = 0;
    uint8_t divisor_low = 12;  // 9600 bits a second
    uint8_t divisor_high = 0;
    uint8_t transmitter_interrupt = 0;  // 1: the transmitter became empty and IIR has not told it yet
    uint8_t idle_polls = 0;             // reads of LSR with nothing between them
    uint8_t received_count = 0;
    uint8_t received[kReceiveBytes] = {};
  };

  uint8_t read(uint32_t offset);
  // Gives the byte that the guest sends with it, if it does.
  std::optional<uint8_t> write(uint32_t offset, uint8_t value);

  // Takes what there is room for; nothing unless the guest listens.
  size_t receive(std::span<const uint8_t> bytes);
  // Somebody takes notice of what is received: the driver raised RTS or enabled the interrupt, or polls LSR. Before
  // that a driver that starts would throw away what was typed ahead.
  bool listening() const;
  bool has_room() const { return listening() && state_.received_count < kReceiveBytes; }

  // The interrupt line, behind OUT2 as on every PC.
  bool interrupt() const;

  const State& state() const { return state_; }
  // False, and nothing changed, for a state that no guest can bring about.
  bool set_state(const State& state);

 private:
  enum Register : uint32_t {
    data = 0,
    interrupt_enable,
    identification,
    line_control,
    modem_control,
    line_status,
    modem_status,
    scratch
  };

  bool divisor_access() const;
  bool loopback() const;
  bool fifo_enabled() const;
  uint8_t identify() const;
  uint8_t modem_lines() const;
  void write_modem_control(uint8_t value);
  void write_fifo_control(uint8_t value);
  uint8_t take_received();

  State state_;
};

}  // namespace serial
