// SPDX-License-Identifier: Apache-2.0
// The host's services for plugins: C tables over the machine's parts.
#include "clone/abi/host.h"

#include "clone/abi/acpi.h"
#include "clone/abi/bus.h"
#include "clone/abi/irq.h"
#include "clone/abi/machine.h"
#include "clone/abi/memory.h"
#include "clone/sdk/error.hpp"
#include "console/console_hub.hpp"
#include "control/control_server.hpp"
#include "loop/loop_service.hpp"
#include "plugin/host_context.hpp"
#include "util/log.hpp"
#include "virtqueue/virtqueue_service.hpp"
#include "vm/machine.hpp"

namespace vmm {
namespace {

using clone_sdk::guarded;

GuestMemory& memory_of(const clone_host* host) { return *context_of(host).memory; }
Machine& machine_of(const clone_host* host) { return *context_of(host).machine; }
// Only instances have a machine.
Instance& instance_of(const clone_host* host) { return static_cast<Instance&>(context_of(host)); }

// --- clone.host-log/1

void host_log(const clone_host* host, uint32_t level, const char* message) noexcept {
  log(level > CLONE_LOG_DEBUG ? LogLevel::debug : static_cast<LogLevel>(level),
      std::string(host->name) + ": " + message);
}

constexpr clone_host_log kLog = {sizeof kLog, 0, host_log};

// --- clone.host-publish/1

clone_status publish(const clone_host* host, const char* id, const void* table, clone_err* err) noexcept {
  return guarded(err, [&]() -> Result<void> {
    const auto [entry, added] = machine_of(host).published().try_emplace(id, Machine::Published{host->name, table});
    if (!added) return Error{std::string(id) + " is offered by " + entry->second.owner, 0, CLONE_ERR_BUSY};
    return {};
  });
}

constexpr clone_host_publish kPublish = {sizeof kPublish, 0, publish};

// --- clone.host-memory/1

constexpr clone_host_memory kMemory = {
    sizeof kMemory,
    0,
    [](const clone_host* host) noexcept { return static_cast<uint32_t>(memory_of(host).regions().size()); },
    [](const clone_host* host, uint32_t index, clone_memory_region* region) noexcept -> clone_status {
      const auto regions = memory_of(host).regions();
      if (index >= regions.size() || region->size < sizeof *region) return CLONE_ERR_INVALID;
      uint64_t fd_offset = 0;
      for (uint32_t i = 0; i < index; ++i) fd_offset += regions[i].size_bytes;
      region->fd = memory_of(host).memfd();
      region->fd_offset = fd_offset;
      region->guest_address = regions[index].start.value;
      region->size_bytes = regions[index].size_bytes;
      region->host_address = regions[index].host;
      return CLONE_OK;
    },
    [](const clone_host* host, uint64_t address, void* into, uint64_t size_bytes) noexcept -> clone_status {
      return memory_of(host).read(GuestAddress{address}, into, size_bytes) ? CLONE_OK : CLONE_ERR_GUEST;
    },
    [](const clone_host* host, uint64_t address, const void* from, uint64_t size_bytes) noexcept -> clone_status {
      return memory_of(host).write(GuestAddress{address}, from, size_bytes) ? CLONE_OK : CLONE_ERR_GUEST;
    },
    [](const clone_host* host, uint64_t address, uint64_t size_bytes) noexcept -> void* {
      return memory_of(host).slice(GuestAddress{address}, size_bytes);
    },
    [](const clone_host* host, uint64_t address, uint64_t size_bytes) noexcept {
      memory_of(host).mark_dirty(GuestAddress{address}, size_bytes);
    },
    [](const clone_host* host, uint64_t address, uint64_t size_bytes) noexcept -> clone_status {
      return memory_of(host).discard(GuestAddress{address}, size_bytes) ? CLONE_OK : CLONE_ERR_GUEST;
    },
};

// --- clone.host-bus/1

clone_status claim(const clone_host* host, uint32_t space, uint64_t start, uint64_t size_bytes,
                   const clone_bus_handler* handler, void* context, uint64_t* id, clone_err* err) noexcept {
  return guarded(err, [&]() -> Result<void> {
    if (space > CLONE_BUS_MMIO || handler->size < sizeof *handler || !handler->read || !handler->write)
      return Error{"a bus claim needs a space and two handlers"};
    Instance& instance = instance_of(host);
    Bus::Claim claimed = TRY(instance.machine->bus(static_cast<BusSpace>(space))
                                 .claim(start, size_bytes, host->name, {handler->read, handler->write, context}));
    const std::lock_guard lock(instance.mutex);
    *id = instance.next_claim++;
    instance.claims.emplace(*id, std::move(claimed));
    return {};
  });
}

void release(const clone_host* host, uint64_t id) noexcept {
  Instance& instance = instance_of(host);
  Bus::Claim claimed;
  {
    const std::lock_guard lock(instance.mutex);
    const auto found = instance.claims.find(id);
    if (found == instance.claims.end()) return;
    claimed = std::move(found->second);
    instance.claims.erase(found);
  }
}

clone_status allocate_mmio(const clone_host* host, uint64_t size_bytes, uint64_t alignment, uint64_t* start,
                           clone_err* err) noexcept {
  return guarded(err, [&]() -> Result<void> {
    Instance& instance = instance_of(host);
    if (alignment == 0 || (alignment & (alignment - 1)) != 0) return Error{"the alignment is not a power of two"};
    WindowLease lease = TRY(instance.machine->window_pool().allocate(host->name, size_bytes, alignment));
    *start = lease.value().value;
    instance.windows.push_back(std::move(lease));
    return {};
  });
}

// Adds or removes, by the member function.
template <Result<void> (KvmVm::*change)(const IoEvent&, int) const>
clone_status ioeventfd(const clone_host* host, uint32_t space, uint64_t address, uint32_t size_bytes, uint32_t match,
                       uint64_t value, int32_t fd, clone_err* err) noexcept {
  return guarded(err, [&]() -> Result<void> {
    if (space > CLONE_BUS_MMIO) return Error{"an ioeventfd needs a space"};
    if (!machine_of(host).vm().is_open()) return {};  // gone with the VM
    const IoEvent event{static_cast<BusSpace>(space), address, size_bytes, match ? std::optional(value) : std::nullopt};
    return (machine_of(host).vm().*change)(event, fd);
  });
}

constexpr clone_host_bus kBus = {
    sizeof kBus, 0, claim, release, allocate_mmio, ioeventfd<&KvmVm::add_io_event>, ioeventfd<&KvmVm::remove_io_event>};

// --- clone.host-irq/1

clone_status allocate_gsi(const clone_host* host, uint32_t wanted, uint32_t* gsi, clone_err* err) noexcept {
  return guarded(err, [&]() -> Result<void> {
    Instance& instance = instance_of(host);
    NumberLease lease = TRY(instance.machine->gsi_pool().allocate(
        host->name, wanted == CLONE_GSI_ANY ? std::nullopt : std::optional(wanted)));
    *gsi = lease.value();
    instance.gsis.push_back(std::move(lease));
    return {};
  });
}

clone_status set_level(const clone_host* host, uint32_t gsi, uint32_t level) noexcept {
  return machine_of(host).vm().set_irq_level(gsi, level != 0).ok() ? CLONE_OK : CLONE_ERR_SYSTEM;
}

clone_status pulse(const clone_host* host, uint32_t gsi) noexcept {
  return machine_of(host).vm().pulse_irq(gsi).ok() ? CLONE_OK : CLONE_ERR_SYSTEM;
}

constexpr clone_host_irq kIrq = {
    sizeof kIrq,
    0,
    allocate_gsi,
    set_level,
    pulse,
    [](const clone_host* host, uint32_t gsi, int32_t fd, int32_t resample_fd, clone_err* err) noexcept {
      return guarded(err, [&] { return machine_of(host).vm().add_irqfd(fd, gsi, resample_fd); });
    },
    [](const clone_host* host, uint32_t gsi, int32_t fd, clone_err* err) noexcept {
      return guarded(err, [&]() -> Result<void> {
        const KvmVm& vm = machine_of(host).vm();
        return vm.is_open() ? vm.remove_irqfd(fd, gsi) : Result<void>();
      });
    },
    [](const clone_host* host, uint32_t* gsi, clone_err* err) noexcept {
      return guarded(err, [&]() -> Result<void> {
        *gsi = TRY(machine_of(host).gsi_routing().allocate());
        return {};
      });
    },
    [](const clone_host* host, uint32_t gsi, uint64_t address, uint32_t data, uint32_t masked,
       clone_err* err) noexcept {
      return guarded(err, [&] {
        return machine_of(host).gsi_routing().set(gsi,
                                                  masked ? std::nullopt : std::optional(MsiMessage{address, data}));
      });
    },
    [](const clone_host* host, uint32_t gsi) noexcept { (void)machine_of(host).gsi_routing().free(gsi); },
    [](const clone_host* host, uint64_t address, uint32_t data) noexcept -> clone_status {
      return machine_of(host).vm().signal_msi({address, data}).ok() ? CLONE_OK : CLONE_ERR_SYSTEM;
    },
};

// --- clone.host-machine/1

void request(const clone_host* host, uint32_t what) noexcept {
  Machine& machine = machine_of(host);
  switch (what) {
    case CLONE_MACHINE_POWER_OFF:
      machine.end(Ending::power_off);
      break;
    case CLONE_MACHINE_RESET:
      machine.end(Ending::reset);
      break;
    case CLONE_MACHINE_PANIC:
      machine.end(Ending::crashed, "the guest reported a panic");
      break;
    default:
      break;
  }
}

clone_status on_power_button(const clone_host* host, clone_status (*pressed)(void*), void* context,
                             clone_err* err) noexcept {
  return guarded(err, [&]() -> Result<void> {
    Machine::PowerButton& button = machine_of(host).power_button();
    if (button.pressed) return Error{"the power button belongs to " + button.owner, 0, CLONE_ERR_BUSY};
    button = {pressed, context, host->name};
    return {};
  });
}

constexpr clone_host_machine kMachine = {
    sizeof kMachine,
    0,
    [](const clone_host* host) noexcept { return machine_of(host).plan().vcpus; },
    [](const clone_host* host) noexcept { return memory_of(host).size_bytes(); },
    request,
    on_power_button,
    [](const clone_host* host) noexcept { return machine_of(host).plan().name.c_str(); },
    [](const clone_host* host) noexcept {
      return machine_of(host).is_fork() && !instance_of(host).is_new ? CLONE_ORIGIN_SAVED : CLONE_ORIGIN_BOOT;
    },
};

// --- clone.host-acpi/1

Result<AcpiNode::Resource> acpi_resource(const clone_acpi_resource& given) {
  switch (given.kind) {
    case CLONE_ACPI_IO:
      if (given.start > 0xffff || given.length == 0 || given.length > 0x10000 - given.start)
        return Error{"an ACPI node's ports lie outside 0 to 0xffff"};
      return AcpiNode::Resource(
          AcpiNode::Ports{static_cast<uint16_t>(given.start), static_cast<uint32_t>(given.length)});
    case CLONE_ACPI_MEMORY:
      return AcpiNode::Resource(AcpiNode::Memory{{given.start}, given.length});
    case CLONE_ACPI_IRQ:
      return AcpiNode::Resource(AcpiNode::Interrupt{
          static_cast<uint32_t>(given.start),
          given.flags & CLONE_ACPI_IRQ_LEVEL ? aml::Trigger::level : aml::Trigger::edge,
          given.flags & CLONE_ACPI_IRQ_ACTIVE_LOW ? aml::Polarity::active_low : aml::Polarity::active_high,
          given.flags & CLONE_ACPI_IRQ_SHARED ? aml::Sharing::shared : aml::Sharing::exclusive});
    default:
      return Error{"an ACPI node has a resource of the unknown kind " + std::to_string(given.kind)};
  }
}

clone_status add_node(const clone_host* host, const clone_acpi_node* given, clone_err* err) noexcept {
  return guarded(err, [&]() -> Result<void> {
    auto& nodes = machine_of(host).acpi().nodes;
    AcpiNode node;
    node.hid = given->hid ? given->hid : "";
    node.cid = given->cid ? given->cid : "";
    uint64_t uid = 0;
    for (const AcpiNode& other : nodes) uid += other.hid == node.hid;
    node.uid = uid;
    for (uint32_t i = 0; i < given->resource_count; ++i)
      node.resources.push_back(TRY(acpi_resource(given->resources[i])));
    nodes.push_back(std::move(node));
    return {};
  });
}

clone_status add_aml(const clone_host* host, const void* aml, uint64_t size_bytes, clone_err* err) noexcept {
  return guarded(err, [&]() -> Result<void> {
    const auto* bytes = static_cast<const aml::Bytes::value_type*>(aml);
    machine_of(host).acpi().aml.emplace_back(bytes, bytes + size_bytes);
    return {};
  });
}

clone_status set_power(const clone_host* host, const clone_acpi_power* power, clone_err* err) noexcept {
  return guarded(err, [&]() -> Result<void> {
    AcpiConfig& config = machine_of(host).acpi().config;
    if (config.pm) return Error{"the machine has its power registers already", 0, CLONE_ERR_BUSY};
    AcpiPmBlock block;
    block.event_port = power->event_port;
    block.control_port = power->control_port;
    block.timer_port = power->timer_port;
    block.timer_bits = 32;
    block.sci_gsi = power->sci_gsi;
    config.pm = block;
    if (power->reset_port != 0) config.reset = AcpiReset{power->reset_port, power->reset_value};
    config.s5_sleep_type = power->sleep_type_s5;
    return {};
  });
}

constexpr clone_host_acpi kAcpi = {
    sizeof kAcpi,
    0,
    add_node,
    add_aml,
    set_power,
    [](const clone_host* host, uint32_t flags, clone_err*) noexcept -> clone_status {
      AcpiConfig& config = machine_of(host).acpi().config;
      config.has_i8042 |= (flags & CLONE_ACPI_LEGACY_I8042) != 0;
      config.has_rtc |= (flags & CLONE_ACPI_LEGACY_RTC) != 0;
      return CLONE_OK;
    },
    [](const clone_host* host, uint64_t base, uint32_t first_bus, uint32_t last_bus, clone_err* err) noexcept {
      return guarded(err, [&]() -> Result<void> {
        if (first_bus != 0 || last_bus > 255) return Error{"an ECAM window is for buses 0 to at most 255"};
        machine_of(host).acpi().config.pci = AcpiConfig::PciConfigWindow{{base}, last_bus + 1};
        return {};
      });
    },
};

const void* find_service(const clone_host* host, const char* raw_id) noexcept {
  const HostContext& context = context_of(host);
  const std::string_view id = raw_id;
  if (id == CLONE_HOST_LOG) return &kLog;
  if (id == CLONE_HOST_MEMORY) return context.memory ? &kMemory : nullptr;
  if (id == CLONE_VIRTQUEUE) return context.memory ? virtqueue_service() : nullptr;
  if (id == CLONE_HOST_LOOP) return context.main_loop ? loop_service() : nullptr;
  if (id == CLONE_HOST_CONSOLE) return context.console ? console_service() : nullptr;
  if (id == CLONE_HOST_CONTROL) return context.control ? control_service() : nullptr;
  if (id == CLONE_HOST_INSTANCES) return context.control ? instances_service() : nullptr;
  if (!context.machine) return nullptr;
  if (id == CLONE_HOST_BUS) return &kBus;
  if (id == CLONE_HOST_IRQ) return &kIrq;
  if (id == CLONE_HOST_MACHINE) return &kMachine;
  if (id == CLONE_HOST_ACPI) return &kAcpi;
  if (id == CLONE_HOST_PUBLISH) return &kPublish;
  const auto& published = context.machine->published();
  const auto found = published.find(id);
  return found == published.end() ? nullptr : found->second.table;
}

}  // namespace

HostHandle::HostHandle(std::string name, HostContext& context)
    : name_(std::move(name)), raw_{sizeof raw_, CLONE_ABI_MAJOR, CLONE_ABI_MINOR, 0,
                                   &context,    name_.c_str(),   find_service} {}

}  // namespace vmm
