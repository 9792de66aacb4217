// SPDX-License-Identifier: Apache-2.0
// `clone attach` and `clone logs`: a VM's console, with and without a keyboard.
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>

#include "cli/command.hpp"
#include "cli/vm_option.hpp"
#include "console/terminal.hpp"
#include "util/local_socket.hpp"
#include "util/log.hpp"

namespace vmm {
namespace {

constexpr char kLeave = 0x11;  // Ctrl-Q

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

enum class Left { by_user, machine_ended, output_gone };

enum class Typing { sent, only_to_leave };

// Until the user leaves or the machine ends. `input` may be -1.
Left carry(int socket, int input, int output, Typing typing) {
  char bytes[16 * 1024];
  while (true) {
    pollfd wanted[] = {{socket, POLLIN, 0}, {input, POLLIN, 0}};
    if (::poll(wanted, 2, -1) < 0) {
      if (errno == EINTR) continue;
      return Left::by_user;
    }
    if (wanted[0].revents) {
      const ssize_t count = ::read(socket, bytes, sizeof bytes);
      if (count <= 0 && !(count < 0 && errno == EINTR)) return Left::machine_ended;
      if (count > 0 && !write_all(output, {bytes, static_cast<size_t>(count)})) return Left::output_gone;
    }
    if (input >= 0 && wanted[1].revents) {
      const ssize_t count = ::read(input, bytes, sizeof bytes);
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) {  // the end of a pipe: what is printed still counts
        if (typing == Typing::sent) ::shutdown(socket, SHUT_WR);
        input = -1;
        continue;
      }
      const std::string_view typed(bytes, static_cast<size_t>(count));
      const size_t leave = typed.find(kLeave);
      if (typing == Typing::sent && !write_all(socket, typed.substr(0, leave))) return Left::machine_ended;
      if (leave != std::string_view::npos) return Left::by_user;
    }
  }
}

// The process that types instead of us, if one does.
int other_writer(ControlClient& client) {
  auto answer = client.call("console.clients");
  const auto* clients = answer.ok() ? answer->result.if_array() : nullptr;
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
  } else if (const int pid = other_writer(found->client)) {
    log_warning("process " + std::to_string(pid) + " types there already; you watch until it leaves");
  }
  const bool interactive = ::isatty(STDIN_FILENO) != 0;
  if (interactive) std::fprintf(stderr, "attached to %s; Ctrl-Q leaves\n", found->instance.name.c_str());
  Left left;
  {
    Terminal terminal(STDIN_FILENO);
    terminal.enter_raw();
    // A watcher's terminal is read too: for Ctrl-Q.
    left = carry(socket->get(), STDIN_FILENO, STDOUT_FILENO, read_only ? Typing::only_to_leave : Typing::sent);
  }
  if (interactive)
    std::fprintf(stderr, "\r\n%s\n", left == Left::machine_ended ? "the VM has ended" : "left; the VM runs on");
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
    carry(socket->get(), -1, STDOUT_FILENO, Typing::only_to_leave);
    return ExitCode::success;
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
