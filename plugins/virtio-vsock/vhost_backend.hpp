// SPDX-License-Identifier: Apache-2.0
// vsock in the kernel: /dev/vhost-vsock serves the rx and tx queues, and streams are AF_VSOCK sockets of the host.
#pragma once

#include <mutex>
#include <vector>

#include "backend.hpp"

namespace virtio_vsock {

class VhostBackend final : public Backend {
 public:
  // An error where the device is not there, or where this process may not use ports below 1024.
  static clone_sdk::Result<std::unique_ptr<VhostBackend>> create(const clone_sdk::Host& host);
  ~VhostBackend() override;

  // False when another VM has it.
  clone_sdk::Result<bool> claim_cid(uint32_t cid);

  const char* name() const override { return "vhost"; }
  uint64_t ring_features(uint64_t offered) const override { return offered & kernel_features_; }
  clone_sdk::Result<void> activate(const clone_sdk::Activation& activation) override;
  void reset_queues() override;
  clone_sdk::Result<void> resume() override;
  clone_sdk::Result<void> quiesce() override;
  clone_sdk::Result<void> end_streams() override;
  clone_sdk::Result<clone_sdk::Fd> connect(uint32_t guest_port) override;

  // clone.vhost/1
  clone_sdk::Result<void> start_log();
  clone_sdk::Result<void> take_log(void (*mark)(void* context, uint64_t guest_address, uint64_t size_bytes),
                                   void* context);
  clone_sdk::Result<void> stop_log();
  clone_sdk::Result<void> memory_changed();

 private:
  explicit VhostBackend(const clone_sdk::Host& host) : host_(host) {}
  clone_sdk::Result<void> open();
  clone_sdk::Result<void> reopen();
  clone_sdk::Result<void> set_features();
  clone_sdk::Result<void> set_memory();
  clone_sdk::Result<void> set_log_base();
  clone_sdk::Result<void> set_addresses(uint32_t index);
  clone_sdk::Result<void> set_queue(uint32_t index);
  clone_sdk::Result<void> run();
  clone_sdk::Result<void> stop();
  template <typename Argument>
  clone_sdk::Result<void> call(const char* what, unsigned long request, Argument argument) const;

  const clone_sdk::Host& host_;
  const clone_host_memory* memory_ = nullptr;
  clone_sdk::Fd fd_;
  uint64_t kernel_features_ = 0;
  uint32_t cid_ = 0;

  std::mutex mutex_;  // a vCPU activates and resets, the main thread does the rest
  bool allowed_to_run_ = false;
  bool running_ = false;
  uint64_t features_ = 0;  // negotiated, of those the kernel has
  std::vector<clone_sdk::Queue> queues_;
  std::vector<uint64_t> log_;  // a bit for each page; empty while nothing is logged
};

}  // namespace virtio_vsock
