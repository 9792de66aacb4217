/* SPDX-License-Identifier: Apache-2.0 */
/* clone.vhost/1: what the host needs of a device whose data path runs in the kernel or in another process. */
#ifndef CLONE_ABI_VHOST_H
#define CLONE_ABI_VHOST_H

#include "device.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLONE_VHOST "clone.vhost/1"

typedef struct clone_vhost {
  uint32_t size;
  uint32_t reserved;
  /* [control] Begins to log the pages that the backend writes (VHOST_F_LOG_ALL). */
  clone_status (*start_log)(void *device, clone_err *err);
  /* [control] Calls `mark` for every range written since the last call and clears the log. */
  clone_status (*take_log)(void *device, void (*mark)(void *context, uint64_t guest_address, uint64_t size_bytes),
                           void *context, clone_err *err);
  clone_status (*stop_log)(void *device, clone_err *err);
  /* [control] &quiesced. The guest's memory regions changed (clone.host-memory/1). */
  clone_status (*memory_changed)(void *device, clone_err *err);
} clone_vhost;

#ifdef __cplusplus
}
#endif

#endif
