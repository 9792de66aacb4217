// SPDX-License-Identifier: Apache-2.0
// A built plugin, its things by name, and their lives, for tests: PluginFile, DeviceUnderTest, SavedState.
//
//   const PluginFile file("virtio-rng");
//   DeviceUnderTest rng(file.device("virtio-rng"), host.handle("virtio-rng.0"));
//   rng.configure({{"source", "/dev/urandom"}});
#pragma once

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "clone/abi/device.h"
#include "clone/abi/plugin.h"
#include "clone/abi/transport.h"
#include "clone/abi/virtio.h"

namespace vmm::test {

// ID.so of this build's plugins. Stays loaded until the process ends, as in the real host.
class PluginFile {
 public:
  explicit PluginFile(const std::string& id) {
    const std::string path = std::string(CLONE_TEST_PLUGIN_DIR) + "/" + id + ".so";
    void* handle = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!handle) throw std::runtime_error(::dlerror());
    const auto entry = reinterpret_cast<clone_plugin_entry_function>(::dlsym(handle, CLONE_PLUGIN_ENTRY));
    if (!entry) throw std::runtime_error(path + " has no " + CLONE_PLUGIN_ENTRY);
    plugin_ = entry();
  }
  const clone_plugin& plugin() const { return *plugin_; }
  const clone_device_type& device(const std::string& name) const {
    return find<clone_device_factory, clone_device_type>(CLONE_DEVICE_FACTORY, name);
  }
  const clone_transport_type& transport(const std::string& name) const {
    return find<clone_transport_factory, clone_transport_type>(CLONE_TRANSPORT_FACTORY, name);
  }

 private:
  template <typename Factory, typename Type>
  const Type& find(const char* id, const std::string& name) const {
    const auto* factory = static_cast<const Factory*>(plugin_->get_factory(id));
    for (uint32_t i = 0; factory && i < factory->count; ++i)
      if (name == factory->type(i)->descriptor->name) return *factory->type(i);
    throw std::runtime_error("the plugin has no " + name);
  }

  const clone_plugin* plugin_;
};

// Sections in memory; a test may change or remove one before it is loaded.
struct SavedState {
  struct Section {
    uint32_t version;
    std::vector<std::byte> bytes;
    bool operator==(const Section&) const = default;
  };
  std::map<std::string, Section> sections;

  clone_writer writer() {
    return {sizeof(clone_writer), 0, this,
            [](void* self, const char* tag, uint32_t version, const void* data, uint64_t size_bytes, clone_err*) {
              const auto* bytes = static_cast<const std::byte*>(data);
              const bool added = static_cast<SavedState*>(self)
                                     ->sections.emplace(tag, Section{version, {bytes, bytes + size_bytes}})
                                     .second;
              return added ? CLONE_OK : CLONE_ERR_INVALID;
            }};
  }
  clone_reader reader() {
    return {sizeof(clone_reader), 0, this,
            [](void* self, const char* tag, uint32_t* version, const void** data, uint64_t* size_bytes, clone_err*) {
              const auto& all = static_cast<SavedState*>(self)->sections;
              const auto found = all.find(tag);
              if (found == all.end()) return CLONE_ERR_NOT_FOUND;
              *version = found->second.version;
              *data = found->second.bytes.data();
              *size_bytes = found->second.bytes.size();
              return CLONE_OK;
            }};
  }
};

// A device or transport from create() to destroy(). Each call keeps its error text in `error`.
class DeviceUnderTest {
 public:
  DeviceUnderTest(const clone_descriptor& descriptor, const clone_device_ops& ops, const clone_host* host)
      : descriptor_(descriptor), ops_(ops), host_(host) {
    if (call([&](clone_err* err) { return ops_.create(host, &device_, err); }) != CLONE_OK)
      throw std::runtime_error(error);
  }
  DeviceUnderTest(const clone_device_type& type, const clone_host* host)
      : DeviceUnderTest(*type.descriptor, *type.ops, host) {}
  DeviceUnderTest(const clone_transport_type& type, const clone_host* host)
      : DeviceUnderTest(*type.descriptor, *type.ops, host) {}
  DeviceUnderTest(const DeviceUnderTest&) = delete;
  ~DeviceUnderTest() { destroy(); }

