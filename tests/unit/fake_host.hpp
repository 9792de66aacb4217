// SPDX-License-Identifier: Apache-2.0
// A clone_host in memory: a plugin runs against it without KVM, and a test plays the guest and the user.
//
//   FakeHost host;                                            // 16 MiB of guest memory
//   host.offer(CLONE_VIRTQUEUE, virtqueue_service());         // services of the core, where a test needs them
//   const clone_host* handle = host.handle("serial.0");       // what the plugin is given
//   host.write<uint8_t>(CLONE_BUS_PIO, 0x3f8, 'A');           // the guest writes a port
//   host.run_main_loop();                                     // callbacks that are due
//   CHECK(host.interrupts(4) == 1);                           // pulses, rising levels and irqfd signals since the last
//   ask
#pragma once

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "clone/abi/acpi.h"
#include "clone/abi/bus.h"
#include "clone/abi/console.h"
#include "clone/abi/control.h"
#include "clone/abi/irq.h"
#include "clone/abi/loop.h"
#include "clone/abi/machine.h"
#include "clone/abi/memory.h"
#include "clone/sdk/error.hpp"
#include "clone/sdk/fd.hpp"
#include "memory/guest_memory.hpp"
#include "plugin/host_context.hpp"

namespace vmm::test {

// True when the descriptor is readable now; an eventfd is then drained.
inline bool take_event(int fd, uint64_t* count = nullptr) {
  pollfd entry{fd, POLLIN, 0};
  uint64_t value = 0;
  if (::poll(&entry, 1, 0) != 1 || ::read(fd, &value, sizeof value) != sizeof value) return false;
  if (count) *count += value;
  return true;
}
inline void signal_event(int fd) {
  const uint64_t one = 1;
  if (::write(fd, &one, sizeof one) != sizeof one) throw std::runtime_error("eventfd write failed");
}

// A poll(2) loop. Callbacks run under a lock, so that remove_fd() waits for one that runs on another thread.
class FakeLoop {
 public:
  struct Source {
    uint32_t events;
    void (*ready)(void* context, uint32_t events);
    void* context;
  };

  FakeLoop() : wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}
  ~FakeLoop() { stop(); }

  void start_thread() {
    thread_ = std::thread([this] {
      while (!stopping_) run_once(-1);
    });
  }
  void stop() {
    stopping_ = true;
    signal_event(wake_.get());
    if (thread_.joinable()) thread_.join();
  }

  bool add(int fd, Source source) {
    std::lock_guard lock(mutex_);
    const bool added = sources_.emplace(fd, source).second;
    signal_event(wake_.get());
    return added;
  }
  bool change(int fd, uint32_t events) {
    std::lock_guard lock(mutex_);
    const auto found = sources_.find(fd);
    if (found == sources_.end()) return false;
    found->second.events = events;
    signal_event(wake_.get());
    return true;
  }
  void remove(int fd) {
    std::lock_guard lock(mutex_);
    sources_.erase(fd);
  }
  void post(void (*call)(void*), void* context) {
    std::lock_guard lock(posts_mutex_);
    posts_.emplace_back(call, context);
    signal_event(wake_.get());
  }

  // Waits up to timeout_ms and runs what is due; the number of callbacks that ran.
  int run_once(int timeout_ms) {
    std::vector<pollfd> entries{{wake_.get(), POLLIN, 0}};
    {
      std::lock_guard lock(mutex_);
      for (const auto& [fd, source] : sources_)
        entries.push_back({fd,
                           static_cast<short>((source.events & CLONE_READABLE ? POLLIN : 0) |
                                              (source.events & CLONE_WRITABLE ? POLLOUT : 0)),
                           0});
    }
    if (::poll(entries.data(), entries.size(), timeout_ms) <= 0) return 0;
    int ran = 0;
    if (entries[0].revents) {
      uint64_t ignored;
      if (::read(wake_.get(), &ignored, sizeof ignored) < 0) return 0;
    }
    std::deque<std::pair<void (*)(void*), void*>> posts;
    {
      std::lock_guard lock(posts_mutex_);
      posts.swap(posts_);
    }
    for (const auto& [call, context] : posts) {
      call(context);
      ++ran;
    }
    for (size_t i = 1; i < entries.size(); ++i) {
      if (!entries[i].revents) continue;
      std::lock_guard lock(mutex_);
      const auto found = sources_.find(entries[i].fd);
      if (found == sources_.end()) continue;
      const Source source = found->second;
      const short seen = entries[i].revents;
      source.ready(source.context, (seen & POLLIN ? CLONE_READABLE : 0u) | (seen & POLLOUT ? CLONE_WRITABLE : 0u) |
                                       (seen & (POLLHUP | POLLERR) ? CLONE_HANGUP : 0u));
      ++ran;
    }
    return ran;
  }

