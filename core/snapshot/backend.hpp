// SPDX-License-Identifier: Apache-2.0
// Snapshots of machines as a backend plugin keeps them.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "clone/abi/snapshot_notes.h"
#include "memory/guest_memory.hpp"
#include "plugin/host_context.hpp"
#include "plugin/library.hpp"
#include "plugin/options.hpp"
#include "snapshot/sections.hpp"
#include "util/result.hpp"

namespace vmm {

class SnapshotBackend;

// A snapshot's memory is handled in pieces of this size: large enough for the disk, small beside the machine.
constexpr uint64_t kSnapshotPieceBytes = 4 << 20;

// One that is being written, or one that was opened. The backend lasts longer.
class SnapshotImage {
 public:
  SnapshotImage(SnapshotImage&& other) noexcept
      : backend_(other.backend_), image_(std::exchange(other.image_, nullptr)) {}
  SnapshotImage& operator=(SnapshotImage&&) = delete;
  // Without commit() what was written is gone.
  ~SnapshotImage();

  // Pages of zeroes need not be written, nor over a parent those that are its own. What is written again counts.
  Result<void> write_memory(uint64_t offset, std::span<const std::byte> bytes);
  Result<void> write(const Sections& sections);
  Result<void> write_section(const std::string& owner, const std::string& tag, uint32_t version,
                             std::span<const std::byte> bytes);
  Result<void> commit();

  // Where the memory lies; descriptors last as long as this object.
  Result<std::vector<MemoryExtent>> extents();
  Result<Sections> sections();
  Result<void> verify();

  // A hint kept beside the snapshot (clone/abi/snapshot_notes.h); nothing where there is none, or the backend keeps
  // none. [any], one call at a time.
  Result<std::optional<std::vector<std::byte>>> read_note(const std::string& name);
  Result<void> write_note(const std::string& name, std::span<const std::byte> note);

 private:
  friend class SnapshotBackend;
  SnapshotImage(const SnapshotBackend& backend, void* image) : backend_(&backend), image_(image) {}

  const SnapshotBackend* backend_;
  void* image_;
};

class SnapshotBackend {
 public:
  struct Entry {
    std::string name, parent;  // empty: a full one
    uint64_t memory_bytes = 0, stored_bytes = 0;
  };

  static Result<std::unique_ptr<SnapshotBackend>> create(PluginLibrary& library, const std::string& type,
                                                         const KeyValues& options);
  SnapshotBackend(const SnapshotBackend&) = delete;
  SnapshotBackend& operator=(const SnapshotBackend&) = delete;
  ~SnapshotBackend();

  // parent: empty for a full one; one that is not there is CLONE_ERR_NOT_FOUND.
  Result<SnapshotImage> begin(const std::string& name, const std::string& parent, uint64_t memory_bytes) const;
  Result<SnapshotImage> open(const std::string& name) const;
  Result<std::vector<Entry>> list() const;
  Result<void> remove(const std::string& name) const;
  // Where it lies. A backend that cannot is CLONE_ERR_UNSUPPORTED.
  Result<void> set_compressed(const std::string& name, bool on) const;

 private:
  friend class SnapshotImage;
  clone_snapshot_notes notes() const;
  explicit SnapshotBackend(const BackendType& type)
      : type_(type), host_("snapshot-" + std::string(type.descriptor.name), context_) {}

  // One call into the plugin: its error gets its name, a crash in it is reported under that name.
  template <typename Call>
  Result<clone_status> call(const char* phase, Call&& body) const;

  BackendType type_;
  HostContext context_;
  HostHandle host_;
  void* backend_ = nullptr;
};

}  // namespace vmm
