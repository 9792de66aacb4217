// SPDX-License-Identifier: Apache-2.0
// A snapshot backend as its tests drive it: the calls of its table, with what the last one said.
#pragma once

#include <doctest/doctest.h>

#include <cstddef>
#include <string>
#include <vector>

#include "fake_host.hpp"
#include "plugin/library.hpp"
#include "plugin/options.hpp"

namespace vmm::test {

// Of the plugins in the build tree, the backend of that name.
template <const auto& kName>
class SnapshotBackendRig {
 public:
  using Bytes = std::vector<std::byte>;
  static constexpr uint64_t kMemoryBytes = 64 * 4096;

  explicit SnapshotBackendRig(const KeyValues& options) {
    const auto values = OptionValues::check(type().descriptor, options).value();
    REQUIRE_MESSAGE(call([&](clone_err* err) {
                      return table().create(host_.handle(kName), &values.raw(), &backend_, err);
                    }) == CLONE_OK,
                    error);
  }
  SnapshotBackendRig(const SnapshotBackendRig&) = delete;
  SnapshotBackendRig& operator=(const SnapshotBackendRig&) = delete;
  ~SnapshotBackendRig() { table().destroy(backend_); }

  static const clone_snapshot_backend_type& table() { return type().table; }
  FakeHost& host() { return host_; }

  template <typename Call>
  clone_status call(Call&& body) {
    clone_err err{sizeof err, 0, {}};
    status = body(&err);
    error = err.message;
    code = err.code;
    return status;
  }
  void* begin(const char* name, const char* parent = nullptr, uint64_t memory_bytes = kMemoryBytes) {
    void* image = nullptr;
    call([&](clone_err* err) { return table().begin(backend_, name, parent, memory_bytes, &image, err); });
    return image;
  }
  void* open(const char* name) {
    void* image = nullptr;
    call([&](clone_err* err) { return table().open(backend_, name, &image, err); });
    return image;
  }
  bool write(void* image, uint64_t offset, const Bytes& data) {
    return call([&](clone_err* err) { return table().write_memory(image, offset, data.data(), data.size(), err); }) ==
           CLONE_OK;
  }
  bool section(void* image, const char* owner, const char* tag, const Bytes& data, uint32_t version = 1) {
    return call([&](clone_err* err) {
             return table().write_section(image, owner, tag, version, data.data(), data.size(), err);
           }) == CLONE_OK;
  }
  bool commit(void* image) {
    return call([&](clone_err* err) { return table().commit(image, err); }) == CLONE_OK;
  }
  bool verify(void* image) {
    return call([&](clone_err* err) { return table().verify(image, err); }) == CLONE_OK;
  }
  bool remove(const char* name) {
    return call([&](clone_err* err) { return table().remove(backend_, name, err); }) == CLONE_OK;
  }
  static void close(void* image) { table().close(image); }

  std::string error;
  int code = 0;
  clone_status status = CLONE_OK;

 protected:
  void* backend_ = nullptr;

 private:
  static const BackendType& type() {
    static const auto catalogue = Catalogue::scan({CLONE_TEST_PLUGIN_DIR}, PluginTrust::any);
    static PluginLibrary library(*catalogue);
    static const BackendType found = library.snapshot_backend(kName).value();
    return found;
  }

  FakeHost host_;
};

}  // namespace vmm::test