 private:
  clone_sdk::Fd wake_;
  std::recursive_mutex mutex_;
  std::map<int, Source> sources_;
  std::mutex posts_mutex_;
  std::deque<std::pair<void (*)(void*), void*>> posts_;
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

class FakeHost {
 public:
  struct AcpiNode {
    std::string owner, hid, cid;
    std::vector<clone_acpi_resource> resources;
  };

  explicit FakeHost(uint64_t memory_bytes = 16ull << 20) : memory_(make_memory(memory_bytes)) {}
  FakeHost(const FakeHost&) = delete;

  // The handle of one instance, made on the first ask; lasts as long as the FakeHost.
  const clone_host* handle(const std::string& name = "test.0") {
    auto& slot = handles_[name];
    if (!slot) {
      slot = std::make_unique<Handle>();
      slot->memory = &memory_;
      slot->fake = this;
      slot->name = name;
      slot->host = {sizeof(clone_host), CLONE_ABI_MAJOR, CLONE_ABI_MINOR, 0, static_cast<HostContext*>(slot.get()),
                    slot->name.c_str(), get_extension};
    }
    return &slot->host;
  }
  // A table that get_extension() finds besides, or instead of, the fake ones.
  void offer(const std::string& id, const void* table) { offered_[id] = table; }

  GuestMemory& memory() { return memory_; }

  // --- The guest's side: ports, MMIO, interrupts ---
  void bus_read(uint32_t space, uint64_t address, void* data, uint32_t size_bytes) {
    std::memset(data, 0xff, size_bytes);
    if (const auto claim = find_claim(space, address, size_bytes)) {
      std::shared_lock in_use(claim->in_use);
      claim->handler->read(claim->context, address - claim->start, data, size_bytes);
    }
  }
  void bus_write(uint32_t space, uint64_t address, const void* data, uint32_t size_bytes) {
    uint64_t value = 0;
    std::memcpy(&value, data, size_bytes);
    {
      std::lock_guard lock(mutex_);
      for (const auto& [event, fd] : ioeventfds_)
        if (event.space == space && event.address == address &&
            (event.size_bytes == 0 || event.size_bytes == size_bytes) && (!event.match || event.value == value))
          return signal_event(fd.get());
    }
    if (const auto claim = find_claim(space, address, size_bytes)) {
      std::shared_lock in_use(claim->in_use);
      claim->handler->write(claim->context, address - claim->start, data, size_bytes);
    }
  }
  template <typename T>
  T read(uint32_t space, uint64_t address) {
    T value;
    bus_read(space, address, &value, sizeof value);
    return value;
  }
  template <typename T>
  void write(uint32_t space, uint64_t address, T value) {
    bus_write(space, address, &value, sizeof value);
  }
  // How often the guest was interrupted on the line since the last call.
  uint64_t interrupts(uint32_t gsi) {
    std::lock_guard lock(mutex_);
    Line& line = lines_[gsi];
    uint64_t count = std::exchange(line.raised, 0);
    for (const auto& [number, fd] : line.irqfds) take_event(fd.get(), &count);
    return count;
  }
  bool level(uint32_t gsi) {
    std::lock_guard lock(mutex_);
    return lines_[gsi].level;
  }
  size_t claim_count() {
    std::lock_guard lock(mutex_);
    return claims_.size();
  }
  size_t ioeventfd_count() {
    std::lock_guard lock(mutex_);
    return ioeventfds_.size();
  }
  size_t irqfd_count() {
    std::lock_guard lock(mutex_);
    size_t count = 0;
    for (const auto& [gsi, line] : lines_) count += line.irqfds.size();
    return count;
  }
  // Messages sent with msi_send(): address and data.
  std::vector<std::pair<uint64_t, uint32_t>> msi_messages() {
    std::lock_guard lock(mutex_);
    return msi_messages_;
  }
  std::set<uint32_t> free_gsis = {5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23};

