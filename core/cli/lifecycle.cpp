// SPDX-License-Identifier: Apache-2.0
// `clone stop`, `clone pause`, `clone resume`.
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <CLI/CLI.hpp>

#include <optional>

#include "cli/command.hpp"
#include "cli/vm_option.hpp"

namespace vmm {
namespace {

ExitCode call_one(const Arguments& arguments, const char* name, const char* help, const char* method) {
  std::string vm;
  CLI::App app(help, name);
  add_vm_option(app, vm);
  if (const Parsed parsed = parse(app, arguments); parsed.done) return parsed.code;
  auto found = contact(vm);
  if (!found.ok()) return fail(found.error());
  if (auto answer = found->client.call(method); !answer.ok()) return fail(answer.error());
  return ExitCode::success;
}

// The process itself, though its number may be given to another later.
bool wait_for_end(int process, std::chrono::milliseconds limit) {
  pollfd ended{process, POLLIN, 0};
  return ::poll(&ended, 1, static_cast<int>(limit.count())) > 0;
}

}  // namespace

ExitCode pause_command(const Arguments& arguments) {
  return call_one(arguments, "clone pause", "Let a VM stand still: clone pause [VM]", "vm.pause");
}

ExitCode resume_command(const Arguments& arguments) {
  return call_one(arguments, "clone resume", "Let a paused VM go on: clone resume [VM]", "vm.resume");
}

ExitCode stop_command(const Arguments& arguments) {
  std::string vm;
  std::optional<unsigned> grace_seconds;
  bool force = false;
  CLI::App app("Power a VM off and wait until it has ended: clone stop [VM]", "clone stop");
  add_vm_option(app, vm);
  app.add_option("--grace", grace_seconds, "How long the guest may take before it is stopped (default: as it was run).")
      ->type_name("SECONDS")
      ->check(CLI::Range(0u, 3600u));
  app.add_flag("--force,-f", force, "Stop it at once, without asking the guest.");
  if (const Parsed parsed = parse(app, arguments); parsed.done) return parsed.code;
  auto found = contact(vm);
  if (!found.ok()) return fail(found.error());
  const Fd process(static_cast<int>(::syscall(SYS_pidfd_open, found->instance.pid, 0)));
  boost::json::object parameters;
  if (force) parameters["force"] = true;
  if (grace_seconds) parameters["grace_ms"] = static_cast<int64_t>(*grace_seconds) * 1000;
  if (auto answer = found->client.call("vm.stop", std::move(parameters)); !answer.ok()) return fail(answer.error());
  // The VM itself keeps the time; a VMM that hangs is told apart from it by a wide margin.
  constexpr auto most = std::chrono::milliseconds(3'600'000 + 30'000);
  if (process && !wait_for_end(process.get(), most))
    return fail(
        Error{"VM " + found->instance.name + ": process " + std::to_string(found->instance.pid) + " does not end"});
  return ExitCode::success;
}

}  // namespace vmm
