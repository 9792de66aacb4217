/* SPDX-License-Identifier: Apache-2.0 */
/* clone.host-bus/1: port I/O and memory-mapped I/O, claimed range by range. */
#ifndef CLONE_ABI_BUS_H
#define CLONE_ABI_BUS_H

#include "host.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLONE_HOST_BUS "clone.host-bus/1"
#define CLONE_BUS_PIO 0u  /* 16-bit ports */
#define CLONE_BUS_MMIO 1u /* guest physical addresses */

/* [vcpu] `offset` counts from the start of the claim; size_bytes is 1, 2, 4 or 8 and offset + size_bytes lies within
 * the claim. Data is little endian. A handler locks for itself; it may be called by many vCPUs at once. */
typedef struct clone_bus_handler {
  uint32_t size;
  uint32_t reserved;
  void (*read)(void *context, uint64_t offset, void *data, uint32_t size_bytes);
  void (*write)(void *context, uint64_t offset, const void *data, uint32_t size_bytes);
} clone_bus_handler;

typedef struct clone_host_bus {
  uint32_t size;
  uint32_t reserved;
  /* [control] or [vcpu] (PCI BARs move). Refused with both names when the range overlaps another claim. `handler` and
   * `context` last until release() returned. `claim` identifies it afterwards. */
  clone_status (*claim)(const clone_host *host, uint32_t space, uint64_t start, uint64_t size_bytes,
                        const clone_bus_handler *handler, void *context, uint64_t *claim, clone_err *err);
  /* [control] or [vcpu], but not from inside the claim's own handler. On return no handler of it runs any more. */
  void (*release)(const clone_host *host, uint64_t claim);
  /* [control] &inactive. A free window in the hole below 4 GiB; alignment is a power of two. */
  clone_status (*allocate_mmio)(const clone_host *host, uint64_t size_bytes, uint64_t alignment, uint64_t *start,
                                clone_err *err);
  /* [any] A guest write of `size_bytes` (0: any size) to the address signals `fd` and never leaves the kernel. With
   * `match` != 0 only when the value written equals `value`. */
  clone_status (*ioeventfd)(const clone_host *host, uint32_t space, uint64_t address, uint32_t size_bytes,
                            uint32_t match, uint64_t value, int32_t fd, clone_err *err);
  clone_status (*ioeventfd_remove)(const clone_host *host, uint32_t space, uint64_t address, uint32_t size_bytes,
                                   uint32_t match, uint64_t value, int32_t fd, clone_err *err);
} clone_host_bus;

#ifdef __cplusplus
}
#endif

#endif
