// SPDX-License-Identifier: Apache-2.0
// KVM and a virtual machine of it, as objects: every call of the API that the core uses but those of a vCPU.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "bus/bus.hpp"
#include "kvm/api.hpp"
#include "memory/guest_memory.hpp"
#include "util/fd.hpp"
#include "util/result.hpp"

namespace vmm {

constexpr uint32_t kVcpusMax = 32;

class Kvm {
 public:
  static Result<Kvm> open(const std::string& path = "/dev/kvm");

  int fd() const { return fd_.get(); }
  // What KVM_CHECK_EXTENSION says of a KVM_CAP_…; 0 when it is not there.
  int capability(int number) const;
  // An error when this many vCPUs are more than we, or this KVM, run.
  Result<void> check_vcpu_count(uint32_t count) const;

  Result<std::vector<kvm_cpuid_entry2>> supported_cpuid() const;
  // The MSRs that make up a vCPU's state: KVM's list, and the MTRRs, which it keeps but does not list.
  Result<std::vector<uint32_t>> msr_indices() const;

 private:
  explicit Kvm(Fd fd) : fd_(std::move(fd)) {}

  Fd fd_;
};

// A message-signalled interrupt, as a PCI function would write it.
struct MsiMessage {
  uint64_t address = 0;
  uint32_t data = 0;
  bool operator==(const MsiMessage&) const = default;
};

// A guest write that signals an eventfd and never leaves the kernel.
struct IoEvent {
  BusSpace space = BusSpace::mmio;
  uint64_t address = 0;
  uint32_t size_bytes = 0;  // 1, 2, 4, 8; 0 for a write of any size, which excludes a match
  std::optional<uint64_t> match;
};

// The interrupt chips that KVM emulates, by their KVM_IRQCHIP_… number.
enum class Irqchip : uint32_t {
  pic_master = KVM_IRQCHIP_PIC_MASTER,
  pic_slave = KVM_IRQCHIP_PIC_SLAVE,
  ioapic = KVM_IRQCHIP_IOAPIC,
};

// Each call is [any] unless said otherwise.
class KvmVm {
 public:
  static Result<KvmVm> create(const Kvm& kvm);

  int fd() const { return fd_.get(); }
  int capability(int number) const;
  // Lets the kernel take the whole VM apart at once, when its vCPUs are gone: undoing one registration after the other
  // costs a grace period each. What is called afterwards fails. [control]
  void close() { fd_.reset(); }
  bool is_open() const { return static_cast<bool>(fd_); }

  // PIC, IOAPIC, a local APIC for each vCPU, and the PIT with port 0x61. Before the first vCPU.
  Result<void> create_irqchip();

  // KVM waits for its readers here (milliseconds on some hosts): few slots, and not in the way of the first
  // instruction. Flags are KVM_MEM_LOG_DIRTY_PAGES and KVM_MEM_READONLY. Setting a slot again with other flags changes
  // them.
  Result<void> set_memory_slot(uint32_t slot, const GuestMemory::Region& region, uint32_t flags = 0);
  Result<void> remove_memory_slot(uint32_t slot);
  // As many as KVM itself allows once its slots have so many pages; it does not adapt them to later slots any more.
  Result<void> reserve_shadow_pages(uint64_t guest_pages) const;
  // The pages written since the log was last cleared, a bit each. Where dirty_log_is_manual(), reading leaves them
  // marked until clear_dirty_log(), to be called before a page is copied; otherwise reading clears.
  Result<std::vector<uint64_t>> dirty_log(uint32_t slot, uint64_t page_count) const;
  // `first_page` is a multiple of 64; so is the page count, unless the range ends with the slot.
  Result<void> clear_dirty_log(uint32_t slot, uint64_t first_page, uint32_t page_count,
                               std::span<const uint64_t> bitmap) const;
  bool dirty_log_is_manual() const { return manual_dirty_log_; }

  // Writes to the eventfd interrupt the guest by `gsi`. With a resample eventfd the line is level-triggered: held until
  // the guest's end of interrupt, which that one tells.
  Result<void> add_irqfd(int fd, uint32_t gsi, int resample_fd = -1) const;
  Result<void> remove_irqfd(int fd, uint32_t gsi) const;
  Result<void> add_io_event(const IoEvent& event, int fd) const;
  Result<void> remove_io_event(const IoEvent& event, int fd) const;
  // Replaces the whole table; GsiRouting keeps it.
  Result<void> set_gsi_routing(std::span<const kvm_irq_routing_entry> entries) const;
  Result<void> set_irq_level(uint32_t gsi, bool asserted) const;
  Result<void> pulse_irq(uint32_t gsi) const;
  // Not an error when the guest masks it.
  Result<void> signal_msi(const MsiMessage& message) const;

  // State to save and restore, with the vCPUs paused.
  Result<kvm_clock_data> clock() const;
  Result<void> set_clock(const kvm_clock_data& clock) const;
  Result<kvm_irqchip> irqchip(Irqchip chip) const;
  Result<void> set_irqchip(const kvm_irqchip& state) const;
  Result<kvm_pit_state2> pit() const;
  Result<void> set_pit(const kvm_pit_state2& state) const;
  // The frequency that vCPUs created later start with (KVM_CAP_VM_TSC_CONTROL).
  Result<uint32_t> tsc_khz() const;
  Result<void> set_tsc_khz(uint32_t khz) const;

 private:
  explicit KvmVm(Fd fd) : fd_(std::move(fd)) {}

  Fd fd_;
  bool manual_dirty_log_ = false;
};

}  // namespace vmm
