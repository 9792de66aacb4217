// SPDX-License-Identifier: Apache-2.0
// The snapshot backend "memory": snapshots are files in memory that small processes hold.
#include <unistd.h>

#include <cstdlib>
#include <filesystem>

#include "clone/sdk/plugin.hpp"
#include "kept_snapshot.hpp"
#include "new_snapshot.hpp"

namespace snapshot_memory {
namespace {

using clone_sdk::Options;
using clone_sdk::SnapshotImage;
using snapshot_file::check_name;
using snapshot_file::system_error;

// The folder `templates` where the directories of VMs are (docs/control.md).
Result<std::string> default_store() {
  const auto from = [](const char* variable) {
    const char* value = std::getenv(variable);
    return std::string(value ? value : "");
  };
  if (const std::string given = from("CLONE_RUNTIME_DIR"); !given.empty()) return given + "/templates";
  if (::geteuid() == 0) return std::string("/run/clone/templates");
  if (const std::string session = from("XDG_RUNTIME_DIR"); session.starts_with('/'))
    return session + "/clone/templates";
  if (const std::string home = from("HOME"); home.starts_with('/')) return home + "/.clone/run/templates";
  return Error{"no place for the keepers' sockets: set XDG_RUNTIME_DIR, HOME or CLONE_RUNTIME_DIR, or store=FOLDER"};
}

class Backend final : public clone_sdk::SnapshotBackend {
 public:
  using SnapshotBackend::SnapshotBackend;
  static const clone_descriptor descriptor;

  Result<void> configure(const Options& options) override {
    const auto given = options.text("store");
    std::error_code error;
    store_path_ = std::filesystem::absolute(given ? std::string(*given) : CLONE_TRY(default_store()), error).string();
    if (error) return system_error(error.value()).context("store");
    while (store_path_.size() > 1 && store_path_.ends_with('/')) store_path_.pop_back();
    return {};
  }

  Result<std::unique_ptr<SnapshotImage>> begin(const std::string& name, const std::string& parent,
                                               uint64_t memory_bytes) override {
    CLONE_TRY(check_name("a snapshot's name", name));
    if (!parent.empty())
      return Error{"snapshot '" + name + "', a difference to '" + parent + "': the backend memory keeps full snapshots",
                   0, CLONE_ERR_UNSUPPORTED};
    Keepers keepers(CLONE_TRY(Store::make(store_path_)));
    return std::unique_ptr<SnapshotImage>(CLONE_TRY(NewSnapshot::begin(std::move(keepers), name, memory_bytes)));
  }

  Result<std::unique_ptr<SnapshotImage>> open(const std::string& name) override {
    const Keepers keepers = CLONE_TRY(keepers_for(name));
    return std::unique_ptr<SnapshotImage>(CLONE_TRY(KeptSnapshot::open(keepers, name)));
  }

  // One whose keeper is gone is passed over; one that answers what it should not is, too, but not without a word.
  Result<std::vector<SnapshotInfo>> list() override {
    auto store = Store::open(store_path_);
    if (!store.ok() && store.error().code == ENOENT) return std::vector<SnapshotInfo>();
    const Keepers keepers(CLONE_TRY(std::move(store)));
    std::vector<SnapshotInfo> list;
    for (const std::string& name : CLONE_TRY(keepers.names())) {
      const auto summary = read_summary(keepers, name);
      if (summary.ok())
        list.push_back({name, "", summary->memory_bytes, summary->stored_bytes});
      else if (summary.error().status != CLONE_ERR_NOT_FOUND)
        host().log(CLONE_LOG_WARNING, "passed over: " + summary.error().message);
    }
    return list;
  }

  // Its memory goes when the last one who has it open is gone.
  Result<void> remove(const std::string& name) override {
    const Keepers keepers = CLONE_TRY(keepers_for(name));
    return keepers.end(name);
  }

 private:
  Result<Keepers> keepers_for(const std::string& name) {
    CLONE_TRY(check_name("a snapshot's name", name));
    auto store = Store::open(store_path_);
    if (!store.ok() && store.error().code == ENOENT)
      return Error{"there is no snapshot '" + name + "': " + store.error().message, ENOENT, CLONE_ERR_NOT_FOUND};
    return Keepers(CLONE_TRY(std::move(store)));
  }

  std::string store_path_;  // absolute
};

constexpr clone_option store = clone_sdk::path_option(
    "store", nullptr, "The folder of the keepers' sockets; unset: templates in that of the VMs, /run/clone for root.");
constexpr const clone_option* options[] = {&store, nullptr};

constexpr clone_descriptor Backend::descriptor = {
    sizeof(clone_descriptor),
    0,
    "memory",
    "Snapshots are in memory, full ones; a small process holds each until the host stops.",
    options,
    ""};

}  // namespace
}  // namespace snapshot_memory

CLONE_SDK_PLUGIN("snapshot-memory", "1.0.0", "clone", "Apache-2.0", "Snapshots in memory.",
                 CLONE_PROVIDES("snapshot-backend", "memory", ""))
CLONE_SDK_SNAPSHOT_BACKENDS(snapshot_memory::Backend)
