/* SPDX-License-Identifier: Apache-2.0 */
/* clone.host-irq/1: interrupt lines (GSIs) and message-signalled interrupts. */
#ifndef CLONE_ABI_IRQ_H
#define CLONE_ABI_IRQ_H

#include "host.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLONE_HOST_IRQ "clone.host-irq/1"
#define CLONE_GSI_ANY 0xffffffffu

typedef struct clone_host_irq {
  uint32_t size;
  uint32_t reserved;
  /* [control] &inactive. A line of the IOAPIC: the one asked for, or a free one (CLONE_GSI_ANY). Exclusive. */
  clone_status (*allocate)(const clone_host *host, uint32_t wanted, uint32_t *gsi, clone_err *err);
  /* [any] Level-triggered use: 1 asserts, 0 releases. */
  clone_status (*set_level)(const clone_host *host, uint32_t gsi, uint32_t level);
  /* [any] Edge-triggered use. */
  clone_status (*pulse)(const clone_host *host, uint32_t gsi);
  /* [any] Writes to the eventfd `fd` interrupt the guest without a thread in between. resample_fd (or -1): signalled at
   * the guest's end of interrupt, for level-triggered lines. */
  clone_status (*irqfd)(const clone_host *host, uint32_t gsi, int32_t fd, int32_t resample_fd, clone_err *err);
  clone_status (*irqfd_remove)(const clone_host *host, uint32_t gsi, int32_t fd, clone_err *err);
  /* [control] or [vcpu]. A GSI for one MSI or MSI-X vector, to be used with irqfd; no message until msi_update(). */
  clone_status (*msi_allocate)(const clone_host *host, uint32_t *gsi, clone_err *err);
  /* [control] or [vcpu]. The message of the vector, as the guest wrote it. `masked` != 0: interrupts are dropped. */
  clone_status (*msi_update)(const clone_host *host, uint32_t gsi, uint64_t address, uint32_t data, uint32_t masked,
                             clone_err *err);
  void (*msi_free)(const clone_host *host, uint32_t gsi);
  /* [any] One message, now. */
  clone_status (*msi_send)(const clone_host *host, uint64_t address, uint32_t data);
} clone_host_irq;

#ifdef __cplusplus
}
#endif

#endif
