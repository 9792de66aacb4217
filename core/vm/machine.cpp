// SPDX-License-Identifier: Apache-2.0
// Builds a machine in the order in which its parts need each other, and takes it apart in the reverse.
#include "vm/machine.hpp"

#include <algorithm>
#include <set>
#include <thread>

#include "boot/entry.hpp"
#include "boot/modules.hpp"
#include "clone/abi/boot_arguments.h"
#include "clone/abi/vhost.h"
#include "clone/abi/virtio.h"
#include "clone/sdk/error.hpp"
#include "loop/thread.hpp"
#include "plugin/catalogue.hpp"
#include "plugin/crash_report.hpp"
#include "snapshot/kvm_state.hpp"
#include "snapshot/plan_sections.hpp"
#include "util/log.hpp"

namespace vmm {
namespace {

constexpr const char* kInitProgram = "libexec/clone/clone-init";
// The kernel's own words for "the host knows the time" and "the host's random numbers are good".
constexpr const char* kBaseArguments = "tsc=reliable no_timer_check random.trust_cpu=on";

std::vector<std::string> words(std::string_view text) {
  std::vector<std::string> list;
  while (!text.empty()) {
    const size_t end = text.find(' ');
    if (end != 0) list.emplace_back(text.substr(0, end));
    text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
  }
  return list;
}

template <typename Table>
std::optional<Table> extension_of(const Instance& instance, const char* id) {
  const auto* table = static_cast<const Table*>(instance.ops.get_extension(instance.device, id));
  if (!table) return std::nullopt;
  return copy_table(table);
}

// One call into a plugin: its error gets the instance's name, a crash in it is reported under that name.
template <typename Call>
Result<void> call_plugin(const Instance& instance, const char* phase, Call&& call) {
  const CrashReport crash(instance.host.name(), phase);
  clone_sdk::ErrorBuffer error;
  try {
    return error.result(call(static_cast<clone_err*>(error))).context("plugin " + instance.host.name());
  } catch (...) {
    return Error{"plugin " + instance.host.name() + ": threw an exception " + phase, 0, CLONE_ERR_INTERNAL};
  }
}

}  // namespace

Result<std::unique_ptr<Machine>> Machine::create(const CheckedPlan& plan, const Surroundings& around, Timing& timing,
                                                 Ended ended, const SavedMachine* saved) {
  std::unique_ptr<Machine> machine(new Machine(plan, around, std::move(ended), saved));
  TRY(saved ? machine->restore(timing) : machine->boot(timing));
  return machine;
}

Machine::~Machine() {
  *alive_ = false;
  vcpus_.reset();
  slots_.reset();
  if (vm_) vm_->close();
  destroy_instances();
}

Result<void> Machine::boot(Timing& timing) {
  const Plan& plan = plan_.plan;
  // Opened first: its pages are read ahead while the rest is made.
  const KernelFile kernel = TRY(KernelFile::open(plan.kernel, plan.protocol).context("--kernel"));
  timing.mark("kernel file");
  memory_ = TRY(GuestMemory::create(plan.memory));
  timing.mark("memory");
  // Copying the kernel and the kernel's own work for KVM's memory slots take milliseconds each: side by side.
  Result<void> loaded;
  Thread loader = TRY(spawn_thread("clone-load", [&] { loaded = load_kernel(kernel); }));
  Shell shell = TRY(Shell::create());
  take_kvm(shell);
  TRY(kvm_->check_vcpu_count(plan_.plan.vcpus));
  timing.mark("kvm");
  TRY(make_devices());
  timing.mark("devices");
  slots_ = TRY(SlotSetter::start(*vm_, *memory_));
  loader.join();
  TRY(std::move(loaded));
  timing.mark("kernel load (rest)");
  return prepare_boot(kernel.image(), timing);
}

void Machine::take_kvm(Shell& shell) {
  kvm_ = std::move(shell.kvm);
  vm_ = std::move(shell.vm);
  gsi_routing_.emplace(*vm_);
}

Result<void> Machine::restore(Timing& timing) {
  Shell shell = TRY(saved_->shell ? saved_->shell->take() : Shell::create());
  timing.mark("kvm");
  if (!shell.memory) TRY(shell.fill(plan_.plan.memory, plan_.plan.vcpus, *saved_));
  shell.memory->set_mergeable(plan_.plan.memory.mergeable);
  timing.mark("memory, vcpus");
  take_kvm(shell);
  memory_ = std::move(shell.memory);
  make_vcpus(std::move(shell.vcpus));
  // A hint: a fork does without.
  if (auto prefault = Prefault::start(*memory_, saved_->prefault, saved_->image); prefault.ok())
    prefault_ = std::move(*prefault);
  else
    log_debug(prefault.error().message);
  TRY(make_devices());
  timing.mark("devices");
  // Behind the devices, because what they register with KVM waits for slots that are being set.
  if (!shell.has_slots) slots_ = TRY(SlotSetter::start(*vm_, *memory_));
  std::set<std::string, std::less<>> owners = {kCoreSections, kKvmSections, kPolicySections};
  for (const Instance& instance : instances_) {
    if (instance.is_new) continue;
    const SectionReader reader(saved_->sections, instance.host.name());
    TRY(call_plugin(instance, "while its state was loaded",
                    [&](clone_err* err) { return instance.ops.load(instance.device, &reader.raw(), err); }));
    TRY(reader.check_all_read());
    owners.insert(instance.host.name());
  }
  TRY(check_core_sections(saved_->sections));
  for (const auto& [key, section] : saved_->sections.all())
    if (!owners.contains(key.first))
      return Error{"section " + key.first + "/" + key.second + ": this machine has no " + key.first, 0,
                   CLONE_ERR_CORRUPT};
  timing.mark("device state");
  if (slots_) TRY(slots_->wait_for(vcpus_->vcpu(0)));
  timing.mark("memory slots (rest)");
  TRY(load_kvm(*vm_, vcpu_pointers(), saved_->sections));
  timing.mark("kvm state");
  return {};
}

void Machine::make_vcpus(std::vector<KvmVcpu> vcpus) {
  vcpus_ = std::make_unique<Vcpus>(std::move(vcpus), pio_, mmio_, [this](const VcpuStop& stop) {
    const bool guests_doing = stop.reason == StopReason::reset || stop.reason == StopReason::crash;
    end(stop.reason == StopReason::shutdown ? Ending::power_off
        : guests_doing                      ? Ending::crashed
                                            : Ending::kvm_failed,
        stop.message);
  });
}

std::vector<KvmVcpu*> Machine::vcpu_pointers() {
  std::vector<KvmVcpu*> vcpus;
  for (size_t i = 0; i < vcpus_->count(); ++i) vcpus.push_back(&vcpus_->vcpu(i));
  return vcpus;
}

Result<void> Machine::save(Sections& sections) {
  for (const Instance& instance : instances_) {
    const SectionWriter writer(sections, instance.host.name());
    TRY(call_plugin(instance, "while its state was saved",
                    [&](clone_err* err) { return instance.ops.save(instance.device, &writer.raw(), err); }));
  }
  if (reclaim_) {
    const SectionWriter writer(sections, kPolicySections);
    TRY(reclaim_->save(writer.raw()));
  }
  return save_kvm(*kvm_, *vm_, vcpu_pointers(), sections);
}

Result<void> Machine::track_dirty_pages() {
  auto begun = begin_dirty_log();
  if (!begun.ok()) (void)stop_tracking_dirty_pages();
  return begun;
}

Result<void> Machine::begin_dirty_log() {
  for (const Instance& instance : instances_)
    if (const auto vhost = extension_of<clone_vhost>(instance, CLONE_VHOST))
      TRY(call_plugin(instance, "while its log of pages was begun",
                      [&](clone_err* err) { return vhost->start_log(instance.device, err); }));
  memory_->enable_dirty_tracking(true);
  for (uint32_t slot = 0; slot < memory_->regions().size(); ++slot)
    TRY(vm_->set_memory_slot(slot, memory_->regions()[slot], KVM_MEM_LOG_DIRTY_PAGES));
  return {};
}

Result<void> Machine::stop_tracking_dirty_pages() {
  for (uint32_t slot = 0; slot < memory_->regions().size(); ++slot)
    TRY(vm_->set_memory_slot(slot, memory_->regions()[slot]));
  memory_->enable_dirty_tracking(false);
  for (const Instance& instance : instances_)
    if (const auto vhost = extension_of<clone_vhost>(instance, CLONE_VHOST))
      TRY(call_plugin(instance, "while its log of pages was ended",
                      [&](clone_err* err) { return vhost->stop_log(instance.device, err); }));
  return {};
}

Result<void> Machine::take_dirty_pages(PageSet& pages) {
  const auto mark = [](void* memory, uint64_t address, uint64_t size_bytes) noexcept {
    static_cast<GuestMemory*>(memory)->mark_dirty({address}, size_bytes);
  };
  for (const Instance& instance : instances_)
    if (const auto vhost = extension_of<clone_vhost>(instance, CLONE_VHOST))
      TRY(call_plugin(instance, "while its log of pages was taken",
                      [&](clone_err* err) { return vhost->take_log(instance.device, mark, &*memory_, err); }));
  uint64_t first_page = 0;
  for (uint32_t slot = 0; slot < memory_->regions().size(); ++slot) {
    const uint64_t page_count = memory_->regions()[slot].size_bytes / kPageSize;
    const auto log = TRY(vm_->dirty_log(slot, page_count));
    pages.add(first_page, log);
    if (vm_->dirty_log_is_manual()) TRY(vm_->clear_dirty_log(slot, 0, static_cast<uint32_t>(page_count), log));
    pages.add(first_page, memory_->take_dirty(slot));
    first_page += page_count;
  }
  return {};
}

Result<void> Machine::load_kernel(const KernelFile& kernel) {
  const KernelImage& image = kernel.image();
  if (plan_.plan.memory.huge_pages == HugePages::kernel)
    memory_->prefer_huge_pages(image.start, image.end.value - image.start.value);
  return kernel.load_into(*memory_);
}

Result<void> Machine::make_instance(const std::string& name, const DeviceType& type, const OptionValues& options,
                                    bool is_new) {
  Instance& instance = instances_.emplace_back(
      name, HostContext{&*memory_, &around_.main_loop, &around_.console, this, around_.control, around_.directory});
  instance.ops = type.ops;
  instance.is_new = is_new;
  TRY(call_plugin(instance, "while it was created",
                  [&](clone_err* err) { return instance.ops.create(instance.host.raw(), &instance.device, err); }));
  if (!instance.device) return Error{"plugin " + name + ": create succeeded without a device", 0, CLONE_ERR_INTERNAL};
  return call_plugin(instance, "while it was configured",
                     [&](clone_err* err) { return instance.ops.configure(instance.device, &options.raw(), err); });
}

Result<void> Machine::make_devices() {
  const auto is_virtio = [](const Instance& instance) {
    return extension_of<clone_virtio_device>(instance, CLONE_VIRTIO_DEVICE).has_value();
  };
  bool any_new = false;
  for (const CheckedDevice& device : plan_.devices) {
    TRY(make_instance(device.instance, device.type, device.options, device.is_new));
    if (device.is_new && !is_virtio(instances_.back()))
      return Error{device.instance + ": a fork may be given virtio devices only"};
    any_new = any_new || device.is_new;
  }
  if (any_new) {
    TRY(find_root());  // that there are not two
    if (std::ranges::none_of(instances_, [&](const Instance& one) { return !one.is_new && is_virtio(one); }))
      return Error{"a fork of a machine without virtio devices cannot be given any: there was no transport"};
  }
  if (std::none_of(instances_.begin(), instances_.end(), is_virtio)) return {};

  TRY(make_instance("transport-" + plan_.plan.transport.type, plan_.transport, plan_.transport_options));
  Instance& transport = instances_.back();
  for (const Instance& instance : instances_) {
    const auto* table =
        static_cast<const clone_virtio_device*>(instance.ops.get_extension(instance.device, CLONE_VIRTIO_DEVICE));
    if (!table || &instance == &transport) continue;
    const clone_virtio_attachment attachment{sizeof attachment, 0,     instance.host.raw()->name,
                                             instance.device,   table, instance.host.raw()};
    TRY(call_plugin(transport, "while a device was attached",
                    [&](clone_err* err) { return plan_.transport.attach(transport.device, &attachment, err); }));
  }
  return {};
}

Result<void> Machine::prepare_boot(const KernelImage& image, Timing& timing) {
  BootConfig boot;
  if (!plan_.plan.initrd.empty()) {
    for (const auto& [flag, value] : {std::pair("--init", &plan_.plan.init), {"--modules", &plan_.plan.modules}})
      if (!value->empty()) log_warning(std::string(flag) + " is for the generated initrd; --initrd has its own");
    const Mapping file = TRY(map_file(plan_.plan.initrd).context("--initrd"));
    boot.initrd = TRY(place_initrd(*memory_, image, file.bytes()).context("--initrd " + plan_.plan.initrd));
    if (const auto root = TRY(find_root()); root && *root->info.overlay)
      return Error{root->owner +
                   ": an overlay in the guest's memory is laid by the generated initrd: leave --initrd out"};
  } else if (const auto generated = TRY(generate_initrd(image))) {
    boot.initrd = TRY(find_initrd_place(*memory_, image, generated->size_bytes()));
    generated->write_to({memory_->slice(boot.initrd->start, boot.initrd->size_bytes), boot.initrd->size_bytes});
  }
  timing.mark("initrd");

  boot.rsdp = TRY(write_acpi_tables());
  boot.command_line = command_line();
  const MemoryRange ecam{layout::kPciConfig, layout::kPciConfigBytes, MemoryKind::reserved};
  if (acpi_.config.pci) boot.reserved = {&ecam, 1};
  const EntryState entry = TRY(prepare_entry(*memory_, image, boot));
  timing.mark("acpi, boot parameters");

  auto vcpus = TRY(create_vcpus(*kvm_, *vm_, {plan_.plan.vcpus}));
  TRY(vcpus.front().apply_entry(entry));
  timing.mark("vcpus");
  TRY(slots_->wait_for(vcpus.front()));
  timing.mark("memory slots (rest)");
  make_vcpus(std::move(vcpus));
  return {};
}

Result<std::optional<Machine::Root>> Machine::find_root() {
  std::optional<Root> root;
  for (const Instance& instance : instances_) {
    const auto table = extension_of<clone_boot_root>(instance, CLONE_BOOT_ROOT);
    if (!table || !table->describe) continue;
    clone_boot_root_info info{sizeof info, 0, "", "", "", ""};
    clone_status status = CLONE_OK;
    TRY(call_plugin(instance, "while its root file system was described",
                    [&](clone_err* err) { return status = table->describe(instance.device, &info, err); }));
    if (status == CLONE_EMPTY) continue;
    if (root) return Error{"two devices hold the root file system: " + root->owner + " and " + instance.host.name()};
    const std::string_view overlay = info.overlay ? info.overlay : "";
    if (!overlay.empty() && overlay != "tmpfs")
      return Error{instance.host.name() + ": a root overlay of the unknown kind '" + std::string(overlay) +
                   "'; allowed is tmpfs"};
    if (overlay.empty()) info.overlay = "";
    root = Root{info, instance.host.name()};
  }
  return root;
}

// The root file system's device, if there is one, decides whether an initrd has to be made.
Result<std::optional<Initrd>> Machine::generate_initrd(const KernelImage& kernel) {
  const auto found = TRY(find_root());
  if (!found) {
    if (!plan_.plan.init.empty()) log_warning("--init has no effect without a root file system (--rootfs)");
    return std::optional<Initrd>();
  }

  const clone_boot_root_info* const root = &found->info;
  InitrdSpec spec;
  spec.init_path = installation_prefix() + "/" + kInitProgram;
  spec.modules_dir = plan_.plan.modules;
  spec.kernel_version = kernel.version;
  spec.modules = TRY(guest_modules(kernel, *root));
  spec.root = root->source;
  if (*root->file_system) spec.filesystem_types = {root->file_system};
  spec.root_access = root->read_only ? RootAccess::read_only : RootAccess::read_write;
  if (*root->overlay) spec.overlay = RootOverlay::guest_memory;
  if (!plan_.plan.init.empty()) spec.init = plan_.plan.init;
  return std::optional(TRY(Initrd::prepare(spec).context("generated initrd")));
}

// What the plugins ask for, as far as this kernel has it as modules or built in. What is missing is told: a guest may
// still do without it.
Result<std::vector<std::string>> Machine::guest_modules(const KernelImage& kernel, const clone_boot_root_info& root) {
  const std::string& given = plan_.plan.modules;
  auto directory = find_modules_directory(given, kernel.version);
  if (!directory.ok()) {
    if (directory.error().code != ENOENT || !given.empty()) return std::move(directory).error().context("--modules");
    log_info("no modules of kernel '" + kernel.version + "' in /lib/modules: taking them to be built in");
    return std::vector<std::string>();
  }
  struct Wanted {
    std::string name;
    LogLevel if_missing;
    std::string owner;
  };
  std::vector<Wanted> wanted;
  auto add = [&](const char* names, LogLevel if_missing, const std::string& owner) {
    for (const std::string& name : words(names ? names : "")) wanted.push_back({name, if_missing, owner});
  };
  add(plan_.transport.descriptor.guest_modules, LogLevel::warning, "transport " + plan_.plan.transport.type);
  add(root.guest_modules, LogLevel::info, "the root file system");
  for (const CheckedDevice& device : plan_.devices)
    add(device.type.descriptor.guest_modules, LogLevel::info, device.instance);

  if (*root.overlay) {
    const std::string module = "overlay";
    if (auto there = resolve_modules(*directory, kernel.version, {&module, 1}); !there.ok())
      return std::move(there).error().context("the overlay over the root file system");
    wanted.push_back({module, LogLevel::warning, "the overlay over the root file system"});
  }

  std::vector<std::string> modules;
  for (const Wanted& one : wanted) modules.push_back(one.name);
  // The usual kernel has them all: its module lists are read once. Otherwise each name is asked for.
  if (resolve_modules(*directory, kernel.version, modules).ok()) return modules;
  modules.clear();
  for (const auto& [name, if_missing, owner] : wanted) {
    if (resolve_modules(*directory, kernel.version, {&name, 1}).ok()) {
      modules.push_back(name);
    } else {
      log(if_missing, "kernel " + kernel.version + " has no module " + name + " for " + owner);
    }
  }
  return modules;
}

std::string Machine::command_line() {
  std::string line = kBaseArguments;
  if (plan_.plan.on_reboot == OnReboot::exit) line += " panic=-1";
  // A kernel that is told of no PCI bus still probes for one, port by port.
  if (!acpi_.config.pci) line += " pci=off";
  for (const Instance& instance : instances_)
    if (const auto table = extension_of<clone_boot_arguments>(instance, CLONE_BOOT_ARGUMENTS))
      if (const char* arguments = table->arguments(instance.device); arguments && *arguments)
        line += " " + std::string(arguments);
  if (!plan_.plan.command_line.empty()) line += " " + plan_.plan.command_line;
  return line;
}

Result<GuestAddress> Machine::write_acpi_tables() {
  AcpiConfig& config = acpi_.config;
  config.vcpu_count = plan_.plan.vcpus;
  for (size_t i = 0; i < acpi_.nodes.size(); ++i)
    config.device_nodes.push_back(TRY(acpi_node(acpi_.nodes[i], static_cast<unsigned>(i))));
  for (const aml::Bytes& terms : acpi_.aml) config.device_nodes.push_back(terms);
  return write_acpi(*memory_, config);
}

Result<void> Machine::start(Timing& timing) {
  reclaim_ = TRY(Reclaim::create(plan_, around_.main_loop, *memory_, [&](std::string_view id) {
    const auto found = published_.find(id);
    return found == published_.end() ? nullptr : found->second.table;
  }));
  if (const auto* saved = std::exchange(saved_, nullptr); saved && reclaim_)
    if (saved->sections.has(kPolicySections)) {
      const SectionReader reader(saved->sections, kPolicySections);
      TRY(reclaim_->load(reader.raw()));
      TRY(reader.check_all_read());
    }
  for (const Instance& instance : instances_)
    if (instance.ops.start)
      TRY(call_plugin(instance, "while it was started",
                      [&](clone_err* err) { return instance.ops.start(instance.device, err); }));
  timing.mark("start");
  return vcpus_->start();
}

Timing::Clock::time_point Machine::first_instruction() const {
  // A machine that ends before it begins has no first instruction: now stands for it.
  const auto limit = Timing::Clock::now() + std::chrono::seconds(10);
  while (vcpus_->first_entry_ns() == 0 && Timing::Clock::now() < limit) std::this_thread::yield();
  const uint64_t entry_ns = vcpus_->first_entry_ns();
  return entry_ns ? Timing::Clock::time_point(std::chrono::nanoseconds(entry_ns)) : Timing::Clock::now();
}

Result<void> Machine::ask_to_power_off() {
  bool asked = false;
  if (const auto* guest = find_published<clone_guest>(CLONE_GUEST))
    asked = guest->request(guest->context, CLONE_GUEST_POWER_OFF, nullptr) == CLONE_OK;
  if (power_button_.pressed) {
    // A guest that does not listen yet finds the press when it does (CLONE_EMPTY).
    if (power_button_.pressed(power_button_.context) < 0)
      return Error{power_button_.owner + ": the power button cannot be pressed", 0, CLONE_ERR_STATE};
    asked = true;
  }
  if (!asked) return Error{"this machine has no power button", 0, CLONE_ERR_UNSUPPORTED};
  return {};
}

bool Machine::read_balloon(clone_balloon_state& state) const {
  const auto* balloon = find_published<clone_balloon>(CLONE_BALLOON);
  state.size = sizeof state;
  if (balloon) balloon->state(balloon->context, &state);
  return balloon != nullptr;
}

bool Machine::read_guest(clone_guest_report& report) const {
  const auto* guest = find_published<clone_guest>(CLONE_GUEST);
  report.size = sizeof report;
  if (guest) guest->report(guest->context, &report);
  return guest != nullptr;
}

Result<void> Machine::pause() {
  if (!vcpus_->pause_all()) return Error{"the machine is coming to its end", 0, CLONE_ERR_STATE};
  if (reclaim_) reclaim_->pause();
  for (Instance& instance : instances_) {
    instance.quiesced = true;  // one that fails halfway is resumed like the others
    auto quiesced = call_plugin(instance, "while it was quiesced",
                                [&](clone_err* err) { return instance.ops.quiesce(instance.device, err); });
    if (quiesced.ok()) continue;
    TRY(resume());
    return std::move(quiesced).error();
  }
  return {};
}

Result<void> Machine::resume() {
  for (Instance& instance : instances_)
    if (std::exchange(instance.quiesced, false))
      TRY(call_plugin(instance, "while it was resumed",
                      [&](clone_err* err) { return instance.ops.resume(instance.device, err); }));
  if (reclaim_) reclaim_->resume();
  for (size_t i = 0; i < vcpus_->count(); ++i) vcpus_->vcpu(i).tell_paused();
  vcpus_->resume_all();
  return {};
}

void Machine::end(Ending ending, std::string detail) {
  const std::lock_guard lock(end_mutex_);
  if (std::exchange(ended_already_, true)) return;
  around_.main_loop.post([this, alive = alive_, ending, detail = std::move(detail)] {
    if (*alive) ended_(ending, detail);
  });
}

// The transport, made last, goes first: it takes the queues from the devices.
void Machine::destroy_instances() {
  while (!instances_.empty()) {
    Instance& instance = instances_.back();
    if (instance.device) {
      const CrashReport crash(instance.host.name(), "while it was destroyed");
      instance.ops.destroy(instance.device);
    }
    around_.console.detach(instance.host.name());
    if (around_.control) around_.control->remove_all_of(instance.host.name());
    instances_.pop_back();
  }
}

}  // namespace vmm
