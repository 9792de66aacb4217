// SPDX-License-Identifier: Apache-2.0
// vmgenid: a generation id in the identity page, whose change a Generic Event Device tells (ACPI 6.5 §5.6.9).
#include "vmgenid.hpp"

#include <sys/random.h>

#include <cstddef>
#include <string>

#include "clone/sdk/options.hpp"

namespace pc_platform {
namespace {

using clone_sdk::Error;
using clone_sdk::ErrorBuffer;
using clone_sdk::Result;

// docs/fork.md tells guests of it.
struct IdentityPage {
  char magic[8] = {'C', 'L', 'O', 'N', 'E', 'I', 'D', '\0'};
  uint32_t version = 1;
  uint32_t size_bytes = sizeof(IdentityPage);
  uint8_t generation_id[16];
  uint64_t generation;
  uint8_t seed[32];
  char name[64] = {};
};
constexpr uint32_t kGenerationId = CLONE_IDENTITY_PAGE + offsetof(IdentityPage, generation_id);
static_assert(sizeof(IdentityPage) == 136 && kGenerationId % 8 == 0);

// A PC's for its coprocessor: given to nobody who asks for any, and in a fork the one that the guest was told of.
constexpr uint32_t kGsi = 13;

struct SavedState {
  uint64_t generation;
};
constexpr uint32_t kStateVersion = 1;

// AML (ACPI 6.5 §20.2), as much of it as two devices take.
using Aml = std::string;

// PkgLength counts itself; in two bytes it reaches 4095.
Aml sized(const Aml& opcode, const Aml& body) {
  const size_t length = body.size() + 2;
  return opcode + static_cast<char>(0x40 | (length & 0xf)) + static_cast<char>(length >> 4) + body;
}
Aml dword(uint32_t value) {
  return {static_cast<char>(value), static_cast<char>(value >> 8), static_cast<char>(value >> 16),
          static_cast<char>(value >> 24)};
}
Aml text(const char* value) { return std::string("\x0d") + value + '\0'; }
Aml name(const char* path, const Aml& value) { return std::string("\x08") + path + value; }
Aml device(const char* path, const Aml& body) { return sized("\x5b\x82", path + body); }

Aml generation_counter() {
  const Aml zero(1, '\0');
  const Aml address = sized("\x12", "\x02\x0c" + dword(kGenerationId) + zero);  // Package (2) {low half, high half}
  return device("VGEN", name("_HID", text("CLNE0001")) + name("_CID", text("VM_Gen_Counter")) +
                            name("_DDN", text("VM_Gen_Counter")) + name("ADDR", address));
}

Aml event_device() {
  // §6.4.3.6: an extended interrupt, of a consumer, edge-triggered and active high; then the end tag.
  const Aml interrupt = Aml("\x89\x06\x00\x03\x01", 5) + dword(kGsi) + Aml("\x79\x00", 2);
  const Aml resources = sized("\x11", Aml("\x0a") + static_cast<char>(interrupt.size()) + interrupt);
  const Aml event =
      sized("\x14", Aml("_EVT\x09") + "\x86VGEN\x0a\x80");  // one argument, serialized: Notify (VGEN, 0x80)
  return device("VGED", name("_HID", text("ACPI0013")) + name("_UID", text("VGEN")) + name("_CRS", resources) + event);
}

template <size_t size_bytes>
Result<void> fill_with_random(uint8_t (&bytes)[size_bytes]) {
  if (::getrandom(bytes, size_bytes, 0) != ssize_t{size_bytes}) return clone_sdk::errno_error("getrandom");
  return {};
}

constexpr const clone_option* options[] = {nullptr};

}  // namespace

constexpr clone_descriptor Vmgenid::descriptor = {
    sizeof(clone_descriptor),
    CLONE_CAN_SAVE | CLONE_CAN_MIGRATE,
    "vmgenid",
    "Tells the guest that it goes on as another machine, by a generation id and the identity page.",
    options,
    ""};

Result<void> Vmgenid::configure(const clone_sdk::Options&) {
  memory_ = CLONE_TRY(host().service<clone_host_memory>(CLONE_HOST_MEMORY));
  machine_ = CLONE_TRY(host().service<clone_host_machine>(CLONE_HOST_MACHINE));
  irq_ = CLONE_TRY(host().service<clone_host_irq>(CLONE_HOST_IRQ));
  const auto* acpi = CLONE_TRY(host().service<clone_host_acpi>(CLONE_HOST_ACPI));
  CLONE_TRY(host().allocate_gsi(kGsi));
  const Aml devices = generation_counter() + event_device();
  ErrorBuffer error;
  return error.result(acpi->add_aml(host().raw(), devices.data(), devices.size(), error));
}

Result<void> Vmgenid::start() {
  if (std::exchange(begun_, true)) return {};
  ++generation_;
  CLONE_TRY(write_page());
  if (generation_ > 1) irq_->pulse(host().raw(), kGsi);
  return {};
}

Result<void> Vmgenid::write_page() {
  IdentityPage page;
  page.generation = generation_;
  CLONE_TRY(fill_with_random(page.generation_id));
  CLONE_TRY(fill_with_random(page.seed));
  if (machine_->size > offsetof(clone_host_machine, name))
    std::string(machine_->name(host().raw())).copy(page.name, sizeof page.name - 1);
  if (memory_->write(host().raw(), CLONE_IDENTITY_PAGE, &page, sizeof page) != CLONE_OK)
    return Error{"the guest has no memory for the identity page", 0, CLONE_ERR_GUEST};
  return {};
}

Result<void> Vmgenid::reset_device() {
  generation_ = 0;
  begun_ = false;
  return {};
}

Result<void> Vmgenid::save(const clone_sdk::Writer& writer) {
  return writer.put("generation", kStateVersion, SavedState{generation_});
}

Result<void> Vmgenid::load(const clone_sdk::Reader& reader) {
  const auto state = CLONE_TRY(reader.get<SavedState>("generation", kStateVersion));
  if (state.generation == 0 || state.generation == UINT64_MAX)
    return Error{"section generation holds an impossible number", 0, CLONE_ERR_CORRUPT};
  generation_ = state.generation;
  begun_ = false;
  return {};
}

}  // namespace pc_platform
