// SPDX-License-Identifier: Apache-2.0
// vmgenid: a generation id in the identity page, whose change a Generic Event Device tells (ACPI 6.5 §5.6.9).
#include "vmgenid.hpp"

#include <sys/random.h>

#include <cstddef>
#include <string>

#include "clone/sdk/aml.hpp"
#include "clone/sdk/options.hpp"

namespace pc_platform {
namespace {

using clone_sdk::Error;
using clone_sdk::ErrorBuffer;
using clone_sdk::Result;
namespace aml = clone_sdk::aml;

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
constexpr uint16_t kGenerationId = CLONE_IDENTITY_PAGE + offsetof(IdentityPage, generation_id);
static_assert(sizeof(IdentityPage) == 136 && kGenerationId % 8 == 0);

// A PC's for its coprocessor: given to nobody who asks for any, and in a fork the one that the guest was told of.
constexpr uint32_t kGsi = 13;

struct SavedState {
  uint64_t generation;
};
constexpr uint32_t kStateVersion = 1;

aml::Code generation_counter() {
  const aml::Code zero(1, '\0');
  const aml::Code address = aml::sized("\x12", "\x02\x0b" + aml::word(kGenerationId) + zero);  // {low half, high half}
  return aml::device("VGEN", aml::name("_HID", aml::text("CLNE0001")) + aml::name("_CID", aml::text("VM_Gen_Counter")) +
                                 aml::name("_DDN", aml::text("VM_Gen_Counter")) + aml::name("ADDR", address));
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
  const aml::Code devices = generation_counter() + aml::event_device("VGED", kGsi, "VGEN", 0x80);
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
