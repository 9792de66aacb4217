// SPDX-License-Identifier: Apache-2.0
// The services of the bench: tables over the BenchHost behind the handle that they are called with.
#include "plugin/bench_host.hpp"

namespace vmm {

struct BenchServices {
  using Handle = BenchHost::Handle;
  using Claim = BenchHost::Claim;
  using IoEvent = BenchHost::IoEvent;
  using Line = BenchHost::Line;

  static BenchHost& of(const clone_host* host) {
    BenchHost& bench = BenchHost::of(host);
    ++bench.service_calls_;
    return bench;
  }
  static clone_status fail(clone_err* err, clone_status status, const std::string& message) {
    return clone_sdk::report(err, clone_sdk::Error{message, 0, status});
  }

  static const clone_host_log* log_table() {
    static const clone_host_log table = {sizeof table, 0, [](const clone_host* host, uint32_t, const char* message) {
                                           BenchHost& bench = BenchHost::of(host);
                                           std::lock_guard lock(bench.mutex_);
                                           bench.log_lines_.push_back(std::string(host->name) + ": " + message);
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
          BenchHost& bench = of(host);
          if (size_bytes == 0 || start + size_bytes - 1 < start ||
              (space == CLONE_BUS_PIO && start + size_bytes > 0x10000))
            return fail(err, CLONE_ERR_INVALID, "a range that does not exist");
          std::lock_guard lock(bench.mutex_);
          for (const auto& [other_id, other] : bench.claims_)
            if (other->space == space && start < other->start + other->size_bytes && other->start < start + size_bytes)
              return fail(err, CLONE_ERR_BUSY, std::string(host->name) + ": the range belongs to " + other->owner);
          auto claim = std::make_shared<Claim>();
          claim->space = space;
          claim->start = start;
          claim->size_bytes = size_bytes;
          claim->handler = handler;
          claim->context = context;
          claim->owner = host->name;
          *id = bench.next_claim_++;
          bench.claims_.emplace(*id, std::move(claim));
          return CLONE_OK;
        },
        [](const clone_host* host, uint64_t id) {
          BenchHost& bench = of(host);
          std::shared_ptr<Claim> claim;
          {
            std::lock_guard lock(bench.mutex_);
            const auto found = bench.claims_.find(id);
            if (found == bench.claims_.end()) {
              bench.misuses_.push_back("releases a claim that it does not have");
              return;
            }
            claim = found->second;
            bench.claims_.erase(found);
          }
          std::unique_lock wait(claim->in_use);
        },
        [](const clone_host* host, uint64_t size_bytes, uint64_t alignment, uint64_t* start, clone_err* err) {
          BenchHost& bench = of(host);
          std::lock_guard lock(bench.mutex_);
          const uint64_t aligned = (bench.next_mmio_ + alignment - 1) & ~(alignment - 1);
          if (aligned + size_bytes > 0xf000'0000) return fail(err, CLONE_ERR_BUSY, "no MMIO window is left");
          *start = aligned;
          bench.next_mmio_ = aligned + size_bytes;
          return CLONE_OK;
        },
        [](const clone_host* host, uint32_t space, uint64_t address, uint32_t size_bytes, uint32_t match,
           uint64_t value, int32_t fd, clone_err* err) {
          BenchHost& bench = of(host);
          const IoEvent event{space, address, size_bytes, match, value, fd};
          std::lock_guard lock(bench.mutex_);
          for (const auto& [other, other_fd] : bench.ioeventfds_)
            if (other == event) return fail(err, CLONE_ERR_BUSY, "this ioeventfd is there already");
          bench.ioeventfds_.emplace_back(event, clone_sdk::Fd(::dup(fd)));
          return CLONE_OK;
        },
        [](const clone_host* host, uint32_t space, uint64_t address, uint32_t size_bytes, uint32_t match,
           uint64_t value, int32_t fd, clone_err* err) {
          BenchHost& bench = of(host);
          const IoEvent event{space, address, size_bytes, match, value, fd};
          std::lock_guard lock(bench.mutex_);
          if (std::erase_if(bench.ioeventfds_, [&](const auto& entry) { return entry.first == event; }) == 0)
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
          BenchHost& bench = of(host);
          std::lock_guard lock(bench.mutex_);
          if (wanted == CLONE_GSI_ANY) {
            if (bench.free_gsis.empty()) return fail(err, CLONE_ERR_BUSY, "no interrupt line is left");
            wanted = *bench.free_gsis.begin();
          }
          if (bench.lines_in_use_.contains(wanted)) return fail(err, CLONE_ERR_BUSY, "the interrupt line is taken");
          bench.free_gsis.erase(wanted);
          bench.lines_in_use_.insert(wanted);
          *gsi = wanted;
          return CLONE_OK;
        },
        [](const clone_host* host, uint32_t gsi, uint32_t level) {
          BenchHost& bench = of(host);
          std::lock_guard lock(bench.mutex_);
          Line& line = bench.lines_[gsi];
          if (level && !line.level) ++line.raised;
          line.level = level != 0;
          return CLONE_OK;
        },
        [](const clone_host* host, uint32_t gsi) {
          BenchHost& bench = of(host);
          std::lock_guard lock(bench.mutex_);
          ++bench.lines_[gsi].raised;
          return CLONE_OK;
        },
        [](const clone_host* host, uint32_t gsi, int32_t fd, int32_t, clone_err*) {
          BenchHost& bench = of(host);
          std::lock_guard lock(bench.mutex_);
          bench.lines_[gsi].irqfds.emplace_back(fd, clone_sdk::Fd(::dup(fd)));
          return CLONE_OK;
        },
        [](const clone_host* host, uint32_t gsi, int32_t fd, clone_err* err) {
          BenchHost& bench = of(host);
          std::lock_guard lock(bench.mutex_);
          if (std::erase_if(bench.lines_[gsi].irqfds, [&](const auto& entry) { return entry.first == fd; }) == 0)
            return fail(err, CLONE_ERR_NOT_FOUND, "no such irqfd");
          return CLONE_OK;
        },
        [](const clone_host* host, uint32_t* gsi, clone_err*) {
          BenchHost& bench = of(host);
          std::lock_guard lock(bench.mutex_);
          *gsi = bench.next_msi_gsi_++;
          bench.msi_gsis_.insert(*gsi);
          return CLONE_OK;
        },
        [](const clone_host* host, uint32_t gsi, uint64_t, uint32_t, uint32_t, clone_err*) {
          BenchHost& bench = of(host);
          std::lock_guard lock(bench.mutex_);
          return bench.msi_gsis_.contains(gsi) ? CLONE_OK : CLONE_ERR_INVALID;
        },
        [](const clone_host* host, uint32_t gsi) {
          BenchHost& bench = of(host);
          std::lock_guard lock(bench.mutex_);
          if (bench.msi_gsis_.erase(gsi) == 0) bench.misuses_.push_back("frees an MSI vector that it does not have");
        },
        [](const clone_host* host, uint64_t address, uint32_t data) {
          BenchHost& bench = of(host);
          std::lock_guard lock(bench.mutex_);
          bench.msi_messages_.emplace_back(address, data);
          return CLONE_OK;
        }};
    return &table;
  }

  // Counts while it lives.
  struct Counted {
    explicit Counted(BenchHost& host) : bench(host) { ++bench.thread_count_; }
    Counted(const Counted&) = delete;
    ~Counted() { --bench.thread_count_; }
    BenchHost& bench;
  };
  struct OwnLoop : BenchLoop {
    explicit OwnLoop(BenchHost& host) : counted(host) {}
    Counted counted;
  };
  struct OwnThread {
    Counted counted;
    std::thread thread;
  };
  static BenchLoop& loop_of(clone_loop* loop) { return *reinterpret_cast<BenchLoop*>(loop); }

  static const clone_host_loop* loop_table() {
    static const clone_host_loop table = {
        sizeof table,
        0,
        [](const clone_host* host) { return reinterpret_cast<clone_loop*>(&of(host).main_loop_); },
        [](const clone_host* host, const char*, clone_loop** loop, clone_err*) {
          auto* created = new OwnLoop(of(host));
          created->start_thread();
          *loop = reinterpret_cast<clone_loop*>(static_cast<BenchLoop*>(created));
          return CLONE_OK;
        },
        [](clone_loop* loop) { delete static_cast<OwnLoop*>(&loop_of(loop)); },
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
        [](const clone_host* host, const char*, void (*run)(void*), void* context, clone_thread** thread, clone_err*) {
          *thread = reinterpret_cast<clone_thread*>(new OwnThread{Counted(of(host)), std::thread(run, context)});
          return CLONE_OK;
        },
        [](clone_thread* thread) {
          const std::unique_ptr<OwnThread> owned(reinterpret_cast<OwnThread*>(thread));
          owned->thread.join();
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
          BenchHost& bench = of(host);
          std::lock_guard lock(bench.mutex_);
          bench.machine_requests_.push_back(what);
        },
        [](const clone_host* host, clone_status (*pressed)(void*), void* context, clone_err* err) {
          BenchHost& bench = of(host);
          if (bench.power_button_) return fail(err, CLONE_ERR_BUSY, "the machine has a power button already");
          bench.power_button_ = pressed;
          bench.power_button_context_ = context;
          return CLONE_OK;
        },
        [](const clone_host* host) { return of(host).machine_name.c_str(); },
        [](const clone_host* host) {
          return of(host).saved_instances.contains(host->name) ? CLONE_ORIGIN_SAVED : CLONE_ORIGIN_BOOT;
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
          BenchHost& bench = of(host);
          if (bench.console_input_) return fail(err, CLONE_ERR_BUSY, "the machine has a console already");
          bench.console_input_ = input;
          bench.console_context_ = context;
          return CLONE_OK;
        },
        [](const clone_host* host) { ++of(host).console_input_wanted_; },
        [](const clone_host* host, const void* data, uint64_t size_bytes) {
          BenchHost& bench = of(host);
          std::lock_guard lock(bench.mutex_);
          bench.console_output_.append(static_cast<const char*>(data), size_bytes);
        }};
    return &table;
  }

  static const clone_host_control* control_table() {
    static const clone_host_control table = {
        sizeof table,
        0,
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
        [](const clone_host*, const char*, const char*) {},
        [](const clone_host* host) { return of(host).directory().c_str(); },
        [](const clone_host* host) {
          of(host).directory();
          return static_cast<int32_t>(of(host).directory_fd_.get());
        }};
    return &table;
  }
};

const std::string& BenchHost::directory() {
  if (directory_.empty()) {
    std::string path = (std::filesystem::temp_directory_path() / "clone-check-XXXXXX").string();
    if (::mkdtemp(path.data())) directory_ = path;
    directory_fd_ = clone_sdk::Fd(::open(directory_.c_str(), O_DIRECTORY | O_RDONLY | O_CLOEXEC));
  }
  return directory_;
}

const void* BenchHost::get_extension(const clone_host* host, const char* id) {
  const BenchHost& bench = of(host);
  if (const auto found = bench.offered_.find(id); found != bench.offered_.end()) return found->second;
  static const std::map<std::string, const void*> tables = {
      {CLONE_HOST_LOG, BenchServices::log_table()},         {CLONE_HOST_MEMORY, BenchServices::memory_table()},
      {CLONE_HOST_BUS, BenchServices::bus_table()},         {CLONE_HOST_IRQ, BenchServices::irq_table()},
      {CLONE_HOST_LOOP, BenchServices::loop_table()},       {CLONE_HOST_ACPI, BenchServices::acpi_table()},
      {CLONE_HOST_MACHINE, BenchServices::machine_table()}, {CLONE_HOST_CONSOLE, BenchServices::console_table()},
      {CLONE_HOST_CONTROL, BenchServices::control_table()}, {CLONE_HOST_PUBLISH, BenchServices::publish_table()}};
  const auto found = tables.find(id);
  return found == tables.end() ? nullptr : found->second;
}

}  // namespace vmm
