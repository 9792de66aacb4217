// SPDX-License-Identifier: Apache-2.0
// The transport "mmio": each virtio device is a window of registers and an interrupt line, found through ACPI.
#include <memory>
#include <vector>

#include "clone/sdk/plugin.hpp"
#include "slot.hpp"

namespace {

using clone_sdk::Options;
using clone_sdk::Result;
using transport_mmio::Slot;

constexpr uint64_t kFeaturePackedRing = 1ull << 34;

class TransportMmio final : public clone_sdk::Transport {
 public:
  using Transport::Transport;
  static const clone_descriptor descriptor;

  Result<void> configure(const Options& options) override {
    if (!options.flag("packed")) ring_features_ &= ~kFeaturePackedRing;
    return {};
  }
  Result<void> attach(const clone_virtio_attachment& attachment) override {
    slots_.push_back(CLONE_TRY(Slot::create(attachment, ring_features_)));
    return {};
  }
  Result<void> start() override { return resume(); }
  Result<void> quiesce() override { return {}; }
  Result<void> resume() override {
    for (const auto& slot : slots_) slot->wake();
    return {};
  }
  Result<void> reset_device() override {
    for (const auto& slot : slots_) slot->reset();
    return {};
  }
  Result<void> save(const clone_sdk::Writer& writer) override {
    for (const auto& slot : slots_) CLONE_TRY(slot->save(writer));
    return {};
  }
  Result<void> load(const clone_sdk::Reader& reader) override {
    for (const auto& slot : slots_) CLONE_TRY(slot->load(reader));
    return {};
  }

 private:
  uint64_t ring_features_ = ~0ull;
  std::vector<std::unique_ptr<Slot>> slots_;
};

constexpr clone_option packed = clone_sdk::bool_option("packed", "on", "Offer packed rings besides split ones.");
constexpr const clone_option* options[] = {&packed, nullptr};

constexpr clone_descriptor TransportMmio::descriptor = {
    sizeof(clone_descriptor),
    CLONE_CAN_SAVE | CLONE_CAN_MIGRATE,
    "mmio",
    "Virtio devices as memory-mapped registers with an interrupt line each, described in ACPI.",
    options,
    "virtio_mmio"};

}  // namespace

CLONE_SDK_PLUGIN("transport-mmio", "1.0.0", "clone", "Apache-2.0", "Virtio over MMIO (virtio 1.2, modern only).",
                 CLONE_PROVIDES("transport", "mmio", ""))
CLONE_SDK_TRANSPORTS(TransportMmio)
