/* SPDX-License-Identifier: Apache-2.0 */
/* clone.snapshot-backend/1: where snapshots are kept, full or as a difference to a parent. */
#ifndef CLONE_ABI_SNAPSHOT_BACKEND_H
#define CLONE_ABI_SNAPSHOT_BACKEND_H

#include "descriptor.h"
#include "host.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLONE_SNAPSHOT_BACKEND_FACTORY "clone.snapshot-backend/1"

/* Guest memory of an image: `fd` can be mapped MAP_PRIVATE. Extents are ascending and do not overlap; what none covers
 * is zeroes. The fd belongs to the image and lasts as long as it. */
typedef struct clone_snapshot_extent {
  uint32_t size;
  int32_t fd;
  uint64_t fd_offset;
  uint64_t memory_offset; /* in the guest's memory, regions one behind the other */
  uint64_t size_bytes;
} clone_snapshot_extent;

typedef struct clone_snapshot_backend_type {
  uint32_t size;
  uint32_t reserved;
  const clone_descriptor *descriptor;
  /* All [control] unless said otherwise. */
  clone_status (*create)(const clone_host *host, const clone_options *options, void **backend, clone_err *err);
  void (*destroy)(void *backend);

  /* A new image, of which nothing is seen under its name before commit(). parent: NULL for a full one. */
  clone_status (*begin)(void *backend, const char *name, const char *parent, uint64_t memory_bytes, void **image,
                        clone_err *err);
  /* [any] Pages that are never written are zeroes (full) or the parent's. Offsets and sizes are whole pages. `data` does
   * not change during the call. A page may be written again, any number of times and zeroes too: the last call before
   * commit() counts (calls for one page do not overlap). */
  clone_status (*write_memory)(void *image, uint64_t memory_offset, const void *data, uint64_t size_bytes,
                               clone_err *err);
  clone_status (*write_section)(void *image, const char *owner, const char *tag, uint32_t version, const void *data,
                                uint64_t size_bytes, clone_err *err);
  /* Durable and visible in one step, or not at all. */
  clone_status (*commit)(void *image, clone_err *err);

  clone_status (*open)(void *backend, const char *name, void **image, clone_err *err);
  /* CLONE_EMPTY past the last. */
  clone_status (*memory_extent)(void *image, uint32_t index, clone_snapshot_extent *extent, clone_err *err);
  clone_status (*read_section)(void *image, const char *owner, const char *tag, uint32_t *version, const void **data,
                               uint64_t *size_bytes, clone_err *err);
  clone_status (*list_sections)(void *image, void (*visit)(void *context, const char *owner, const char *tag,
                                                           uint32_t version, uint64_t size_bytes),
                                void *context, clone_err *err);
  clone_status (*verify)(void *image, clone_err *err);
  /* After begin() without commit(): discards. */
  void (*close)(void *image);

  clone_status (*list)(void *backend, void (*visit)(void *context, const char *name, const char *parent,
                                                    uint64_t memory_bytes, uint64_t stored_bytes),
                       void *context, clone_err *err);
  clone_status (*remove)(void *backend, const char *name, clone_err *err);
  const void *(*get_extension)(void *backend, const char *id);
} clone_snapshot_backend_type;

/* What get_extension() of a backend that can compress where a snapshot lies answers to this id with. [control] */
#define CLONE_SNAPSHOT_COMPRESSION "clone.snapshot-compression/1"
typedef struct clone_snapshot_compression {
  uint32_t size;
  uint32_t reserved;
  /* on: keep that snapshot compressed, 0: as it is mapped. It is the same snapshot before and after, for its parent, its
   * children and who has it open, and whole whenever the process ends; checksums are compared, damage is an error. One
   * that is kept so already is CLONE_OK. */
  clone_status (*set_compressed)(void *backend, const char *name, uint32_t on, clone_err *err);
} clone_snapshot_compression;

typedef struct clone_snapshot_backend_factory {
  uint32_t size;
  uint32_t count;
  const clone_snapshot_backend_type *(*type)(uint32_t index);
} clone_snapshot_backend_factory;

#ifdef __cplusplus
}
#endif

#endif
