// SPDX-License-Identifier: Apache-2.0
// Calls to KVM that concern the host as a whole, or one virtual machine.
#include "kvm/kvm.hpp"

#include <fcntl.h>

#include <algorithm>

#include "boot/layout.hpp"
#include "kvm/ioctl.hpp"

namespace vmm {
namespace {

constexpr int kApiVersion = 12;           // the only one since Linux 2.6.22
constexpr size_t kCpuidEntriesMax = 256;  // KVM_MAX_CPUID_ENTRIES

// IA32_MTRRCAP's count is 8 in KVM (KVM_NR_VAR_MTRR).
std::vector<uint32_t> mtrr_indices() {
  std::vector<uint32_t> indices{0x250, 0x258, 0x259};                              // fixed 64 KiB, 16 KiB
  for (uint32_t index = 0x268; index <= 0x26f; ++index) indices.push_back(index);  // fixed 4 KiB
  for (uint32_t index = 0x200; index <= 0x20f; ++index) indices.push_back(index);  // variable: base, mask
  indices.push_back(0x2ff);                                                        // default type
  return indices;
}

Error open_error(const std::string& path) {
  Error error = errno_error(path);
  if (error.code == ENOENT || error.code == ENODEV || error.code == ENXIO) {
    error.message += ": turn on virtualisation in the firmware, then load the module kvm_intel or kvm_amd";
  } else if (error.code == EACCES || error.code == EPERM) {
    error.message += ": run as root, or join the group that may use it (usermod -aG kvm $USER) and log in again";
  }
  return error;
}

Result<void> ignore_value(Result<int> result) {
  if (!result) return std::move(result).error();
  return {};
}

}  // namespace

Result<Kvm> Kvm::open(const std::string& path) {
  Fd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK));
  if (!fd) return open_error(path);
  const int version = ::ioctl(fd.get(), KVM_GET_API_VERSION, 0);
  if (version < 0) return Error{path + ": not a KVM device", ENOTTY};
  if (version != kApiVersion) {
    return Error{path + ": KVM API version " + std::to_string(version) + ", only 12 is known", EPROTO};
  }
  return Kvm(std::move(fd));
}

int Kvm::capability(int number) const { return std::max(0, ::ioctl(fd_.get(), KVM_CHECK_EXTENSION, number)); }

Result<void> Kvm::check_vcpu_count(uint32_t count) const {
  const auto here = static_cast<uint32_t>(std::max(capability(KVM_CAP_MAX_VCPUS), 1));
  const uint32_t limit = std::min(kVcpusMax, here);
  if (count >= 1 && count <= limit) return {};
  return Error{"vCPUs: " + std::to_string(count) + " asked for: 1 to " + std::to_string(limit) +
                   " are allowed (KVM here runs up to " + std::to_string(here) + ")",
               EINVAL};
}

Result<std::vector<kvm_cpuid_entry2>> Kvm::supported_cpuid() const {
  FlexibleStruct<kvm_cpuid2, kvm_cpuid_entry2> list(kCpuidEntriesMax);
  list->nent = kCpuidEntriesMax;
  TRY(KVM_CALL(fd_.get(), KVM_GET_SUPPORTED_CPUID, list.get()));
  const auto entries = list.entries().first(std::min<size_t>(list->nent, kCpuidEntriesMax));
  return std::vector(entries.begin(), entries.end());
}

Result<std::vector<uint32_t>> Kvm::msr_indices() const {
  // Asked for none, KVM answers E2BIG and how many there are.
  kvm_msr_list count{};
  if (::ioctl(fd_.get(), KVM_GET_MSR_INDEX_LIST, &count) < 0 && errno != E2BIG) {
    return errno_error("KVM_GET_MSR_INDEX_LIST");
  }
  FlexibleStruct<kvm_msr_list, uint32_t> list(count.nmsrs);
  list->nmsrs = count.nmsrs;
  TRY(KVM_CALL(fd_.get(), KVM_GET_MSR_INDEX_LIST, list.get()));
  std::vector<uint32_t> indices(list.entries().begin(), list.entries().end());
  for (const uint32_t index : mtrr_indices()) {
    if (std::ranges::find(indices, index) == indices.end()) indices.push_back(index);
  }
  return indices;
}

