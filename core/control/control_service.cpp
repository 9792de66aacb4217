// SPDX-License-Identifier: Apache-2.0
// clone.host-control/1 and clone.host-instances/1: commands and metrics of plugins on the control socket, and the VMs
// around.
#include "clone/abi/control.h"

#include <fcntl.h>

#include <algorithm>

#include "clone/sdk/error.hpp"
#include "control/control_server.hpp"
#include "control/instances.hpp"
#include "loop/event_loop.hpp"
#include "memory/usage.hpp"
#include "plugin/host_context.hpp"

namespace vmm {
namespace {

namespace json = boost::json;

using Call = void (*)(void* context, const char* json, const clone_reply* reply);

// Behind a clone_reply until it is answered, from any thread.
struct PendingReply {
  ControlServer::Reply reply;
  EventLoop& loop;
};

template <typename Answer>
void answer(void* context, Answer&& how) {
  const std::shared_ptr<PendingReply> pending(static_cast<PendingReply*>(context));
  if (pending->loop.in_loop_thread()) return how(pending->reply);
  pending->loop.post([pending, how = std::forward<Answer>(how)]() mutable { how(pending->reply); });
}

void succeed_with_fd(void* context, const char* text, int32_t fd) noexcept {
  boost::system::error_code error;
  json::value result = json::parse(text, error);
  // Shared: what is posted to a loop is copied.
  const auto duplicate = std::make_shared<Fd>(fd < 0 ? -1 : ::fcntl(fd, F_DUPFD_CLOEXEC, 0));
  answer(context, [result = std::move(result), bad = error.failed(), duplicate](ControlServer::Reply& reply) {
    if (bad) return reply.fail("the plugin answered what is no JSON");
    reply.succeed(result, std::move(*duplicate));
  });
}

void succeed(void* context, const char* text) noexcept { succeed_with_fd(context, text, -1); }

void fail(void* context, const char* message) noexcept {
  answer(context, [text = std::string(message)](ControlServer::Reply& reply) { reply.fail(text); });
}

clone_status add_command(const clone_host* host, const char* name, const char* help, Call call, void* context,
                         clone_err* err) noexcept {
  return clone_sdk::guarded(err, [&]() -> Result<void> {
    HostContext& owner = context_of(host);
    const auto run = [call, context, loop = owner.main_loop](const json::object& parameters,
                                                             ControlServer::Reply reply) {
      const clone_reply raw = {sizeof raw, 0,    new PendingReply{std::move(reply), *loop},
                               succeed,    fail, succeed_with_fd};
      call(context, json::serialize(parameters).c_str(), &raw);
    };
    const std::string instance = host->name;
    TRY(owner.control->add_method(instance, instance + "." + name, help, run));
    constexpr std::string_view first = ".0";
    if (instance.ends_with(first))
      TRY(owner.control->add_method(instance, instance.substr(0, instance.size() - first.size()) + "." + name, help,
                                    run));
    return {};
  });
}

clone_status add_metric(const clone_host* host, const char* name, const char* help, uint32_t kind,
                        double (*read)(void* context), void* context, clone_err* err) noexcept {
  return clone_sdk::guarded(err, [&]() -> Result<void> {
    const std::string_view allowed = "abcdefghijklmnopqrstuvwxyz0123456789_";
    if (std::string_view(name).empty() || std::string_view(name).find_first_not_of(allowed) != std::string_view::npos)
      return Error{std::string("metric '") + name + "': allowed are small letters, digits and '_'"};
    context_of(host).control->add_metric(host->name, {name, help, kind, host->name, [=] { return read(context); }});
    return {};
  });
}

void notify(const clone_host* host, const char* name, const char* text) noexcept {
  boost::system::error_code error;
  json::value parameters = json::parse(text, error);
  if (error || !parameters.is_object()) return;
  HostContext& owner = context_of(host);
  const std::string method = std::string(host->name) + "." + name;
  auto tell = [control = owner.control, method, parameters = std::move(parameters)] {
    control->notify(method, parameters.get_object());
  };
  if (owner.main_loop->in_loop_thread()) return tell();
  owner.main_loop->post(std::move(tell));
}

const char* directory(const clone_host* host) noexcept {
  return context_of(host).directory->record().directory.c_str();
}

// This VM first, then the others, oldest first. One that ends meanwhile is left out.
clone_status list(const clone_host* host, void (*visit)(void* context, const clone_instance* instance), void* context,
                  clone_err* err) noexcept {
  return clone_sdk::guarded(err, [&]() -> Result<void> {
    std::vector<InstanceRecord> instances = TRY(list_instances());
    const std::string& own = context_of(host).directory->record().id;
    std::stable_partition(instances.begin(), instances.end(), [&](const InstanceRecord& one) { return one.id == own; });
    for (const InstanceRecord& one : instances) {
      const auto usage = memory_usage(one.pid);
      if (!usage.ok()) continue;
      const clone_instance told = {sizeof told,      static_cast<uint32_t>(one.pid), one.id.c_str(),
                                   one.memory_bytes, usage->resident_bytes,          usage->private_bytes};
      visit(context, &told);
    }
    return {};
  });
}

int32_t directory_fd(const clone_host* host) noexcept { return context_of(host).directory->fd(); }

}  // namespace

const clone_host_control* control_service() {
  static constexpr clone_host_control table = {
      sizeof(clone_host_control), 0, add_command, add_metric, notify, directory, directory_fd};
  return &table;
}

const clone_host_instances* instances_service() {
  static constexpr clone_host_instances table = {sizeof(clone_host_instances), 0, list};
  return &table;
}

}  // namespace vmm
