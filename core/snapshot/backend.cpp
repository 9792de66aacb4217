// SPDX-License-Identifier: Apache-2.0
// Calls into the tables of a snapshot backend.
#include "snapshot/backend.hpp"

#include "clone/sdk/error.hpp"
#include "plugin/crash_report.hpp"

namespace vmm {
namespace {

constexpr uint64_t kMostExtents = 1 << 24;

}  // namespace

template <typename Call>
Result<clone_status> SnapshotBackend::call(const char* phase, Call&& body) const {
  const CrashReport crash(host_.name(), phase);
  clone_sdk::ErrorBuffer error;
  clone_status status = CLONE_ERR_INTERNAL;
  try {
    status = body(static_cast<clone_err*>(error));
  } catch (...) {
    return Error{host_.name() + ": threw an exception " + phase, 0, CLONE_ERR_INTERNAL};
  }
  TRY(error.result(status));
  return status;
}

Result<std::unique_ptr<SnapshotBackend>> SnapshotBackend::create(PluginLibrary& library, const std::string& type,
                                                                 const KeyValues& options) {
  std::unique_ptr<SnapshotBackend> backend(new SnapshotBackend(TRY(library.snapshot_backend(type))));
  const auto values = TRY(OptionValues::check(backend->type_.descriptor, options).context("snapshot backend " + type));
  TRY(backend->call("while it was created", [&](clone_err* err) {
    return backend->type_.table.create(backend->host_.raw(), &values.raw(), &backend->backend_, err);
  }));
  if (!backend->backend_) return Error{"snapshot backend " + type + ": create succeeded without a backend"};
  return backend;
}

SnapshotBackend::~SnapshotBackend() {
  if (backend_) type_.table.destroy(backend_);
}

Result<SnapshotImage> SnapshotBackend::begin(const std::string& name, const std::string& parent,
                                             uint64_t memory_bytes) const {
  void* image = nullptr;
  TRY(call("while a snapshot was begun", [&](clone_err* err) {
    return type_.table.begin(backend_, name.c_str(), parent.empty() ? nullptr : parent.c_str(), memory_bytes, &image,
                             err);
  }));
  return SnapshotImage(*this, image);
}

Result<SnapshotImage> SnapshotBackend::open(const std::string& name) const {
  void* image = nullptr;
  TRY(call("while a snapshot was opened",
           [&](clone_err* err) { return type_.table.open(backend_, name.c_str(), &image, err); }));
  return SnapshotImage(*this, image);
}

Result<std::vector<SnapshotBackend::Entry>> SnapshotBackend::list() const {
  std::vector<Entry> entries;
  TRY(call("while snapshots were listed", [&](clone_err* err) {
    return type_.table.list(
        backend_,
        [](void* context, const char* name, const char* parent, uint64_t memory_bytes, uint64_t stored_bytes) {
          static_cast<std::vector<Entry>*>(context)->push_back(
              {name, parent ? parent : "", memory_bytes, stored_bytes});
        },
        &entries, err);
  }));
  return entries;
}

Result<void> SnapshotBackend::remove(const std::string& name) const {
  TRY(call("while a snapshot was removed",
           [&](clone_err* err) { return type_.table.remove(backend_, name.c_str(), err); }));
  return {};
}

// All zero for a backend that keeps none.
clone_snapshot_notes SnapshotBackend::notes() const {
  return copy_table(
      static_cast<const clone_snapshot_notes*>(type_.table.get_extension(backend_, CLONE_SNAPSHOT_NOTES)));
}

SnapshotImage::~SnapshotImage() {
  if (image_) backend_->type_.table.close(image_);
}

Result<void> SnapshotImage::write_memory(const GuestMemory& memory) {
  return memory.visit_contents(kSnapshotPieceBytes, [&](uint64_t offset, std::span<const std::byte> bytes) {
    return write_memory(offset, bytes);
  });
}

Result<void> SnapshotImage::write_memory(const GuestMemory& memory, const PageSet& pages) {
  return memory.visit_pages(pages, kSnapshotPieceBytes, [&](uint64_t offset, std::span<const std::byte> bytes) {
    return write_memory(offset, bytes);
  });
}

Result<void> SnapshotImage::write_memory(uint64_t offset, std::span<const std::byte> bytes) {
  TRY(backend_->call("while memory was written", [&](clone_err* err) {
    return backend_->type_.table.write_memory(image_, offset, bytes.data(), bytes.size(), err);
  }));
  return {};
}

Result<void> SnapshotImage::write(const Sections& sections) {
  for (const auto& [key, section] : sections.all())
    TRY(write_section(key.first, key.second, section.version, section.bytes));
  return {};
}

Result<void> SnapshotImage::write_section(const std::string& owner, const std::string& tag, uint32_t version,
                                          std::span<const std::byte> bytes) {
  TRY(backend_->call("while a section was written", [&](clone_err* err) {
    return backend_->type_.table.write_section(image_, owner.c_str(), tag.c_str(), version, bytes.data(), bytes.size(),
                                               err);
  }));
  return {};
}

Result<void> SnapshotImage::commit() {
  TRY(backend_->call("while a snapshot was committed",
                     [&](clone_err* err) { return backend_->type_.table.commit(image_, err); }));
  return {};
}

Result<std::vector<MemoryExtent>> SnapshotImage::extents() {
  std::vector<MemoryExtent> extents;
  for (uint32_t index = 0; index < kMostExtents; ++index) {
    clone_snapshot_extent extent{};
    extent.size = sizeof extent;
    extent.fd = -1;
    const clone_status status = TRY(backend_->call("while its memory was looked up", [&](clone_err* err) {
      return backend_->type_.table.memory_extent(image_, index, &extent, err);
    }));
    if (status == CLONE_EMPTY) return extents;
    extents.push_back({extent.fd, extent.fd_offset, extent.memory_offset, extent.size_bytes});
  }
  return Error{"the snapshot's memory is in more than " + std::to_string(kMostExtents) + " pieces", 0,
               CLONE_ERR_CORRUPT};
}

Result<Sections> SnapshotImage::sections() {
  struct Name {
    std::string owner, tag;
  };
  std::vector<Name> names;
  TRY(backend_->call("while its sections were listed", [&](clone_err* err) {
    return backend_->type_.table.list_sections(
        image_,
        [](void* context, const char* owner, const char* tag, uint32_t, uint64_t) {
          static_cast<std::vector<Name>*>(context)->push_back({owner, tag});
        },
        &names, err);
  }));
  Sections sections;
  for (const auto& [owner, tag] : names) {
    uint32_t version = 0;
    const void* data = nullptr;
    uint64_t size_bytes = 0;
    TRY(backend_->call("while a section was read", [&](clone_err* err) {
      return backend_->type_.table.read_section(image_, owner.c_str(), tag.c_str(), &version, &data, &size_bytes, err);
    }));
    TRY(sections.put(owner, tag, version, {static_cast<const std::byte*>(data), size_bytes}));
  }
  return sections;
}

Result<void> SnapshotImage::verify() {
  TRY(backend_->call("while a snapshot was verified",
                     [&](clone_err* err) { return backend_->type_.table.verify(image_, err); }));
  return {};
}

Result<std::optional<std::vector<std::byte>>> SnapshotImage::read_note(const std::string& name) {
  const clone_snapshot_notes notes = backend_->notes();
  std::optional<std::vector<std::byte>> note;
  if (!notes.read) return note;
  const auto take = [](void* context, const void* data, uint64_t size_bytes) {
    const auto* bytes = static_cast<const std::byte*>(data);
    static_cast<std::optional<std::vector<std::byte>>*>(context)->emplace(bytes, bytes + size_bytes);
  };
  TRY(backend_->call("while a note was read",
                     [&](clone_err* err) { return notes.read(image_, name.c_str(), take, &note, err); }));
  return note;
}

Result<void> SnapshotImage::write_note(const std::string& name, std::span<const std::byte> note) {
  const clone_snapshot_notes notes = backend_->notes();
  if (!notes.write) return Error{"this backend keeps no notes", 0, CLONE_ERR_UNSUPPORTED};
  TRY(backend_->call("while a note was written",
                     [&](clone_err* err) { return notes.write(image_, name.c_str(), note.data(), note.size(), err); }));
  return {};
}

}  // namespace vmm
