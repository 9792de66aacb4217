// SPDX-License-Identifier: Apache-2.0
// The host's services as C++: each call finds its table by name once per Host object that asks.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <utility>

#include "clone/abi/acpi.h"
#include "clone/abi/bus.h"
#include "clone/abi/console.h"
#include "clone/abi/host.h"
#include "clone/abi/irq.h"
#include "clone/abi/loop.h"
#include "clone/abi/machine.h"
#include "clone/abi/memory.h"
#include "clone/abi/virtqueue.h"
#include "clone/sdk/error.hpp"

namespace clone_sdk {

// Turns two member functions into a bus handler: void read(uint64_t offset, void* data, uint32_t size_bytes) and
// void write(uint64_t offset, const void* data, uint32_t size_bytes). They run on vCPU threads and must not throw.
template <auto read, auto write, typename T>
const clone_bus_handler* bus_handler() {
  static constexpr clone_bus_handler handler = {
      sizeof(clone_bus_handler), 0,
      [](void* context, uint64_t offset, void* data, uint32_t size_bytes) noexcept {
        (static_cast<T*>(context)->*read)(offset, data, size_bytes);
      },
      [](void* context, uint64_t offset, const void* data, uint32_t size_bytes) noexcept {
        (static_cast<T*>(context)->*write)(offset, data, size_bytes);
      }};
  return &handler;
}

// A claimed range, given back when it goes.
class Claim {
 public:
  Claim() = default;
  Claim(const clone_host* host, const clone_host_bus* bus, uint64_t id) : host_(host), bus_(bus), id_(id) {}
  Claim(Claim&& other) noexcept : host_(other.host_), bus_(std::exchange(other.bus_, nullptr)), id_(other.id_) {}
  Claim& operator=(Claim&& other) noexcept {
    if (this != &other) {
      release();
      host_ = other.host_;
      bus_ = std::exchange(other.bus_, nullptr);
      id_ = other.id_;
    }
    return *this;
  }
  ~Claim() { release(); }
  void release() {
    if (bus_) std::exchange(bus_, nullptr)->release(host_, id_);
  }

 private:
  const clone_host* host_ = nullptr;
  const clone_host_bus* bus_ = nullptr;
  uint64_t id_ = 0;
};

class Host {
 public:
  explicit Host(const clone_host* host) : host_(host) {}

  const clone_host* raw() const { return host_; }
  const char* name() const { return host_->name; }

  // A service that this host does not have is an error that names it.
  template <typename Table>
  Result<const Table*> service(const char* id) const {
    const void* table = host_->get_extension(host_, id);
    if (!table) return Error{std::string("the host does not offer ") + id, 0, CLONE_ERR_UNSUPPORTED};
    return static_cast<const Table*>(table);
  }

  void log(uint32_t level, const std::string& message) const {
    if (auto table = service<clone_host_log>(CLONE_HOST_LOG); table.ok()) (*table)->log(host_, level, message.c_str());
  }

  template <auto read, auto write, typename T>
  Result<Claim> claim(uint32_t space, uint64_t start, uint64_t size_bytes, T* context) const {
    const auto* bus = CLONE_TRY(service<clone_host_bus>(CLONE_HOST_BUS));
    uint64_t id = 0;
    ErrorBuffer error;
    CLONE_TRY(
        error.result(bus->claim(host_, space, start, size_bytes, bus_handler<read, write, T>(), context, &id, error)));
    return Claim(host_, bus, id);
  }

  Result<uint64_t> allocate_mmio(uint64_t size_bytes, uint64_t alignment) const {
    const auto* bus = CLONE_TRY(service<clone_host_bus>(CLONE_HOST_BUS));
    uint64_t start = 0;
    ErrorBuffer error;
    CLONE_TRY(error.result(bus->allocate_mmio(host_, size_bytes, alignment, &start, error)));
    return start;
  }

  Result<uint32_t> allocate_gsi(uint32_t wanted = CLONE_GSI_ANY) const {
    const auto* irq = CLONE_TRY(service<clone_host_irq>(CLONE_HOST_IRQ));
    uint32_t gsi = 0;
    ErrorBuffer error;
    CLONE_TRY(error.result(irq->allocate(host_, wanted, &gsi, error)));
    return gsi;
  }

  Result<void> add_acpi_node(const char* hid, std::initializer_list<clone_acpi_resource> resources,
                             const char* cid = nullptr) const {
    const auto* acpi = CLONE_TRY(service<clone_host_acpi>(CLONE_HOST_ACPI));
    const clone_acpi_node node = {sizeof(clone_acpi_node), static_cast<uint32_t>(resources.size()), hid, cid,
                                  resources.begin()};
    ErrorBuffer error;
    return error.result(acpi->add_node(host_, &node, error));
  }

 private:
  const clone_host* host_;
};

constexpr clone_acpi_resource acpi_io(uint64_t start, uint64_t length) {
  return {sizeof(clone_acpi_resource), CLONE_ACPI_IO, start, length, 0, 0};
}
constexpr clone_acpi_resource acpi_memory(uint64_t start, uint64_t length) {
  return {sizeof(clone_acpi_resource), CLONE_ACPI_MEMORY, start, length, 0, 0};
}
constexpr clone_acpi_resource acpi_irq(uint32_t gsi, uint32_t flags = 0) {
  return {sizeof(clone_acpi_resource), CLONE_ACPI_IRQ, gsi, 1, flags, 0};
}

// An eventfd's descriptor watched on a loop; the callback is a member function `void ready()`.
class Watch {
 public:
  Watch() = default;
  Watch(Watch&& other) noexcept : table_(std::exchange(other.table_, nullptr)), loop_(other.loop_), fd_(other.fd_) {}
  Watch& operator=(Watch&& other) noexcept {
    if (this != &other) {
      stop();
      table_ = std::exchange(other.table_, nullptr);
      loop_ = other.loop_;
      fd_ = other.fd_;
    }
    return *this;
  }
  ~Watch() { stop(); }

  template <auto ready, typename T>
  static Result<Watch> start(const clone_host_loop* table, clone_loop* loop, int fd, uint32_t events, T* context) {
    ErrorBuffer error;
    CLONE_TRY(error.result(table->add_fd(
        loop, fd, events, [](void* self, uint32_t) noexcept { (static_cast<T*>(self)->*ready)(); }, context, error)));
    Watch watch;
    watch.table_ = table;
    watch.loop_ = loop;
    watch.fd_ = fd;
    return watch;
  }
  // On return the callback does not run and will not run again.
  void stop() {
    if (table_) std::exchange(table_, nullptr)->remove_fd(loop_, fd_);
  }

 private:
  const clone_host_loop* table_ = nullptr;
  clone_loop* loop_ = nullptr;
  int fd_ = -1;
};

}  // namespace clone_sdk
