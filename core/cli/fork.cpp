// SPDX-License-Identifier: Apache-2.0
// `clone fork`: a machine that goes on from where a template stood, or another machine stands now.
#include <sys/stat.h>

#include <CLI/CLI.hpp>
#include <optional>

#include "cli/command.hpp"
#include "cli/device_help.hpp"
#include "cli/machine_options.hpp"
#include "cli/many.hpp"
#include "cli/template_option.hpp"
#include "cli/vm_option.hpp"
#include "snapshot/backend.hpp"
#include "snapshot/handover.hpp"
#include "snapshot/plan_sections.hpp"
#include "vm/session.hpp"

namespace vmm {
namespace {

// Copying the memory of a machine that has no file for it takes its time.
constexpr auto kHandoverLimit = std::chrono::minutes(10);

// A machine's state, and what its memory's descriptors belong to.
struct Origin {
  SavedMachine saved;
  std::optional<SnapshotImage> image;
  Fd memory;
};

Result<void> from_template(const SnapshotBackend& backend, const std::string& name, Origin& origin) {
  origin.image.emplace(TRY(backend.open(name)));
  origin.saved.sections = TRY(origin.image->sections());
  origin.saved.memory = TRY(origin.image->extents());
  return {};
}

Result<void> from_machine(const std::string& vm, Origin& origin) {
  auto found = TRY(contact(vm));
  auto answer = TRY(found.client.call("vm.fork", {}, kHandoverLimit));
  const boost::json::value* sections =
      answer.result.is_object() ? answer.result.get_object().if_contains("sections") : nullptr;
  struct stat file {};
  if (!sections || !answer.fd || ::fstat(answer.fd.get(), &file) != 0)
    return Error{"VM " + found.instance.name + ": an answer without state and memory"};
  origin.saved.sections = TRY(sections_from_json(*sections));
  origin.memory = std::move(answer.fd);
  origin.saved.memory = {{origin.memory.get(), 0, 0, static_cast<uint64_t>(file.st_size)}};
  return {};
}

}  // namespace

ExitCode fork_command(const Arguments& arguments) {
  Timing timing;
  auto catalogue = scan_plugins(early_plugin_paths(arguments));
  if (!catalogue.ok()) return fail(catalogue.error());
  const std::vector<Setting> settings = all_settings(*catalogue);

  StartOptions options;
  TemplateStore store;
  std::string name, vm;
  unsigned count = 1;
  CLI::App app(
      "Start a virtual machine from where another stood: clone fork --template NAME | --from VM [OPTIONS]",
      "clone fork");
  auto* origins = app.add_option_group("Origin");
  origins->add_option("--template,-t", name, "A template, as `clone template list` names it.")->type_name("NAME");
  origins->add_option("--from", vm, "A VM that runs and goes on, by name, id or process id.")->type_name("VM");
  add_store_option(app, store);
  app.add_option("--count", count, "Start so many, NAME-1, NAME-2, … without a console here, and wait for them all.")
      ->type_name("N")
      ->check(CLI::Range(1u, 1000u));
  for (const Setting& setting : settings)
    if (is_setting_of_forks(setting)) add_setting(app, setting, options.settings);
  add_start_options(app, options);
  if (const Parsed parsed = parse_settings(app, arguments, *catalogue); parsed.done) return parsed.code;
  PluginLibrary library(*catalogue);
  if (const auto printed = print_device_help(library, options.settings)) return *printed;
  if (name.empty() == vm.empty()) return fail(Error{"give one of --template NAME and --from VM"}, ExitCode::usage);
  apply_verbosity(options);

  std::unique_ptr<SnapshotBackend> backend;  // lasts longer than its image
  Origin origin;
  if (name.empty()) {
    if (const auto taken = from_machine(vm, origin); !taken.ok()) return fail(taken.error());
  } else {
    auto opened = open_store(library, store);
    if (!opened.ok()) return fail(opened.error());
    backend = std::move(*opened);
    if (const auto taken = from_template(*backend, name, origin); !taken.ok()) return fail(taken.error());
  }
  timing.mark(name.empty() ? "state of the other machine" : "template");

  auto profile = saved_settings(origin.saved.sections, settings);
  if (!profile.ok()) return fail(profile.error());
  auto plan = make_plan(*profile, options.settings);
  if (!plan.ok()) return fail(plan.error(), ExitCode::usage);
  plan->complete = true;  // the guest knows of no others
  // Those that the profile does not have come from the command line.
  for (PlannedDevice& device : plan->devices) device.is_new = device.where.empty();
  timing.mark("plan");
  auto checked = check_plan(*plan, library);
  if (!checked.ok()) return fail(checked.error(), ExitCode::usage);
  timing.mark("plugins");
  const auto run = [&] {
    Session session(*checked, library, timing, options.timing ? TimingReport::print : TimingReport::none,
                    &origin.saved);
    return exit_code_of(session.run());
  };
  if (count == 1) return run();
  const std::string given = checked->plan.name;
  const auto name_of = [&](unsigned number) {
    return (given.empty() ? "fork" : given) + "-" + std::to_string(number);
  };
  return start_many(count, name_of, [&](unsigned number) {
    if (!given.empty()) checked->plan.name = name_of(number);
    return run();
  });
}

}  // namespace vmm
