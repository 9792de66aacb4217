// SPDX-License-Identifier: Apache-2.0
// Bare guests of a few instructions on /dev/kvm: accesses to the buses, interrupts, pausing and stopping of vCPUs.
#include <doctest/doctest.h>

#include <sys/eventfd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <thread>

#include "boot/entry.hpp"
#include "boot/layout.hpp"
#include "bus/bus.hpp"
#include "irq/gsi_routing.hpp"
#include "kvm/vcpus.hpp"

using namespace vmm;
using namespace std::chrono_literals;

namespace {

// Every wait in here ends.
bool within(std::chrono::milliseconds limit, const std::function<bool()>& condition) {
  const auto end = std::chrono::steady_clock::now() + limit;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(1ms);
  }
  return true;
}

constexpr auto kLimit = 10s;  // the machine may be busy
constexpr uint16_t kCode = 0x1000;
constexpr uint64_t kMmio = 0xd000'0000;

// 2 MiB of memory at 0.
struct Machine {
  Kvm kvm;
  KvmVm vm;
  GuestMemory memory;

  static constexpr uint64_t kPages = 512;

  static Machine create() {
    auto kvm = Kvm::open();
    REQUIRE_MESSAGE(kvm.ok(), kvm.error().message);
    auto vm = KvmVm::create(*kvm);
    REQUIRE_MESSAGE(vm.ok(), vm.error().message);
    auto memory = GuestMemory::create({.size_bytes = kPages * kPageSize});
    REQUIRE_MESSAGE(memory.ok(), memory.error().message);
    Machine machine{std::move(*kvm), std::move(*vm), std::move(*memory)};
    REQUIRE(machine.vm.set_memory_slot(0, machine.region()).ok());
    return machine;
  }

  const GuestMemory::Region& region() const { return memory.regions().front(); }
  void write(uint64_t address, std::initializer_list<uint8_t> bytes) {
    REQUIRE(memory.write(GuestAddress{address}, bytes.begin(), bytes.size()));
  }
  template <typename T>
  T load(uint64_t address) const {
    return memory.load<T>(GuestAddress{address}).value();
  }
};

// Real mode, flat at 0, a stack below 64 KiB.
void enter_real_mode(KvmVcpu& vcpu, uint16_t ip) {
  auto sregs = vcpu.get<kvm_sregs>();
  REQUIRE(sregs.ok());
  for (kvm_segment* segment : {&sregs->cs, &sregs->ds, &sregs->es, &sregs->ss}) {
    segment->base = 0;
    segment->selector = 0;
  }
  REQUIRE(vcpu.set(*sregs).ok());
  kvm_regs regs{};
  regs.rip = ip;
  regs.rsp = 0xfff0;
  regs.rflags = 2;
  REQUIRE(vcpu.set(regs).ok());
}

void enter_kernel(Machine& machine, KvmVcpu& vcpu, BootProtocol protocol) {
  KernelImage kernel;
  kernel.protocol = protocol;
  kernel.entry = kernel.start = kernel.end = GuestAddress{kCode};
  const auto entry = prepare_entry(machine.memory, kernel, {});
  REQUIRE_MESSAGE(entry.ok(), entry.error().message);
  REQUIRE(vcpu.apply_entry(*entry).ok());
}

void enter_long_mode(Machine& machine, KvmVcpu& vcpu) { enter_kernel(machine, vcpu, BootProtocol::linux64); }

// What vCPUs write to port 0x10 (bytes), to 0xd0000000 (anything), and why they stopped.
struct Observer {
  Bus pio{BusSpace::pio};
  Bus mmio{BusSpace::mmio};
  std::mutex mutex;
  std::string bytes;
  std::vector<std::pair<uint64_t, uint64_t>> mmio_writes;
  std::atomic<uint64_t> accesses{0};
  std::atomic<bool> stopped{false};
  std::optional<VcpuStop> stop;
  Bus::Claim port;
  Bus::Claim window;

