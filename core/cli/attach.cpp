// SPDX-License-Identifier: Apache-2.0
// `clone attach` and `clone logs`: a VM's console, with and without a keyboard.
#include <fcntl.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>

#include "cli/command.hpp"
#include "cli/vm_option.hpp"
#include "console/attachment.hpp"
#include "console/terminal.hpp"
#include "util/local_socket.hpp"
#include "util/log.hpp"

namespace vmm {
namespace {

Result<Fd> connect_console(const InstanceRecord& instance) {
  const Fd directory(::open(instance.directory.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
  if (!directory) return errno_error(instance.directory).context("VM " + instance.name);
  return connect_in(directory.get(), "console.sock").context("VM " + instance.name);
}

bool write_all(int fd, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t count = ::write(fd, bytes.data(), bytes.size());
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    bytes.remove_prefix(static_cast<size_t>(count));
  }
  return true;
}

// The process that types instead of us, if one does.
Result<int> other_writer(ControlClient& client) {
  const auto answer = TRY(client.call("console.clients"));
  const auto* clients = answer.result.if_array();
  if (!clients) return 0;
  for (const auto& entry : *clients) {
    const auto* fields = entry.if_object();
    const auto* types = fields ? fields->if_contains("types") : nullptr;
    const auto* pid = fields ? fields->if_contains("pid") : nullptr;
    if (types && types->is_bool() && types->get_bool() && pid && pid->is_int64() && pid->get_int64() != ::getpid())
      return static_cast<int>(pid->get_int64());
  }
  return 0;
}

// Behind a console that hung up: a VM that answers has not ended, but has turned us away.
Result<void> check_ended(Contact& vm) {
  const auto answer = vm.client.call("vm.info");
  if (answer.ok()) return Error{"VM " + vm.instance.name + ": it closed the console; the last line says why"};
  return answer.error().code == ECONNRESET ? Result<void>() : answer.error();
}

}  // namespace

ExitCode attach_command(const Arguments& arguments) {
  std::string vm;
  bool read_only = false;
  CLI::App app("Enter a VM's serial console; Ctrl-Q leaves: clone attach [VM]", "clone attach");
  add_vm_option(app, vm);
  app.add_flag("--read-only,-r", read_only, "Watch; type nothing.");
  if (const Parsed parsed = parse(app, arguments); parsed.done) return parsed.code;
  auto found = contact(vm);
  if (!found.ok()) return fail(found.error());
  auto socket = connect_console(found->instance);
  if (!socket.ok()) return fail(socket.error());
  ::signal(SIGPIPE, SIG_IGN);
  if (read_only) {
    ::shutdown(socket->get(), SHUT_WR);
  } else {
    const auto pid = other_writer(found->client);
    if (!pid.ok()) return fail(pid.error());
    if (*pid) log_warning("process " + std::to_string(*pid) + " types there already; you watch until it leaves");
  }
  const bool interactive = ::isatty(STDIN_FILENO) != 0;
  if (interactive) std::fprintf(stderr, "attached to %s; Ctrl-Q leaves\n", found->instance.name.c_str());
  Left left;
  {
    Terminal terminal(STDIN_FILENO);
    terminal.enter_raw();
    // A watcher's terminal is read too: for Ctrl-Q.
    left = carry_console(socket->get(), STDIN_FILENO, STDOUT_FILENO, read_only ? Typing::only_to_leave : Typing::sent);
  }
  if (left == Left::hung_up)
    if (const auto ended = check_ended(*found); !ended.ok()) return fail(ended.error());
  if (interactive)
    std::fprintf(stderr, "\r\n%s\n", left == Left::hung_up ? "the VM has ended" : "left; the VM runs on");
  return ExitCode::success;
}

ExitCode logs_command(const Arguments& arguments) {
  std::string vm;
  bool follow = false;
  bool of_vmm = false;
  CLI::App app("Print what a VM's console printed last: clone logs [VM]", "clone logs");
  add_vm_option(app, vm);
  app.add_flag("--follow,-f", follow, "Go on with what is printed from now on, until the VM ends.");
  app.add_flag("--vmm", of_vmm, "The VMM's own messages instead.");
  if (const Parsed parsed = parse(app, arguments); parsed.done) return parsed.code;
  if (follow && of_vmm) return fail(Error{"--follow is for the console; leave it or --vmm out"}, ExitCode::usage);
  auto found = contact(vm);
  if (!found.ok()) return fail(found.error());
  ::signal(SIGPIPE, SIG_IGN);
  if (follow) {
    auto socket = connect_console(found->instance);
    if (!socket.ok()) return fail(socket.error());
    ::shutdown(socket->get(), SHUT_WR);
    const Left left = carry_console(socket->get(), -1, STDOUT_FILENO, Typing::only_to_leave);
    const Result<void> ended = left == Left::hung_up ? check_ended(*found) : Result<void>();
    return ended.ok() ? ExitCode::success : fail(ended.error());
  }
  auto answer = found->client.call(of_vmm ? "log.read" : "console.read");
  if (!answer.ok()) return fail(answer.error());
  const auto* object = answer->result.if_object();
  if (const auto* text = object ? object->if_contains("text") : nullptr; text && text->is_string())
    write_all(STDOUT_FILENO, text->get_string());
  if (const auto* lines = object ? object->if_contains("lines") : nullptr; lines && lines->is_array())
    for (const auto& line : lines->get_array())
      if (line.is_string()) write_all(STDOUT_FILENO, std::string(line.get_string()) + "\n");
  return ExitCode::success;
}

}  // namespace vmm
