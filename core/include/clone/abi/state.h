/* SPDX-License-Identifier: Apache-2.0 */
/* Saved state: sections with a tag and a version, out through a writer, in through a reader. */
#ifndef CLONE_ABI_STATE_H
#define CLONE_ABI_STATE_H

#include "base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Save the device's model, not its implementation. Saving the same state twice gives the same bytes. Integers are little
 * endian. */
typedef struct clone_writer {
  uint32_t size;
  uint32_t reserved;
  void *context;
  /* [control] &quiesced. One section; a tag appears once for each owner. Bytes are copied. */
  clone_status (*put)(void *context, const char *tag, uint32_t version, const void *data, uint64_t size_bytes,
                      clone_err *err);
} clone_writer;

/* The stream is hostile: sizes and contents are checked by whoever reads them. */
typedef struct clone_reader {
  uint32_t size;
  uint32_t reserved;
  void *context;
  /* [control] CLONE_ERR_NOT_FOUND when there is no such section. The bytes last until load() returns. */
  clone_status (*get)(void *context, const char *tag, uint32_t *version, const void **data, uint64_t *size_bytes,
                      clone_err *err);
} clone_reader;

#ifdef __cplusplus
}
#endif

#endif