  Observer() {
    auto port_claim = pio.claim(0x10, 4, "port",
                                {[](void* context, uint64_t, void* data, uint32_t size_bytes) {
                                   ++static_cast<Observer*>(context)->accesses;
                                   std::memset(data, 0x5a, size_bytes);
                                 },
                                 [](void* context, uint64_t, const void* data, uint32_t size_bytes) {
                                   auto& self = *static_cast<Observer*>(context);
                                   std::lock_guard lock(self.mutex);
                                   ++self.accesses;
                                   self.bytes.append(static_cast<const char*>(data), size_bytes);
                                 },
                                 this});
    port = std::move(*port_claim);
    auto window_claim = mmio.claim(kMmio, 0x1000, "window",
                                   {[](void*, uint64_t offset, void* data, uint32_t size_bytes) {
                                      const uint64_t value = 0x1122'3344'5566'7700 + offset;
                                      std::memcpy(data, &value, size_bytes);
                                    },
                                    [](void* context, uint64_t offset, const void* data, uint32_t size_bytes) {
                                      auto& self = *static_cast<Observer*>(context);
                                      std::lock_guard lock(self.mutex);
                                      uint64_t value = 0;
                                      std::memcpy(&value, data, size_bytes);
                                      self.mmio_writes.emplace_back(offset, value);
                                    },
                                    this});
    window = std::move(*window_claim);
  }

  std::function<void(const VcpuStop&)> on_stop() {
    return [this](const VcpuStop& why) {
      stop = why;
      stopped = true;
    };
  }
  bool wait_stopped() {
    return within(kLimit, [&] { return stopped.load(); });
  }
  std::string seen() {
    std::lock_guard lock(mutex);
    return bytes;
  }
};

std::vector<KvmVcpu> vcpus_of(const Machine& machine, uint32_t count) {
  auto vcpus = create_vcpus(machine.kvm, machine.vm, {.count = count});
  REQUIRE_MESSAGE(vcpus.ok(), vcpus.error().message);
  return std::move(*vcpus);
}

// Of a machine without irqchip, where HLT comes to us.
std::vector<KvmVcpu> bare_vcpu_of(const Machine& machine) {
  auto vcpu = KvmVcpu::create(machine.kvm, machine.vm, 0);
  REQUIRE_MESSAGE(vcpu.ok(), vcpu.error().message);
  REQUIRE(vcpu->set_cpuid(*machine.kvm.supported_cpuid()).ok());
  std::vector<KvmVcpu> vcpus;
  vcpus.push_back(std::move(*vcpu));
  return vcpus;
}

double milliseconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

TEST_CASE("a device that is missing or is not KVM") {
  auto missing = Kvm::open("/nonexistent/kvm");
  REQUIRE(!missing.ok());
  CHECK(missing.error().message ==
        "/nonexistent/kvm: No such file or directory: turn on virtualisation in the firmware, then load the module "
        "kvm_intel or kvm_amd");
  auto other = Kvm::open("/dev/null");
  REQUIRE(!other.ok());
  CHECK(other.error().message == "/dev/null: not a KVM device");
}

TEST_CASE("MSRs are named") {
  CHECK(msr_name(0x10a) == "MSR 0x10a (IA32_ARCH_CAPABILITIES)");
  CHECK(msr_name(0x12345) == "MSR 0x12345");
}

TEST_CASE("the number of vCPUs is checked") {
  auto kvm = Kvm::open();
  REQUIRE(kvm.ok());
  CHECK(kvm->check_vcpu_count(1).ok());
  for (const uint32_t count : {0u, 1000u}) {
    const auto result = kvm->check_vcpu_count(count);
    REQUIRE(!result.ok());
    CHECK(result.error().message.starts_with("vCPUs: " + std::to_string(count) + " asked for: 1 to "));
  }
}

