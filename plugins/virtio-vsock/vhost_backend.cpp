// SPDX-License-Identifier: Apache-2.0
// The vhost protocol of linux/vhost.h. The kernel has no packed rings, and needs host addresses of the split ones.
#include "vhost_backend.hpp"

// The header's helpers of old are no C++.
#define VIRTIO_RING_NO_LEGACY
#include <fcntl.h>
#include <linux/vhost.h>
#include <linux/virtio_config.h>
#include <linux/vm_sockets.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/socket.h>

#include <atomic>
#include <bit>

namespace virtio_vsock {

using clone_sdk::errno_error;
using clone_sdk::Error;
using clone_sdk::Fd;
using clone_sdk::Queue;
using clone_sdk::Result;

namespace {

constexpr const char* kDevice = "/dev/vhost-vsock";
constexpr uint32_t kFirstOrdinaryPort = 1024;  // from here on any user of the host may bind
constexpr uint32_t kPageBytes = 4096;          // VHOST_PAGE_SIZE
constexpr uint32_t kVhostQueues = 2;
constexpr uint64_t kPackedRing = uint64_t{1} << VIRTIO_F_RING_PACKED;
constexpr uint64_t kLogAll = uint64_t{1} << VHOST_F_LOG_ALL;

// A socket on a port that is free and below 1024.
Result<Fd> reserved_socket() {
  Fd fd(::socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) return errno_error("a vsock socket");
  uint32_t start = 0;
  if (::getrandom(&start, sizeof start, 0) != sizeof start) start = 0;
  constexpr uint32_t kPorts = kFirstOrdinaryPort - 1;
  for (uint32_t i = 0; i < kPorts; ++i) {
    sockaddr_vm address{};
    address.svm_family = AF_VSOCK;
    address.svm_cid = VMADDR_CID_ANY;
    address.svm_port = 1 + (start % kPorts + i) % kPorts;
    if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) return fd;
    if (errno == EACCES) return Error{"ports below 1024 need CAP_NET_BIND_SERVICE", EACCES, CLONE_ERR_SYSTEM};
    if (errno != EADDRINUSE) return errno_error("a vsock port below 1024");
  }
  return Error{"no vsock port below 1024 is free", EADDRINUSE, CLONE_ERR_BUSY};
}

}  // namespace

template <typename Argument>
Result<void> VhostBackend::call(const char* what, unsigned long request, Argument argument) const {
  if (::ioctl(fd_.get(), request, argument) == 0) return {};
  return errno_error(std::string(kDevice) + ": " + what);
}

Result<std::unique_ptr<VhostBackend>> VhostBackend::create(const clone_sdk::Host& host) {
  std::unique_ptr<VhostBackend> backend(new VhostBackend(host));
  backend->memory_ = CLONE_TRY(host.service<clone_host_memory>(CLONE_HOST_MEMORY));
  CLONE_TRY(backend->open());
  CLONE_TRY(reserved_socket());
  return backend;
}

VhostBackend::~VhostBackend() { static_cast<void>(stop()); }

Result<void> VhostBackend::open() {
  Fd fd(::open(kDevice, O_RDWR | O_CLOEXEC));
  if (!fd) return errno_error(kDevice);
  fd_ = std::move(fd);
  CLONE_TRY(call("VHOST_SET_OWNER", VHOST_SET_OWNER, nullptr));
  return call("VHOST_GET_FEATURES", VHOST_GET_FEATURES, &kernel_features_);
}

Result<bool> VhostBackend::claim_cid(uint32_t cid) {
  uint64_t wanted = cid;
  if (::ioctl(fd_.get(), VHOST_VSOCK_SET_GUEST_CID, &wanted) == 0) {
    cid_ = cid;
    return true;
  }
  if (errno == EADDRINUSE) return false;
  return errno_error(std::string(kDevice) + ": cid=" + std::to_string(cid));
}

// The only way to end the host's sockets that lead to the guest is to let go of the device.
Result<void> VhostBackend::reopen() {
  CLONE_TRY(stop());
  Fd fresh(::open(kDevice, O_RDWR | O_CLOEXEC));
  // Where a jail took the device away, the old one serves on; such sockets end when they are used.
  if (!fresh) return {};
  fd_ = std::move(fresh);
  CLONE_TRY(call("VHOST_SET_OWNER", VHOST_SET_OWNER, nullptr));
  if (!CLONE_TRY(claim_cid(cid_)))
    return Error{"cid=" + std::to_string(cid_) + ": in use by another machine", EADDRINUSE, CLONE_ERR_BUSY};
  return {};
}

// --- Setting up ---

Result<void> VhostBackend::set_features() {
  const uint64_t features = features_ | (log_.empty() ? 0 : kLogAll);
  return call("VHOST_SET_FEATURES", VHOST_SET_FEATURES, &features);
}

