// SPDX-License-Identifier: Apache-2.0
// Which interrupt each GSI raises: the lines of PIC and IOAPIC below 24, one message (MSI) each from 24 on.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>

#include "kvm/kvm.hpp"
#include "util/result.hpp"

namespace vmm {

constexpr uint32_t kIrqLines = KVM_IOAPIC_NUM_PINS;

// A change costs one KVM_SET_GSI_ROUTING (the kernel waits for its readers), none when it changes nothing.
class GsiRouting {
 public:
  // Outlived by `vm`, which has its irqchip.
  explicit GsiRouting(const KvmVm& vm);
  GsiRouting(const GsiRouting&) = delete;
  GsiRouting& operator=(const GsiRouting&) = delete;

  // A GSI for one message, which goes nowhere yet. [any]
  Result<uint32_t> allocate();
  // The message of an allocated GSI; none while it is masked: interrupts then are dropped. KVM looks for the route of
  // an irqfd's signal a moment later where it found none, so one that comes just before a message is set may pass.
  // [any]
  Result<void> set(uint32_t gsi, std::optional<MsiMessage> message);
  Result<void> free(uint32_t gsi);

  // While one lives, changes are only noted; commit() makes them in one go. One that goes without commit() tries to,
  // and logs what fails.
  class Batch {
   public:
    explicit Batch(GsiRouting& routing);
    ~Batch();
    Batch(const Batch&) = delete;
    Batch& operator=(const Batch&) = delete;
    Result<void> commit();

   private:
    GsiRouting* routing_;
  };

 private:
  Result<void> apply();

  const KvmVm& vm_;
  const uint32_t limit_;
  std::mutex mutex_;
  std::map<uint32_t, std::optional<MsiMessage>> messages_;
  uint32_t batches_ = 0;
  bool changed_ = false;
};

}  // namespace vmm
