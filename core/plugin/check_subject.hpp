// SPDX-License-Identifier: Apache-2.0
// What a phase of the check works on: the plugin loaded, one of its devices or transports, and instances on a bench.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "clone/abi/plugin.h"
#include "clone/abi/transport.h"
#include "clone/abi/virtio.h"
#include "plugin/bench_host.hpp"
#include "plugin/check_recorder.hpp"
#include "plugin/library.hpp"
#include "plugin/options.hpp"

namespace vmm {

// Pseudorandom numbers: the same in every check.
class CheckRandom {
 public:
  explicit CheckRandom(uint64_t seed) : engine_(seed) {}
  uint64_t next() { return engine_(); }
  uint64_t below(uint64_t limit) { return engine_() % limit; }
  bool one_in(uint64_t n) { return below(n) == 0; }
  void fill(void* data, size_t size_bytes) {
    for (size_t i = 0; i < size_bytes; ++i) static_cast<std::byte*>(data)[i] = static_cast<std::byte>(next());
  }

 private:
  std::mt19937_64 engine_;
};

// The plugin of one child process. Its init has run, with a host that has nothing but a log.
struct LoadedPlugin {
  const clone_plugin* entry = nullptr;
  clone_plugin plugin{};
};

// Empty folder and files that options of the plugin may point to; made by the parent, which removes it.
struct CheckFolder {
  std::string path;
  std::string file() const { return path + "/file"; }
  std::string folder() const { return path + "/folder"; }
  std::string missing() const { return path + "/missing/file"; }
};

// A device or a transport of the plugin.
struct CheckSubject {
  PluginFile file;
  Provided provided;
  CheckFolder folder;
  KeyValues chosen;  // options that the user gave for it

  TransportType type;  // attach is NULL for a device
  bool is_transport() const { return provided.kind == "transport"; }
  bool can_save() const { return (type.descriptor.capabilities & CLONE_CAN_SAVE) != 0; }
};

// A status with its words.
struct Outcome {
  clone_status status = CLONE_OK;
  std::string message;
  bool ok() const { return status >= 0; }
  std::string text() const {
    return message.empty() ? "status " + std::to_string(status) + " without a message" : message;
  }
  // The host lacks something, which says nothing about the plugin.
  bool is_the_hosts() const {
    return !message.empty() &&
           (status == CLONE_ERR_SYSTEM || status == CLONE_ERR_UNSUPPORTED || status == CLONE_ERR_BUSY);
  }
};

// Sections in memory, both ways.
struct CheckState {
  struct Section {
    uint32_t version = 0;
    std::vector<std::byte> bytes;
    bool operator==(const Section&) const = default;
  };
  std::map<std::string, Section> sections;
  bool operator==(const CheckState&) const = default;

  clone_writer writer();
  clone_reader reader();
  // Where two states differ, for a message.
  std::string difference(const CheckState& other) const;
};

// One life of a device or transport, destroyed in a state in which it may be.
class CheckInstance {
 public:
  CheckInstance(const CheckSubject& subject, BenchHost& bench, const std::string& name);
  CheckInstance(const CheckInstance&) = delete;
  ~CheckInstance() { destroy(); }

  Outcome create();
  Outcome configure(const clone_options& options);
  Outcome attach(const clone_virtio_attachment& attachment);
  Outcome start();
  Outcome quiesce();
  Outcome resume();
  Outcome reset();
  Outcome save(CheckState& state);
  Outcome load(CheckState& state);
  void destroy();

  void* device() const { return device_; }
  BenchHost& bench() { return bench_; }
  const clone_host* host() const { return host_; }
  const void* raw_extension(const char* id) const { return ops_.get_extension(device_, id); }
  template <typename Table>
  std::optional<Table> extension(const char* id) const {
    const auto* table = static_cast<const Table*>(raw_extension(id));
    if (!table) return std::nullopt;
    return copy_table(table);
  }

 private:
  template <typename Call>
  Outcome call(Call&& body);

  const clone_device_ops& ops_;
  decltype(clone_transport_type::attach) attach_;
  BenchHost& bench_;
  const clone_host* host_;
  void* device_ = nullptr;
  bool running_ = false;
};

// A virtio device of the check's own, for transports: two queues that take whatever comes and give it back.
class DummyVirtio {
 public:
  DummyVirtio() : name_("dummy.0") {}
  DummyVirtio(const DummyVirtio&) = delete;
  // `bench` gives the device its host.
  clone_virtio_attachment attachment(BenchHost& bench);
  // Serves what the driver made available.
  void serve();
  bool active() const { return active_; }

 private:
  static const clone_virtio_device* table();
  static DummyVirtio& of(void* device) { return *static_cast<DummyVirtio*>(device); }

  std::string name_;
  std::mutex mutex_;
  bool active_ = false;
  std::vector<clone_virtqueue*> queues_;
  std::byte config_[64]{};
};

// A bench with a configured instance on it; for a transport, with a device attached.
struct CheckStage {
  std::unique_ptr<BenchHost> bench;
  std::unique_ptr<DummyVirtio> dummy;
  std::unique_ptr<CheckInstance> instance;

  // The outcome is of configure, or of attach.
  static Outcome set_up(const CheckSubject& subject, CheckStage& stage);

  ~CheckStage();
  CheckStage() = default;
  CheckStage(CheckStage&&) = default;
  CheckStage& operator=(CheckStage&&) = delete;
};

std::unique_ptr<BenchHost> make_bench();

// Values for the options that must be given, and those that the user chose.
enum class SamplePath { file, folder, missing };
KeyValues sample_options(const CheckSubject& subject, SamplePath path);

// The guest's seeded reads and writes on every claimed range, and the callbacks that follow.
void exercise_claims(BenchHost& bench, DummyVirtio* dummy, CheckRandom& random, unsigned accesses);

// The phases of one device or transport, each in a child of its own.
void check_description(CheckRecorder& recorder, const CheckSubject& subject);
void check_life(CheckRecorder& recorder, const CheckSubject& subject);
void check_options(CheckRecorder& recorder, const CheckSubject& subject);
void check_accesses(CheckRecorder& recorder, const CheckSubject& subject);
void check_state(CheckRecorder& recorder, const CheckSubject& subject);
void check_hostile_state(CheckRecorder& recorder, const CheckSubject& subject);
void check_virtio(CheckRecorder& recorder, const CheckSubject& subject);
void check_leaks(CheckRecorder& recorder, const CheckSubject& subject);

}  // namespace vmm