Result<void> VhostBackend::set_memory() {
  const uint32_t count = memory_->region_count(host_.raw());
  // A struct with a tail of regions.
  std::vector<uint64_t> storage((sizeof(vhost_memory) + count * sizeof(vhost_memory_region)) / sizeof(uint64_t));
  auto* table = reinterpret_cast<vhost_memory*>(storage.data());
  table->nregions = count;
  for (uint32_t i = 0; i < count; ++i) {
    clone_memory_region region{};
    region.size = sizeof region;
    if (memory_->region(host_.raw(), i, &region) != CLONE_OK) return Error{"the guest's memory has no region"};
    table->regions[i] = {region.guest_address, region.size_bytes, reinterpret_cast<uintptr_t>(region.host_address), 0};
  }
  return call("VHOST_SET_MEM_TABLE", VHOST_SET_MEM_TABLE, table);
}

Result<void> VhostBackend::set_log_base() {
  const auto address = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(log_.data()));
  return call("VHOST_SET_LOG_BASE", VHOST_SET_LOG_BASE, &address);
}

// The areas of a split ring (virtio 1.2 §2.7).
Result<void> VhostBackend::set_addresses(uint32_t index) {
  const Queue& queue = queues_[index];
  clone_virtqueue_layout layout{};
  layout.size = sizeof layout;
  if (queue.table()->layout(queue.raw(), &layout) != CLONE_OK) return Error{"a queue has no layout"};
  const uint64_t entries = layout.queue_size;
  const auto host_address = [this](uint64_t guest_address, uint64_t size_bytes) {
    return static_cast<uint64_t>(reinterpret_cast<uintptr_t>(memory_->slice(host_.raw(), guest_address, size_bytes)));
  };
  vhost_vring_addr addresses{};
  addresses.index = index;
  addresses.desc_user_addr = host_address(layout.descriptor_address, 16 * entries);
  addresses.avail_user_addr = host_address(layout.driver_address, 6 + 2 * entries);
  addresses.used_user_addr = host_address(layout.device_address, 6 + 8 * entries);
  if (!addresses.desc_user_addr || !addresses.avail_user_addr || !addresses.used_user_addr)
    return Error{"a queue is not in guest memory", 0, CLONE_ERR_GUEST};
  addresses.log_guest_addr = layout.device_address;
  if (!log_.empty()) addresses.flags = 1u << VHOST_VRING_F_LOG;
  return call("VHOST_SET_VRING_ADDR", VHOST_SET_VRING_ADDR, &addresses);
}

Result<void> VhostBackend::set_queue(uint32_t index) {
  const Queue& queue = queues_[index];
  clone_virtqueue_position position{};
  position.size = sizeof position;
  if (queue.table()->get_position(queue.raw(), &position) != CLONE_OK) return Error{"a queue has no position"};
  const vhost_vring_state size = {index, queue.size()};
  CLONE_TRY(call("VHOST_SET_VRING_NUM", VHOST_SET_VRING_NUM, &size));
  const vhost_vring_state base = {index, position.next_available};
  CLONE_TRY(call("VHOST_SET_VRING_BASE", VHOST_SET_VRING_BASE, &base));
  CLONE_TRY(set_addresses(index));
  const vhost_vring_file called = {index, queue.table()->call_fd(queue.raw())};
  CLONE_TRY(call("VHOST_SET_VRING_CALL", VHOST_SET_VRING_CALL, &called));
  const vhost_vring_file kicked = {index, queue.kick_fd()};
  return call("VHOST_SET_VRING_KICK", VHOST_SET_VRING_KICK, &kicked);
}

Result<void> VhostBackend::activate(const clone_sdk::Activation& activation) {
  std::lock_guard lock(mutex_);
  if (!activation.queues[kRxQueue] || !activation.queues[kTxQueue])
    return Error{"the driver did not enable the rx and tx queues", 0, CLONE_ERR_GUEST};
  queues_ = {activation.queues[kRxQueue], activation.queues[kTxQueue]};
  clone_virtqueue_layout layout{};
  layout.size = sizeof layout;
  if (queues_[kRxQueue].table()->layout(queues_[kRxQueue].raw(), &layout) != CLONE_OK)
    return Error{"a queue has no layout"};
  if (layout.features & kPackedRing) {
    queues_.clear();
    return Error{"the driver uses packed rings, which vhost-vsock does not have (backend=user has)", 0,
                 CLONE_ERR_UNSUPPORTED};
  }
  features_ = (activation.features | layout.features) & kernel_features_ & ~kLogAll;
  // Inside of activate(): the transport is to know that interrupts come from the kernel.
  for (const Queue& queue : queues_) queue.table()->call_fd(queue.raw());
  return allowed_to_run_ ? run() : Result<void>();
}

Result<void> VhostBackend::run() {
  if (queues_.empty() || running_) return {};
  if (!log_.empty()) CLONE_TRY(set_log_base());
  CLONE_TRY(set_features());
  CLONE_TRY(set_memory());
  for (uint32_t i = 0; i < kVhostQueues; ++i) CLONE_TRY(set_queue(i));
  const int on = 1;
  CLONE_TRY(call("VHOST_VSOCK_SET_RUNNING", VHOST_VSOCK_SET_RUNNING, &on));
  running_ = true;
  // What the driver made available before.
  for (const Queue& queue : queues_) queue.kick();
  return {};
}

