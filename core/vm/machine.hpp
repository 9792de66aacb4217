// SPDX-License-Identifier: Apache-2.0
// A virtual machine from its plan to its end: memory, KVM, buses, the devices of the plugins, vCPUs.
#pragma once

#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "boot/acpi.hpp"
#include "boot/initrd.hpp"
#include "boot/kernel.hpp"
#include "bus/bus.hpp"
#include "bus/resources.hpp"
#include "clone/abi/balloon.h"
#include "clone/abi/boot_root.h"
#include "clone/abi/guest.h"
#include "clone/abi/machine.h"
#include "console/console_hub.hpp"
#include "control/control_server.hpp"
#include "irq/gsi_routing.hpp"
#include "kvm/kvm.hpp"
#include "kvm/vcpus.hpp"
#include "loop/event_loop.hpp"
#include "memory/guest_memory.hpp"
#include "plan/plan.hpp"
#include "plugin/host_context.hpp"
#include "snapshot/sections.hpp"
#include "util/result.hpp"
#include "vm/prefault.hpp"
#include "vm/reclaim.hpp"
#include "vm/shell.hpp"
#include "vm/timing.hpp"

namespace vmm {

enum class Ending { power_off, reset, crashed, kvm_failed, stopped };

// What one device or transport claimed; all of it is given back when the instance goes.
struct Instance : HostContext {
  Instance(std::string name, const HostContext& context) : HostContext(context), host(std::move(name), *this) {}

  HostHandle host;
  clone_device_ops ops{};
  void* device = nullptr;
  bool is_new = false;  // the machine was saved without it
  bool quiesced = false;
  std::mutex mutex;  // PCI BARs are claimed by vCPU threads
  std::map<uint64_t, Bus::Claim> claims;
  uint64_t next_claim = 1;
  std::vector<NumberLease> gsis;
  std::vector<WindowLease> windows;
};

class Machine {
 public:
  // Called once, on the main loop, when the guest has come to an end by itself; `detail` may say more.
  using Ended = std::function<void(Ending, const std::string& detail)>;

  // What outlives the machine.
  struct Surroundings {
    EventLoop& main_loop;
    ConsoleHub& console;
    ControlServer* control = nullptr;
    const InstanceDirectory* directory = nullptr;  // with `control`
    bool is_fork = false;                          // the first machine was restored
  };

  // `saved`: NULL to boot; otherwise it lasts until start() returns, and is of a machine with this plan.
  static Result<std::unique_ptr<Machine>> create(const CheckedPlan& plan, const Surroundings& around, Timing& timing,
                                                 Ended ended, const SavedMachine* saved = nullptr);
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;
  // Stops the vCPUs and destroys transport and devices.
  ~Machine();

  // Starts the devices and the vCPUs.
  Result<void> start(Timing& timing);
  // When the first vCPU entered the guest; waits for it.
  Timing::Clock::time_point first_instruction() const;
  // By the power button, and by the program in the guest that listens to us. An error when there is neither.
  Result<void> ask_to_power_off();
  // The vCPUs stand still, devices have done what they were told and wait, no time goes by for the balloon policy. An
  // error, and the machine runs on, when the guest has come to its end or a device cannot stand still.
  Result<void> pause();
  Result<void> resume();

  // All but the memory of a paused machine. A device that cannot be saved is an error by its name.
  Result<void> save(Sections& sections);
  // From now on it is known which pages are written, by the guest or by the host's side. What was written before is in
  // memory for all to see. The machine may run.
  Result<void> track_dirty_pages();
  // Adds those that were written since the last call, or since tracking began. Of a machine that runs some may be being
  // written: what is read of them then may be torn, and they are among those of a later call.
  Result<void> take_dirty_pages(PageSet& pages);
  Result<void> stop_tracking_dirty_pages();

  // What devices publish of the guest. False when none does.
  bool read_balloon(clone_balloon_state& state) const;
  bool read_guest(clone_guest_report& report) const;

  // [any] A device's request (CLONE_MACHINE_…), or a vCPU's end. The first one counts.
  void end(Ending ending, std::string detail = {});

  // What the services of vm/services.cpp work on.
  GuestMemory& memory() { return *memory_; }
  KvmVm& vm() { return *vm_; }
  GsiRouting& gsi_routing() { return *gsi_routing_; }
  Bus& bus(BusSpace space) { return space == BusSpace::pio ? pio_ : mmio_; }
  GsiPool& gsi_pool() { return gsi_pool_; }
  WindowPool& window_pool() { return window_pool_; }
  const Plan& plan() const { return plan_.plan; }
  bool is_fork() const { return around_.is_fork; }

  struct AcpiParts {
    std::vector<AcpiNode> nodes;
    std::vector<aml::Bytes> aml;
    AcpiConfig config;
  };
  AcpiParts& acpi() { return acpi_; }

  struct PowerButton {
    clone_status (*pressed)(void* context) = nullptr;
    void* context = nullptr;
    std::string owner;
  };
  PowerButton& power_button() { return power_button_; }

  // A table that a device has published, or null.
  template <typename Table>
  const Table* find_published(const char* id) const {
    const auto found = published_.find(id);
    return found == published_.end() ? nullptr : static_cast<const Table*>(found->second.table);
  }
  struct Published {
    std::string owner;
    const void* table = nullptr;
  };
  std::map<std::string, Published, std::less<>>& published() { return published_; }

 private:
  Machine(const CheckedPlan& plan, const Surroundings& around, Ended ended, const SavedMachine* saved)
      : plan_(plan), around_(around), ended_(std::move(ended)), saved_(saved) {}

  Result<void> boot(Timing& timing);
  Result<void> restore(Timing& timing);
  void take_kvm(Shell& shell);
  void make_vcpus(std::vector<KvmVcpu> vcpus);
  std::vector<KvmVcpu*> vcpu_pointers();
  Result<void> make_devices();
  Result<void> begin_dirty_log();
  Result<void> make_instance(const std::string& name, const DeviceType& type, const OptionValues& options,
                             bool is_new = false);
  Result<void> load_kernel(const KernelFile& kernel);
  Result<void> prepare_boot(const KernelImage& image, Timing& timing);
  Result<std::optional<Initrd>> generate_initrd(const KernelImage& kernel);
  struct Root {
    clone_boot_root_info info;
    std::string owner;
  };
  Result<std::optional<Root>> find_root();
  Result<std::vector<std::string>> guest_modules(const KernelImage& kernel, const clone_boot_root_info& root);
  std::string command_line();
  Result<GuestAddress> write_acpi_tables();
  void destroy_instances();

  const CheckedPlan& plan_;
  const Surroundings around_;
  Ended ended_;
  const SavedMachine* saved_;  // until start() returns
  std::mutex end_mutex_;
  bool ended_already_ = false;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);  // for calls posted to the loop

  std::optional<GuestMemory> memory_;
  std::optional<Kvm> kvm_;
  std::optional<KvmVm> vm_;
  std::unique_ptr<SlotSetter> slots_;
  std::optional<GsiRouting> gsi_routing_;
  Bus pio_{BusSpace::pio};
  Bus mmio_{BusSpace::mmio};
  GsiPool gsi_pool_;
  WindowPool window_pool_{layout::kMmioWindow, layout::kMmioWindow + layout::kMmioWindowBytes};
  AcpiParts acpi_;
  PowerButton power_button_;
  std::map<std::string, Published, std::less<>> published_;
  std::list<Instance> instances_;  // the transport last
  std::unique_ptr<Reclaim> reclaim_;
  std::unique_ptr<Vcpus> vcpus_;
  std::unique_ptr<Prefault> prefault_;
};

}  // namespace vmm
