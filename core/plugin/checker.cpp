// SPDX-License-Identifier: Apache-2.0
// The order of a check: the file, what it returns when loaded, then each thing that it provides.
#include "plugin/checker.hpp"

#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "clone/abi/balloon_policy.h"
#include "clone/abi/boot_arguments.h"
#include "clone/abi/boot_root.h"
#include "clone/abi/snapshot_backend.h"
#include "clone/abi/vhost.h"
#include "plugin/check_subject.hpp"
#include "plugin/crash_report.hpp"
#include "plugin/elf_exports.hpp"
#include "plugin/elf_reader.hpp"
#include "plugin/host_context.hpp"
#include "util/mapping.hpp"

namespace vmm {
namespace {

namespace fs = std::filesystem;

struct KnownFactory {
  const char* kind;
  const char* id;
};
constexpr KnownFactory kFactories[] = {{"device", CLONE_DEVICE_FACTORY},
                                       {"transport", CLONE_TRANSPORT_FACTORY},
                                       {"balloon-policy", CLONE_BALLOON_POLICY_FACTORY},
                                       {"snapshot-backend", CLONE_SNAPSHOT_BACKEND_FACTORY}};

// Every factory and every row of one begin alike.
struct AnyType {
  uint32_t size;
  uint32_t reserved;
  const clone_descriptor* descriptor;
};
struct AnyFactory {
  uint32_t size;
  uint32_t count;
  const AnyType* (*type)(uint32_t index);
};

class CheckDirectory {
 public:
  CheckDirectory() {
    std::string pattern = (fs::temp_directory_path() / "clone-check-XXXXXX").string();
    if (!::mkdtemp(pattern.data())) return;
    folder.path = pattern;
    fs::create_directory(folder.folder());
    std::ofstream(folder.file()).put(0);
    fs::resize_file(folder.file(), 1 << 20);
  }
  CheckDirectory(const CheckDirectory&) = delete;
  ~CheckDirectory() {
    std::error_code ignored;
    if (!folder.path.empty()) fs::remove_all(folder.path, ignored);
  }
  CheckFolder folder;
};

Result<LoadedPlugin> load(const PluginFile& file) {
  void* library = ::dlopen(file.path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) return Error{::dlerror()};
  const auto entry = reinterpret_cast<clone_plugin_entry_function>(::dlsym(library, CLONE_PLUGIN_ENTRY));
  if (!entry) return Error{"it has no function " CLONE_PLUGIN_ENTRY};
  LoadedPlugin loaded;
  loaded.entry = entry();
  loaded.plugin = copy_table(loaded.entry);
  if (entry() != loaded.entry) return Error{"its entry function returns another pointer the second time"};
  return loaded;
}

Result<void> initialise(const PluginFile& file, const LoadedPlugin& loaded) {
  if (!loaded.plugin.init) return {};
  // A host with a log and nothing else, as the real one. It lasts as long as this process.
  const auto* host = new HostHandle(file.manifest.id, *new HostContext{});
  clone_sdk::ErrorBuffer error;
  return error.result(loaded.plugin.init(host->raw(), error));
}

// --- the file

void check_file(CheckRecorder& recorder, const PluginFile& file, std::span<const std::byte> bytes) {
  recorder.rule("the file bears the plugin's name", [&] {
    return Verdict::when(fs::path(file.path).filename() == file.manifest.id + ".so",
                         "it should be called " + file.manifest.id + ".so");
  });
  recorder.rule("the manifest tells version, licence and purpose", [&] {
    const Manifest& manifest = file.manifest;
    if (manifest.version.empty() || manifest.licence.empty() || manifest.description.empty())
      return Verdict::failed("version, licence or description is empty");
    return Verdict::when(!manifest.provides.empty(), "it provides nothing");
  });
  recorder.rule("the kinds that it provides are known", [&] {
    const std::vector<std::string>& unknown = file.manifest.unknown_records;
    if (unknown.empty()) return Verdict();
    const std::string text = "unknown kind '" + unknown.front() + "'";
    return file.manifest.abi_minor > CLONE_ABI_MINOR ? Verdict::skipped(text) : Verdict::failed(text);
  });
  recorder.rule("its short flags belong to its devices", [&] {
    for (const ShortFlag& flag : file.manifest.flags) {
      if (!file.manifest.find("device", flag.device))
        return Verdict::failed(flag.flag + " is for '" + flag.device + "', which it does not provide");
      if (flag.help.empty()) return Verdict::failed(flag.flag + " has no help");
    }
    for (const FlagOption& flag : file.manifest.flag_options) {
      if (!file.manifest.find("device", flag.device))
        return Verdict::failed(flag.flag + " is for '" + flag.device + "', which it does not provide");
      if (flag.help.empty()) return Verdict::failed(flag.flag + " has no help");
    }
    return Verdict();
  });
  recorder.rule("it exports clone_plugin_entry and nothing else", [&] {
    const auto symbols = exported_symbols(bytes);
    if (!symbols.ok()) return Verdict::failed(symbols.error().message);
    std::string all;
    for (const std::string& name : *symbols) all += (all.empty() ? "" : ", ") + name;
    return Verdict::when(all == CLONE_PLUGIN_ENTRY, all.empty() ? "it exports nothing" : "it exports " + all);
  });
}

// --- loaded

std::string factory_mistake(const Manifest& manifest, const clone_plugin& plugin, const KnownFactory& known) {
  const auto* factory = static_cast<const AnyFactory*>(plugin.get_factory(known.id));
  const auto promised = std::count_if(manifest.provides.begin(), manifest.provides.end(),
                                      [&](const Provided& provided) { return provided.kind == known.kind; });
  const std::string kind = known.kind;
  if (!factory) return promised ? "the manifest promises a " + kind + ", there is no factory " + known.id : "";
  if (factory->size < sizeof(AnyFactory) || !factory->type) return std::string(known.id) + " is incomplete";
  for (uint32_t i = 0; i < factory->count; ++i) {
    const AnyType* type = factory->type(i);
    if (!type || type->size < sizeof(AnyType) || !type->descriptor || !type->descriptor->name)
      return std::string(known.id) + ": row " + std::to_string(i) + " has no descriptor";
    if (!manifest.find(kind, type->descriptor->name))
      return kind + " '" + type->descriptor->name + "' is in the factory and not in the manifest";
  }
  for (const Provided& provided : manifest.provides) {
    if (provided.kind != kind) continue;
    uint32_t found = 0;
    for (uint32_t i = 0; i < factory->count; ++i) found += provided.name == factory->type(i)->descriptor->name;
    if (found != 1)
      return kind + " '" + provided.name + "' is in the manifest and " +
             (found ? "more than once in the factory" : "not in the factory");
  }
  return {};
}

void check_loaded(CheckRecorder& recorder, const PluginFile& file, std::span<const std::byte> bytes) {
  void* library = nullptr;
  if (!recorder.rule("it is loaded with every symbol resolved", [&] {
        library = ::dlopen(file.path.c_str(), RTLD_NOW | RTLD_LOCAL);
        return Verdict::when(library, library ? "" : ::dlerror());
      }))
    return;
  LoadedPlugin loaded;
  if (!recorder.rule("its entry function returns the same table twice", [&] {
        auto result = load(file);
        if (!result.ok()) return Verdict::failed(result.error().message);
        loaded = *result;
        if (!loaded.entry) return Verdict::failed("it returns NULL");
        return Verdict::when(loaded.plugin.manifest && loaded.plugin.get_factory,
                             "the table has no manifest or no get_factory");
      }))
    return;
  recorder.rule("the table's manifest is that of the file", [&] {
    const auto sections = elf_sections(bytes);
    if (!sections.ok()) return Verdict::failed(sections.error().message);
    for (const ElfSection& section : *sections)
      if (section.name == CLONE_MANIFEST_SECTION)
        return Verdict::when(section.bytes.size() >= sizeof(clone_manifest) &&
                                 std::memcmp(section.bytes.data(), loaded.plugin.manifest, sizeof(clone_manifest)) == 0,
                             "they differ");
    return Verdict::failed("the file has none");
  });
  if (!recorder.rule("its init succeeds", [&] {
        const auto result = initialise(file, loaded);
        return Verdict::when(result.ok(), result.ok() ? "" : result.error().message);
      }))
    return;
  recorder.rule("a factory that it cannot know is answered with NULL", [&] {
    for (const char* id : {"", "clone.unheard-of/1", "clone.device/4294967295"})
      if (loaded.plugin.get_factory(id)) return Verdict::failed("'" + std::string(id) + "' is answered with a table");
    return Verdict();
  });
  for (const KnownFactory& known : kFactories)
    recorder.rule("manifest and factory " + std::string(known.id) + " agree", [&] {
      const std::string mistake = factory_mistake(file.manifest, loaded.plugin, known);
      return Verdict::when(mistake.empty(), mistake);
    });
}

// --- what it provides

template <typename Factory, typename Type>
const Type* find_type(const clone_plugin& plugin, const char* id, const std::string& name) {
  const auto* factory = static_cast<const Factory*>(plugin.get_factory(id));
  for (uint32_t i = 0; factory && i < factory->count; ++i)
    if (const Type* type = factory->type(i); name == type->descriptor->name) return type;
  return nullptr;
}

// Every function of a table but those that are optional is there.
template <typename Type, typename... Members>
Verdict complete(const Type* type, Members... members) {
  const Type copy = copy_table(type);
  return Verdict::when(((copy.*members != nullptr) && ...), "a function is missing");
}

void check_descriptor_of(CheckRecorder& recorder, const PluginFile& file, const Provided& provided,
                         const CheckFolder& folder, const clone_descriptor* descriptor) {
  CheckSubject subject{file, provided, folder, {}, {}};
  subject.type.descriptor = copy_table(descriptor);
  if (recorder.rule("its descriptor is complete",
                    [&] { return Verdict::when(subject.type.descriptor.options, "it has no option table"); }))
    check_description(recorder, subject);
}

// A balloon policy on a bench, made with the defaults.
class CheckPolicy {
 public:
  explicit CheckPolicy(const clone_balloon_policy_type& type) : type_(copy_table(&type)) {
    const auto values = OptionValues::check(copy_table(type_.descriptor), {});
    if (values.ok()) type_.create(bench_->handle("policy"), &values->raw(), &policy_, error_);
  }
  CheckPolicy(const CheckPolicy&) = delete;
  ~CheckPolicy() {
    if (policy_) type_.destroy(policy_);
  }
  bool made() const { return policy_ != nullptr; }
  std::string error() const { return error_.result(CLONE_ERR_INTERNAL).error().message; }

