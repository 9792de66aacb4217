// SPDX-License-Identifier: Apache-2.0
// vsock without the kernel's help: streams of the guest are Unix sockets in the VM's directory (docs in README.md).
//
// One thread serves queues and sockets. All that is waited for is in one epoll set, and that set is what the host's
// loop watches, so that to pause is to stop one watch. mutex_ guards everything; other threads take it to activate,
// reset and connect, and wait for one round of the loop at most, which ends early for them.
#pragma once

#include <map>
#include <mutex>
#include <optional>
#include <string>

#include "backend.hpp"
#include "fair_mutex.hpp"

namespace virtio_vsock {

class UserBackend final : public Backend, private HostSide {
 public:
  // `directory` is that of the VM, -1 for none: then there are no sockets, and connect() is the only way in.
  static clone_sdk::Result<std::unique_ptr<UserBackend>> create(const clone_sdk::Host& host, uint32_t guest_cid,
                                                                int directory);
  ~UserBackend() override;

  const char* name() const override { return "user"; }
  uint64_t ring_features(uint64_t offered) const override { return offered; }
  clone_sdk::Result<void> activate(const clone_sdk::Activation& activation) override;
  void reset_queues() override;
  clone_sdk::Result<void> resume() override;
  clone_sdk::Result<void> quiesce() override;
  clone_sdk::Result<void> end_streams() override;
  clone_sdk::Result<clone_sdk::Fd> connect(uint32_t guest_port) override;
  const Counters* counters() const override { return &streams_.counters(); }

 private:
  class Source;
  class Signal;
  class Client;

  UserBackend(const clone_sdk::Host& host, uint32_t guest_cid, int directory);
  clone_sdk::Result<void> open();
  clone_sdk::Result<void> listen();

  // On the loop's thread.
  void serve();
  void accept_clients();
  void watch_listener(bool watched);
  void greet(Client& client);
  void forget(Client& client);
  void expire();

  // Under the mutex.
  void exchange_packets();
  bool take_packets();
  bool give_packets();
  void driver_broke();
  void wake() const;
  void arm_timer();
  bool active() const { return rx_ && tx_ && !broken_; }
  bool full(PortRange range) const { return greeting_.size() + streams_.counters().streams >= most_streams(range); }

  std::unique_ptr<Partner> dial(uint32_t host_port) override;
  void retire(std::unique_ptr<Partner> partner) override;
  std::chrono::milliseconds now() override;

  const clone_sdk::Host& host_;
  const int directory_;
  const clone_host_loop* loop_table_ = nullptr;
  clone_loop* loop_ = nullptr;
  clone_sdk::Fd epoll_, wake_, timer_, listener_;
  std::vector<std::unique_ptr<Source>> signals_;
  Source* listener_signal_ = nullptr;

  FairMutex mutex_;
  Streams streams_;
  clone_sdk::Queue rx_, tx_;
  clone_sdk::Chain chain_;
  std::vector<iovec> parts_;
  const clone_virtio_port* port_ = nullptr;
  bool broken_ = false;
  std::chrono::milliseconds timer_period_{0};             // 0 while it is not armed
  std::optional<std::chrono::milliseconds> still_since_;  // while it is quiesced, for which time stands still
  std::chrono::milliseconds still_for_{0};                // in all, before
  bool listener_rests_ = false;                           // there were no descriptors for what comes
  std::map<Client*, std::unique_ptr<Client>> greeting_;
  // Closed, but events of this round may still name them.
  std::vector<std::unique_ptr<Partner>> retired_;
  clone_sdk::Watch watch_;
};

}  // namespace virtio_vsock
