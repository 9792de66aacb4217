/* SPDX-License-Identifier: Apache-2.0 */
/* clone.vsock/1: streams into the guest, published (clone.host-publish/1) by the device that carries them. */
#ifndef CLONE_ABI_VSOCK_H
#define CLONE_ABI_VSOCK_H

#include "base.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLONE_VSOCK "clone.vsock/1"

typedef struct clone_vsock {
  uint32_t size;
  uint32_t cid; /* the guest's */
  void *context;
  /* [control] &active. Begins a stream to `port` of the guest and returns at once: *fd is a non-blocking stream socket, the
   * caller's. It is writable when the guest has accepted; a guest that refuses ends it (end of file, or an error in
   * SO_ERROR). The source port is below 1024, which other users of the host cannot have: a guest can tell the VMM by it. */
  clone_status (*connect)(void *context, uint32_t port, int32_t *fd, clone_err *err);
} clone_vsock;

#ifdef __cplusplus
}
#endif

#endif