  clone_status decide(const clone_balloon_input& input, clone_balloon_output& output) {
    output = {sizeof output, 0, 0};
    return type_.decide(policy_, &input, &output, error_);
  }
  clone_status save(CheckState& state) {
    const clone_writer writer = state.writer();
    return type_.save(policy_, &writer, error_);
  }
  clone_status load(CheckState& state) {
    const clone_reader reader = state.reader();
    return type_.load(policy_, &reader, error_);
  }
  const void* extension(const char* id) { return type_.get_extension(policy_, id); }

  // A moment in the life of a VM of 1 GiB of which some is not known.
  static clone_balloon_input sample(CheckRandom& random, uint64_t now_ms) {
    constexpr uint64_t memory = 1ull << 30;
    const auto maybe = [&](uint64_t value) { return random.one_in(4) ? ~uint64_t{0} : value; };
    return {sizeof(clone_balloon_input),
            static_cast<uint32_t>(random.below(3)),
            now_ms,
            memory,
            maybe(random.below(memory)),
            maybe(random.below(memory)),
            maybe(random.below(memory)),
            random.below(memory),
            static_cast<uint32_t>(maybe(random.below(1001))),
            static_cast<uint32_t>(maybe(random.below(1001)))};
  }

 private:
  std::unique_ptr<BenchHost> bench_ = make_bench();
  clone_balloon_policy_type type_;
  clone_sdk::ErrorBuffer error_;
  void* policy_ = nullptr;
};

void check_policy_state(CheckRecorder& recorder, const clone_balloon_policy_type& type) {
  // Lives through some minutes, with its state taken on the way.
  const auto live = [](CheckPolicy& policy, CheckRandom& random, uint64_t from_ms) {
    clone_balloon_output output{};
    for (uint64_t now_ms = from_ms; now_ms < from_ms + 200'000; now_ms += 1000 + random.below(5000))
      policy.decide(CheckPolicy::sample(random, now_ms), output);
  };
  recorder.rule("saves the same bytes twice, and the same after they are loaded", [&] {
    CheckPolicy policy(type), other(type);
    CheckRandom random(12);
    live(policy, random, 0);
    CheckState first, second, third;
    if (policy.save(first) != CLONE_OK || policy.save(second) != CLONE_OK)
      return Verdict::failed("save: " + policy.error());
    if (const std::string difference = first.difference(second); !difference.empty())
      return Verdict::failed(difference);
    if (other.load(first) != CLONE_OK) return Verdict::failed("load: " + other.error());
    if (other.save(third) != CLONE_OK) return Verdict::failed("save: " + other.error());
    const std::string difference = first.difference(third);
    return Verdict::when(difference.empty(), "loaded and saved: " + difference);
  });
  recorder.rule("goes on deciding after damaged states, loaded or refused", [&] {
    CheckRandom random(13);
    for (int round = 0; round < 100; ++round) {
      CheckPolicy policy(type);
      live(policy, random, 0);
      CheckState state;
      if (policy.save(state) != CLONE_OK) return Verdict::failed("save: " + policy.error());
      for (auto& [tag, section] : state.sections) {
        if (random.one_in(4)) section.version = static_cast<uint32_t>(random.next());
        if (random.one_in(3)) section.bytes.resize(random.below(2 * section.bytes.size() + 2));
        for (std::byte& byte : section.bytes)
          if (random.one_in(8)) byte = static_cast<std::byte>(random.next());
      }
      if (random.one_in(4) && !state.sections.empty()) state.sections.erase(state.sections.begin());
      CheckPolicy other(type);
      (void)other.load(state);
      clone_balloon_output output{};
      const uint64_t now_ms = random.one_in(2) ? random.below(1'000'000) : random.next();
      other.decide(CheckPolicy::sample(random, now_ms), output);
      if (output.target_bytes > 1ull << 30) return Verdict::failed("the target is larger than the machine's memory");
    }
    return Verdict();
  });
}

void check_policy(CheckRecorder& recorder, const PluginFile& file, const Provided& provided, const CheckFolder& folder,
                  const clone_plugin& plugin) {
  using Type = clone_balloon_policy_type;
  const auto* type = find_type<clone_balloon_policy_factory, Type>(plugin, CLONE_BALLOON_POLICY_FACTORY, provided.name);
  check_descriptor_of(recorder, file, provided, folder, type->descriptor);
  if (!recorder.rule("its table is complete", [&] {
        return complete(type, &Type::create, &Type::destroy, &Type::decide, &Type::save, &Type::load,
                        &Type::get_extension);
      }))
    return;
  if (const auto values = OptionValues::check(copy_table(type->descriptor), {}); !values.ok()) {
    recorder.rule("is made with its defaults",
                  [&] { return Verdict::skipped("it has required options: " + values.error().message); });
    return;
  }
  if (!recorder.rule("is made with its defaults", [&] {
        const CheckPolicy policy(*type);
        return Verdict::when(policy.made(), policy.error());
      }))
    return;
  recorder.rule("an extension that it cannot know is answered with NULL", [&] {
    CheckPolicy policy(*type);
    for (const char* id : {"", "clone.unheard-of/1"})
      if (policy.extension(id)) return Verdict::failed("'" + std::string(id) + "' is answered with a table");
    return Verdict();
  });
  recorder.rule("decides, whatever is known, within the machine's memory", [&] {
    CheckPolicy policy(*type);
    CheckRandom random(11);
    // Time may stand still.
    for (uint64_t now_ms = 0; now_ms < 1'000'000; now_ms += random.one_in(4) ? 0 : random.below(5000)) {
      const clone_balloon_input input = CheckPolicy::sample(random, now_ms);
      clone_balloon_output output{};
      if (policy.decide(input, output) != CLONE_OK) return Verdict::failed("decide: " + policy.error());
      if (output.target_bytes > input.memory_bytes)
        return Verdict::failed("the target is larger than the machine's memory");
    }
    return Verdict();
  });
  recorder.rule("decides when nothing at all is known", [&] {
    CheckPolicy policy(*type);
    clone_balloon_input input;
    std::memset(&input, 0xff, sizeof input);
    input.size = sizeof input;
    clone_balloon_output output{};
    for (const uint32_t activity : {CLONE_ACTIVITY_UNKNOWN, CLONE_ACTIVITY_IDLE, CLONE_ACTIVITY_ACTIVE, ~0u}) {
      input.activity = activity;
      if (policy.decide(input, output) != CLONE_OK) return Verdict::failed("decide: " + policy.error());
    }
    return Verdict();
  });
  check_policy_state(recorder, *type);
}

void check_backend(CheckRecorder& recorder, const PluginFile& file, const Provided& provided, const CheckFolder& folder,
                   const clone_plugin& plugin) {
  using Type = clone_snapshot_backend_type;
  const auto* type =
      find_type<clone_snapshot_backend_factory, Type>(plugin, CLONE_SNAPSHOT_BACKEND_FACTORY, provided.name);
  check_descriptor_of(recorder, file, provided, folder, type->descriptor);
  recorder.rule("its table is complete", [&] {
    return complete(type, &Type::create, &Type::destroy, &Type::begin, &Type::write_memory, &Type::write_section,
                    &Type::commit, &Type::open, &Type::memory_extent, &Type::read_section, &Type::list_sections,
                    &Type::verify, &Type::close, &Type::list, &Type::remove, &Type::get_extension);
  });
}

Verdict check_device_table(const CheckSubject& subject) {
  const clone_descriptor& descriptor = subject.type.descriptor;
  if (!descriptor.name || !descriptor.options) return Verdict::failed("its descriptor is incomplete");
  const clone_device_ops& ops = subject.type.ops;
  if (!ops.create || !ops.destroy || !ops.configure || !ops.quiesce || !ops.resume || !ops.reset || !ops.save ||
      !ops.load || !ops.get_extension)
    return Verdict::failed("a function is missing");
  return Verdict::when(!subject.is_transport() || subject.type.attach, "it has no attach function");
}

// Fills in the tables of a device or transport.
void find_tables(CheckSubject& subject, const clone_plugin& plugin) {
  auto fill = [&](const auto* type) {
    const auto copy = copy_table(type);
    subject.type.file = &subject.file;
    subject.type.descriptor = copy_table(copy.descriptor);
    subject.type.ops = copy_table(copy.ops);
  };
  if (subject.is_transport()) {
    const auto* type = find_type<clone_transport_factory, clone_transport_type>(plugin, CLONE_TRANSPORT_FACTORY,
                                                                                subject.provided.name);
    fill(type);
    subject.type.attach = copy_table(type).attach;
  } else {
    fill(find_type<clone_device_factory, clone_device_type>(plugin, CLONE_DEVICE_FACTORY, subject.provided.name));
  }
}

using Phase = void (*)(CheckRecorder&, const CheckSubject&);
// What later phases do is built on the first two: when one of those fails, the rest would only repeat it.
constexpr Phase kFoundations[] = {check_description, check_life};
constexpr Phase kPhases[] = {check_options,       check_accesses, check_state,
                             check_hostile_state, check_virtio,   check_leaks};

class Check {
 public:
  Check(std::string path, const CheckOptions& options, CheckReport& report)
      : path_(std::move(path)), options_(options), report_(report) {}

  void run() {
    auto mapped = map_file(path_);
    if (!add("the file can be read", mapped.ok() ? Result<void>() : mapped.error())) return;
    mapping_ = std::move(mapped).value();
    auto manifest = parse_manifest(mapping_.bytes());
    if (!add("its manifest can be read", manifest.ok() ? Result<void>() : manifest.error())) return;
    file_ = {path_, std::move(manifest).value()};
    if (!add("it is built for this plugin interface", check_abi(file_.manifest))) return;
    if (options_.trust == PluginTrust::checked && !add("nobody but its owner can change the file", check_trust(path_)))
      return;
    if (directory_.folder.path.empty()) {
      add("the check can be run", errno_error("temporary folder"));
      return;
    }
    phase("", [&](CheckRecorder& recorder) { check_file(recorder, file_, mapping_.bytes()); });
    if (phase("", [&](CheckRecorder& recorder) { check_loaded(recorder, file_, mapping_.bytes()); }) != 0) return;
    for (const Provided& provided : file_.manifest.provides) check_provided(provided);
  }

 private:
  bool add(const std::string& what, const Result<void>& result) {
    report_.rows.push_back(
        {result.ok() ? CheckVerdict::passed : CheckVerdict::failed, what, result.ok() ? "" : result.error().message});
    return result.ok();
  }

  // The number of rows that failed.
  unsigned phase(const std::string& prefix, const std::function<void(CheckRecorder&)>& body) {
    std::vector<CheckRow> rows;
    run_check_phase(rows, options_.phase_limit_ms, [&](CheckRecorder& recorder) {
      // Files that a plugin makes under relative names go with the folder.
      if (::chdir(directory_.folder.path.c_str()) == 0) body(recorder);
    });
    unsigned failed = 0;
    for (CheckRow& row : rows) {
      failed += row.verdict == CheckVerdict::failed;
      row.what = prefix + row.what;
      report_.rows.push_back(std::move(row));
    }
    return failed;
  }

  void check_provided(const Provided& provided) {
    const std::string prefix = provided.kind + " " + provided.name + ": ";
    const bool lives = provided.kind == "device" || provided.kind == "transport";
    auto with_plugin = [&](const std::function<void(CheckRecorder&, const clone_plugin&)>& body) {
      return phase(prefix, [&](CheckRecorder& recorder) {
        // The phase before this one saw it succeed.
        const auto loaded = load(file_);
        if (!loaded.ok() || !initialise(file_, *loaded).ok()) ::_exit(2);
        body(recorder, loaded->plugin);
      });
    };
    if (provided.kind == "balloon-policy")
      with_plugin([&](CheckRecorder& recorder, const clone_plugin& plugin) {
        check_policy(recorder, file_, provided, directory_.folder, plugin);
      });
    if (provided.kind == "snapshot-backend")
      with_plugin([&](CheckRecorder& recorder, const clone_plugin& plugin) {
        check_backend(recorder, file_, provided, directory_.folder, plugin);
      });
    if (!lives) return;

    CheckSubject subject{file_, provided, directory_.folder, {}, {}};
    for (const NamedOptions& given : options_.options)
      if (given.name == provided.name) subject.chosen = given.options;
    auto run = [&](Phase body) {
      return with_plugin([&](CheckRecorder& recorder, const clone_plugin& plugin) {
        find_tables(subject, plugin);
        body(recorder, subject);
      });
    };
    const unsigned incomplete = with_plugin([&](CheckRecorder& recorder, const clone_plugin& plugin) {
      find_tables(subject, plugin);
      recorder.rule("its tables are complete", [&] { return check_device_table(subject); });
    });
    if (incomplete) return;
    unsigned failed = 0;
    for (const Phase body : kFoundations) failed += run(body);
    const bool unavailable = std::any_of(report_.rows.begin(), report_.rows.end(), [&](const CheckRow& row) {
      return row.verdict == CheckVerdict::skipped && row.what.starts_with(prefix);
    });
    if (failed || unavailable) {
      report_.rows.push_back({CheckVerdict::skipped, prefix + "its work is checked",
                              failed ? "not before the rules above hold" : "it cannot be configured on this host"});
      return;
    }
    for (const Phase body : kPhases) run(body);
  }

  const std::string path_;
  const CheckOptions& options_;
  CheckReport& report_;
  CheckDirectory directory_;
  Mapping mapping_;
  PluginFile file_;
};

}  // namespace

unsigned CheckReport::count(CheckVerdict verdict) const {
  return static_cast<unsigned>(
      std::count_if(rows.begin(), rows.end(), [&](const CheckRow& row) { return row.verdict == verdict; }));
}

CheckReport check_plugin(const std::string& path, const CheckOptions& options) {
  CheckReport report;
  std::error_code ignored;
  Check(fs::absolute(path, ignored).string(), options, report).run();
  return report;
}

std::string known_extensions(const DeviceType& type) {
  const std::string name = type.file->manifest.id;
  const CrashReport crash(name, "while its extensions were asked for");
  HostContext context;
  const HostHandle host(name, context);
  void* device = nullptr;
  std::string known;
  try {
    if (type.ops.create(host.raw(), &device, nullptr) != CLONE_OK || !device) return "unknown: it cannot be created";
    for (const char* id : {CLONE_VIRTIO_DEVICE, CLONE_BOOT_ROOT, CLONE_BOOT_ARGUMENTS, CLONE_VHOST})
      if (type.ops.get_extension(device, id)) known += (known.empty() ? "" : ", ") + std::string(id);
    type.ops.destroy(device);
  } catch (...) {
    return "unknown: it threw an exception";
  }
  return known.empty() ? "none" : known;
}

}  // namespace vmm
