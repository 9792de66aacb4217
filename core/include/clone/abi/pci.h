/* SPDX-License-Identifier: Apache-2.0 */
/* clone.pci-bus/1: PCI functions, offered by a transport that has a PCI bus (found with clone_host.get_extension). */
#ifndef CLONE_ABI_PCI_H
#define CLONE_ABI_PCI_H

#include "host.h"
#include "state.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLONE_PCI_BUS "clone.pci-bus/1"
#define CLONE_PCI_SLOT_ANY 0xffffffffu

#define CLONE_PCI_BAR_IO 1u
#define CLONE_PCI_BAR_64 2u
#define CLONE_PCI_BAR_PREFETCHABLE 4u
#define CLONE_PCI_BAR_MAPPED 8u /* the function maps it into the guest itself when told of its place */

typedef struct clone_pci_bar {
  uint32_t size;
  uint32_t flags;
  uint64_t size_bytes; /* a power of two; 0: not there */
} clone_pci_bar;

/* A function, as it describes itself. The bus keeps the standard header, the BARs, and the MSI and MSI-X capabilities. */
typedef struct clone_pci_function {
  uint32_t size;
  uint16_t vendor_id;
  uint16_t device_id;
  uint16_t subsystem_vendor_id;
  uint16_t subsystem_id;
  uint32_t class_revision; /* class code << 8 | revision */
  uint32_t interrupt_pin;  /* 0: none, 1: INTA */
  uint32_t msix_vectors;   /* 0: no MSI-X */
  uint32_t msix_bar;       /* BAR that holds the table and the pending bits; the bus serves them */
  uint32_t msi_vectors;    /* 0: no MSI */
  const clone_pci_bar *const *bars; /* six; NULL entries allowed */
  /* Capabilities appended to the bus's own: id, next, body as they stand in configuration space. */
  const void *capabilities;
  uint64_t capabilities_bytes;
  /* [vcpu] Accesses to a BAR of the function, and to configuration space that the bus does not keep. */
  void (*bar_read)(void *context, uint32_t bar, uint64_t offset, void *data, uint32_t size_bytes);
  void (*bar_write)(void *context, uint32_t bar, uint64_t offset, const void *data, uint32_t size_bytes);
  void (*config_read)(void *context, uint32_t offset, void *data, uint32_t size_bytes);
  void (*config_write)(void *context, uint32_t offset, const void *data, uint32_t size_bytes);
  /* [vcpu] or [control]. The guest placed the BAR (or took it away: address ~0). Optional. */
  void (*bar_moved)(void *context, uint32_t bar, uint64_t guest_address);
  /* [vcpu] or [control]. Function-level or bus reset. */
  void (*reset)(void *context);
} clone_pci_function;

typedef struct clone_pci_bus {
  uint32_t size;
  uint32_t reserved;
  void *context;
  /* [control] &inactive. `function` and `function_context` last until remove(). */
  clone_status (*add)(void *context, const clone_host *owner, uint32_t slot, const clone_pci_function *function,
                      void *function_context, uint64_t *handle, clone_err *err);
  void (*remove)(void *context, uint64_t handle);
  /* [any] Interrupts the guest by the vector, or by INTx (vector 0) when neither MSI nor MSI-X is enabled. */
  void (*interrupt)(void *context, uint64_t handle, uint32_t vector);
  void (*set_intx)(void *context, uint64_t handle, uint32_t level);
  /* [control] An eventfd that does the same when written; owned by the bus. */
  int32_t (*vector_fd)(void *context, uint64_t handle, uint32_t vector, clone_err *err);
  /* [control] &quiesced. The function's standard state, saved and loaded for it. */
  clone_status (*save)(void *context, uint64_t handle, const clone_writer *writer, clone_err *err);
  clone_status (*load)(void *context, uint64_t handle, const clone_reader *reader, clone_err *err);
} clone_pci_bus;

#ifdef __cplusplus
}
#endif

#endif
