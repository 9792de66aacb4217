/* SPDX-License-Identifier: Apache-2.0 */
/* clone.host-memory/1: the guest's physical memory. */
#ifndef CLONE_ABI_MEMORY_H
#define CLONE_ABI_MEMORY_H

#include "host.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLONE_HOST_MEMORY "clone.host-memory/1"

typedef struct clone_memory_region {
  uint32_t size;
  int32_t fd;            /* of the backing file, -1 for anonymous memory; owned by the host */
  uint64_t fd_offset;
  uint64_t guest_address;
  uint64_t size_bytes;
  void *host_address;    /* for handing to the kernel (vhost, VFIO); a plugin's own writes go through write() or a
                            virtqueue, or are followed by mark_dirty() */
} clone_memory_region;

typedef struct clone_host_memory {
  uint32_t size;
  uint32_t reserved;
  /* [any] */
  uint32_t (*region_count)(const clone_host *host);
  /* [any] Fills `region` (its size set by the caller). CLONE_ERR_INVALID past the last. */
  clone_status (*region)(const clone_host *host, uint32_t index, clone_memory_region *region);
  /* [any] CLONE_ERR_GUEST, and nothing copied, unless the whole range is memory. */
  clone_status (*read)(const clone_host *host, uint64_t guest_address, void *into, uint64_t size_bytes);
  /* [any] The same, and the pages are marked dirty. */
  clone_status (*write)(const clone_host *host, uint64_t guest_address, const void *from, uint64_t size_bytes);
  /* [any] The host's address of a range that lies whole in one region, or NULL. */
  void *(*slice)(const clone_host *host, uint64_t guest_address, uint64_t size_bytes);
  /* [any] After a write through slice() or by a kernel device. Out-of-range parts are ignored. */
  void (*mark_dirty)(const clone_host *host, uint64_t guest_address, uint64_t size_bytes);
  /* [any] Gives whole pages back to the system (MADV_DONTNEED, hole punching for file-backed memory); they read as
   * zeroes afterwards. */
  clone_status (*discard)(const clone_host *host, uint64_t guest_address, uint64_t size_bytes);
} clone_host_memory;

#ifdef __cplusplus
}
#endif

#endif
