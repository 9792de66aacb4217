// SPDX-License-Identifier: Apache-2.0
// clone.virtqueue/1, as the host offers it.
#pragma once

#include "clone/abi/virtqueue.h"

namespace vmm {

const clone_host_virtqueue* virtqueue_service();

}  // namespace vmm
