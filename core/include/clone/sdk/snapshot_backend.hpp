// SPDX-License-Identifier: Apache-2.0
// A snapshot backend as classes: derive from SnapshotBackend, give it a `static const clone_descriptor descriptor`,
// list it in CLONE_SDK_SNAPSHOT_BACKENDS. What begin() and open() make derives from SnapshotImage.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "clone/abi/snapshot_backend.h"
#include "clone/sdk/host.hpp"
#include "clone/sdk/options.hpp"
#include "clone/sdk/state.hpp"

namespace clone_sdk {

// One snapshot, either being made or opened. The functions are those of clone_snapshot_backend_type; those of the other
// kind are answered with CLONE_ERR_STATE. Destroyed before commit() succeeded, a new one leaves nothing.
class SnapshotImage {
 public:
  struct SectionInfo {
    std::string owner, tag;
    uint32_t version = 0;
    uint64_t size_bytes = 0;
  };

  SnapshotImage() = default;
  SnapshotImage(const SnapshotImage&) = delete;
  SnapshotImage& operator=(const SnapshotImage&) = delete;
  virtual ~SnapshotImage() = default;

  // Of a new one. write_memory() is [any].
  virtual Result<void> write_memory(uint64_t, std::span<const std::byte>) { return opened(); }
  virtual Result<void> write_section(std::string_view, std::string_view, uint32_t, std::span<const std::byte>) {
    return opened();
  }
  virtual Result<void> commit() { return opened(); }

  // Of an opened one. What is handed out lasts as long as the image.
  virtual Result<std::optional<clone_snapshot_extent>> memory_extent(uint32_t) { return unfinished(); }
  virtual Result<Reader::Section> read_section(std::string_view, std::string_view) { return unfinished(); }
  virtual Result<std::vector<SectionInfo>> list_sections() { return unfinished(); }
  virtual Result<void> verify() { return unfinished(); }

 private:
  static Error opened() { return {"the snapshot is open for reading and cannot be written", 0, CLONE_ERR_STATE}; }
  static Error unfinished() { return {"the snapshot is being made and cannot be read", 0, CLONE_ERR_STATE}; }
};

// All [control].
class SnapshotBackend {
 public:
  struct SnapshotInfo {
    std::string name, parent;  // parent: "" for a full one
    uint64_t memory_bytes = 0;
    uint64_t stored_bytes = 0;
  };

  explicit SnapshotBackend(const clone_host* host) : host_(host) {}
  SnapshotBackend(const SnapshotBackend&) = delete;
  SnapshotBackend& operator=(const SnapshotBackend&) = delete;
  virtual ~SnapshotBackend() = default;

  virtual Result<void> configure(const Options&) { return {}; }
  // parent: "" for a full one.
  virtual Result<std::unique_ptr<SnapshotImage>> begin(const std::string& name, const std::string& parent,
                                                       uint64_t memory_bytes) = 0;
  virtual Result<std::unique_ptr<SnapshotImage>> open(const std::string& name) = 0;
  virtual Result<std::vector<SnapshotInfo>> list() = 0;
  virtual Result<void> remove(const std::string& name) = 0;
  virtual const void* extension(std::string_view) { return nullptr; }

  const Host& host() const { return host_; }

 private:
  Host host_;
};

namespace detail {

template <typename T>
struct SnapshotBackendThunks {
  static SnapshotBackend& self(void* backend) { return *static_cast<SnapshotBackend*>(backend); }
  static SnapshotImage& as_image(void* image) { return *static_cast<SnapshotImage*>(image); }
  static std::span<const std::byte> bytes_of(const void* data, uint64_t size_bytes) {
    return {static_cast<const std::byte*>(data), size_bytes};
  }

