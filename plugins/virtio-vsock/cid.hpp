// SPDX-License-Identifier: Apache-2.0
// Context ids: which one a VM has, and the lock that keeps every other VM of the same runtime directory off it.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "clone/sdk/fd.hpp"
#include "clone/sdk/result.hpp"

namespace virtio_vsock {

constexpr uint32_t kFirstGuestCid = 3;              // 0 to 2: hypervisor, local, host
constexpr uint32_t kLastGuestCid = UINT32_MAX - 1;  // the one above means any

struct Cid {
  uint32_t number = 0;
  clone_sdk::Fd lock;  // holds it; empty where there is no folder for locks
};

// Takes a CID: `wanted`, or the next free one. The folder ".cid" in `parent` holds a file for each CID that was ever
// used, locked (flock) by the VM that has it. With an empty parent, or one that others may write to, there are no
// locks, and the next free one is a random one. `claim` has the last word: false when somebody else on the host has
// that CID.
clone_sdk::Result<Cid> take_cid(const std::string& parent, std::optional<uint32_t> wanted,
                                const std::function<clone_sdk::Result<bool>(uint32_t)>& claim);

}  // namespace virtio_vsock
