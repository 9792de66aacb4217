// SPDX-License-Identifier: Apache-2.0
// Between a keeper and those who start it or ask it: SOCK_SEQPACKET, one request and one answer on a connection.
#pragma once

namespace snapshot_memory {

// What a keeper finds open when it starts.
enum Descriptor : int {
  kListener = 0,  // bound to its name, not listening yet
  kMemory = 1,
  kState = 2,
  kStarter = 3,  // it says kReady there, and ends unless kPublished is the answer
  kDescriptors
};
constexpr char kReady = 'r';
constexpr char kPublished = 'p';

// A request is one of these bytes.
constexpr char kGive = 'g';  // answered with kGreeting, and with kMemory and kState beside it
constexpr char kEnd = 'e';   // answered with the connection's end, when nothing is held any more
constexpr char kGreeting[8] = {'C', 'L', 'O', 'N', 'E', 'K', 'P', '1'};

}  // namespace snapshot_memory
