// SPDX-License-Identifier: Apache-2.0
// Keeps KVM's table of GSI routes.
#include "irq/gsi_routing.hpp"

#include <algorithm>
#include <utility>
#include <vector>

#include "util/log.hpp"

namespace vmm {
namespace {

constexpr uint32_t kPicLines = 8;  // of each of both

kvm_irq_routing_entry line_route(uint32_t gsi, Irqchip chip, uint32_t pin) {
  kvm_irq_routing_entry entry{};
  entry.gsi = gsi;
  entry.type = KVM_IRQ_ROUTING_IRQCHIP;
  entry.u.irqchip = {.irqchip = static_cast<uint32_t>(chip), .pin = pin};
  return entry;
}

kvm_irq_routing_entry message_route(uint32_t gsi, const MsiMessage& message) {
  kvm_irq_routing_entry entry{};
  entry.gsi = gsi;
  entry.type = KVM_IRQ_ROUTING_MSI;
  entry.u.msi.address_lo = static_cast<uint32_t>(message.address);
  entry.u.msi.address_hi = static_cast<uint32_t>(message.address >> 32);
  entry.u.msi.data = message.data;
  return entry;
}

// The same as KVM's own table for a new irqchip: GSI n is pin n of the IOAPIC (0 as well: no interrupt source override
// for the timer), and below 16 also of the PICs.
std::vector<kvm_irq_routing_entry> line_routes() {
  std::vector<kvm_irq_routing_entry> routes;
  for (uint32_t gsi = 0; gsi < kIrqLines; ++gsi) {
    routes.push_back(line_route(gsi, Irqchip::ioapic, gsi));
    if (gsi < kPicLines) {
      routes.push_back(line_route(gsi, Irqchip::pic_master, gsi));
    } else if (gsi < 2 * kPicLines) {
      routes.push_back(line_route(gsi, Irqchip::pic_slave, gsi - kPicLines));
    }
  }
  return routes;
}

}  // namespace

// KVM_CAP_IRQ_ROUTING bounds both the routes and the numbers; the lines' second routes, to the PICs, count as well.
GsiRouting::GsiRouting(const KvmVm& vm)
    : vm_(vm),
      limit_(std::max(static_cast<uint32_t>(vm.capability(KVM_CAP_IRQ_ROUTING)), kIrqLines + 2 * kPicLines) -
             2 * kPicLines) {}

Result<uint32_t> GsiRouting::allocate() {
  std::lock_guard lock(mutex_);
  uint32_t gsi = kIrqLines;
  for (const auto& [taken, message] : messages_) {
    if (taken != gsi) break;
    ++gsi;
  }
  if (gsi >= limit_) return Error{"MSI: all " + std::to_string(limit_ - kIrqLines) + " GSIs are taken", ENOSPC};
  messages_.emplace(gsi, std::nullopt);
  return gsi;
}

Result<void> GsiRouting::set(uint32_t gsi, std::optional<MsiMessage> message) {
  std::lock_guard lock(mutex_);
  const auto found = messages_.find(gsi);
  if (found == messages_.end()) return Error{"GSI " + std::to_string(gsi) + ": not allocated for messages", ENOENT};
  if (found->second == message) return {};
  std::swap(found->second, message);
  changed_ = true;
  auto result = apply();
  if (!result) std::swap(found->second, message);
  return result;
}

Result<void> GsiRouting::free(uint32_t gsi) {
  TRY(set(gsi, std::nullopt));
  std::lock_guard lock(mutex_);
  messages_.erase(gsi);
  return {};
}

// Tells KVM, unless a batch will.
Result<void> GsiRouting::apply() {
  if (batches_ || !changed_) return {};
  std::vector<kvm_irq_routing_entry> routes = line_routes();
  for (const auto& [gsi, message] : messages_) {
    if (message) routes.push_back(message_route(gsi, *message));
  }
  TRY(vm_.set_gsi_routing(routes));
  changed_ = false;
  return {};
}

GsiRouting::Batch::Batch(GsiRouting& routing) : routing_(&routing) {
  std::lock_guard lock(routing_->mutex_);
  ++routing_->batches_;
}

GsiRouting::Batch::~Batch() {
  if (auto result = commit(); !result) log_warning("interrupt routes: " + result.error().message);
}

Result<void> GsiRouting::Batch::commit() {
  if (!routing_) return {};
  GsiRouting& routing = *std::exchange(routing_, nullptr);
  std::lock_guard lock(routing.mutex_);
  --routing.batches_;
  return routing.apply();
}

}  // namespace vmm
