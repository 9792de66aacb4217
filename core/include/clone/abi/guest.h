/* SPDX-License-Identifier: Apache-2.0 */
/* clone.guest/1: what a program inside the guest tells and does, published (clone.host-publish/1) by the device that speaks
 * with it. */
#ifndef CLONE_ABI_GUEST_H
#define CLONE_ABI_GUEST_H

#include "balloon_policy.h"
#include "base.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLONE_GUEST "clone.guest/1"

#define CLONE_GUEST_POWER_OFF 1u
#define CLONE_GUEST_REBOOT 2u

/* ~0 for a number that is not known. */
typedef struct clone_guest_report {
  uint32_t size;
  uint32_t connected;  /* 1 while the program answers */
  uint32_t activity;   /* CLONE_ACTIVITY_… */
  uint32_t age_ms;     /* of this report */
  uint32_t process_count;
  uint32_t load_permille; /* of one processor, 1 minute average */
  uint32_t pressure_some_permille; /* PSI memory, 10 s average */
  uint32_t pressure_full_permille;
  uint64_t total_bytes;
  uint64_t free_bytes;
  uint64_t available_bytes;
} clone_guest_report;

typedef struct clone_guest {
  uint32_t size;
  uint32_t reserved;
  void *context;
  /* [control] Fills `report` (its size set by the caller). */
  void (*report)(void *context, clone_guest_report *report);
  /* [control] &inactive. `changed` is called on [control] when activity or connected has changed. */
  void (*subscribe)(void *context, void (*changed)(void *listener), void *listener);
  /* [control] Asks for CLONE_GUEST_POWER_OFF or _REBOOT. CLONE_EMPTY when the program does not answer. */
  clone_status (*request)(void *context, uint32_t what, clone_err *err);
} clone_guest;

#ifdef __cplusplus
}
#endif

#endif
