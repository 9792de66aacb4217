/* SPDX-License-Identifier: Apache-2.0 */
/* clone.balloon/1: a device that can take memory back from the guest, published (clone.host-publish/1) for the host, which
 * asks a balloon policy for the target. */
#ifndef CLONE_ABI_BALLOON_H
#define CLONE_ABI_BALLOON_H

#include "base.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLONE_BALLOON "clone.balloon/1"

/* ~0 for a number that the guest has not told. */
typedef struct clone_balloon_state {
  uint32_t size;
  uint32_t ready;               /* 1 while a driver of the guest serves the balloon */
  uint64_t target_bytes;
  uint64_t balloon_bytes;       /* as it stands */
  uint64_t reported_bytes;      /* given back by free page reporting, since the start */
  uint64_t guest_free_bytes;    /* the statistics of the guest's driver */
  uint64_t guest_available_bytes;
  uint64_t guest_total_bytes;
  uint64_t statistics_age_ms;   /* since the guest's driver told them */
} clone_balloon_state;

typedef struct clone_balloon {
  uint32_t size;
  uint32_t reserved;
  void *context;
  /* [control] Takes effect in steps; state() tells how far it is. More than the VM has is cut to what it has. */
  void (*set_target)(void *context, uint64_t bytes);
  /* [any] Fills `state` (its size set by the caller). */
  void (*state)(void *context, clone_balloon_state *state);
} clone_balloon;

#ifdef __cplusplus
}
#endif

#endif
