// SPDX-License-Identifier: Apache-2.0
// `clone snapshot` keeps a running machine as a template; `clone template` shows, checks, copies and removes them.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <boost/json.hpp>
#include <cstdio>
#include <filesystem>

#include "cli/command.hpp"
#include "cli/template_option.hpp"
#include "cli/vm_option.hpp"
#include "snapshot/copies.hpp"
#include "snapshot/plan_sections.hpp"
#include "util/utf8.hpp"
#include "vm/prefault.hpp"

namespace vmm {
namespace {

namespace json = boost::json;

// Writing takes as long as the disk does.
constexpr auto kSnapshotLimit = std::chrono::hours(1);

std::string milliseconds_text(int64_t us) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f ms", static_cast<double>(us) / 1000);
  return text;
}

// A command on templates that names none or one of them.
struct TemplateCommand {
  TemplateStore store;
  PluginPaths plugins;
  std::string name;
  std::string other;  // the new name, a file
  bool as_json = false;
};

template <typename Action>
ExitCode on_store(const TemplateCommand& command, Action&& action) {
  auto catalogue = scan_plugins(command.plugins);
  if (!catalogue.ok()) return fail(catalogue.error());
  PluginLibrary library(*catalogue);
  auto backend = open_store(library, command.store);
  if (!backend.ok()) return fail(backend.error());
  const Result<void> done = action(**backend);
  return done.ok() ? ExitCode::success : fail(done.error());
}

Result<void> list(const SnapshotBackend& backend, bool as_json) {
  const auto entries = TRY(backend.list());
  if (as_json) {
    json::array rows;
    for (const SnapshotBackend::Entry& entry : entries)
      rows.push_back(json::object{{"name", entry.name},
                                  {"parent", entry.parent.empty() ? json::value() : json::value(entry.parent)},
                                  {"memory_bytes", entry.memory_bytes},
                                  {"stored_bytes", entry.stored_bytes}});
    std::puts(json::serialize(rows).c_str());
    return {};
  }
  std::printf("%-24s %-24s %8s %8s\n", "NAME", "PARENT", "MEMORY", "STORED");
  for (const SnapshotBackend::Entry& entry : entries)
    std::printf("%-24s %-24s %8s %8s\n", entry.name.c_str(), entry.parent.empty() ? "-" : entry.parent.c_str(),
                size_text(entry.memory_bytes).c_str(), size_text(entry.stored_bytes).c_str());
  return {};
}

// What the first fork of a template touched; nothing where that is not recorded, or cannot be read.
std::optional<TouchedPages> recorded_pages(SnapshotImage& image, uint64_t memory_bytes) {
  const auto note = image.read_note(kTouchedNote);
  if (!note.ok() || !*note) return std::nullopt;
  auto pages = decode_touched(**note, memory_bytes / kPageSize);
  if (!pages.ok()) return std::nullopt;
  return std::move(*pages);
}

uint64_t page_count(const std::vector<PageRun>& runs) {
  uint64_t count = 0;
  for (const PageRun& run : runs) count += run.count;
  return count;
}

Result<void> inspect(const SnapshotBackend& backend, const std::string& name, bool as_json) {
  auto image = TRY(backend.open(name));
  const Sections sections = TRY(image.sections());
  const auto extents = TRY(image.extents());
  uint64_t stored_bytes = 0;
  for (const MemoryExtent& extent : extents) stored_bytes += extent.size_bytes;
  const std::string_view settings = TRY(saved_profile(sections));
  std::optional<TouchedPages> touched;
  for (const SnapshotBackend::Entry& entry : TRY(backend.list()))
    if (entry.name == name) touched = recorded_pages(image, entry.memory_bytes);
  if (as_json) {
    json::array rows;
    for (const auto& [key, section] : sections.all())
      rows.push_back(json::object{{"owner", valid_utf8(key.first)},
                                  {"tag", valid_utf8(key.second)},
                                  {"version", section.version},
                                  {"size_bytes", section.bytes.size()}});
    json::value prefault;
    if (touched)
      prefault = json::object{{"read_bytes", page_count(touched->read) * kPageSize},
                              {"written_bytes", page_count(touched->written) * kPageSize}};
    std::puts(json::serialize(json::object{{"name", name},
                                           {"profile", valid_utf8(settings)},
                                           {"mapped_bytes", stored_bytes},
                                           {"extents", extents.size()},
                                           {"prefault", prefault},
                                           {"sections", std::move(rows)}})
                  .c_str());
    return {};
  }
  // An imported one may hold anything, and a terminal obeys.
  std::printf("%s\n%-20s %-24s %7s %10s\n", printable(settings).c_str(), "OWNER", "TAG", "VERSION", "BYTES");
  for (const auto& [key, section] : sections.all())
    std::printf("%-20s %-24s %7u %10zu\n", printable(key.first).c_str(), printable(key.second).c_str(), section.version,
                section.bytes.size());
  std::printf("\nmemory: %s in %zu pieces\n", size_text(stored_bytes).c_str(), extents.size());
  if (touched)
    std::printf("a fork's first moments: %s read, %s written\n",
                size_text(page_count(touched->read) * kPageSize).c_str(),
                size_text(page_count(touched->written) * kPageSize).c_str());
  return {};
}

Result<uint64_t> stored_bytes_of(const SnapshotBackend& backend, const std::string& name) {
  const auto entries = TRY(backend.list());
  const auto found = std::ranges::find(entries, name, &SnapshotBackend::Entry::name);
  return found == entries.end() ? 0 : found->stored_bytes;
}

Result<void> set_compressed(const SnapshotBackend& backend, const std::string& name, bool on) {
  const uint64_t before_bytes = TRY(stored_bytes_of(backend, name));
  TRY(backend.set_compressed(name, on));
  const uint64_t now_bytes = TRY(stored_bytes_of(backend, name));
  std::printf("%s: %s, before %s\n", name.c_str(), size_text(now_bytes).c_str(), size_text(before_bytes).c_str());
  return {};
}

}  // namespace

