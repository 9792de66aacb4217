// SPDX-License-Identifier: Apache-2.0
// The snapshot backend "file": snapshots are folders in a folder.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "clone/sdk/plugin.hpp"
#include "clone/sdk/snapshot_notes.hpp"
#include "compression.hpp"
#include "new_snapshot.hpp"
#include "stored_snapshot.hpp"

namespace snapshot_file {
namespace {

using clone_sdk::Options;
using clone_sdk::SnapshotImage;

constexpr const char* kRootsStore = "/var/lib/clone/templates";

Result<std::string> default_store() {
  if (::geteuid() == 0) return std::string(kRootsStore);
  const char* home = std::getenv("HOME");
  if (!home || *home != '/')
    return Error{"HOME is not set to an absolute path; without store=FOLDER, snapshots are kept in ~/.clone/templates"};
  return std::string(home) + "/.clone/templates";
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
    if (!parent.empty()) CLONE_TRY(check_name("the parent's name", parent));
    Store store = CLONE_TRY(Store::make(store_path_));
    return std::unique_ptr<SnapshotImage>(CLONE_TRY(NewSnapshot::begin(std::move(store), name, parent, memory_bytes)));
  }

  Result<std::unique_ptr<SnapshotImage>> open(const std::string& name) override {
    const Store store = CLONE_TRY(open_store_for(name));
    return std::unique_ptr<SnapshotImage>(CLONE_TRY(StoredSnapshot::open(store, name)));
  }

  Result<std::vector<SnapshotInfo>> list() override {
    const auto store = Store::open(store_path_);
    if (!store.ok() && store.error().code == ENOENT) return std::vector<SnapshotInfo>();
    if (!store.ok()) return store.error();
    std::vector<SnapshotInfo> list;
    for (const auto& [name, summary] : CLONE_TRY(summaries(*store)))
      list.push_back({name, summary.header.parent, summary.header.memory_bytes, summary.stored_bytes});
    return list;
  }

  // Its files go when the last one who has them open is gone.
  Result<void> remove(const std::string& name) override {
    const Store store = CLONE_TRY(open_store_for(name));
    const auto lock = CLONE_TRY(store.lock());
    const Fd folder = CLONE_TRY(store.lock_folder(name));
    for (const auto& [child, summary] : CLONE_TRY(summaries(store)))
      if (summary.header.parent == name)
        return Error{"snapshot '" + name + "' is the parent of '" + child + "'; allowed is to remove that one first", 0,
                     CLONE_ERR_BUSY};
    for (const std::string& file : CLONE_TRY(names_in(folder.get()).context(store.path_of(name))))
      if (!is_of_snapshot(file)) return Error{store.path_of(name) + ": holds " + file + ", which is not a snapshot's"};
    const TemporaryFolder hidden = CLONE_TRY(store.make_temporary(name));
    if (::renameat(store.fd(), name.c_str(), store.fd(), hidden.name.c_str()) != 0) {
      const int code = errno;
      ::unlinkat(store.fd(), hidden.name.c_str(), AT_REMOVEDIR);
      return system_error(code).context(store.path_of(name));
    }
    store.clear(folder.get(), hidden.name);
    return sync(store.fd()).context(store.path());
  }

  const void* extension(std::string_view id) override {
    static constexpr clone_snapshot_compression table = {
        sizeof table, 0, [](void* backend, const char* name, uint32_t on, clone_err* err) noexcept {
          return clone_sdk::guarded(err, [&]() -> Result<void> {
            auto& self = *static_cast<Backend*>(static_cast<SnapshotBackend*>(backend));
            const Store store = CLONE_TRY(self.open_store_for(name));
            return set_compressed(store, name, on != 0);
          });
        }};
    if (id == CLONE_SNAPSHOT_COMPRESSION) return &table;
    return id == CLONE_SNAPSHOT_NOTES ? clone_sdk::snapshot_notes<StoredSnapshot>() : nullptr;
  }

 private:
  Result<Store> open_store_for(const std::string& name) {
    CLONE_TRY(check_name("a snapshot's name", name));
    auto store = Store::open(store_path_);
    if (!store.ok() && store.error().code == ENOENT)
      return Error{"there is no snapshot '" + name + "': " + store.error().message, ENOENT, CLONE_ERR_NOT_FOUND};
    return store;
  }

  // One that cannot be read is logged and passed over.
  Result<std::vector<std::pair<std::string, Summary>>> summaries(const Store& store) {
    std::vector<std::pair<std::string, Summary>> found;
    for (const std::string& name : CLONE_TRY(store.names())) {
      auto summary = read_summary(store, name);
      if (summary.ok())
        found.emplace_back(name, std::move(summary).value());
      else
        host().log(CLONE_LOG_WARNING, "passed over: " + summary.error().message);
    }
    return found;
  }

  std::string store_path_;  // absolute
};

constexpr clone_option store = clone_sdk::path_option(
    "store", nullptr,
    "The folder of all snapshots; unset: /var/lib/clone/templates for root, else ~/.clone/templates.");
constexpr const clone_option* options[] = {&store, nullptr};

constexpr clone_descriptor Backend::descriptor = {
    sizeof(clone_descriptor),
    0,
    "file",
    "Snapshots are folders on the disk, full or as a difference to another one.",
    options,
    ""};

}  // namespace
}  // namespace snapshot_file

CLONE_SDK_PLUGIN("snapshot-file", "1.0.0", "clone", "Apache-2.0", "Snapshots on the disk.",
                 CLONE_PROVIDES("snapshot-backend", "file", "default"))
CLONE_SDK_SNAPSHOT_BACKENDS(snapshot_file::Backend)
