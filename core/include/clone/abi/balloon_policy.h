/* SPDX-License-Identifier: Apache-2.0 */
/* clone.balloon-policy/1: decides how much memory a VM should give back. It keeps no clock, so that a test drives it. */
#ifndef CLONE_ABI_BALLOON_POLICY_H
#define CLONE_ABI_BALLOON_POLICY_H

#include "descriptor.h"
#include "host.h"
#include "state.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLONE_BALLOON_POLICY_FACTORY "clone.balloon-policy/1"

#define CLONE_ACTIVITY_UNKNOWN 0u
#define CLONE_ACTIVITY_IDLE 1u
#define CLONE_ACTIVITY_ACTIVE 2u

/* What is known of the VM at one moment; ~0 for a number that is not known. */
typedef struct clone_balloon_input {
  uint32_t size;
  uint32_t activity;
  uint64_t now_ms; /* monotonic, from any start; never runs backwards */
  uint64_t memory_bytes;
  uint64_t resident_bytes; /* of the VM's process, on the host */
  uint64_t guest_available_bytes; /* told while the balloon stood as it stands; otherwise not known */
  uint64_t guest_free_bytes;      /* likewise */
  uint64_t balloon_bytes;  /* as it stands */
  uint32_t pressure_some_permille; /* PSI memory, 10 s average */
  uint32_t pressure_full_permille;
} clone_balloon_input;

typedef struct clone_balloon_output {
  uint32_t size;
  uint32_t wake_ms; /* ask again after at most this long; 0: only when something changes */
  uint64_t target_bytes;
} clone_balloon_output;

typedef struct clone_balloon_policy_type {
  uint32_t size;
  uint32_t reserved;
  const clone_descriptor *descriptor;
  /* All [control]. */
  clone_status (*create)(const clone_host *host, const clone_options *options, void **policy, clone_err *err);
  void (*destroy)(void *policy);
  clone_status (*decide)(void *policy, const clone_balloon_input *input, clone_balloon_output *output, clone_err *err);
  clone_status (*save)(void *policy, const clone_writer *writer, clone_err *err);
  clone_status (*load)(void *policy, const clone_reader *reader, clone_err *err);
  const void *(*get_extension)(void *policy, const char *id);
} clone_balloon_policy_type;

typedef struct clone_balloon_policy_factory {
  uint32_t size;
  uint32_t count;
  const clone_balloon_policy_type *(*type)(uint32_t index);
} clone_balloon_policy_factory;

#ifdef __cplusplus
}
#endif

#endif
