// SPDX-License-Identifier: Apache-2.0
// A clone_host in memory: a plugin runs against it without KVM, while the caller plays the guest and the user.
//
//   BenchHost host;                                            // 16 MiB of guest memory
//   host.offer(CLONE_VIRTQUEUE, virtqueue_service());          // services of the core, where they are needed
//   const clone_host* handle = host.handle("serial.0");        // what the plugin is given
//   host.write<uint8_t>(CLONE_BUS_PIO, 0x3f8, 'A');            // the guest writes a port
//   host.run_main_loop();                                      // callbacks that are due
//   host.interrupts(4);                                        // pulses, rising levels, irqfd signals since last asked
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <deque>
#include <filesystem>
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

namespace vmm {

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
class BenchLoop {
 public:
  struct Source {
    uint32_t events;
    void (*ready)(void* context, uint32_t events);
    void* context;
  };

  BenchLoop() : wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}
  ~BenchLoop() { stop(); }

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
  size_t watch_count() {
    std::lock_guard lock(mutex_);
    return sources_.size();
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

class BenchHost {
 public:
  struct AcpiNode {
    std::string owner, hid, cid;
    std::vector<clone_acpi_resource> resources;
  };

  explicit BenchHost(uint64_t memory_bytes = 16ull << 20) : memory_(make_memory(memory_bytes)) {}
  BenchHost(const BenchHost&) = delete;
  ~BenchHost() {
    std::error_code ignored;
    if (!directory_.empty()) std::filesystem::remove_all(directory_, ignored);
  }

  // The handle of one instance, made on the first ask; lasts as long as the BenchHost.
  const clone_host* handle(const std::string& name = "test.0") {
    auto& slot = handles_[name];
    if (!slot) {
      slot = std::make_unique<Handle>();
      slot->memory = &memory_;
      slot->bench = this;
      slot->name = name;
      slot->host = {sizeof(clone_host), CLONE_ABI_MAJOR, CLONE_ABI_MINOR, 0, static_cast<HostContext*>(slot.get()),
                    slot->name.c_str(), get_extension};
    }
    return &slot->host;
  }
  // A table that get_extension() finds besides, or instead of, the bench's.
  void offer(const std::string& id, const void* table) { offered_[id] = table; }

  GuestMemory& memory() { return memory_; }
  // The VM's own directory, made when it is first asked for.
  const std::string& directory();

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
  // What the plugin claimed and must give back besides: callbacks on the main loop, threads and loops of its own, MSI
  // vectors.
  size_t main_loop_watch_count() { return main_loop_.watch_count(); }
  size_t thread_count() const { return thread_count_; }
  size_t msi_vector_count() {
    std::lock_guard lock(mutex_);
    return msi_gsis_.size();
  }
  // Calls of services other than the log.
  uint64_t service_calls() const { return service_calls_; }
  // What a plugin did that the interface forbids, e.g. a claim given back twice.
  std::vector<std::string> misuses() {
    std::lock_guard lock(mutex_);
    return misuses_;
  }
  struct ClaimedRange {
    uint32_t space;
    uint64_t start, size_bytes;
  };
  std::vector<ClaimedRange> claimed_ranges() {
    std::lock_guard lock(mutex_);
    std::vector<ClaimedRange> ranges;
    for (const auto& [id, claim] : claims_) ranges.push_back({claim->space, claim->start, claim->size_bytes});
    return ranges;
  }
  // Messages sent with msi_send(): address and data.
  std::vector<std::pair<uint64_t, uint32_t>> msi_messages() {
    std::lock_guard lock(mutex_);
    return msi_messages_;
  }
  std::set<uint32_t> free_gsis = {5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23};

  // --- The main loop: runs only when the caller says so ---
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
  std::string machine_name;
  std::set<std::string> saved_instances;  // those whose origin is CLONE_ORIGIN_SAVED
  struct Answer {
    std::string text;  // JSON, or "error: …"; "" while it has not been answered
    clone_sdk::Fd fd;
  };
  // `answer` lasts until it is given: a command may answer later.
  void begin_command(const std::string& name, const std::string& json, Answer& answer) {
    const auto found = commands_.find(name);
    if (found == commands_.end()) {
      answer.text = "error: no such command";
      return;
    }
    const clone_reply reply = {
        sizeof(clone_reply),
        0,
        &answer,
        [](void* context, const char* text) { static_cast<Answer*>(context)->text = text; },
        [](void* context, const char* text) { static_cast<Answer*>(context)->text = std::string("error: ") + text; },
        [](void* context, const char* text, int32_t fd) {
          static_cast<Answer*>(context)->text = text;
          static_cast<Answer*>(context)->fd = clone_sdk::Fd(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
        }};
    found->second.call(found->second.context, json.c_str(), &reply);
  }
  std::string call_command(const std::string& name, const std::string& json) {
    Answer answer;
    begin_command(name, json, answer);
    return answer.text;
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
  friend struct BenchServices;
  struct Handle : HostContext {
    BenchHost* bench = nullptr;
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
  static BenchHost& of(const clone_host* host) { return *handle_of(host).bench; }
  static const void* get_extension(const clone_host* host, const char* id);

  std::shared_ptr<Claim> find_claim(uint32_t space, uint64_t address, uint64_t size_bytes) {
    std::lock_guard lock(mutex_);
    for (const auto& [id, claim] : claims_)
      if (claim->space == space && address >= claim->start && address - claim->start < claim->size_bytes &&
          size_bytes <= claim->size_bytes - (address - claim->start))
        return claim;
    return nullptr;
  }

  GuestMemory memory_;
  std::mutex mutex_;  // guards what other threads than the caller's may reach
  std::map<std::string, std::unique_ptr<Handle>> handles_;
  std::map<std::string, const void*> offered_;
  std::map<uint64_t, std::shared_ptr<Claim>> claims_;
  uint64_t next_claim_ = 1;
  uint64_t next_mmio_ = 0xd000'0000;
  std::vector<std::pair<IoEvent, clone_sdk::Fd>> ioeventfds_;
  std::map<uint32_t, Line> lines_;
  std::set<uint32_t> lines_in_use_;
  uint32_t next_msi_gsi_ = 24;
  std::set<uint32_t> msi_gsis_;
  std::vector<std::pair<uint64_t, uint32_t>> msi_messages_;
  BenchLoop main_loop_;
  uint64_t (*console_input_)(void*, const void*, uint64_t) = nullptr;
  void* console_context_ = nullptr;
  std::string console_output_;
  std::atomic<int> console_input_wanted_{0};
  clone_status (*power_button_)(void*) = nullptr;
  void* power_button_context_ = nullptr;
  std::vector<uint32_t> machine_requests_;
  std::map<std::string, Command> commands_;
  std::string directory_;  // of clone.host-control/1, made when it is asked for
  clone_sdk::Fd directory_fd_;
  std::map<std::string, std::pair<double (*)(void*), void*>> metrics_;
  std::vector<std::string> log_lines_;
  std::vector<std::string> misuses_;
  std::atomic<uint64_t> service_calls_{0};
  std::atomic<size_t> thread_count_{0};
};

}  // namespace vmm
