/* SPDX-License-Identifier: Apache-2.0 */
/* clone.snapshot-notes/1: small hints kept beside a snapshot, by those who use it. */
#ifndef CLONE_ABI_SNAPSHOT_NOTES_H
#define CLONE_ABI_SNAPSHOT_NOTES_H

#include "base.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLONE_SNAPSHOT_NOTES "clone.snapshot-notes/1"
#define CLONE_SNAPSHOT_NOTE_MAX_BYTES (1u << 20)

/* An extension of a snapshot backend (get_extension). A note is no part of the snapshot: no checksum covers it, no copy
 * takes it along, it may be gone or wrong at any time, and it goes with the snapshot. `image` comes from open(); one of
 * begin() must not be passed. Calls end before its close(). */
typedef struct clone_snapshot_notes {
  uint32_t size;
  uint32_t reserved;
  /* [any], one call at a time for an image. Calls take() once with the note, which is valid until that returns;
   * CLONE_EMPTY, without a call, when there is none. Errors, without a call: CLONE_ERR_CORRUPT: larger than allowed;
   * CLONE_ERR_INVALID: the name; others of reading it. Any error counts as no note. */
  clone_status (*read)(void *image, const char *name,
                       void (*take)(void *context, const void *data, uint64_t size_bytes), void *context,
                       clone_err *err);
  /* [any], one call at a time for an image. The note is there whole or not at all; it replaces one that is there. An
   * error where this process may not write to the snapshot. name: 1 to 32 of `a-z -`. At most
   * CLONE_SNAPSHOT_NOTE_MAX_BYTES. */
  clone_status (*write)(void *image, const char *name, const void *data, uint64_t size_bytes, clone_err *err);
} clone_snapshot_notes;

#ifdef __cplusplus
}
#endif

#endif
