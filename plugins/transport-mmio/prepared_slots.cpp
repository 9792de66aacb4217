// SPDX-License-Identifier: Apache-2.0
// The prepared slots' ACPI description and the register behind it.
#include "prepared_slots.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "clone/sdk/aml.hpp"

namespace transport_mmio {
namespace {

namespace aml = clone_sdk::aml;
using aml::Code;

constexpr const char* kContainer = "SLTS";

Code indexed(char letter, unsigned index) {
  char name[5];
  std::snprintf(name, sizeof name, "%c%03u", letter, index % 1000);
  return name;
}

// ACPI 6.5 §20.2.5.2: a region of I/O ports, and a field of one bit for each slot.
Code taken_register(unsigned count) {
  const Code region = "\x5b\x80TAKN" + Code(1, '\x01') + '\x0b' + aml::word(kTakenPort) + aml::byte(4);
  Code field = "TAKN\x03";  // read as double words
  for (unsigned index = 0; index < count; ++index) field += indexed('T', index) + '\x01';
  return region + aml::sized("\x5b\x81", field);
}

Code slot_device(unsigned index, const Place& place) {
  // Present, enabled, shown and working (15), or nothing of that: Return (Multiply (taken, 15)).
  const Code status = '\xa4' + ('\x77' + indexed('T', index)) + aml::byte(15) + '\0';
  return aml::device(
      indexed('S', index).c_str(),
      aml::name("_HID", aml::text("LNRO0005")) + aml::name("_UID", aml::byte(static_cast<uint8_t>(index))) +
          aml::resources(aml::memory(static_cast<uint32_t>(place.base), kWindowBytes) + aml::interrupt(place.gsi)) +
          aml::method("_STA", 0, status));
}

}  // namespace

Result<std::unique_ptr<PreparedSlots>> PreparedSlots::create(const clone_sdk::Host& host, uint32_t count) {
  std::unique_ptr<PreparedSlots> slots(new PreparedSlots(host));
  if (auto result = slots->set_up(count); !result.ok())
    return std::move(result).error().context("slots=" + std::to_string(count));
  return slots;
}

Result<void> PreparedSlots::set_up(uint32_t count) {
  irq_ = CLONE_TRY(host_.service<clone_host_irq>(CLONE_HOST_IRQ));
  const auto* acpi = CLONE_TRY(host_.service<clone_host_acpi>(CLONE_HOST_ACPI));
  for (uint32_t index = 0; index < count; ++index) places_.push_back(CLONE_TRY(claim_place(host_)));
  event_gsi_ = CLONE_TRY(host_.allocate_gsi());
  claim_ = CLONE_TRY((host_.claim<&PreparedSlots::read, &PreparedSlots::write>(CLONE_BUS_PIO, kTakenPort, 4, this)));

  // ACPI0004: a container ("module device", §9.11).
  Code body = aml::name("_HID", aml::text("ACPI0004")) + taken_register(count);
  for (uint32_t index = 0; index < count; ++index) body += slot_device(index, places_[index]);
  const Code devices = aml::device(kContainer, body) + aml::event_device("SLTE", event_gsi_, kContainer, 0);
  clone_sdk::ErrorBuffer error;
  return error.result(acpi->add_aml(host_.raw(), devices.data(), devices.size(), error));
}

Result<Place> PreparedSlots::take() {
  if (taken_ == places_.size())
    return clone_sdk::Error{"slots=" + std::to_string(places_.size()) + ": no slot is left, allowed are up to " +
                            std::to_string(kMostPreparedSlots)};
  return places_[taken_++];
}

void PreparedSlots::tell() const { irq_->pulse(host_.raw(), event_gsi_); }

void PreparedSlots::read(uint64_t offset, void* data, uint32_t size_bytes) {
  const uint32_t bits = static_cast<uint32_t>((uint64_t{1} << taken_) - 1) >> (8 * offset);
  std::memcpy(data, &bits, std::min<size_t>(size_bytes, sizeof bits));
}

}  // namespace transport_mmio