TEST_CASE("real mode: port output by string and by byte, input, halt") {
  Machine machine = Machine::create();
  Observer observer;
  machine.write(0x500, {'h', 'e', 'l', 'l', 'o'});
  machine.write(kCode, {0xbe, 0x00, 0x05,        // mov si, 0x500
                        0xb9, 0x05, 0x00,        // mov cx, 5
                        0xba, 0x10, 0x00,        // mov dx, 0x10
                        0xf3, 0x6e,              // rep outsb
                        0xec,                    // in al, dx
                        0xa2, 0x00, 0x06,        // mov [0x600], al
                        0xba, 0x99, 0x00,        // mov dx, 0x99: nobody's
                        0xed,                    // in ax, dx
                        0xa3, 0x02, 0x06,        // mov [0x602], ax
                        0xb0, '!',  0xe6, 0x10,  // mov al, '!'; out 0x10, al
                        0xf4});                  // hlt
  auto vcpus = bare_vcpu_of(machine);
  enter_real_mode(vcpus[0], kCode);
  Vcpus running(std::move(vcpus), observer.pio, observer.mmio, observer.on_stop());
  CHECK(running.state(0) == VcpuState::created);
  CHECK(running.first_entry_ns() == 0);
  REQUIRE(running.start().ok());
  REQUIRE(observer.wait_stopped());
  CHECK(observer.stop->reason == StopReason::halt);
  CHECK(observer.seen() == "hello!");
  CHECK(machine.load<uint8_t>(0x600) == 0x5a);
  CHECK(machine.load<uint16_t>(0x602) == 0xffff);
  CHECK(running.first_entry_ns() > 0);
  running.stop_all();
  CHECK(running.state(0) == VcpuState::stopped);
}