// The kernel gives a chain back before it takes the next: both positions are the same.
Result<void> VhostBackend::stop() {
  if (!std::exchange(running_, false)) return {};
  const int off = 0;
  CLONE_TRY(call("VHOST_VSOCK_SET_RUNNING", VHOST_VSOCK_SET_RUNNING, &off));
  for (uint32_t i = 0; i < kVhostQueues; ++i) {
    vhost_vring_state base = {i, 0};
    CLONE_TRY(call("VHOST_GET_VRING_BASE", VHOST_GET_VRING_BASE, &base));
    const auto next = static_cast<uint16_t>(base.num);
    const clone_virtqueue_position position = {sizeof position, next, next};
    clone_sdk::ErrorBuffer error;
    CLONE_TRY(error.result(queues_[i].table()->set_position(queues_[i].raw(), &position, error)));
    // No kick, no call: the descriptors are the queue's.
    const vhost_vring_file none = {i, VHOST_FILE_UNBIND};
    CLONE_TRY(call("VHOST_SET_VRING_KICK", VHOST_SET_VRING_KICK, &none));
    CLONE_TRY(call("VHOST_SET_VRING_CALL", VHOST_SET_VRING_CALL, &none));
  }
  return {};
}

void VhostBackend::reset_queues() {
  std::lock_guard lock(mutex_);
  if (queues_.empty()) return;
  if (auto ended = reopen(); !ended.ok()) host_.log(CLONE_LOG_WARNING, ended.error().message);
  queues_.clear();
}

Result<void> VhostBackend::resume() {
  std::lock_guard lock(mutex_);
  allowed_to_run_ = true;
  return run();
}

Result<void> VhostBackend::quiesce() {
  std::lock_guard lock(mutex_);
  allowed_to_run_ = false;
  return stop();
}

Result<void> VhostBackend::end_streams() {
  std::lock_guard lock(mutex_);
  return reopen();
}

Result<Fd> VhostBackend::connect(uint32_t guest_port) {
  Fd fd = CLONE_TRY(reserved_socket());
  const timespec patience = {kPatience.count() / 1000, 0};
  ::setsockopt(fd.get(), AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, &patience, sizeof patience);
  sockaddr_vm address{};
  address.svm_family = AF_VSOCK;
  address.svm_cid = cid_;
  address.svm_port = guest_port;
  if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 && errno != EINPROGRESS)
    return errno_error("port " + std::to_string(guest_port) + " of the guest");
  return fd;
}

// --- clone.vhost/1 ---

Result<void> VhostBackend::start_log() {
  std::lock_guard lock(mutex_);
  if (!log_.empty()) return {};
  if (!(kernel_features_ & kLogAll)) return Error{"vhost-vsock keeps no log of pages", 0, CLONE_ERR_UNSUPPORTED};
  uint64_t end = 0;
  for (uint32_t i = 0; i < memory_->region_count(host_.raw()); ++i) {
    clone_memory_region region{};
    region.size = sizeof region;
    if (memory_->region(host_.raw(), i, &region) == CLONE_OK)
      end = std::max(end, region.guest_address + region.size_bytes);
  }
  log_.assign(end / kPageBytes / 64 + 1, 0);
  if (!running_) return {};
  CLONE_TRY(set_log_base());
  // Used rings first: from the moment that everything is logged, they have to be.
  for (uint32_t i = 0; i < kVhostQueues; ++i) CLONE_TRY(set_addresses(i));
  return set_features();
}

Result<void> VhostBackend::take_log(void (*mark)(void* context, uint64_t guest_address, uint64_t size_bytes),
                                    void* context) {
  std::lock_guard lock(mutex_);
  for (size_t word = 0; word < log_.size(); ++word) {
    // The kernel sets bits at the same time.
    uint64_t bits = std::atomic_ref(log_[word]).exchange(0);
    while (bits) {
      const int first = std::countr_zero(bits);
      const int length = std::countr_one(bits >> first);
      mark(context, (word * 64 + static_cast<uint32_t>(first)) * kPageBytes,
           static_cast<uint64_t>(length) * kPageBytes);
      bits = first + length == 64 ? 0 : bits & (UINT64_MAX << (first + length));
    }
  }
  return {};
}

Result<void> VhostBackend::stop_log() {
  std::lock_guard lock(mutex_);
  if (log_.empty()) return {};
  std::vector<uint64_t> before;
  before.swap(log_);
  if (!running_) return {};
  Result<void> done = set_features();
  for (uint32_t i = 0; done.ok() && i < kVhostQueues; ++i) done = set_addresses(i);
  // The kernel may still write to it.
  if (!done.ok()) log_.swap(before);
  return done;
}

Result<void> VhostBackend::memory_changed() {
  std::lock_guard lock(mutex_);
  // Whatever runs is given its memory when it begins to.
  if (!running_) return {};
  return set_memory();
}

}  // namespace virtio_vsock
