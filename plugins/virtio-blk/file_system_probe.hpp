// SPDX-License-Identifier: Apache-2.0
// Which file system a disk holds, and what a guest's kernel needs to mount it.
#pragma once

#include "image.hpp"

namespace virtio_blk {

struct FileSystem {
  const char* name = "";           // as mount(8) knows it; "" when not known
  const char* guest_modules = "";  // separated by blanks
};

// Reads a few bytes at fixed places; what cannot be read is not known.
FileSystem probe_file_system(Image& image);

}  // namespace virtio_blk
