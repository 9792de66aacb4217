// SPDX-License-Identifier: Apache-2.0
// What carries the guest's packets: the kernel's vhost-vsock, or this process and sockets of the host's.
#pragma once

#include "clone/abi/vhost.h"
#include "clone/sdk/fd.hpp"
#include "clone/sdk/virtio.hpp"
#include "streams.hpp"

namespace virtio_vsock {

constexpr uint32_t kRxQueue = 0;  // virtio 1.2 §5.10.2; named as the driver sees them
constexpr uint32_t kTxQueue = 1;
constexpr uint32_t kEventQueue = 2;
constexpr uint32_t kQueueCount = 3;

// Threads: those of a virtio device (clone/abi/virtio.h); what is not named there is [control].
class Backend {
 public:
  virtual ~Backend() = default;
  virtual const char* name() const = 0;
  virtual uint64_t ring_features(uint64_t offered) const = 0;
  virtual clone_sdk::Result<void> activate(const clone_sdk::Activation& activation) = 0;
  virtual void reset_queues() = 0;
  virtual clone_sdk::Result<void> resume() = 0;
  virtual clone_sdk::Result<void> quiesce() = 0;
  // &quiesced or before start(). Another state was loaded: the streams that there were end on the host.
  virtual clone_sdk::Result<void> end_streams() = 0;
  // As clone_vsock.connect.
  virtual clone_sdk::Result<clone_sdk::Fd> connect(uint32_t guest_port) = 0;
  // Null where the kernel does not tell.
  virtual const Counters* counters() const { return nullptr; }
};

}  // namespace virtio_vsock