  // --- The main loop: runs only when a test says so ---
  // Everything that is due, at most `rounds` times; waits up to timeout_ms for the first callback.
  int run_main_loop(int timeout_ms = 0, int rounds = 100) {
    int ran = 0;
    for (int i = 0; i < rounds; ++i) {
      const int now = main_loop_.run_once(i == 0 ? timeout_ms : 0);
      if (now == 0 && i > 0) break;
      ran += now;
    }
    return ran;
  }
  // Runs the main loop until `done()`; false after timeout_ms.
  bool run_until(const std::function<bool()>& done, int timeout_ms = 5000) {
    for (int waited_ms = 0; !done(); ++waited_ms) {
      if (waited_ms >= timeout_ms) return false;
      run_main_loop(1);
    }
    return true;
  }

  // --- The user's side: console, machine, commands ---
  uint64_t type(const std::string& text) {
    return console_input_ ? console_input_(console_context_, text.data(), text.size()) : 0;
  }
  std::string console_output() {
    std::lock_guard lock(mutex_);
    return console_output_;
  }
  int console_input_wanted() const { return console_input_wanted_; }
  clone_status press_power_button() { return power_button_ ? power_button_(power_button_context_) : CLONE_EMPTY; }
  std::vector<uint32_t> machine_requests() {
    std::lock_guard lock(mutex_);
    return machine_requests_;
  }
  uint32_t vcpu_count = 1;
  // The JSON of the answer, or "error: …"; "" while it has not been answered.
  std::string call_command(const std::string& name, const std::string& json) {
    const auto found = commands_.find(name);
    if (found == commands_.end()) return "error: no such command";
    std::string answer;
    const clone_reply reply = {
        sizeof(clone_reply), 0, &answer,
        [](void* context, const char* text) { *static_cast<std::string*>(context) = text; },
        [](void* context, const char* text) { *static_cast<std::string*>(context) = std::string("error: ") + text; }};
    found->second.call(found->second.context, json.c_str(), &reply);
    return answer;
  }
  double metric(const std::string& name) { return metrics_.at(name).first(metrics_.at(name).second); }

  std::vector<AcpiNode> acpi_nodes;
  std::vector<std::byte> acpi_aml;
  clone_acpi_power acpi_power{};
  uint32_t acpi_legacy = 0;
  std::vector<std::string> log_lines() {
    std::lock_guard lock(mutex_);
    return log_lines_;
  }

 private:
  struct Handle : HostContext {
    FakeHost* fake = nullptr;
    std::string name;
    clone_host host{};
  };
  struct Claim {
    uint32_t space;
    uint64_t start, size_bytes;
    const clone_bus_handler* handler;
    void* context;
    std::string owner;
    std::shared_mutex in_use;
  };
  struct IoEvent {
    uint32_t space;
    uint64_t address;
    uint32_t size_bytes, match;
    uint64_t value;
    int fd;
    bool operator==(const IoEvent&) const = default;
  };
  struct Line {
    bool level = false;
    uint64_t raised = 0;
    std::vector<std::pair<int, clone_sdk::Fd>> irqfds;  // the caller's number, and our duplicate
  };
  struct Command {
    void (*call)(void* context, const char* json, const clone_reply* reply);
    void* context;
  };

  static GuestMemory make_memory(uint64_t size_bytes) {
    MemoryConfig config;
    config.size_bytes = size_bytes;
    auto memory = GuestMemory::create(config);
    if (!memory.ok()) throw std::runtime_error(memory.error().message);
    return std::move(memory).value();
  }
  static Handle& handle_of(const clone_host* host) {
    return *static_cast<Handle*>(static_cast<HostContext*>(host->context));
  }
  static FakeHost& of(const clone_host* host) { return *handle_of(host).fake; }
  static clone_status fail(clone_err* err, clone_status status, const std::string& message) {
    return clone_sdk::report(err, clone_sdk::Error{message, 0, status});
  }