void add_store_option(CLI::App& app, TemplateStore& store) {
  app.add_option("--backend", store.backend, "What keeps templates: file, memory, or another plugin's (default: file).")
      ->type_name("NAME")
      ->group("Template");
  app.add_option("--store", store.folder, "Folder of the templates (default: the backend's own).")
      ->type_name("DIR")
      ->group("Template");
}

Result<std::unique_ptr<SnapshotBackend>> open_store(PluginLibrary& library, const TemplateStore& store) {
  KeyValues options;
  if (!store.folder.empty()) options.emplace_back("store", store.folder);
  return SnapshotBackend::create(library, store.backend, options);
}

ExitCode snapshot_command(const Arguments& arguments) {
  static constexpr std::string_view template_words[] = {"inspect", "verify", "flatten"};
  if (!arguments.empty() && std::ranges::find(template_words, arguments.front()) != std::end(template_words))
    return template_command(arguments);
  std::string vm, name;
  TemplateStore store;
  bool incremental = false, stop = false;
  CLI::App app("Keep a running VM as a template: clone snapshot --name NAME [VM]", "clone snapshot");
  add_vm_option(app, vm);
  app.add_option("--name,-n", name, "What the template is called.")->type_name("NAME")->required();
  add_store_option(app, store);
  app.add_flag("--incremental", incremental, "Keep only what differs from the VM's last snapshot, or from its template.");
  app.add_flag("--stop", stop, "End the VM when the template is written; it stands still until then.");
  if (const Parsed parsed = parse(app, arguments); parsed.done) return parsed.code;
  auto found = contact(vm);
  if (!found.ok()) return fail(found.error());
  json::object parameters{{"name", name}, {"incremental", incremental}, {"stop", stop}};
  // The VM's process has its own current directory.
  std::error_code ignored;
  parameters["backend"] = store.backend;
  if (!store.folder.empty()) parameters["store"] = std::filesystem::absolute(store.folder, ignored).string();
  auto answer = found->client.call("vm.snapshot", std::move(parameters), kSnapshotLimit);
  if (!answer.ok()) return fail(answer.error());
  const auto number = [&](const char* key) { return json::value_to<int64_t>(answer->result.at(key)); };
  std::string changed;
  if (incremental)
    changed = size_text(static_cast<uint64_t>(number("changed_bytes"))) + " changed since " +
              json::value_to<std::string>(answer->result.at("parent")) + ", ";
  std::printf("%s: %s%s of memory; the VM stood still for %s, written after %s\n", name.c_str(), changed.c_str(),
              size_text(static_cast<uint64_t>(number("memory_bytes"))).c_str(),
              milliseconds_text(number("paused_us")).c_str(), milliseconds_text(number("took_us")).c_str());
  return ExitCode::success;
}

