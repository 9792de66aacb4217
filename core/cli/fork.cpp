// SPDX-License-Identifier: Apache-2.0
// `clone fork`: a machine that goes on from where a template stood, or another machine stands now.
#include <sys/stat.h>

#include <CLI/CLI.hpp>
#include <filesystem>
#include <map>
#include <optional>

#include "cli/command.hpp"
#include "cli/device_help.hpp"
#include "cli/machine_options.hpp"
#include "cli/many.hpp"
#include "cli/pool.hpp"
#include "cli/template_option.hpp"
#include "cli/vm_option.hpp"
#include "snapshot/backend.hpp"
#include "snapshot/handover.hpp"
#include "snapshot/plan_sections.hpp"
#include "vm/session.hpp"
#include "vm/shell.hpp"

namespace vmm {
namespace {

// Copying the memory of a machine that has no file for it takes its time.
constexpr auto kHandoverLimit = std::chrono::minutes(10);
constexpr unsigned kMostInPool = 1000;

// What the command line says.
struct ForkOptions {
  StartOptions start;
  TemplateStore store;
  std::string name, vm;
  unsigned count = 1;
  std::optional<unsigned> prepare;
  PrefaultMode prefault = PrefaultMode::recorded;
};

void add_origin_options(CLI::App& app, ForkOptions& options) {
  auto* origins = app.add_option_group("Origin");
  origins->add_option("--template,-t", options.name, "A template, as `clone template list` names it.")
      ->type_name("NAME");
  origins->add_option("--from", options.vm, "A VM that runs and goes on, by name, id or process id.")->type_name("VM");
  add_store_option(app, options.store);
  app.add_option("--count", options.count,
                 "Start so many, NAME-1, NAME-2, … without a console here, and wait for them all.")
      ->type_name("N")
      ->check(CLI::Range(1u, 1000u));
  app.add_option("--prepare", options.prepare,
                 "Start none, but keep so many ready in the background: the next forks of this template take them and "
                 "begin sooner. 0 ends that.")
      ->type_name("N")
      ->check(CLI::Range(0u, kMostInPool));
  static const std::map<std::string, PrefaultMode> modes = {
      {"none", PrefaultMode::none}, {"recorded", PrefaultMode::recorded}, {"all", PrefaultMode::all}};
  app.add_option("--prefault", options.prefault,
                 "Memory to map ahead, in the background: none, recorded (what the template's first fork touched in its "
                 "first 2 s; default), all.")
      ->type_name("WHAT")
      ->transform(CLI::CheckedTransformer(modes));
}

PoolKey key_of(const ForkOptions& options) { return {options.store, options.name, options.start.plugins}; }

// Whom a pool can serve: one fork of a template. What else is asked for, and whether it makes sense, its member says.
std::optional<ExitCode> take_from_pool(const Arguments& arguments) {
  ForkOptions options;
  CLI::App app;
  app.set_help_flag();
  app.allow_extras();
  add_origin_options(app, options);
  add_plugin_options(app, options.start.plugins);
  try {
    app.parse(std::vector(arguments.rbegin(), arguments.rend()));
  } catch (const CLI::Error&) {
    return std::nullopt;
  }
  if (options.name.empty() || !options.vm.empty() || options.count > 1 || options.prepare) return std::nullopt;
  return fork_from_pool(key_of(options), arguments);
}

// The options of `clone fork` with these plugins, for one command line.
class ForkParser {
 public:
  ForkParser(const Catalogue& catalogue, const std::vector<Setting>& settings);
  ForkParser(const ForkParser&) = delete;
  ForkParser& operator=(const ForkParser&) = delete;

  // Help and mistakes are printed.
  Parsed parse(const Arguments& arguments, PluginLibrary& library);
  ForkOptions options;

