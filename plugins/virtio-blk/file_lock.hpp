// SPDX-License-Identifier: Apache-2.0
// Keeps two machines from writing to one image; understood by QEMU.
#pragma once

#include "clone/sdk/host.hpp"

namespace virtio_blk {

// Until the open file description goes. Readers share an image; a writer is alone with it. On a file system without
// locks the image is used without one, and that is logged. The message begins with what is the matter, not the path.
clone_sdk::Result<void> lock_image(int fd, bool read_only, const clone_sdk::Host& host);

// Whether somebody else holds any lock on the file.
bool is_locked(int fd);

}  // namespace virtio_blk
