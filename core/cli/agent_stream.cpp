// SPDX-License-Identifier: Apache-2.0
// How commands reach the agent in a VM's guest.
#include "cli/agent_stream.hpp"

#include "control/client.hpp"

namespace vmm {

Result<AgentOf> open_agent(const std::string& vm, const AnswerLimit& limit) {
  const InstanceRecord instance = TRY(find_instance(vm));
  ControlClient client = TRY(ControlClient::connect(instance, limit.left()));
  const auto left = limit.left();
  // The VM itself gives up in time; more than that only one that hangs needs.
  auto reply = client.call("guest-agent.connect", {{"timeout_ms", left.count()}}, left + std::chrono::seconds(1));
  const std::string name = "VM " + instance.name;
  if (!reply.ok()) {
    Error error = std::move(reply).error();
    if (error.message.starts_with(name + ": ")) error.message.erase(0, name.size() + 2);
    return limit.explain(std::move(error)).context(name);
  }
  if (!reply->fd) return Error{name + ": it gave no stream to the agent"};
  return AgentOf{name, AgentSession(std::move(reply->fd))};
}

}  // namespace vmm
