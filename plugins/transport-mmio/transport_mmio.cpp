// SPDX-License-Identifier: Apache-2.0
// The transport "mmio": each virtio device is a window of registers and an interrupt line, found through ACPI.
#include <cstddef>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "clone/sdk/plugin.hpp"
#include "prepared_slots.hpp"

namespace {

using clone_sdk::Error;
using clone_sdk::Options;
using clone_sdk::Result;
using transport_mmio::Place;
using transport_mmio::PreparedSlots;
using transport_mmio::Slot;

constexpr uint64_t kFeaturePackedRing = 1ull << 34;

class TransportMmio final : public clone_sdk::Transport {
 public:
  using Transport::Transport;
  static const clone_descriptor descriptor;

  Result<void> configure(const Options& options) override {
    if (!options.flag("packed")) ring_features_ &= ~kFeaturePackedRing;
    if (const auto slots = static_cast<uint32_t>(options.number("slots")))
      prepared_ = CLONE_TRY(PreparedSlots::create(host(), slots));
    return {};
  }
  Result<void> attach(const clone_virtio_attachment& attachment) override {
    const bool is_new =
        has_origin(CLONE_ORIGIN_SAVED, host()) && has_origin(CLONE_ORIGIN_BOOT, clone_sdk::Host(attachment.host));
    std::optional<Place> place;
    if (prepared_) {
      auto taken = prepared_->take();
      if (!taken.ok()) return std::move(taken).error().context(attachment.name);
      place = *taken;
    } else if (is_new) {
      return Error{
          std::string(attachment.name) +
          ": no slot was prepared for it: start the machine to be saved with --transport mmio,slots=N, as many as "
          "there shall be devices, up to " +
          std::to_string(transport_mmio::kMostPreparedSlots)};
    }
    slots_.push_back({CLONE_TRY(Slot::create(attachment, ring_features_, place)), is_new});
    return {};
  }
  Result<void> start() override {
    CLONE_TRY(resume());
    if (std::exchange(has_news_, false)) prepared_->tell();
    return {};
  }
  Result<void> quiesce() override { return {}; }
  Result<void> resume() override {
    for (const Attached& one : slots_) one.slot->wake();
    return {};
  }
  Result<void> reset_device() override {
    for (const Attached& one : slots_) one.slot->reset();
    return {};
  }
  Result<void> save(const clone_sdk::Writer& writer) override {
    for (const Attached& one : slots_) CLONE_TRY(one.slot->save(writer));
    return {};
  }
  Result<void> load(const clone_sdk::Reader& reader) override {
    for (Attached& one : slots_) {
      if (std::exchange(one.is_new, false))
        has_news_ = true;
      else
        CLONE_TRY(one.slot->load(reader));
    }
    return {};
  }

 private:
  struct Attached {
    std::unique_ptr<Slot> slot;
    bool is_new;  // the saved state knows nothing of it
  };

  static bool has_origin(uint32_t origin, const clone_sdk::Host& host) {
    const auto machine = host.service<clone_host_machine>(CLONE_HOST_MACHINE);
    return machine.ok() && (*machine)->size > offsetof(clone_host_machine, origin) && (*machine)->origin &&
           (*machine)->origin(host.raw()) == origin;
  }

  uint64_t ring_features_ = ~0ull;
  std::unique_ptr<PreparedSlots> prepared_;
  bool has_news_ = false;  // that the guest has not been told
  std::vector<Attached> slots_;
};

constexpr clone_option packed = clone_sdk::bool_option("packed", "on", "Offer packed rings besides split ones.");
constexpr clone_option slots = clone_sdk::number_option(
    "slots", "0",
    "Describe so many slots to the guest: those that the machine's devices leave free are for devices "
    "that are added to its forks. 0: none.",
    0, transport_mmio::kMostPreparedSlots);
constexpr const clone_option* options[] = {&packed, &slots, nullptr};

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