  std::shared_ptr<Claim> find_claim(uint32_t space, uint64_t address, uint64_t size_bytes) {
    std::lock_guard lock(mutex_);
    for (const auto& [id, claim] : claims_)
      if (claim->space == space && address >= claim->start && address - claim->start < claim->size_bytes &&
          size_bytes <= claim->size_bytes - (address - claim->start))
        return claim;
    return nullptr;
  }

  static const void* get_extension(const clone_host* host, const char* id) {
    FakeHost& fake = of(host);
    if (const auto found = fake.offered_.find(id); found != fake.offered_.end()) return found->second;
    static const std::map<std::string, const void*> tables = {
        {CLONE_HOST_LOG, log_table()},         {CLONE_HOST_MEMORY, memory_table()},
        {CLONE_HOST_BUS, bus_table()},         {CLONE_HOST_IRQ, irq_table()},
        {CLONE_HOST_LOOP, loop_table()},       {CLONE_HOST_ACPI, acpi_table()},
        {CLONE_HOST_MACHINE, machine_table()}, {CLONE_HOST_CONSOLE, console_table()},
        {CLONE_HOST_CONTROL, control_table()}, {CLONE_HOST_PUBLISH, publish_table()}};
    const auto found = tables.find(id);
    return found == tables.end() ? nullptr : found->second;
  }

  static const clone_host_log* log_table() {
    static const clone_host_log table = {sizeof table, 0, [](const clone_host* host, uint32_t, const char* message) {
                                           FakeHost& fake = of(host);
                                           std::lock_guard lock(fake.mutex_);
                                           fake.log_lines_.push_back(std::string(host->name) + ": " + message);
                                         }};
    return &table;
  }

  static const clone_host_publish* publish_table() {
    static const clone_host_publish table = {
        sizeof table, 0, [](const clone_host* host, const char* id, const void* published, clone_err* err) {
          if (!of(host).offered_.emplace(id, published).second)
            return fail(err, CLONE_ERR_BUSY, std::string(id) + " is offered already");
          return CLONE_OK;
        }};
    return &table;
  }

  static const clone_host_memory* memory_table() {
    static const clone_host_memory table = {
        sizeof table,
        0,
        [](const clone_host* host) { return static_cast<uint32_t>(of(host).memory_.regions().size()); },
        [](const clone_host* host, uint32_t index, clone_memory_region* region) {
          const auto regions = of(host).memory_.regions();
          if (index >= regions.size()) return CLONE_ERR_INVALID;
          uint64_t fd_offset = 0;
          for (uint32_t i = 0; i < index; ++i) fd_offset += regions[i].size_bytes;
          *region = {region->size,
                     of(host).memory_.memfd(),
                     fd_offset,
                     regions[index].start.value,
                     regions[index].size_bytes,
                     regions[index].host};
          return CLONE_OK;
        },
        [](const clone_host* host, uint64_t address, void* into, uint64_t size_bytes) {
          return of(host).memory_.read({address}, into, size_bytes) ? CLONE_OK : CLONE_ERR_GUEST;
        },
        [](const clone_host* host, uint64_t address, const void* from, uint64_t size_bytes) {
          return of(host).memory_.write({address}, from, size_bytes) ? CLONE_OK : CLONE_ERR_GUEST;
        },
        [](const clone_host* host, uint64_t address, uint64_t size_bytes) {
          return static_cast<void*>(of(host).memory_.slice({address}, size_bytes));
        },
        [](const clone_host* host, uint64_t address, uint64_t size_bytes) {
          of(host).memory_.mark_dirty({address}, size_bytes);
        },
        [](const clone_host* host, uint64_t address, uint64_t size_bytes) {
          std::byte* start = of(host).memory_.slice({address}, size_bytes);
          if (!start || address % kPageSize || size_bytes % kPageSize) return CLONE_ERR_INVALID;
          return ::madvise(start, size_bytes, MADV_DONTNEED) == 0 ? CLONE_OK : CLONE_ERR_SYSTEM;
        }};
    return &table;
  }