  // Values as a user would write them, defaults filled in. Ranges are the host's to check, not checked here.
  clone_status configure(const std::map<std::string, std::string>& given = {}) {
    std::vector<clone_option_value> values;
    for (const clone_option* const* row = descriptor_.options; *row; ++row) {
      const auto found = given.find((*row)->name);
      const char* text = found == given.end() ? (*row)->default_value : found->second.c_str();
      values.push_back({sizeof(clone_option_value), (*row)->type, (*row)->name, text, text ? number(**row, text) : 0});
    }
    std::vector<const clone_option_value*> pointers;
    for (const auto& value : values) pointers.push_back(&value);
    const clone_options options = {sizeof options, static_cast<uint32_t>(pointers.size()), pointers.data()};
    return call([&](clone_err* err) { return ops_.configure(device_, &options, err); });
  }
  clone_status start() {
    return ops_.start ? call([&](clone_err* err) { return ops_.start(device_, err); }) : CLONE_OK;
  }
  clone_status quiesce() {
    return call([&](clone_err* err) { return ops_.quiesce(device_, err); });
  }
  clone_status resume() {
    return call([&](clone_err* err) { return ops_.resume(device_, err); });
  }
  clone_status reset() {
    return call([&](clone_err* err) { return ops_.reset(device_, err); });
  }
  clone_status save(SavedState& state) {
    const clone_writer writer = state.writer();
    return call([&](clone_err* err) { return ops_.save(device_, &writer, err); });
  }
  clone_status load(SavedState& state) {
    const clone_reader reader = state.reader();
    return call([&](clone_err* err) { return ops_.load(device_, &reader, err); });
  }
  void destroy() {
    if (device_) ops_.destroy(device_);
    device_ = nullptr;
  }

  void* raw() const { return device_; }
  template <typename Table>
  const Table* extension(const char* id) const {
    return static_cast<const Table*>(ops_.get_extension(device_, id));
  }
  // What a transport is given of this device.
  clone_virtio_attachment attachment() const {
    return {sizeof(clone_virtio_attachment),
            0,
            host_->name,
            device_,
            extension<clone_virtio_device>(CLONE_VIRTIO_DEVICE),
            host_};
  }

  template <typename Call>
  clone_status call(Call&& body) {
    clone_err err{sizeof err, 0, {}};
    const clone_status status = body(&err);
    error = err.message;
    return status;
  }
  std::string error;

 private:
  static uint64_t number(const clone_option& option, const std::string& text) {
    switch (option.type) {
      case CLONE_OPTION_BOOL:
        return text == "on" || text == "yes" || text == "true" || text == "1";
      case CLONE_OPTION_NUMBER:
        return std::strtoull(text.c_str(), nullptr, 0);
      case CLONE_OPTION_SIZE: {
        char* end = nullptr;
        const uint64_t value = std::strtoull(text.c_str(), &end, 10);
        const char* const suffixes = "KMGT";
        const char* suffix = *end ? std::strchr(suffixes, *end) : nullptr;
        return suffix ? value << (10 * (suffix - suffixes + 1)) : value;
      }
      case CLONE_OPTION_CHOICE: {
        uint64_t index = 0;
        std::string rest = option.choices;
        for (; rest.substr(0, rest.find('|')) != text; ++index) {
          if (rest.find('|') == std::string::npos) throw std::runtime_error(text + " is no choice of " + option.name);
          rest.erase(0, rest.find('|') + 1);
        }
        return index;
      }
      default:
        return 0;
    }
  }

  const clone_descriptor& descriptor_;
  const clone_device_ops& ops_;
  const clone_host* host_;
  void* device_ = nullptr;
};

}  // namespace vmm::test
