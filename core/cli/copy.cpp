// SPDX-License-Identifier: Apache-2.0
// `clone cp`: copies files and trees into a VM's guest, or out of it.
#include <signal.h>

#include <CLI/CLI.hpp>
#include <optional>

#include "agent/copy.hpp"
#include "cli/agent_stream.hpp"
#include "cli/command.hpp"

namespace vmm {
namespace {

struct GuestPath {
  std::string vm;  // empty: that of --vm-id, or the only one
  std::string path;
};

// ":PATH" and "NAME:PATH" are in a guest; a '/' before the first ':' makes it a path here.
std::optional<GuestPath> guest_path(const std::string& text) {
  const size_t colon = text.find(':');
  if (colon == std::string::npos || text.find('/') < colon) return std::nullopt;
  return GuestPath{text.substr(0, colon), text.substr(colon + 1)};
}

Result<void> copy(const std::string& vm, const std::string& source, const std::string& target, bool owners,
                  uint32_t timeout_s) {
  const auto from = guest_path(source);
  const auto to = guest_path(target);
  const GuestPath& guest = from ? *from : *to;
  const AnswerLimit limit(timeout_s);
  AgentOf agent = TRY(open_agent(guest.vm.empty() ? vm : guest.vm, limit));
  ::signal(SIGPIPE, SIG_IGN);
  const CopyOptions options = {owners, limit.left(), std::chrono::seconds(std::max(timeout_s, 60u))};
  return (from ? copy_out_of_guest(agent.session, guest.path, target, options)
               : copy_into_guest(agent.session, source, guest.path, options))
      .context(agent.name);
}

}  // namespace

ExitCode copy_command(const Arguments& arguments) {
  std::string vm, source, target;
  bool owners = false;
  uint32_t timeout_s = 10;
  CLI::App app("Copy files and folders into a virtual machine, or out of it.", "clone cp");
  app.footer(
      "One of SOURCE and TARGET is in a guest: :PATH, or NAME:PATH with the name or id of its VM; PATH is absolute.");
  app.add_option("--vm-id", vm, "Name, id or process id of the VM; needed when several run.")->type_name("ID");
  app.add_flag("--owners", owners, "Keep user and group; otherwise what is new belongs to who makes it.");
  app.add_option("--timeout", timeout_s, "Seconds that the agent may take to answer. (default: 10)")
      ->type_name("SECONDS")
      ->check(CLI::Range(1u, 600u));
  app.add_option("SOURCE", source, "What to copy.")->required();
  app.add_option("TARGET", target, "Where to: a new name, or a directory that is there.")->required();
  if (const Parsed parsed = parse(app, arguments); parsed.done) return parsed.code;
  const auto from = guest_path(source);
  const auto to = guest_path(target);
  if (from.has_value() == to.has_value())
    return fail(Error{source + " " + target + ": one of them has to be in a guest, :PATH or NAME:PATH"},
                ExitCode::usage);
  const GuestPath& guest = from ? *from : *to;
  if (!guest.path.starts_with('/'))
    return fail(Error{(from ? source : target) + ": a path in a guest begins with '/'"}, ExitCode::usage);
  if (!vm.empty() && !guest.vm.empty() && vm != guest.vm)
    return fail(Error{"--vm-id " + vm + ", " + guest.vm + ": two names of a VM"}, ExitCode::usage);
  const Result<void> copied = copy(vm, source, target, owners, timeout_s);
  return copied.ok() ? ExitCode::success : fail(copied.error());
}

}  // namespace vmm