Result<KvmVm> KvmVm::create(const Kvm& kvm) {
  KvmVm vm{Fd(TRY(KVM_CALL(kvm.fd(), KVM_CREATE_VM, 0)))};
  // Pages that KVM keeps for itself on Intel CPUs without unrestricted guest.
  uint64_t identity_map = layout::kKvmIdentityMap.value;
  TRY(KVM_CALL(vm.fd(), KVM_SET_IDENTITY_MAP_ADDR, &identity_map));
  TRY(KVM_CALL(vm.fd(), KVM_SET_TSS_ADDR, layout::kKvmTss.value));

  kvm_enable_cap enable{};
  enable.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
  enable.args[0] = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
  vm.manual_dirty_log_ = ::ioctl(vm.fd(), KVM_ENABLE_CAP, &enable) == 0;
  return vm;
}

int KvmVm::capability(int number) const { return std::max(0, ::ioctl(fd_.get(), KVM_CHECK_EXTENSION, number)); }

Result<void> KvmVm::create_irqchip() {
  TRY(KVM_CALL(fd_.get(), KVM_CREATE_IRQCHIP, 0));
  kvm_pit_config pit{};
  pit.flags = KVM_PIT_SPEAKER_DUMMY;
  return ignore_value(KVM_CALL(fd_.get(), KVM_CREATE_PIT2, &pit));
}

Result<void> KvmVm::set_memory_slot(uint32_t slot, const GuestMemory::Region& region, uint32_t flags) {
  kvm_userspace_memory_region request{};
  request.slot = slot;
  request.flags = flags;
  request.guest_phys_addr = region.start.value;
  request.memory_size = region.size_bytes;
  request.userspace_addr = reinterpret_cast<uint64_t>(region.host);
  return ignore_value(KVM_CALL(fd_.get(), KVM_SET_USER_MEMORY_REGION, &request))
      .context("memory slot " + std::to_string(slot));
}

Result<void> KvmVm::remove_memory_slot(uint32_t slot) { return set_memory_slot(slot, {}); }

// The share and the minimum are KVM's: arch/x86/include/asm/kvm_host.h, KVM_PERMILLE_MMU_PAGES, KVM_MIN_ALLOC_MMU_PAGES.
Result<void> KvmVm::reserve_shadow_pages(uint64_t guest_pages) const {
  const uint64_t pages = std::max<uint64_t>(guest_pages * 20 / 1000, 64);
  return ignore_value(KVM_CALL(fd_.get(), KVM_SET_NR_MMU_PAGES, pages));
}

Result<std::vector<uint64_t>> KvmVm::dirty_log(uint32_t slot, uint64_t page_count) const {
  std::vector<uint64_t> bitmap((page_count + 63) / 64);
  kvm_dirty_log request{};
  request.slot = slot;
  request.dirty_bitmap = bitmap.data();
  TRY(KVM_CALL(fd_.get(), KVM_GET_DIRTY_LOG, &request).context("memory slot " + std::to_string(slot)));
  return bitmap;
}

Result<void> KvmVm::clear_dirty_log(uint32_t slot, uint64_t first_page, uint32_t page_count,
                                    std::span<const uint64_t> bitmap) const {
  if (bitmap.size() * 64 < page_count) {
    return Error{
        "dirty log: " + std::to_string(bitmap.size() * 64) + " bits given for " + std::to_string(page_count) + " pages",
        EINVAL};
  }
  kvm_clear_dirty_log request{};
  request.slot = slot;
  request.num_pages = page_count;
  request.first_page = first_page;
  request.dirty_bitmap = const_cast<uint64_t*>(bitmap.data());  // only read
  return ignore_value(KVM_CALL(fd_.get(), KVM_CLEAR_DIRTY_LOG, &request))
      .context("memory slot " + std::to_string(slot));
}

namespace {

Result<void> change_irqfd(int vm, int fd, uint32_t gsi, uint32_t flags, int resample_fd) {
  kvm_irqfd request{};
  request.fd = static_cast<uint32_t>(fd);
  request.gsi = gsi;
  request.flags = flags;
  if (resample_fd >= 0) {
    request.flags |= KVM_IRQFD_FLAG_RESAMPLE;
    request.resamplefd = static_cast<uint32_t>(resample_fd);
  }
  return ignore_value(KVM_CALL(vm, KVM_IRQFD, &request)).context("GSI " + std::to_string(gsi));
}

Result<void> change_io_event(int vm, const IoEvent& event, int fd, uint32_t flags) {
  kvm_ioeventfd request{};
  request.addr = event.address;
  request.len = event.size_bytes;
  request.fd = fd;
  request.flags = flags;
  if (event.space == BusSpace::pio) request.flags |= KVM_IOEVENTFD_FLAG_PIO;
  if (event.match) {
    request.flags |= KVM_IOEVENTFD_FLAG_DATAMATCH;
    request.datamatch = *event.match;
  }
  if (auto result = KVM_CALL(vm, KVM_IOEVENTFD, &request); !result) {
    return std::move(result).error().context(
        (event.space == BusSpace::pio ? "ioeventfd at port " : "ioeventfd at guest address ") +
        std::to_string(event.address) + ", " + std::to_string(event.size_bytes) + " bytes");
  }
  return {};
}

}  // namespace

