// SPDX-License-Identifier: Apache-2.0
// Loads plugin files through Boost.DLL and checks the tables that they return.
#include "plugin/library.hpp"

#include <boost/dll/shared_library.hpp>
#include <vector>

#include "plugin/crash_report.hpp"
#include "plugin/host_context.hpp"

namespace vmm {
namespace {

Result<void> check_descriptor(const clone_descriptor& descriptor, std::string_view name) {
  if (descriptor.help && descriptor.options) return {};
  return Error{"the descriptor of '" + std::string(name) + "' is incomplete", 0, CLONE_ERR_INTERNAL};
}

// Everything that a device or transport must have; what is optional is absent here.
Result<void> check_type(const char* name, const DeviceType& type) {
  TRY(check_descriptor(type.descriptor, name));
  const clone_device_ops& ops = type.ops;
  if (!ops.create || !ops.destroy || !ops.configure || !ops.quiesce || !ops.resume || !ops.reset || !ops.save ||
      !ops.load || !ops.get_extension)
    return Error{"'" + std::string(name) + "' lacks a function that every device has", 0, CLONE_ERR_INTERNAL};
  return {};
}

// For what lasts as long as the process: reachable to the end, so that a leak checker does not take it for lost.
template <typename T>
T* keep(T* object) {
  static auto& kept = *new std::vector<void*>;
  kept.push_back(object);
  return object;
}

std::string plugin_name(const PluginFile& file) { return "plugin " + file.manifest.id; }

// The interface's own copy of a type's tables, when it is the one called `name`.
template <typename Type, typename Row>
bool fill(Type& type, const Row* row, std::string_view name, const PluginFile& file) {
  const Row copy = copy_table(row);
  if (!copy.descriptor || !copy.ops) return false;
  type.file = &file;
  type.descriptor = copy_table(copy.descriptor);
  type.ops = copy_table(copy.ops);
  return type.descriptor.name && type.descriptor.name == name;
}

}  // namespace

Result<const clone_plugin*> PluginLibrary::load(const PluginFile& file) {
  if (const auto found = loaded_.find(file.path); found != loaded_.end()) return found->second;

  // Never unloaded: tables and threads of the plugin last as long as the process.
  boost::dll::shared_library* library = nullptr;
  try {
    CrashReport report(file.manifest.id, "while it was loaded");
    library = keep(new boost::dll::shared_library(boost::dll::fs::path(file.path),
                                                  boost::dll::load_mode::rtld_now | boost::dll::load_mode::rtld_local));
  } catch (const std::exception& exception) {
    return Error{plugin_name(file) + ": cannot be loaded: " + exception.what(), ENOEXEC};
  }
  if (!library->has(CLONE_PLUGIN_ENTRY))
    return Error{plugin_name(file) + ": " + file.path + " does not export " CLONE_PLUGIN_ENTRY};
  auto& entry = library->get<const clone_plugin*()>(CLONE_PLUGIN_ENTRY);

  const clone_plugin* table = nullptr;
  try {
    CrashReport report(file.manifest.id, "in its entry function");
    table = entry();
  } catch (...) {
    return Error{plugin_name(file) + ": its entry function threw an exception"};
  }
  const clone_plugin plugin = copy_table(table);
  if (!plugin.manifest || !plugin.get_factory ||
      std::strncmp(plugin.manifest->id, file.manifest.id.c_str(), sizeof plugin.manifest->id) != 0)
    return Error{plugin_name(file) + ": its entry function does not return what its manifest says"};
  if (plugin.init) {
    // Lasts as long as the plugin, which is never unloaded.
    const auto* host = keep(new HostHandle(file.manifest.id, *keep(new HostContext{})));
    clone_err err{sizeof(clone_err), 0, {}};
    clone_status status = CLONE_ERR_INTERNAL;
    try {
      CrashReport report(file.manifest.id, "in its init function");
      status = plugin.init(host->raw(), &err);
    } catch (...) {
      std::snprintf(err.message, sizeof err.message, "its init function threw an exception");
    }
    if (status != CLONE_OK)
      return Error{plugin_name(file) + ": " + (err.message[0] ? err.message : "init failed"), err.code, status};
  }
  loaded_.emplace(file.path, table);
  return table;
}

template <typename Factory>
Result<const Factory*> PluginLibrary::factory(const PluginFile& file, const char* id) {
  const clone_plugin plugin = copy_table(TRY(load(file)));
  const Factory* factory = nullptr;
  try {
    const CrashReport report(file.manifest.id, "in its get_factory function");
    factory = static_cast<const Factory*>(plugin.get_factory(id));
  } catch (...) {
    return Error{plugin_name(file) + ": its get_factory function threw an exception", 0, CLONE_ERR_INTERNAL};
  }
  if (!factory || factory->size < sizeof(Factory) || !factory->type)
    return Error{plugin_name(file) + ": it has no factory " + id, 0, CLONE_ERR_INTERNAL};
  return factory;
}

Result<DeviceType> PluginLibrary::device(std::string_view name) {
  const PluginFile& file = *TRY(catalogue_->find("device", name));
  const auto* factory = TRY(this->factory<clone_device_factory>(file, CLONE_DEVICE_FACTORY));
  for (uint32_t i = 0; i < factory->count; ++i) {
    DeviceType type;
    if (!fill(type, factory->type(i), name, file)) continue;
    TRY(check_type(type.descriptor.name, type).context(plugin_name(file)));
    return type;
  }
  return Error{plugin_name(file) + ": its manifest promises device '" + std::string(name) + "', its factory has none"};
}

Result<TransportType> PluginLibrary::transport(std::string_view name) {
  const PluginFile& file = *TRY(catalogue_->find("transport", name));
  const auto* factory = TRY(this->factory<clone_transport_factory>(file, CLONE_TRANSPORT_FACTORY));
  for (uint32_t i = 0; i < factory->count; ++i) {
    TransportType type;
    const auto* row = factory->type(i);
    if (!fill(type, row, name, file)) continue;
    type.attach = copy_table(row).attach;
    TRY(check_type(type.descriptor.name, type).context(plugin_name(file)));
    if (!type.attach)
      return Error{plugin_name(file) + ": transport '" + std::string(name) + "' has no attach function"};
    return type;
  }
  return Error{plugin_name(file) + ": its manifest promises transport '" + std::string(name) +
               "', its factory has none"};
}

Result<PolicyType> PluginLibrary::balloon_policy(std::string_view name) {
  const PluginFile& file = *TRY(catalogue_->find("balloon-policy", name));
  const auto* factory = TRY(this->factory<clone_balloon_policy_factory>(file, CLONE_BALLOON_POLICY_FACTORY));
  for (uint32_t i = 0; i < factory->count; ++i) {
    PolicyType type{&file, {}, copy_table(factory->type(i))};
    if (!type.table.descriptor) continue;
    type.descriptor = copy_table(type.table.descriptor);
    if (!type.descriptor.name || type.descriptor.name != name) continue;
    TRY(check_descriptor(type.descriptor, name).context(plugin_name(file)));
    if (!type.table.create || !type.table.destroy || !type.table.decide || !type.table.save || !type.table.load)
      return Error{plugin_name(file) + ": balloon policy '" + std::string(name) + "' lacks a function", 0,
                   CLONE_ERR_INTERNAL};
    return type;
  }
  return Error{plugin_name(file) + ": its manifest promises balloon policy '" + std::string(name) +
               "', its factory has none"};
}

Result<BackendType> PluginLibrary::snapshot_backend(std::string_view name) {
  const PluginFile& file = *TRY(catalogue_->find("snapshot-backend", name));
  const auto* factory = TRY(this->factory<clone_snapshot_backend_factory>(file, CLONE_SNAPSHOT_BACKEND_FACTORY));
  for (uint32_t i = 0; i < factory->count; ++i) {
    BackendType type{&file, {}, copy_table(factory->type(i))};
    const clone_snapshot_backend_type& table = type.table;
    if (!table.descriptor) continue;
    type.descriptor = copy_table(table.descriptor);
    if (!type.descriptor.name || type.descriptor.name != name) continue;
    TRY(check_descriptor(type.descriptor, name).context(plugin_name(file)));
    if (!table.create || !table.destroy || !table.begin || !table.write_memory || !table.write_section ||
        !table.commit || !table.open || !table.memory_extent || !table.read_section || !table.list_sections ||
        !table.verify || !table.close || !table.list || !table.remove)
      return Error{plugin_name(file) + ": snapshot backend '" + std::string(name) + "' lacks a function", 0,
                   CLONE_ERR_INTERNAL};
    return type;
  }
  return Error{plugin_name(file) + ": its manifest promises snapshot backend '" + std::string(name) +
               "', its factory has none"};
}

}  // namespace vmm
