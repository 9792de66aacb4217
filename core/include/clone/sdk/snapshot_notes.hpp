// SPDX-License-Identifier: Apache-2.0
// clone.snapshot-notes/1 for a snapshot backend made of the classes of snapshot_backend.hpp.
#pragma once

#include <cstddef>
#include <span>

#include "clone/abi/snapshot_notes.h"
#include "clone/sdk/snapshot_backend.hpp"

namespace clone_sdk {

// What extension(CLONE_SNAPSHOT_NOTES) of a backend returns whose open() makes `Image`, with
//   Result<std::optional<std::vector<std::byte>>> read_note(std::string_view name);  // nothing where there is none
//   Result<void> write_note(std::string_view name, std::span<const std::byte> note);
template <typename Image>
const clone_snapshot_notes* snapshot_notes() {
  static constexpr auto opened = [](void* image) -> Image& {
    return *static_cast<Image*>(static_cast<SnapshotImage*>(image));
  };
  static constexpr clone_snapshot_notes table = {
      sizeof(clone_snapshot_notes), 0,
      [](void* image, const char* name, void (*take)(void* context, const void* data, uint64_t size_bytes),
         void* context, clone_err* err) noexcept {
        bool found = false;
        const clone_status status = guarded(err, [&]() -> Result<void> {
          const auto note = CLONE_TRY(opened(image).read_note(name));
          found = note.has_value();
          if (found) take(context, note->data(), note->size());
          return {};
        });
        return status == CLONE_OK && !found ? CLONE_EMPTY : status;
      },
      [](void* image, const char* name, const void* data, uint64_t size_bytes, clone_err* err) noexcept {
        return guarded(err, [&] {
          return opened(image).write_note(name, {static_cast<const std::byte*>(data), size_bytes});
        });
      }};
  return &table;
}

}  // namespace clone_sdk