  static clone_status create(const clone_host* host, const clone_options* options, void** backend,
                             clone_err* err) noexcept {
    return guarded(err, [&]() -> Result<void> {
      std::unique_ptr<SnapshotBackend> created(new T(host));
      CLONE_TRY(created->configure(Options(*options)));
      *backend = created.release();
      return {};
    });
  }
  static clone_status begin(void* backend, const char* name, const char* parent, uint64_t memory_bytes, void** image,
                            clone_err* err) noexcept {
    return guarded(err, [&]() -> Result<void> {
      if (parent && !*parent) return Error{"the parent's name is empty; allowed is a snapshot's name, or none"};
      *image = CLONE_TRY(self(backend).begin(name, parent ? parent : "", memory_bytes)).release();
      return {};
    });
  }
  static clone_status write_memory(void* image, uint64_t memory_offset, const void* data, uint64_t size_bytes,
                                   clone_err* err) noexcept {
    return guarded(err, [&] { return as_image(image).write_memory(memory_offset, bytes_of(data, size_bytes)); });
  }
  static clone_status write_section(void* image, const char* owner, const char* tag, uint32_t version, const void* data,
                                    uint64_t size_bytes, clone_err* err) noexcept {
    return guarded(err, [&] { return as_image(image).write_section(owner, tag, version, bytes_of(data, size_bytes)); });
  }
  static clone_status commit(void* image, clone_err* err) noexcept {
    return guarded(err, [&] { return as_image(image).commit(); });
  }
  static clone_status open(void* backend, const char* name, void** image, clone_err* err) noexcept {
    return guarded(err, [&]() -> Result<void> {
      *image = CLONE_TRY(self(backend).open(name)).release();
      return {};
    });
  }
  static clone_status memory_extent(void* image, uint32_t index, clone_snapshot_extent* extent,
                                    clone_err* err) noexcept {
    bool past_the_last = false;
    const clone_status status = guarded(err, [&]() -> Result<void> {
      const auto found = CLONE_TRY(as_image(image).memory_extent(index));
      past_the_last = !found;
      if (!found) return {};
      extent->fd = found->fd;
      extent->fd_offset = found->fd_offset;
      extent->memory_offset = found->memory_offset;
      extent->size_bytes = found->size_bytes;
      return {};
    });
    return past_the_last ? CLONE_EMPTY : status;
  }
  static clone_status read_section(void* image, const char* owner, const char* tag, uint32_t* version,
                                   const void** data, uint64_t* size_bytes, clone_err* err) noexcept {
    return guarded(err, [&]() -> Result<void> {
      const Reader::Section section = CLONE_TRY(as_image(image).read_section(owner, tag));
      *version = section.version;
      *data = section.bytes.data();
      *size_bytes = section.bytes.size();
      return {};
    });
  }
  static clone_status list_sections(void* image,
                                    void (*visit)(void* context, const char* owner, const char* tag, uint32_t version,
                                                  uint64_t size_bytes),
                                    void* context, clone_err* err) noexcept {
    return guarded(err, [&]() -> Result<void> {
      for (const auto& section : CLONE_TRY(as_image(image).list_sections()))
        visit(context, section.owner.c_str(), section.tag.c_str(), section.version, section.size_bytes);
      return {};
    });
  }
  static clone_status verify(void* image, clone_err* err) noexcept {
    return guarded(err, [&] { return as_image(image).verify(); });
  }
  static clone_status list(void* backend,
                           void (*visit)(void* context, const char* name, const char* parent, uint64_t memory_bytes,
                                         uint64_t stored_bytes),
                           void* context, clone_err* err) noexcept {
    return guarded(err, [&]() -> Result<void> {
      for (const auto& snapshot : CLONE_TRY(self(backend).list()))
        visit(context, snapshot.name.c_str(), snapshot.parent.empty() ? nullptr : snapshot.parent.c_str(),
              snapshot.memory_bytes, snapshot.stored_bytes);
      return {};
    });
  }
  static clone_status remove(void* backend, const char* name, clone_err* err) noexcept {
    return guarded(err, [&] { return self(backend).remove(name); });
  }

  static constexpr clone_snapshot_backend_type type = {
      sizeof(clone_snapshot_backend_type),
      0,
      &T::descriptor,
      create,
      [](void* backend) noexcept { delete &self(backend); },
      begin,
      write_memory,
      write_section,
      commit,
      open,
      memory_extent,
      read_section,
      list_sections,
      verify,
      [](void* image) noexcept { delete &as_image(image); },
      list,
      remove,
      [](void* backend, const char* id) noexcept { return self(backend).extension(id); }};
};

}  // namespace detail

template <typename... Backends>
const clone_snapshot_backend_factory* snapshot_backend_factory() {
  static constexpr const clone_snapshot_backend_type* types[] = {&detail::SnapshotBackendThunks<Backends>::type...};
  static constexpr clone_snapshot_backend_factory factory = {
      sizeof(clone_snapshot_backend_factory), sizeof...(Backends),
      [](uint32_t index) noexcept -> const clone_snapshot_backend_type* {
        return index < sizeof...(Backends) ? types[index] : nullptr;
      }};
  return &factory;
}

}  // namespace clone_sdk
