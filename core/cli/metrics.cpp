// SPDX-License-Identifier: Apache-2.0
// `clone metrics`: a VM's metrics as Prometheus text.
#include <CLI/CLI.hpp>
#include <cstdio>

#include "cli/command.hpp"
#include "cli/vm_option.hpp"

namespace vmm {

ExitCode metrics_command(const Arguments& arguments) {
  std::string vm;
  CLI::App app("Print a VM's metrics as Prometheus text: clone metrics [VM]", "clone metrics");
  add_vm_option(app, vm);
  if (const Parsed parsed = parse(app, arguments); parsed.done) return parsed.code;
  auto found = contact(vm);
  if (!found.ok()) return fail(found.error());
  auto answer = found->client.call("metrics.read");
  if (!answer.ok()) return fail(answer.error());
  const auto* object = answer->result.if_object();
  const auto* text = object ? object->if_contains("text") : nullptr;
  if (!text || !text->is_string()) return fail(Error{"VM " + found->instance.name + ": metrics.read: no text"});
  std::fputs(text->get_string().c_str(), stdout);
  return ExitCode::success;
}

}  // namespace vmm
