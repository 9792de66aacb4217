// SPDX-License-Identifier: Apache-2.0
// The virtio socket device (virtio 1.2 §5.10): its options, its configuration space, its life, and clone.vsock/1.
#include <linux/virtio_ids.h>
#include <poll.h>
#include <sys/socket.h>

#include <bit>
#include <charconv>
#include <list>

#include "cid.hpp"
#include "clone/abi/control.h"
#include "clone/abi/vsock.h"
#include "clone/sdk/plugin.hpp"
#include "user_backend.hpp"
#include "vhost_backend.hpp"

namespace virtio_vsock {
namespace {

using clone_sdk::Activation;
using clone_sdk::Error;
using clone_sdk::Fd;
using clone_sdk::Options;
using clone_sdk::Queue;
using clone_sdk::Result;
using clone_sdk::Watch;

constexpr uint64_t kStreamFeature = 1;  // VIRTIO_VSOCK_F_STREAM, bit 0
constexpr uint32_t kQueueSize = 256;

enum class Kind { automatic, vhost, user };  // the order of the option's choices

constexpr clone_option kBackend = clone_sdk::choice_option(
    "backend", "auto",
    "vhost is the kernel's vhost-vsock, user sockets in the VM's directory; auto takes vhost where it can be had.",
    "auto|vhost|user");
constexpr clone_option kCid = clone_sdk::number_option(
    "cid", nullptr, "The guest's context id; by default the next one that is free.", kFirstGuestCid, kLastGuestCid);
constexpr clone_option kQueueSizeOption =
    clone_sdk::number_option("queue-size", "256", "Packets that a queue holds; a power of two.", 16, 1024);
constexpr const clone_option* kOptions[] = {&kBackend, &kCid, &kQueueSizeOption, nullptr};

// Streams do not outlive the machine that they led to, and the CID is the machine's that the guest wakes up in: the
// reset event has the driver read it again.
struct SavedVsock {
  uint32_t queue_size;
};
constexpr const char* kSavedTag = "virtio-vsock";
constexpr uint32_t kSavedVersion = 1;

// The parameters {"port": N} and nothing else.
std::optional<uint32_t> parse_port(std::string_view json) {
  const auto take = [&json](std::string_view token) {
    json.remove_prefix(std::min(json.find_first_not_of(" \t\r\n"), json.size()));
    if (!json.starts_with(token)) return false;
    json.remove_prefix(token.size());
    return true;
  };
  if (!take("{") || !take("\"port\"") || !take(":") || !take("")) return std::nullopt;
  uint32_t number = 0;
  const auto [end, error] = std::from_chars(json.data(), json.data() + json.size(), number);
  if (error != std::errc() || number == UINT32_MAX) return std::nullopt;
  json.remove_prefix(static_cast<size_t>(end - json.data()));
  if (!take("}") || !take("") || !json.empty()) return std::nullopt;
  return number;
}

class VirtioVsock final : public clone_sdk::VirtioDeviceOf<VIRTIO_ID_VSOCK> {
 public:
  static const clone_descriptor descriptor;
  using VirtioDeviceOf::VirtioDeviceOf;
  ~VirtioVsock() override;

  Result<void> configure(const Options& options) override;
  Result<void> start() override { return resume(); }
  Result<void> quiesce() override { return backend_->quiesce(); }
  Result<void> resume() override;
  Result<void> save(const clone_sdk::Writer& writer) override {
    return writer.put(kSavedTag, kSavedVersion, SavedVsock{queue_size_});
  }
  Result<void> load(const clone_sdk::Reader& reader) override;
  const void* extension(std::string_view id) override;

  uint64_t features() const override { return kStreamFeature; }
  uint64_t ring_features(uint64_t offered) const override { return backend_->ring_features(offered); }
  uint32_t queue_count() const override { return kQueueCount; }
  uint32_t queue_max_size(uint32_t) const override { return queue_size_; }
  uint32_t config_size() const override { return sizeof(virtio_vsock_config); }
  void read_config(uint32_t offset, void* data, uint32_t size_bytes) override {
    clone_sdk::copy_config(virtio_vsock_config{htole64(cid_.number)}, offset, data, size_bytes);
  }
  Result<void> activate(Activation activation) override;
  void reset_queues() override;

