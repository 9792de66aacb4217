// SPDX-License-Identifier: Apache-2.0
// `clone exec`: runs a command in a VM's guest, with its streams, its signals and its exit status here.
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdlib>

#include "agent/exec.hpp"
#include "cli/agent_stream.hpp"
#include "cli/command.hpp"
#include "console/terminal.hpp"

namespace vmm {
namespace {

struct ExecOptions {
  std::string vm;
  ExecRequest request;
  uint32_t timeout_s = 10;
};

ExitCode exec_failed(const Error& error) { return fail(error, static_cast<ExitCode>(kExecFailed)); }

// Signals of ours as a descriptor, until the end of the process.
Result<Fd> take_signals() {
  sigset_t set;
  ::sigemptyset(&set);
  for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGWINCH}) {
    // Who started us with a signal ignored (nohup) wants it ignored.
    struct sigaction action {};
    if (::sigaction(signal, nullptr, &action) == 0 && action.sa_handler == SIG_IGN) continue;
    ::sigaddset(&set, signal);
  }
  Fd signals(::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
  if (!signals || ::sigprocmask(SIG_BLOCK, &set, nullptr) != 0) return errno_error("signals");
  return signals;
}

Result<void> check_variables(const std::vector<std::string>& variables) {
  for (const std::string& variable : variables)
    if (const size_t equals = variable.find('='); equals == 0 || equals == std::string::npos)
      return Error{"--env " + variable + ": allowed is NAME=VALUE"};
  return {};
}

// The terminal that the command gets: ours, of the same kind and size.
Result<void> describe_terminal(const Terminal& terminal, ExecRequest& request) {
  if (!::isatty(STDIN_FILENO) || !::isatty(STDOUT_FILENO))
    return Error{"-t: standard input and output have to be a terminal"};
  if (terminal.in_background())
    return Error{"-t: the terminal belongs to another job, this one runs in the background"};
  winsize size{};
  if (::ioctl(STDIN_FILENO, TIOCGWINSZ, &size) == 0) {
    request.rows = size.ws_row;
    request.columns = size.ws_col;
  }
  const bool given = std::any_of(request.environment.begin(), request.environment.end(),
                                 [](const std::string& variable) { return variable.starts_with("TERM="); });
  if (const char* type = std::getenv("TERM"); type && !given)
    request.environment.push_back(std::string("TERM=") + type);
  return {};
}

ExitCode run(ExecOptions options) {
  ExecRequest& request = options.request;
  Terminal terminal(STDIN_FILENO);
  if (request.terminal) {
    if (Result<void> there = describe_terminal(terminal, request); !there.ok()) return exec_failed(there.error());
  }
  Result<std::string> frame = exec_frame(request);
  if (!frame.ok()) return exec_failed(frame.error());

  const AnswerLimit limit(options.timeout_s);
  Result<AgentOf> agent = open_agent(options.vm, limit);
  if (!agent.ok()) return exec_failed(agent.error());
  ::signal(SIGPIPE, SIG_IGN);
  Result<Fd> signals = take_signals();
  if (!signals.ok()) return exec_failed(signals.error());
  if (request.terminal && !terminal.enter_raw()) return exec_failed({"-t: the terminal cannot be put into raw mode"});

  const ExecStreams streams = {request.input ? STDIN_FILENO : -1, STDOUT_FILENO, STDERR_FILENO, signals->get(),
                               request.terminal ? STDIN_FILENO : -1};
  Result<ExecEnd> end = run_exec(agent->session, *frame, streams, limit.left());
  terminal.restore();
  if (!end.ok()) {
    const Error error = end.error().code == ETIMEDOUT ? limit.explain(end.error()) : end.error();
    return exec_failed(Error(error).context(agent->name));
  }
  const auto status = static_cast<ExitCode>(end->status);
  return end->message.empty() ? status : fail(Error{end->message}.context(agent->name), status);
}

}  // namespace

ExitCode exec_command(const Arguments& arguments) {
  ExecOptions options;
  ExecRequest& request = options.request;
  CLI::App app("Run a command in a virtual machine, through the agent in its guest.", "clone exec");
  app.footer("Usage: clone exec [OPTION…] -- COMMAND [ARGUMENT…]");
  app.add_option("--vm-id", options.vm, "Name, id or process id of the VM; needed when several run.")->type_name("ID");
  app.add_flag("-i,--interactive", request.input, "Send standard input; otherwise the command reads /dev/null.");
  app.add_flag("-t,--tty", request.terminal, "Give the command this terminal, keys included.");
  app.add_option("-u,--user", request.user, "Run as this user of the guest. (default: root)")->type_name("USER");
  app.add_option("-w,--workdir", request.directory, "Run in this directory. (default: the user's home)")
      ->type_name("DIR");
  app.add_option("-e,--env", request.environment, "Add to the environment; any number of times.")
      ->type_name("NAME=VALUE")
      ->expected(1)
      ->allow_extra_args(false)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  app.add_option("--timeout", options.timeout_s, "Seconds that the agent may take to begin the command. (default: 10)")
      ->type_name("SECONDS")
      ->check(CLI::Range(1u, 600u));
  // What stands behind the first "--" is the guest's, whatever it looks like.
  const auto dashes = std::find(arguments.begin(), arguments.end(), "--");
  if (const Parsed parsed = parse(app, {arguments.begin(), dashes}); parsed.done) return parsed.code;
  if (dashes != arguments.end()) request.arguments.assign(dashes + 1, arguments.end());
  if (request.arguments.empty())
    return fail(Error{"the command is missing: clone exec [OPTION…] -- COMMAND [ARGUMENT…]"}, ExitCode::usage);
  if (Result<void> checked = check_variables(request.environment); !checked.ok())
    return fail(checked.error(), ExitCode::usage);
  if (request.terminal) request.input = true;
  return run(std::move(options));
}

}  // namespace vmm