  static const clone_host_bus* bus_table() {
    static const clone_host_bus table = {
        sizeof table,
        0,
        [](const clone_host* host, uint32_t space, uint64_t start, uint64_t size_bytes,
           const clone_bus_handler* handler, void* context, uint64_t* id, clone_err* err) {
          FakeHost& fake = of(host);
          if (size_bytes == 0 || start + size_bytes - 1 < start ||
              (space == CLONE_BUS_PIO && start + size_bytes > 0x10000))
            return fail(err, CLONE_ERR_INVALID, "a range that does not exist");
          std::lock_guard lock(fake.mutex_);
          for (const auto& [other_id, other] : fake.claims_)
            if (other->space == space && start < other->start + other->size_bytes && other->start < start + size_bytes)
              return fail(err, CLONE_ERR_BUSY, std::string(host->name) + ": the range belongs to " + other->owner);
          auto claim = std::make_shared<Claim>();
          claim->space = space;
          claim->start = start;
          claim->size_bytes = size_bytes;
          claim->handler = handler;
          claim->context = context;
          claim->owner = host->name;
          *id = fake.next_claim_++;
          fake.claims_.emplace(*id, std::move(claim));
          return CLONE_OK;
        },
        [](const clone_host* host, uint64_t id) {
          FakeHost& fake = of(host);
          std::shared_ptr<Claim> claim;
          {
            std::lock_guard lock(fake.mutex_);
            const auto found = fake.claims_.find(id);
            if (found == fake.claims_.end()) throw std::logic_error("release of a claim that is not there");
            claim = found->second;
            fake.claims_.erase(found);
          }
          std::unique_lock wait(claim->in_use);
        },
        [](const clone_host* host, uint64_t size_bytes, uint64_t alignment, uint64_t* start, clone_err* err) {
          FakeHost& fake = of(host);
          std::lock_guard lock(fake.mutex_);
          const uint64_t aligned = (fake.next_mmio_ + alignment - 1) & ~(alignment - 1);
          if (aligned + size_bytes > 0xf000'0000) return fail(err, CLONE_ERR_BUSY, "no MMIO window is left");
          *start = aligned;
          fake.next_mmio_ = aligned + size_bytes;
          return CLONE_OK;
        },
        [](const clone_host* host, uint32_t space, uint64_t address, uint32_t size_bytes, uint32_t match,
           uint64_t value, int32_t fd, clone_err* err) {
          FakeHost& fake = of(host);
          const IoEvent event{space, address, size_bytes, match, value, fd};
          std::lock_guard lock(fake.mutex_);
          for (const auto& [other, other_fd] : fake.ioeventfds_)
            if (other == event) return fail(err, CLONE_ERR_BUSY, "this ioeventfd is there already");
          fake.ioeventfds_.emplace_back(event, clone_sdk::Fd(::dup(fd)));
          return CLONE_OK;
        },
        [](const clone_host* host, uint32_t space, uint64_t address, uint32_t size_bytes, uint32_t match,
           uint64_t value, int32_t fd, clone_err* err) {
          FakeHost& fake = of(host);
          const IoEvent event{space, address, size_bytes, match, value, fd};
          std::lock_guard lock(fake.mutex_);
          if (std::erase_if(fake.ioeventfds_, [&](const auto& entry) { return entry.first == event; }) == 0)
            return fail(err, CLONE_ERR_NOT_FOUND, "no such ioeventfd");
          return CLONE_OK;
        }};
    return &table;
  }

  static const clone_host_irq* irq_table() {
    static const clone_host_irq table = {
        sizeof table,
        0,
        [](const clone_host* host, uint32_t wanted, uint32_t* gsi, clone_err* err) {
          FakeHost& fake = of(host);
          std::lock_guard lock(fake.mutex_);
          if (wanted == CLONE_GSI_ANY) {
            if (fake.free_gsis.empty()) return fail(err, CLONE_ERR_BUSY, "no interrupt line is left");
            wanted = *fake.free_gsis.begin();
          }
          if (fake.lines_in_use_.contains(wanted)) return fail(err, CLONE_ERR_BUSY, "the interrupt line is taken");
          fake.free_gsis.erase(wanted);
          fake.lines_in_use_.insert(wanted);
          *gsi = wanted;
          return CLONE_OK;
        },
        [](const clone_host* host, uint32_t gsi, uint32_t level) {
          FakeHost& fake = of(host);
          std::lock_guard lock(fake.mutex_);
          Line& line = fake.lines_[gsi];
          if (level && !line.level) ++line.raised;
          line.level = level != 0;
          return CLONE_OK;
        },
        [](const clone_host* host, uint32_t gsi) {
          FakeHost& fake = of(host);
          std::lock_guard lock(fake.mutex_);
          ++fake.lines_[gsi].raised;
          return CLONE_OK;
        },
        [](const clone_host* host, uint32_t gsi, int32_t fd, int32_t, clone_err*) {
          FakeHost& fake = of(host);
          std::lock_guard lock(fake.mutex_);
          fake.lines_[gsi].irqfds.emplace_back(fd, clone_sdk::Fd(::dup(fd)));
          return CLONE_OK;
        },
        [](const clone_host* host, uint32_t gsi, int32_t fd, clone_err* err) {
          FakeHost& fake = of(host);
          std::lock_guard lock(fake.mutex_);
          if (std::erase_if(fake.lines_[gsi].irqfds, [&](const auto& entry) { return entry.first == fd; }) == 0)
            return fail(err, CLONE_ERR_NOT_FOUND, "no such irqfd");
          return CLONE_OK;
        },
        [](const clone_host* host, uint32_t* gsi, clone_err*) {
          FakeHost& fake = of(host);
          std::lock_guard lock(fake.mutex_);
          *gsi = fake.next_msi_gsi_++;
          return CLONE_OK;
        },
        [](const clone_host* host, uint32_t gsi, uint64_t, uint32_t, uint32_t, clone_err*) {
          return gsi < of(host).next_msi_gsi_ ? CLONE_OK : CLONE_ERR_INVALID;
        },
        [](const clone_host*, uint32_t) {},
        [](const clone_host* host, uint64_t address, uint32_t data) {
          FakeHost& fake = of(host);
          std::lock_guard lock(fake.mutex_);
          fake.msi_messages_.emplace_back(address, data);
          return CLONE_OK;
        }};
    return &table;
  }

  static FakeLoop& loop_of(clone_loop* loop) { return *reinterpret_cast<FakeLoop*>(loop); }

  static const clone_host_loop* loop_table() {
    static const clone_host_loop table = {
        sizeof table,
        0,
        [](const clone_host* host) { return reinterpret_cast<clone_loop*>(&of(host).main_loop_); },
        [](const clone_host*, const char*, clone_loop** loop, clone_err*) {
          auto* created = new FakeLoop;
          created->start_thread();
          *loop = reinterpret_cast<clone_loop*>(created);
          return CLONE_OK;
        },
        [](clone_loop* loop) { delete &loop_of(loop); },
        [](clone_loop* loop, int32_t fd, uint32_t events, void (*ready)(void*, uint32_t), void* context,
           clone_err* err) {
          return loop_of(loop).add(fd, {events, ready, context})
                     ? CLONE_OK
                     : fail(err, CLONE_ERR_BUSY, "the descriptor is watched already");
        },
        [](clone_loop* loop, int32_t fd, uint32_t events) {
          return loop_of(loop).change(fd, events) ? CLONE_OK : CLONE_ERR_NOT_FOUND;
        },
        [](clone_loop* loop, int32_t fd) { loop_of(loop).remove(fd); },
        [](clone_loop* loop, void (*call)(void*), void* context) {
          loop_of(loop).post(call, context);
          return CLONE_OK;
        },
        [](const clone_host*, const char*, void (*run)(void*), void* context, clone_thread** thread, clone_err*) {
          *thread = reinterpret_cast<clone_thread*>(new std::thread(run, context));
          return CLONE_OK;
        },
        [](clone_thread* thread) {
          const std::unique_ptr<std::thread> owned(reinterpret_cast<std::thread*>(thread));
          owned->join();
        }};
    return &table;
  }

  static const clone_host_machine* machine_table() {
    static const clone_host_machine table = {
        sizeof table,
        0,
        [](const clone_host* host) { return of(host).vcpu_count; },
        [](const clone_host* host) { return of(host).memory_.size_bytes(); },
        [](const clone_host* host, uint32_t what) {
          FakeHost& fake = of(host);
          std::lock_guard lock(fake.mutex_);
          fake.machine_requests_.push_back(what);
        },
        [](const clone_host* host, clone_status (*pressed)(void*), void* context, clone_err* err) {
          FakeHost& fake = of(host);
          if (fake.power_button_) return fail(err, CLONE_ERR_BUSY, "the machine has a power button already");
          fake.power_button_ = pressed;
          fake.power_button_context_ = context;
          return CLONE_OK;
        }};
    return &table;
  }

  static const clone_host_acpi* acpi_table() {
    static const clone_host_acpi table = {
        sizeof table,
        0,
        [](const clone_host* host, const clone_acpi_node* node, clone_err*) {
          of(host).acpi_nodes.push_back({host->name,
                                         node->hid,
                                         node->cid ? node->cid : "",
                                         {node->resources, node->resources + node->resource_count}});
          return CLONE_OK;
        },
        [](const clone_host* host, const void* aml, uint64_t size_bytes, clone_err*) {
          const auto* bytes = static_cast<const std::byte*>(aml);
          auto& all = of(host).acpi_aml;
          all.insert(all.end(), bytes, bytes + size_bytes);
          return CLONE_OK;
        },
        [](const clone_host* host, const clone_acpi_power* power, clone_err* err) {
          if (of(host).acpi_power.size) return fail(err, CLONE_ERR_BUSY, "the machine has power registers already");
          of(host).acpi_power = *power;
          return CLONE_OK;
        },
        [](const clone_host* host, uint32_t flags, clone_err*) {
          of(host).acpi_legacy |= flags;
          return CLONE_OK;
        },
        [](const clone_host*, uint64_t, uint32_t, uint32_t, clone_err*) { return CLONE_OK; }};
    return &table;
  }

  static const clone_host_console* console_table() {
    static const clone_host_console table = {
        sizeof table, 0,
        [](const clone_host* host, uint64_t (*input)(void*, const void*, uint64_t), void* context, clone_err* err) {
          FakeHost& fake = of(host);
          if (fake.console_input_) return fail(err, CLONE_ERR_BUSY, "the machine has a console already");
          fake.console_input_ = input;
          fake.console_context_ = context;
          return CLONE_OK;
        },
        [](const clone_host* host) { ++of(host).console_input_wanted_; },
        [](const clone_host* host, const void* data, uint64_t size_bytes) {
          FakeHost& fake = of(host);
          std::lock_guard lock(fake.mutex_);
          fake.console_output_.append(static_cast<const char*>(data), size_bytes);
        }};
    return &table;
  }

  static const clone_host_control* control_table() {
    static const clone_host_control table = {
        sizeof table, 0,
        [](const clone_host* host, const char* name, const char*, void (*call)(void*, const char*, const clone_reply*),
           void* context, clone_err*) {
          of(host).commands_[std::string(host->name) + "." + name] = {call, context};
          return CLONE_OK;
        },
        [](const clone_host* host, const char* name, const char*, uint32_t, double (*value)(void*), void* context,
           clone_err*) {
          of(host).metrics_[std::string(host->name) + "." + name] = {value, context};
          return CLONE_OK;
        },
        [](const clone_host*, const char*, const char*) {}};
    return &table;
  }

  GuestMemory memory_;
  std::mutex mutex_;  // guards what other threads than the test's may reach
  std::map<std::string, std::unique_ptr<Handle>> handles_;
  std::map<std::string, const void*> offered_;
  std::map<uint64_t, std::shared_ptr<Claim>> claims_;
  uint64_t next_claim_ = 1;
  uint64_t next_mmio_ = 0xd000'0000;
  std::vector<std::pair<IoEvent, clone_sdk::Fd>> ioeventfds_;
  std::map<uint32_t, Line> lines_;
  std::set<uint32_t> lines_in_use_;
  std::atomic<uint32_t> next_msi_gsi_{24};
  std::vector<std::pair<uint64_t, uint32_t>> msi_messages_;
  FakeLoop main_loop_;
  uint64_t (*console_input_)(void*, const void*, uint64_t) = nullptr;
  void* console_context_ = nullptr;
  std::string console_output_;
  std::atomic<int> console_input_wanted_{0};
  clone_status (*power_button_)(void*) = nullptr;
  void* power_button_context_ = nullptr;
  std::vector<uint32_t> machine_requests_;
  std::map<std::string, Command> commands_;
  std::map<std::string, std::pair<double (*)(void*), void*>> metrics_;
  std::vector<std::string> log_lines_;
};

}  // namespace vmm::test