 private:
  // A `connect` command that waits for the guest.
  struct Pending {
    VirtioVsock* device;
    std::list<Pending>::iterator place;
    uint32_t port;
    Fd fd;
    clone_reply reply;
    Watch watch;
    void ready() { device->connected(*this); }
  };

  Result<void> choose_backend(Kind kind, std::optional<uint32_t> wanted_cid);
  Result<void> offer_commands();
  Result<void> publish();
  Result<void> begin_connect(const char* json, const clone_reply* reply);
  void connected(Pending& pending);
  std::string status() const;
  void serve_events();

  const clone_host_loop* loop_ = nullptr;
  const clone_host_control* control_ = nullptr;  // null on a host without a control socket
  uint32_t queue_size_ = kQueueSize;
  Cid cid_;
  std::unique_ptr<Backend> backend_;
  VhostBackend* vhost_ = nullptr;  // backend_, when it is that
  clone_vsock published_{};
  std::list<Pending> pending_;

  // The event queue is served on the main loop, whatever the backend.
  Queue events_;
  clone_sdk::Chain event_chain_;
  const clone_virtio_port* port_ = nullptr;
  bool reset_event_due_ = false;
  Watch events_watch_;
};

const clone_descriptor VirtioVsock::descriptor = {sizeof(clone_descriptor),
                                                  CLONE_CAN_SAVE | CLONE_CAN_MIGRATE,
                                                  "virtio-vsock",
                                                  "Streams between the host and programs of the guest.",
                                                  kOptions,
                                                  "vmw_vsock_virtio_transport"};

VirtioVsock::~VirtioVsock() {
  events_watch_.stop();
  for (Pending& pending : pending_) {
    pending.watch.stop();
    pending.reply.fail(pending.reply.context, "connect: the machine ended");
  }
}

Result<void> VirtioVsock::configure(const Options& options) {
  loop_ = CLONE_TRY(host().service<clone_host_loop>(CLONE_HOST_LOOP));
  if (auto control = host().service<clone_host_control>(CLONE_HOST_CONTROL); control.ok()) control_ = *control;
  queue_size_ = static_cast<uint32_t>(options.number("queue-size", kQueueSize));
  if (!std::has_single_bit(queue_size_))
    return Error{"queue-size=" + std::to_string(queue_size_) + ": allowed are the powers of two from 16 to 1024"};
  const auto wanted = options.text("cid") ? std::optional(static_cast<uint32_t>(options.number("cid"))) : std::nullopt;
  CLONE_TRY(publish());
  CLONE_TRY(choose_backend(static_cast<Kind>(options.number("backend")), wanted));
  published_.cid = cid_.number;
  return offer_commands();
}

Result<void> VirtioVsock::choose_backend(Kind kind, std::optional<uint32_t> wanted_cid) {
  // Beside the directories of the VMs, which do not begin with a dot.
  const std::string directory = control_ ? control_->directory(host().raw()) : "";
  const std::string locks = directory.empty() ? "" : directory + "/..";
  if (kind != Kind::user) {
    auto vhost = VhostBackend::create(host());
    if (vhost.ok()) {
      vhost_ = vhost->get();
      backend_ = std::move(*vhost);
      cid_ = CLONE_TRY(take_cid(locks, wanted_cid, [this](uint32_t cid) { return vhost_->claim_cid(cid); }));
      return {};
    }
    if (kind == Kind::vhost) return std::move(vhost).error().context("backend=vhost");
    host().log(CLONE_LOG_DEBUG, "backend=user, because of " + vhost.error().message);
  }
  cid_ = CLONE_TRY(take_cid(locks, wanted_cid, [](uint32_t) -> Result<bool> { return true; }));
  backend_ = CLONE_TRY(
      UserBackend::create(host(), cid_.number, directory.empty() ? -1 : control_->directory_fd(host().raw())));
  return {};
}

// First of all, so that a second device of a machine's fails before it takes anything.
Result<void> VirtioVsock::publish() {
  const auto table = host().service<clone_host_publish>(CLONE_HOST_PUBLISH);
  if (!table.ok()) return {};  // nobody could look for it
  published_ = {sizeof published_, 0, this, [](void* self, uint32_t port, int32_t* fd, clone_err* err) noexcept {
                  return clone_sdk::guarded(err, [&]() -> Result<void> {
                    Fd stream = CLONE_TRY(static_cast<VirtioVsock*>(self)->backend_->connect(port));
                    *fd = stream.release();
                    return {};
                  });
                }};
  clone_sdk::ErrorBuffer error;
  const clone_status status = (*table)->publish(host().raw(), CLONE_VSOCK, &published_, error);
  if (status == CLONE_ERR_BUSY)
    return Error{"a machine has one vsock device: backend and CID together are --vsock BACKEND,cid=N", 0, status};
  return error.result(status);
}

// --- Commands and metrics ---

Result<void> VirtioVsock::offer_commands() {
  if (!control_) return {};
  clone_sdk::ErrorBuffer error;
  CLONE_TRY(error.result(control_->add_command(
      host().raw(), "connect",
      "Opens a stream to a port of the guest; its descriptor comes with the answer. {\"port\": N}",
      [](void* self, const char* json, const clone_reply* reply) noexcept {
        if (auto begun = static_cast<VirtioVsock*>(self)->begin_connect(json, reply); !begun.ok())
          reply->fail(reply->context, begun.error().message.c_str());
      },
      this, error)));
  CLONE_TRY(error.result(control_->add_command(
      host().raw(), "status", "The guest's CID, the backend, and how many streams there are.",
      [](void* self, const char*, const clone_reply* reply) noexcept {
        reply->succeed(reply->context, static_cast<VirtioVsock*>(self)->status().c_str());
      },
      this, error)));
  if (!backend_->counters()) return {};
  const auto metric = [&](const char* name, const char* help, uint32_t kind, double (*read)(void*)) {
    return error.result(control_->add_metric(host().raw(), name, help, kind, read, this, error));
  };
  static constexpr auto counters = [](void* self) -> const Counters& {
    return *static_cast<VirtioVsock*>(self)->backend_->counters();
  };
  CLONE_TRY(metric("vsock_connections", "Streams between the host and the guest.", CLONE_METRIC_GAUGE,
                   [](void* self) noexcept { return static_cast<double>(counters(self).streams.load()); }));
  CLONE_TRY(metric("vsock_to_guest_bytes_total", "Bytes of streams that went to the guest.", CLONE_METRIC_COUNTER,
                   [](void* self) noexcept { return static_cast<double>(counters(self).to_guest_bytes.load()); }));
  return metric("vsock_from_guest_bytes_total", "Bytes of streams that came from the guest.", CLONE_METRIC_COUNTER,
                [](void* self) noexcept { return static_cast<double>(counters(self).from_guest_bytes.load()); });
}

std::string VirtioVsock::status() const {
  const Counters* counters = backend_->counters();
  return "{\"cid\": " + std::to_string(cid_.number) + ", \"backend\": \"" + backend_->name() +
         "\", \"connections\": " + (counters ? std::to_string(counters->streams.load()) : "null") + "}";
}

Result<void> VirtioVsock::begin_connect(const char* json, const clone_reply* reply) {
  const auto port = parse_port(json);
  if (!port) return Error{"connect: allowed is {\"port\": N}, N being a port of the guest from 0 to 4294967294"};
  Fd fd = CLONE_TRY(backend_->connect(*port).context("connect"));
  pending_.push_front({this, {}, *port, std::move(fd), {}, {}});
  Pending& pending = pending_.front();
  pending.place = pending_.begin();
  std::memcpy(&pending.reply, reply, std::min<size_t>(reply->size, sizeof pending.reply));
  auto watch =
      Watch::start<&Pending::ready>(loop_, loop_->main_loop(host().raw()), pending.fd.get(), CLONE_WRITABLE, &pending);
  if (!watch.ok()) {
    pending_.pop_front();
    return std::move(watch).error();
  }
  pending.watch = std::move(*watch);
  return {};
}

void VirtioVsock::connected(Pending& pending) {
  pollfd entry = {pending.fd.get(), POLLOUT, 0};
  int error = 0;
  socklen_t size = sizeof error;
  const bool known =
      ::poll(&entry, 1, 0) == 1 && ::getsockopt(pending.fd.get(), SOL_SOCKET, SO_ERROR, &error, &size) == 0;
  if (!known) return;
  std::list<Pending> done;
  done.splice(done.begin(), pending_, pending.place);
  pending.watch.stop();
  const clone_reply& reply = pending.reply;
  if (error || entry.revents & (POLLHUP | POLLERR))
    reply.fail(reply.context, ("connect: the guest does not accept streams to port " + std::to_string(pending.port) +
                               (error == ETIMEDOUT ? " (no answer)" : ""))
                                  .c_str());
  else
    reply.succeed_with_fd(reply.context, ("{\"port\": " + std::to_string(pending.port) + "}").c_str(),
                          pending.fd.get());
}

// --- The life of the device ---

Result<void> VirtioVsock::activate(Activation activation) {
  CLONE_TRY(backend_->activate(activation));
  events_ = activation.queues[kEventQueue];
  port_ = activation.port;
  if (!events_) return {};
  events_watch_ = CLONE_TRY(Watch::start<&VirtioVsock::serve_events>(loop_, loop_->main_loop(host().raw()),
                                                                     events_.kick_fd(), CLONE_READABLE, this));
  return {};
}

void VirtioVsock::reset_queues() {
  events_watch_.stop();
  events_ = {};
  port_ = nullptr;
  backend_->reset_queues();
}

Result<void> VirtioVsock::resume() {
  CLONE_TRY(backend_->resume());
  // Now, not when the loop comes to it: the driver ends every stream that it knows when it takes the event, also those
  // that were begun after the load.
  if (events_ && reset_event_due_) serve_events();
  return {};
}

// On the main loop. The driver's buffers stay in the queue until there is an event (virtio 1.2 §5.10.6.7).
void VirtioVsock::serve_events() {
  events_.clear_kick();
  if (!reset_event_due_) return;
  const Queue::Pop popped = events_.pop(event_chain_);
  if (popped == Queue::Pop::broken) {
    reset_event_due_ = false;
    port_->needs_reset(port_->context);
  }
  if (popped != Queue::Pop::chain) return;
  const virtio_vsock_event event = {htole32(VIRTIO_VSOCK_EVENT_TRANSPORT_RESET)};
  const bool written = event_chain_.write(0, &event, sizeof event);
  events_.push(event_chain_, written ? sizeof event : 0);
  events_.signal();
  if (written)
    reset_event_due_ = false;
  else
    events_.kick();
}

Result<void> VirtioVsock::load(const clone_sdk::Reader& reader) {
  const auto saved = CLONE_TRY(reader.get<SavedVsock>(kSavedTag, kSavedVersion));
  if (saved.queue_size != queue_size_)
    return Error{"queue-size is " + std::to_string(queue_size_) + ", of the saved device " +
                 std::to_string(saved.queue_size)};
  CLONE_TRY(backend_->end_streams());
  reset_event_due_ = true;
  return {};
}

const void* VirtioVsock::extension(std::string_view id) {
  static constexpr auto vhost = [](void* device) -> VhostBackend& {
    return *static_cast<VirtioVsock*>(static_cast<Device*>(device))->vhost_;
  };
  static constexpr clone_vhost table = {
      sizeof(clone_vhost),
      0,
      [](void* device, clone_err* err) noexcept {
        return clone_sdk::guarded(err, [&] { return vhost(device).start_log(); });
      },
      [](void* device, void (*mark)(void*, uint64_t, uint64_t), void* context, clone_err* err) noexcept {
        return clone_sdk::guarded(err, [&] { return vhost(device).take_log(mark, context); });
      },
      [](void* device, clone_err* err) noexcept {
        return clone_sdk::guarded(err, [&] { return vhost(device).stop_log(); });
      },
      [](void* device, clone_err* err) noexcept {
        return clone_sdk::guarded(err, [&] { return vhost(device).memory_changed(); });
      }};
  if (id == CLONE_VHOST) return vhost_ ? &table : nullptr;
  return VirtioDeviceOf::extension(id);
}

}  // namespace
}  // namespace virtio_vsock

CLONE_SDK_PLUGIN("virtio-vsock", "1.0.0", "clone", "Apache-2.0", "Streams between the host and programs of the guest.",
                 CLONE_PROVIDES("device", "virtio-vsock", "default")
                     CLONE_PROVIDES_FLAG("--cid", "virtio-vsock", "CID", "cid=%",
                                         "The guest's vsock context id; by default the next one that is free.")
                         CLONE_PROVIDES_FLAG("--vsock", "virtio-vsock", "[BACKEND]", "backend=%",
                                             "How vsock streams are carried: auto, vhost (the kernel) or user "
                                             "(sockets in the VM's directory)."))
CLONE_SDK_DEVICES(virtio_vsock::VirtioVsock)