 private:
  const Catalogue& catalogue_;
  CLI::App app_{"Start a virtual machine from where another stood: clone fork --template NAME | --from VM [OPTIONS]",
                "clone fork"};
};

ForkParser::ForkParser(const Catalogue& catalogue, const std::vector<Setting>& settings) : catalogue_(catalogue) {
  add_origin_options(app_, options);
  for (const Setting& setting : settings)
    if (is_setting_of_forks(setting)) add_setting(app_, setting, options.start.settings);
  add_start_options(app_, options.start);
}

Parsed ForkParser::parse(const Arguments& arguments, PluginLibrary& library) {
  if (const Parsed parsed = parse_settings(app_, arguments, catalogue_); parsed.done) return parsed;
  if (const auto printed = print_device_help(library, options.start.settings)) return {true, *printed};
  const auto wrong = [](const char* message) { return Parsed{true, fail(Error{message}, ExitCode::usage)}; };
  if (options.name.empty() == options.vm.empty()) return wrong("give one of --template NAME and --from VM");
  if (options.prepare && options.name.empty()) return wrong("--prepare is for a template: give --template NAME");
  if (options.prepare && (options.count > 1 || !options.start.settings.empty()))
    return wrong("--prepare starts no fork: leave the options of one to the commands that do");
  apply_verbosity(options.start);
  return {};
}

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
  origin.saved.template_name = name;
  origin.saved.image = &*origin.image;
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

// Forks of one origin, with one set of plugins.
class Forks {
 public:
  explicit Forks(Catalogue catalogue)
      : catalogue_(std::move(catalogue)), settings_(all_settings(catalogue_)), library_(catalogue_) {}

  std::unique_ptr<ForkParser> parser() const { return std::make_unique<ForkParser>(catalogue_, settings_); }
  PluginLibrary& library() { return library_; }
  Result<void> open(const ForkOptions& options);
  // The shell is begun at once, and made while the plan is.
  ExitCode start(const ForkOptions& options, Timing& timing, ShellAhead& shell, int waiting = -1);
  ExitCode start_several(const ForkOptions& options, Timing& timing);
  ExitCode keep_ready(const ForkOptions& options);

 private:
  Result<Plan> plan_of(const ForkOptions& options) const;
  bool is_current(const std::string& name) const;

