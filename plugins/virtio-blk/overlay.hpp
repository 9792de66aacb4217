// SPDX-License-Identifier: Apache-2.0
// Overlays: where a guest's writes go when its root disk's image, the base, stays as it is.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "image.hpp"

namespace virtio_blk {

enum class OverlayKind {
  none,
  guest_memory,  // the guest lays it itself, in a tmpfs; the disk is the base, read-only
  temporary,     // a file that has no name once it is open, and so goes with the process
  file,          // made when it is missing, used again after
};

struct Overlay {
  OverlayKind kind = OverlayKind::none;
  std::string path;  // of a file

  // Whether the disk is one file over another.
  bool in_file() const { return kind == OverlayKind::temporary || kind == OverlayKind::file; }
};

// The words of the option that are no paths.
inline constexpr const char* kOverlayWords = "off|on|tmpfs|auto";

// The option's value. Only the root disk can have an overlay, and only one that the guest may write.
Result<Overlay> choose_overlay(std::string_view value, bool root, bool read_only);

// The overlay's file over the base, which is opened for reading and shared. The base's own backing file is used only
// where its configuration allows that; the overlay's is this base, or else it is refused.
Result<std::unique_ptr<Image>> open_overlay(const Overlay& overlay, ImageConfig base, const clone_sdk::Host& host);

}  // namespace virtio_blk