ExitCode template_command(const Arguments& arguments) {
  TemplateCommand command;
  CLI::App app("Templates of virtual machines: clone template COMMAND", "clone template");
  app.require_subcommand(1);
  const auto add = [&](const char* name, const char* help, bool names_one) {
    CLI::App* sub = app.add_subcommand(name, help);
    if (names_one) sub->add_option("NAME", command.name, "The template.")->type_name("")->required();
    add_store_option(*sub, command.store);
    add_plugin_options(*sub, command.plugins);
    return sub;
  };
  CLI::App* list_app = add("list", "List the templates that there are.", false);
  list_app->add_flag("--json", command.as_json, "As a JSON array.");
  CLI::App* inspect_app = add("inspect", "Print what is in a template.", true);
  inspect_app->add_flag("--json", command.as_json, "As a JSON object.");
  CLI::App* verify_app = add("verify", "Check the sums of everything in a template.", true);
  CLI::App* remove_app = add("rm", "Remove a template. Machines that were forked from it go on.", true);
  CLI::App* flatten_app = add("flatten", "Make a full template of one that is a difference to others.", true);
  flatten_app->add_option("NEW", command.other, "What the full one is called.")->type_name("")->required();
  CLI::App* compress_app = add("compress", "Keep a template compressed: less room, forks that start later.", true);
  CLI::App* decompress_app = add("decompress", "Keep a template as its forks map it, as it was made.", true);
  CLI::App* export_app = add("export", "Write a template, whole, to a file that can go elsewhere.", true);
  export_app->add_option("FILE", command.other, "The file; one that is there is not replaced.")
      ->type_name("")
      ->required();
  CLI::App* import_app = add("import", "Make a template of an exported file. Only of one that you trust.", false);
  import_app->add_option("FILE", command.other, "What `export` wrote.")->type_name("")->required();
  import_app->add_option("--name,-n", command.name, "What it is called; by default as it was.")->type_name("NAME");
  if (const Parsed parsed = parse(app, arguments); parsed.done) return parsed.code;
  return on_store(command, [&](const SnapshotBackend& backend) -> Result<void> {
    if (list_app->parsed()) return list(backend, command.as_json);
    if (inspect_app->parsed()) return inspect(backend, command.name, command.as_json);
    if (remove_app->parsed()) return backend.remove(command.name);
    if (flatten_app->parsed()) return flatten_snapshot(backend, command.name, command.other);
    if (compress_app->parsed()) return set_compressed(backend, command.name, true);
    if (decompress_app->parsed()) return set_compressed(backend, command.name, false);
    if (export_app->parsed()) {
      const uint64_t size_bytes = TRY(export_snapshot(backend, command.name, command.other));
      std::printf("%s: %s\n", command.other.c_str(), size_text(size_bytes).c_str());
      return {};
    }
    if (import_app->parsed()) {
      const std::string name = TRY(import_snapshot(backend, command.other, command.name));
      std::printf("%s: imported\n", name.c_str());
      return {};
    }
    if (!verify_app->parsed()) return {};
    auto image = TRY(backend.open(command.name));
    TRY(image.verify());
    std::printf("%s: whole\n", command.name.c_str());
    return {};
  });
}

}  // namespace vmm