  Catalogue catalogue_;
  std::vector<Setting> settings_;
  PluginLibrary library_;
  std::unique_ptr<SnapshotBackend> backend_;  // lasts longer than the image
  Origin origin_;
  std::vector<GivenSetting> profile_;
  std::optional<CheckedPlan> ready_;  // for a fork that is given nothing
};

Result<void> Forks::open(const ForkOptions& options) {
  if (options.name.empty()) {
    TRY(from_machine(options.vm, origin_));
  } else {
    backend_ = TRY(open_store(library_, options.store));
    TRY(from_template(*backend_, options.name, origin_));
  }
  profile_ = TRY(saved_settings(origin_.saved.sections, settings_));
  return {};
}

Result<Plan> Forks::plan_of(const ForkOptions& options) const {
  return plan_of_fork(profile_, options.start.settings);
}

// Its name may be another template's by now.
bool Forks::is_current(const std::string& name) const {
  auto image = backend_->open(name);
  const auto sections = image.ok() ? image->sections() : image.error();
  return sections.ok() && *sections == origin_.saved.sections;
}

ExitCode Forks::start(const ForkOptions& options, Timing& timing, ShellAhead& shell, int waiting) {
  if (!ready_ || !options.start.settings.empty()) {
    const auto plan = plan_of(options);
    if (!plan.ok()) return fail(plan.error(), ExitCode::usage);
    timing.mark("plan");
    shell.fill(plan->memory, plan->vcpus, origin_.saved);
    auto checked = check_plan(*plan, library_);
    if (!checked.ok()) return fail(checked.error(), ExitCode::usage);
    timing.mark("plugins");
    ready_ = std::move(*checked);
  }
  origin_.saved.shell = &shell;
  origin_.saved.prefault = options.prefault;
  Session session(*ready_, library_, timing, options.start.timing ? TimingReport::print : TimingReport::none,
                  &origin_.saved);
  session.waits_for_it(waiting);
  return exit_code_of(session.run());
}

ExitCode Forks::start_several(const ForkOptions& options, Timing& timing) {
  // Read once by this process, so that the others find it read.
  const auto plan = plan_of(options);
  const auto checked = plan.ok() ? check_plan(*plan, library_) : plan.error();
  if (!checked.ok()) return fail(checked.error(), ExitCode::usage);
  const std::string given = checked->plan.name;
  const auto name_of = [&](unsigned number) {
    return (given.empty() ? "fork" : given) + "-" + std::to_string(number);
  };
  origin_.saved.prefault = options.prefault;
  return start_many(options.count, name_of, [&](unsigned number) {
    CheckedPlan own = *checked;
    if (!given.empty()) own.plan.name = name_of(number);
    Session session(own, library_, timing, options.start.timing ? TimingReport::print : TimingReport::none,
                    &origin_.saved);
    return exit_code_of(session.run());
  });
}

// Each member makes a whole shell, memory and all. What it does for a client is the rest, with the client's options.
ExitCode Forks::keep_ready(const ForkOptions& options) {
  const auto plan = plan_of({});
  auto checked = plan.ok() ? check_plan(*plan, library_) : plan.error();
  if (!checked.ok()) return fail(checked.error());
  ready_ = std::move(*checked);
  std::optional<Shell> shell;
  bool is_mapped = false;
  std::unique_ptr<ForkParser> parsed_by;
  const PoolMember member{
      [&]() -> Result<void> {
        parsed_by = parser();
        shell = TRY(Shell::create());
        TRY(shell->fill(plan->memory, plan->vcpus, origin_.saved));
        is_mapped = Prefault::map_recorded(*shell->memory, *origin_.image);
        return shell->set_slots();
      },
      [&] { return is_current(options.name); },
      [&](const Arguments& arguments, int waiting) {
        Timing timing;
        if (const Parsed parsed = parsed_by->parse(arguments, library_); parsed.done) return parsed.code;
        timing.mark("options");
        PrefaultMode& prefault = parsed_by->options.prefault;
        if (is_mapped && prefault == PrefaultMode::recorded) prefault = PrefaultMode::none;
        ShellAhead made(std::move(*shell));
        return start(parsed_by->options, timing, made, waiting);
      }};
  const auto keeper = start_pool(key_of(options), *options.prepare, member);
  if (!keeper.ok()) return fail(keeper.error());
  std::printf("%u of '%s' ready, kept by process %d\n", *options.prepare, options.name.c_str(), *keeper);
  return ExitCode::success;
}

}  // namespace

ExitCode fork_command(const Arguments& arguments) {
  if (const auto code = take_from_pool(arguments)) return *code;
  Timing timing;
  auto catalogue = scan_plugins(early_plugin_paths(arguments));
  if (!catalogue.ok()) return fail(catalogue.error());
  Forks forks(std::move(*catalogue));
  const auto parser = forks.parser();
  if (const Parsed parsed = parser->parse(arguments, forks.library()); parsed.done) return parsed.code;
  ForkOptions& options = parser->options;
  if (options.prepare == 0) {
    const auto ended = end_pool(key_of(options));
    if (!ended.ok()) return fail(ended.error());
    std::printf(*ended ? "none of '%s' kept ready any more\n" : "none of '%s' was kept ready\n", options.name.c_str());
    return ExitCode::success;
  }
  timing.mark("options");
  // Who keeps others ready outlives the folder it was started in.
  std::error_code no_folder;
  if (options.prepare && !options.store.folder.empty())
    options.store.folder = std::filesystem::absolute(options.store.folder, no_folder).string();
  // No threads before other processes are made.
  std::optional<ShellAhead> shell;
  if (options.count == 1 && !options.prepare) shell.emplace();
  if (const auto opened = forks.open(options); !opened.ok()) return fail(opened.error());
  timing.mark(options.name.empty() ? "state of the other machine" : "template");
  if (options.prepare) return forks.keep_ready(options);
  return shell ? forks.start(options, timing, *shell) : forks.start_several(options, timing);
}

}  // namespace vmm