Result<void> KvmVm::add_irqfd(int fd, uint32_t gsi, int resample_fd) const {
  return change_irqfd(fd_.get(), fd, gsi, 0, resample_fd);
}

Result<void> KvmVm::remove_irqfd(int fd, uint32_t gsi) const {
  return change_irqfd(fd_.get(), fd, gsi, KVM_IRQFD_FLAG_DEASSIGN, -1);
}

Result<void> KvmVm::add_io_event(const IoEvent& event, int fd) const {
  return change_io_event(fd_.get(), event, fd, 0);
}

Result<void> KvmVm::remove_io_event(const IoEvent& event, int fd) const {
  return change_io_event(fd_.get(), event, fd, KVM_IOEVENTFD_FLAG_DEASSIGN);
}

Result<void> KvmVm::set_gsi_routing(std::span<const kvm_irq_routing_entry> entries) const {
  FlexibleStruct<kvm_irq_routing, kvm_irq_routing_entry> table(entries.size());
  table->nr = static_cast<uint32_t>(entries.size());
  std::ranges::copy(entries, table.entries().begin());
  return ignore_value(KVM_CALL(fd_.get(), KVM_SET_GSI_ROUTING, table.get()));
}

Result<void> KvmVm::set_irq_level(uint32_t gsi, bool asserted) const {
  kvm_irq_level request{};
  request.irq = gsi;
  request.level = asserted;
  return ignore_value(KVM_CALL(fd_.get(), KVM_IRQ_LINE, &request)).context("GSI " + std::to_string(gsi));
}

Result<void> KvmVm::pulse_irq(uint32_t gsi) const {
  TRY(set_irq_level(gsi, true));
  return set_irq_level(gsi, false);
}

Result<void> KvmVm::signal_msi(const MsiMessage& message) const {
  kvm_msi request{};
  request.address_lo = static_cast<uint32_t>(message.address);
  request.address_hi = static_cast<uint32_t>(message.address >> 32);
  request.data = message.data;
  return ignore_value(KVM_CALL(fd_.get(), KVM_SIGNAL_MSI, &request));
}

Result<kvm_clock_data> KvmVm::clock() const {
  kvm_clock_data clock{};
  TRY(KVM_CALL(fd_.get(), KVM_GET_CLOCK, &clock));
  return clock;
}

Result<void> KvmVm::set_clock(const kvm_clock_data& clock) const {
  return ignore_value(KVM_CALL(fd_.get(), KVM_SET_CLOCK, &clock));
}

Result<kvm_irqchip> KvmVm::irqchip(Irqchip chip) const {
  kvm_irqchip state{};
  state.chip_id = static_cast<uint32_t>(chip);
  TRY(KVM_CALL(fd_.get(), KVM_GET_IRQCHIP, &state));
  return state;
}

Result<void> KvmVm::set_irqchip(const kvm_irqchip& state) const {
  return ignore_value(KVM_CALL(fd_.get(), KVM_SET_IRQCHIP, &state));
}

Result<kvm_pit_state2> KvmVm::pit() const {
  kvm_pit_state2 state{};
  TRY(KVM_CALL(fd_.get(), KVM_GET_PIT2, &state));
  return state;
}

Result<void> KvmVm::set_pit(const kvm_pit_state2& state) const {
  return ignore_value(KVM_CALL(fd_.get(), KVM_SET_PIT2, &state));
}

Result<uint32_t> KvmVm::tsc_khz() const { return static_cast<uint32_t>(TRY(KVM_CALL(fd_.get(), KVM_GET_TSC_KHZ, 0))); }

Result<void> KvmVm::set_tsc_khz(uint32_t khz) const {
  return ignore_value(KVM_CALL(fd_.get(), KVM_SET_TSC_KHZ, static_cast<unsigned long>(khz)));
}

}  // namespace vmm
