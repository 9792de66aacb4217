// SPDX-License-Identifier: Apache-2.0
// `clone fork`: a machine that goes on from where a template stood.
#include <CLI/CLI.hpp>

#include "cli/command.hpp"
#include "cli/machine_options.hpp"
#include "cli/template_option.hpp"
#include "snapshot/backend.hpp"
#include "snapshot/plan_sections.hpp"
#include "vm/session.hpp"

namespace vmm {

ExitCode fork_command(const Arguments& arguments) {
  Timing timing;
  auto catalogue = scan_plugins(early_plugin_paths(arguments));
  if (!catalogue.ok()) return fail(catalogue.error());
  const std::vector<Setting> settings = all_settings(*catalogue);

  StartOptions options;
  TemplateStore store;
  std::string name;
  CLI::App app("Start a virtual machine from a template: clone fork --template NAME [OPTIONS]", "clone fork");
  app.add_option("--template,-t", name, "The template, as `clone template list` names it.")
      ->type_name("NAME")
      ->required()
      ->group("Template");
  add_store_option(app, store);
  for (const Setting& setting : settings)
    if (is_setting_of_forks(setting)) add_setting(app, setting, options.settings);
  add_start_options(app, options);
  if (const Parsed parsed = parse_settings(app, arguments, *catalogue); parsed.done) return parsed.code;
  apply_verbosity(options);

  PluginLibrary library(*catalogue);
  auto backend = open_store(library, store);
  if (!backend.ok()) return fail(backend.error());
  auto image = (*backend)->open(name);
  if (!image.ok()) return fail(image.error());
  SavedMachine saved;
  if (auto sections = image->sections(); sections.ok())
    saved.sections = std::move(*sections);
  else
    return fail(sections.error());
  if (auto extents = image->extents(); extents.ok())
    saved.memory = std::move(*extents);
  else
    return fail(extents.error());
  timing.mark("template");

  auto profile = saved_settings(saved.sections, settings);
  if (!profile.ok()) return fail(std::move(profile).error().context("template " + name));
  auto plan = make_plan(*profile, options.settings);
  if (!plan.ok()) return fail(plan.error(), ExitCode::usage);
  timing.mark("plan");
  auto checked = check_plan(*plan, library);
  if (!checked.ok()) return fail(checked.error(), ExitCode::usage);
  timing.mark("plugins");
  Session session(*checked, library, timing, options.timing ? TimingReport::print : TimingReport::none, &saved);
  return exit_code_of(session.run());
}

}  // namespace vmm