TEST_CASE("long mode: MMIO of every size") {
  Machine machine = Machine::create();
  Observer observer;
  machine.write(kCode, {0xbb, 0x00, 0x00, 0x00, 0xd0,                    // mov ebx, 0xd0000000
                        0xc6, 0x03, 0x01,                                // mov byte [rbx], 1
                        0x66, 0xc7, 0x43, 0x02, 0x02, 0x02,              // mov word [rbx+2], 0x202
                        0xc7, 0x43, 0x04, 4,    4,    4,    4,           // mov dword [rbx+4], 0x4040404
                        0x48, 0x89, 0x73, 0x08,                          // mov [rbx+8], rsi
                        0x48, 0x8b, 0x43, 0x10,                          // mov rax, [rbx+0x10]
                        0x48, 0x89, 0x04, 0x25, 0x00, 0x06, 0x00, 0x00,  // mov [0x600], rax
                        0xf4});                                          // hlt
  auto vcpus = bare_vcpu_of(machine);
  enter_long_mode(machine, vcpus[0]);
  Vcpus running(std::move(vcpus), observer.pio, observer.mmio, observer.on_stop());
  REQUIRE(running.start().ok());
  REQUIRE(observer.wait_stopped());
  CHECK_MESSAGE(observer.stop->reason == StopReason::halt, observer.stop->message);
  const std::vector<std::pair<uint64_t, uint64_t>> expected{
      {0, 1}, {2, 0x202}, {4, 0x404'0404}, {8, layout::kBootInfo.value}};
  CHECK(observer.mmio_writes == expected);
  CHECK(machine.load<uint64_t>(0x600) == 0x1122'3344'5566'7710);
}

TEST_CASE("protected mode without paging, as PVH enters") {
  Machine machine = Machine::create();
  Observer observer;
  machine.write(kCode, {0x89, 0xd8,                    // mov eax, ebx
                        0xa3, 0x00, 0x06, 0x00, 0x00,  // mov [0x600], eax
                        0xf4});                        // hlt
  auto vcpus = bare_vcpu_of(machine);
  enter_kernel(machine, vcpus[0], BootProtocol::pvh);
  Vcpus running(std::move(vcpus), observer.pio, observer.mmio, observer.on_stop());
  REQUIRE(running.start().ok());
  REQUIRE(observer.wait_stopped());
  CHECK_MESSAGE(observer.stop->reason == StopReason::halt, observer.stop->message);
  CHECK(machine.load<uint32_t>(0x600) == layout::kBootInfo.value);
}

TEST_CASE("a triple fault is a reset, and the VM can be started again") {
  Machine machine = Machine::create();
  Observer observer;
  machine.write(kCode, {0x0f, 0x0b});  // ud2, and no interrupt table
  auto vcpus = bare_vcpu_of(machine);
  enter_long_mode(machine, vcpus[0]);
  Vcpus running(std::move(vcpus), observer.pio, observer.mmio, observer.on_stop());
  REQUIRE(running.start().ok());
  REQUIRE(observer.wait_stopped());
  CHECK_MESSAGE(observer.stop->reason == StopReason::reset, observer.stop->message);
  CHECK(observer.stop->vcpu_id == 0);
  CHECK(!running.pause_all());  // stopped, not paused

  running.stop_all();
  observer.stopped = false;
  machine.write(kCode, {0xf4});
  enter_long_mode(machine, running.vcpu(0));
  REQUIRE(running.start().ok());
  REQUIRE(observer.wait_stopped());
  CHECK_MESSAGE(observer.stop->reason == StopReason::halt, observer.stop->message);
}

TEST_CASE("a spinning vCPU pauses, resumes and stops") {
  Machine machine = Machine::create();
  REQUIRE(machine.vm.create_irqchip().ok());
  Observer observer;
  machine.write(kCode, {0xff, 0x06, 0x00, 0x06,  // inc word [0x600]
                        0xeb, 0xfa});            // jmp to it
  auto vcpus = vcpus_of(machine, 1);
  enter_real_mode(vcpus[0], kCode);
  Vcpus running(std::move(vcpus), observer.pio, observer.mmio, observer.on_stop());
  REQUIRE(running.start().ok());
  const auto counter = [&] {
    return std::atomic_ref(*reinterpret_cast<uint16_t*>(machine.region().host + 0x600)).load();
  };
  REQUIRE(within(kLimit, [&] { return counter() > 0; }));

  double worst_ms = 0;
  for (int round = 0; round < 10; ++round) {
    const auto start = std::chrono::steady_clock::now();
    REQUIRE(running.pause_all());
    worst_ms = std::max(worst_ms, milliseconds_since(start));
    CHECK(running.state(0) == VcpuState::paused);
    const uint16_t at_pause = counter();
    std::this_thread::sleep_for(2ms);
    CHECK(counter() == at_pause);
    CHECK(running.pause_all());  // again: nothing to do
    running.resume_all();
    REQUIRE(within(kLimit, [&] { return counter() != at_pause; }));
  }
  MESSAGE("longest pause_all of a spinning vCPU: ", worst_ms, " ms");
  CHECK(worst_ms < 2000);
  const auto start = std::chrono::steady_clock::now();
  running.stop_all();
  CHECK(milliseconds_since(start) < 2000);
  CHECK(running.state(0) == VcpuState::stopped);
  CHECK(!observer.stopped);  // asked for, so nobody is told
}

TEST_CASE("pausing completes the access that was under way") {
  Machine machine = Machine::create();
  REQUIRE(machine.vm.create_irqchip().ok());
  Observer observer;
  machine.write(kCode, {0xe4, 0x10,        // in al, 0x10
                        0xa2, 0x00, 0x06,  // mov [0x600], al
                        0x30, 0xc0,        // xor al, al
                        0xeb, 0xf7});      // jmp to the start
  auto vcpus = vcpus_of(machine, 1);
  enter_real_mode(vcpus[0], kCode);
  Vcpus running(std::move(vcpus), observer.pio, observer.mmio, observer.on_stop());
  REQUIRE(running.start().ok());
  for (int round = 0; round < 20; ++round) {
    const uint64_t before = observer.accesses;
    REQUIRE(within(kLimit, [&] { return observer.accesses > before; }));
    REQUIRE(running.pause_all());
    const auto regs = running.vcpu(0).get<kvm_regs>();
    REQUIRE(regs.ok());
    // Never past the exit with the old al: either still before the input, or with what it read.
    const bool has_read = regs->rip == kCode + 2 || regs->rip == kCode + 5;
    CHECK((regs->rax & 0xff) == (has_read ? 0x5a : 0));
    // The state is whole: written back, it goes on.
    REQUIRE(running.vcpu(0).set(*regs).ok());
    running.resume_all();
  }
  running.stop_all();
  CHECK(machine.load<uint8_t>(0x600) == 0x5a);
}

TEST_CASE("a pause that comes while a handler runs leaves nothing pending") {
  Machine machine = Machine::create();
  REQUIRE(machine.vm.create_irqchip().ok());
  Observer observer;
  struct Gate {
    std::atomic<bool> entered{false};
    std::atomic<bool> open{false};
  } gate;
  auto claim = observer.pio.claim(0x30, 1, "gate",
                                  {[](void* context, uint64_t, void* data, uint32_t size_bytes) {
                                     auto& self = *static_cast<Gate*>(context);
                                     self.entered = true;
                                     within(kLimit, [&] { return self.open.load(); });
                                     std::memset(data, 0x77, size_bytes);
                                   },
                                   nullptr, &gate});
  REQUIRE(claim.ok());
  machine.write(kCode, {0xe4, 0x30,    // in al, 0x30
                        0xeb, 0xfe});  // jmp $
  auto vcpus = vcpus_of(machine, 1);
  enter_real_mode(vcpus[0], kCode);
  Vcpus running(std::move(vcpus), observer.pio, observer.mmio, observer.on_stop());
  REQUIRE(running.start().ok());
  REQUIRE(within(kLimit, [&] { return gate.entered.load(); }));
  bool paused = false;
  std::thread pausing([&] { paused = running.pause_all(); });
  std::this_thread::sleep_for(20ms);
  CHECK(running.state(0) == VcpuState::running);
  gate.open = true;
  pausing.join();
  REQUIRE(paused);
  const auto regs = running.vcpu(0).get<kvm_regs>();
  REQUIRE(regs.ok());
  CHECK(regs->rip == kCode + 2);
  CHECK((regs->rax & 0xff) == 0x77);
}

TEST_CASE("an instruction that KVM cannot emulate stops the VM with its bytes") {
  Machine machine = Machine::create();
  Observer observer;
  machine.write(kCode, {0xbb, 0x00, 0x00, 0x00, 0xd0,  // mov ebx, 0xd0000000
                        0xd9, 0x03});                  // fld dword [rbx]
  auto vcpus = bare_vcpu_of(machine);
  enter_long_mode(machine, vcpus[0]);
  Vcpus running(std::move(vcpus), observer.pio, observer.mmio, observer.on_stop());
  REQUIRE(running.start().ok());
  REQUIRE(observer.wait_stopped());
  CHECK(observer.stop->reason == StopReason::emulation_failed);
  CHECK(observer.stop->message.starts_with("vCPU 0 at rip 0x1005: KVM internal error, suberror 1"));
  CHECK(observer.stop->message.find("d9 03") != std::string::npos);
  MESSAGE(observer.stop->message);
}

TEST_CASE("an irqfd interrupts a halted vCPU, by line and by message") {
  Machine machine = Machine::create();
  REQUIRE(machine.vm.create_irqchip().ok());
  Observer observer;
  // Vectors 0x20 + 5 (the PIC's line 5) and 0x40 (the message): count to a port, so that the bus sees them.
  machine.write(0x25 * 4, {0x00, 0x18, 0, 0});
  machine.write(0x40 * 4, {0x00, 0x19, 0, 0});
  machine.write(0x1800, {0xb0, 'L', 0xe6, 0x10,   // mov al, 'L'; out 0x10, al
                         0xb0, 0x20, 0xe6, 0x20,  // end of interrupt to the PIC
                         0xcf});                  // iret
  machine.write(0x1900, {0xb0, 'M', 0xe6, 0x10, 0xcf});
  machine.write(kCode, {0xb0, 0x11, 0xe6, 0x20,  // PIC: initialise
                        0xb0, 0x20, 0xe6, 0x21,  // vectors from 0x20
                        0xb0, 0x04, 0xe6, 0x21,  // a slave at line 2
                        0xb0, 0x01, 0xe6, 0x21,  // 8086 mode
                        0xb0, 0xdf, 0xe6, 0x21,  // only line 5 open
                        0xb0, 'R',  0xe6, 0x10,  // ready
                        0xfb,                    // sti
                        0xf4,                    // hlt
                        0xeb, 0xfd});            // jmp to hlt
  auto vcpus = vcpus_of(machine, 1);
  enter_real_mode(vcpus[0], kCode);
  // Software-enable the APIC, so that it takes messages.
  auto apic = vcpus[0].get<kvm_lapic_state>();
  REQUIRE(apic.ok());
  const uint32_t spurious = 0x1ff;
  std::memcpy(apic->regs + 0xf0, &spurious, sizeof spurious);
  REQUIRE(vcpus[0].set(*apic).ok());

  GsiRouting routing(machine.vm);
  Fd line(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  Fd message(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  const auto gsi = routing.allocate();
  REQUIRE(gsi.ok());
  CHECK(*gsi == 24);
  REQUIRE(machine.vm.add_irqfd(line.get(), 5).ok());
  REQUIRE(machine.vm.add_irqfd(message.get(), *gsi).ok());
  Vcpus running(std::move(vcpus), observer.pio, observer.mmio, observer.on_stop());
  REQUIRE(running.start().ok());
  REQUIRE(within(kLimit, [&] { return observer.seen() == "R"; }));

  const auto signal = [](const Fd& fd) { return ::eventfd_write(fd.get(), 1) == 0; };
  REQUIRE(signal(line));
  CHECK(within(kLimit, [&] { return observer.seen() == "RL"; }));
  REQUIRE(signal(message));  // no message yet: dropped, but by a worker of the kernel
  std::this_thread::sleep_for(50ms);
  REQUIRE(routing.set(*gsi, MsiMessage{0xfee0'0000, 0x40}).ok());
  REQUIRE(signal(message));
  CHECK(within(kLimit, [&] { return observer.seen() == "RLM"; }));
  REQUIRE(signal(line));  // the lines are still routed
  CHECK(within(kLimit, [&] { return observer.seen() == "RLML"; }));
  REQUIRE(machine.vm.signal_msi({0xfee0'0000, 0x40}).ok());
  CHECK(within(kLimit, [&] { return observer.seen() == "RLMLM"; }));
  REQUIRE(machine.vm.pulse_irq(5).ok());
  CHECK(within(kLimit, [&] { return observer.seen() == "RLMLML"; }));

  REQUIRE(routing.set(*gsi, std::nullopt).ok());
  REQUIRE(signal(message));
  REQUIRE(machine.vm.remove_irqfd(line.get(), 5).ok());
  REQUIRE(signal(line));
  std::this_thread::sleep_for(50ms);
  CHECK(observer.seen() == "RLMLML");
}

TEST_CASE("GSIs for messages") {
  Machine machine = Machine::create();
  REQUIRE(machine.vm.create_irqchip().ok());
  GsiRouting routing(machine.vm);
  CHECK(*routing.allocate() == 24);
  CHECK(*routing.allocate() == 25);
  CHECK(*routing.allocate() == 26);
  CHECK(!routing.set(27, MsiMessage{0xfee0'0000, 0x30}).ok());
  CHECK(!routing.set(4, MsiMessage{0xfee0'0000, 0x30}).ok());
  {
    GsiRouting::Batch batch(routing);
    for (uint32_t gsi = 24; gsi < 27; ++gsi) CHECK(routing.set(gsi, MsiMessage{0xfee0'0000, gsi}).ok());
    CHECK(batch.commit().ok());
  }
  CHECK(routing.free(25).ok());
  CHECK(!routing.free(25).ok());
  CHECK(*routing.allocate() == 25);
}

TEST_CASE("an ioeventfd takes matching writes out of the guest's way") {
  Machine machine = Machine::create();
  REQUIRE(machine.vm.create_irqchip().ok());
  Observer observer;
  machine.write(kCode, {0xbb, 0x00, 0x00, 0x00, 0xd0,     // mov ebx, 0xd0000000
                        0xc7, 0x03, 7,    0,    0,    0,  // mov dword [rbx], 7
                        0xc7, 0x03, 8,    0,    0,    0,  // mov dword [rbx], 8
                        0xb8, 1,    0,    0,    0,        // mov eax, 1
                        0xe7, 0x10,                       // out 0x10, eax
                        0xe6, 0x10,                       // out 0x10, al
                        0xeb, 0xfe});                     // jmp $
  auto vcpus = vcpus_of(machine, 1);
  enter_long_mode(machine, vcpus[0]);
  Fd seven(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  Fd port(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  const IoEvent mmio_seven{BusSpace::mmio, kMmio, 4, 7};
  const IoEvent port_dword{BusSpace::pio, 0x10, 4, {}};
  REQUIRE(machine.vm.add_io_event(mmio_seven, seven.get()).ok());
  REQUIRE(machine.vm.add_io_event(port_dword, port.get()).ok());
  CHECK(!machine.vm.add_io_event(mmio_seven, port.get()).ok());  // taken
  CHECK(!machine.vm.add_io_event({BusSpace::mmio, kMmio, 3, {}}, port.get()).ok());
  Vcpus running(std::move(vcpus), observer.pio, observer.mmio, observer.on_stop());
  REQUIRE(running.start().ok());
  REQUIRE(within(kLimit, [&] { return observer.seen() == std::string(1, '\1'); }));
  uint64_t count = 0;
  CHECK(::eventfd_read(seven.get(), &count) == 0);
  CHECK(count == 1);
  CHECK(::eventfd_read(port.get(), &count) == 0);
  CHECK(count == 1);
  const std::vector<std::pair<uint64_t, uint64_t>> expected{{0, 8}};
  CHECK(observer.mmio_writes == expected);
  running.stop_all();
  CHECK(machine.vm.remove_io_event(mmio_seven, seven.get()).ok());
  CHECK(!machine.vm.remove_io_event(mmio_seven, seven.get()).ok());
}

TEST_CASE("four vCPUs: three wait for SIPI, and all pause and stop") {
  Machine machine = Machine::create();
  REQUIRE(machine.vm.create_irqchip().ok());
  Observer observer;
  // The others start at page 2 (SIPI vector), and report their APIC id.
  machine.write(0x2000, {0x66, 0xb8, 1, 0, 0, 0,  // mov eax, 1
                         0x0f, 0xa2,              // cpuid
                         0x66, 0xc1, 0xeb, 24,    // shr ebx, 24
                         0x88, 0xd8, 0xe6, 0x10,  // mov al, bl; out 0x10, al
                         0xeb, 0xfe});            // jmp $
  machine.write(kCode, {0xb0, 'B', 0xe6, 0x10, 0xeb, 0xfe});
  auto vcpus = vcpus_of(machine, 4);
  for (size_t i = 0; i < 4; ++i) {
    const auto state = vcpus[i].get<kvm_mp_state>();
    REQUIRE(state.ok());
    CHECK(state->mp_state == (i == 0 ? KVM_MP_STATE_RUNNABLE : KVM_MP_STATE_UNINITIALIZED));
  }
  enter_real_mode(vcpus[0], kCode);
  Vcpus running(std::move(vcpus), observer.pio, observer.mmio, observer.on_stop());
  REQUIRE(running.start().ok());
  REQUIRE(within(kLimit, [&] { return observer.seen() == "B"; }));
  REQUIRE(running.pause_all());
  for (size_t i = 0; i < 4; ++i) CHECK(running.state(i) == VcpuState::paused);
  // INIT and SIPI to all but self, as a message (Intel SDM vol. 3, §11.11): logical ids are not set up, so one by one.
  running.resume_all();
  for (uint64_t id = 1; id < 4; ++id) {
    REQUIRE(machine.vm.signal_msi({0xfee0'0000 | id << 12, 0x4500}).ok());
    REQUIRE(machine.vm.signal_msi({0xfee0'0000 | id << 12, 0x4602}).ok());
    REQUIRE(within(kLimit, [&] { return observer.seen().size() == 1 + id; }));
    CHECK(observer.seen().back() == static_cast<char>(id));
  }
  const auto start = std::chrono::steady_clock::now();
  REQUIRE(running.pause_all());
  CHECK(milliseconds_since(start) < 4000);
  running.resume_all();
  running.stop_all();
  for (size_t i = 0; i < 4; ++i) CHECK(running.state(i) == VcpuState::stopped);
}

TEST_CASE("the state of a vCPU and of the chips can be read and written back") {
  Machine machine = Machine::create();
  REQUIRE(machine.vm.create_irqchip().ok());
  auto vcpus = vcpus_of(machine, 1);
  const KvmVcpu& vcpu = vcpus[0];
  const auto same = [&]<typename State>(State) {
    const auto state = vcpu.get<State>();
    REQUIRE_MESSAGE(state.ok(), state.error().message);
    const auto result = vcpu.set(*state);
    REQUIRE_MESSAGE(result.ok(), result.error().message);
    const auto again = vcpu.get<State>();
    REQUIRE(again.ok());
    CHECK(std::memcmp(&*state, &*again, sizeof(State)) == 0);
  };
  same(kvm_regs{});
  same(kvm_sregs{});
  same(kvm_xcrs{});
  same(kvm_lapic_state{});
  same(kvm_vcpu_events{});
  same(kvm_mp_state{});
  same(kvm_debugregs{});

  const auto xsave = vcpu.xsave();
  REQUIRE(xsave.ok());
  CHECK(xsave->size() >= 4096);
  CHECK(vcpu.set_xsave(*xsave).ok());
  CHECK(!vcpu.set_xsave(std::span(*xsave).first(100)).ok());

  const auto indices = machine.kvm.msr_indices();
  REQUIRE(indices.ok());
  const auto msrs = vcpu.msrs(*indices);
  REQUIRE(msrs.ok());
  CHECK(msrs->size() > 20);
  CHECK(vcpu.set_msrs(*msrs).ok());
  const uint32_t default_type = 0x2ff;
  const auto mtrr = vcpu.msrs(std::span(&default_type, 1));
  REQUIRE(mtrr.ok());
  REQUIRE(mtrr->size() == 1);
  CHECK(mtrr->front().data == 0x806);

  const auto apic = vcpu.get<kvm_lapic_state>();
  REQUIRE(apic.ok());
  uint32_t lint[2];
  std::memcpy(&lint[0], apic->regs + 0x350, 4);
  std::memcpy(&lint[1], apic->regs + 0x360, 4);
  CHECK(lint[0] == 0x700);
  CHECK(lint[1] == 0x400);

  const auto cpuid = vcpu.cpuid();
  REQUIRE(cpuid.ok());
  CHECK(cpuid->size() > 10);
  CHECK(vcpu.set_cpuid(*cpuid).ok());
  CHECK(vcpu.tsc_khz().ok());

  for (const Irqchip chip : {Irqchip::pic_master, Irqchip::pic_slave, Irqchip::ioapic}) {
    const auto state = machine.vm.irqchip(chip);
    REQUIRE(state.ok());
    CHECK(machine.vm.set_irqchip(*state).ok());
  }
  const auto pit = machine.vm.pit();
  REQUIRE(pit.ok());
  CHECK(machine.vm.set_pit(*pit).ok());
  auto clock = machine.vm.clock();
  REQUIRE(clock.ok());
  clock->flags = 0;
  clock->clock += 1'000'000'000'000;
  REQUIRE(machine.vm.set_clock(*clock).ok());
  CHECK(machine.vm.clock()->clock >= clock->clock);
}

TEST_CASE("a refused MSR is left out and the others are set") {
  Machine machine = Machine::create();
  REQUIRE(machine.vm.create_irqchip().ok());
  auto vcpus = vcpus_of(machine, 2);
  // Of vCPU 1, which does not warn.
  const kvm_msr_entry entries[] = {{0x174, 0, 0x10}, {0x4b56'4dff, 0, 1}, {0x175, 0, 0x1234}};
  REQUIRE(vcpus[1].set_msrs(entries).ok());
  const uint32_t indices[] = {0x174, 0x4b56'4dff, 0x175};
  const auto read = vcpus[1].msrs(indices);
  REQUIRE(read.ok());
  REQUIRE(read->size() == 2);
  CHECK((*read)[0].data == 0x10);
  CHECK((*read)[1].data == 0x1234);
}

TEST_CASE("the dirty log tells which pages were written") {
  Machine machine = Machine::create();
  Observer observer;
  REQUIRE(machine.vm.set_memory_slot(0, machine.region(), KVM_MEM_LOG_DIRTY_PAGES).ok());
  machine.write(kCode, {0xa2, 0x00, 0x30,  // mov [0x3000], al
                        0xa2, 0x00, 0x70,  // mov [0x7000], al
                        0xf4});            // hlt
  auto vcpus = bare_vcpu_of(machine);
  enter_real_mode(vcpus[0], kCode);
  Vcpus running(std::move(vcpus), observer.pio, observer.mmio, observer.on_stop());
  REQUIRE(running.start().ok());
  REQUIRE(observer.wait_stopped());
  const auto log = machine.vm.dirty_log(0, Machine::kPages);
  REQUIRE(log.ok());
  CHECK(log->size() == Machine::kPages / 64);
  CHECK(log->front() == ((1u << 3) | (1u << 7)));
  if (machine.vm.dirty_log_is_manual()) REQUIRE(machine.vm.clear_dirty_log(0, 0, Machine::kPages, *log).ok());
  CHECK(machine.vm.dirty_log(0, Machine::kPages)->front() == 0);
  CHECK(!machine.vm.clear_dirty_log(0, 0, Machine::kPages + 64, *log).ok());
  CHECK(machine.vm.remove_memory_slot(0).ok());
}
