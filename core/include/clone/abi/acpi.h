/* SPDX-License-Identifier: Apache-2.0 */
/* clone.host-acpi/1: how a device makes itself known to the guest (ACPI 6.5). All calls [control] &inactive. */
#ifndef CLONE_ABI_ACPI_H
#define CLONE_ABI_ACPI_H

#include "host.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLONE_HOST_ACPI "clone.host-acpi/1"

#define CLONE_ACPI_IO 1u     /* start, length: ports */
#define CLONE_ACPI_MEMORY 2u /* start, length: guest physical addresses below 4 GiB */
#define CLONE_ACPI_IRQ 3u    /* start: the GSI; flags */
#define CLONE_ACPI_IRQ_LEVEL 1u
#define CLONE_ACPI_IRQ_ACTIVE_LOW 2u
#define CLONE_ACPI_IRQ_SHARED 4u

typedef struct clone_acpi_resource {
  uint32_t size;
  uint32_t kind;
  uint64_t start;
  uint64_t length;
  uint32_t flags;
  uint32_t reserved;
} clone_acpi_resource;

typedef struct clone_acpi_node {
  uint32_t size;
  uint32_t resource_count;
  const char *hid; /* "LNRO0005", "PNP0501" */
  const char *cid; /* or NULL */
  const clone_acpi_resource *resources;
} clone_acpi_node;

/* The fixed hardware of ACPI 6.5 §4.8, and how the machine is reset (§4.8.4.6). One per machine; without it the tables
 * describe a hardware-reduced platform. */
typedef struct clone_acpi_power {
  uint32_t size;
  uint32_t sci_gsi;
  uint16_t event_port;   /* PM1a event block, 4 bytes */
  uint16_t control_port; /* PM1a control block, 2 bytes */
  uint16_t timer_port;   /* PM timer, 32 bits wide (TMR_VAL_EXT); 0: none */
  uint16_t reset_port;   /* 0: none */
  uint8_t reset_value;
  uint8_t sleep_type_s5; /* SLP_TYP of the soft-off state */
  uint8_t reserved[6];
} clone_acpi_power;

#define CLONE_ACPI_LEGACY_I8042 1u /* a keyboard controller answers at 0x60 and 0x64 */
#define CLONE_ACPI_LEGACY_RTC 2u   /* a CMOS clock answers at 0x70 */

typedef struct clone_host_acpi {
  uint32_t size;
  uint32_t reserved;
  /* A device under \_SB; its _UID counts the nodes of the same hid. */
  clone_status (*add_node)(const clone_host *host, const clone_acpi_node *node, clone_err *err);
  /* AML terms put into \_SB as they are. */
  clone_status (*add_aml)(const clone_host *host, const void *aml, uint64_t size_bytes, clone_err *err);
  clone_status (*set_power)(const clone_host *host, const clone_acpi_power *power, clone_err *err);
  /* CLONE_ACPI_LEGACY_*: told to the guest in the FADT's IA-PC boot flags (ACPI 6.5 §5.2.9.3). */
  clone_status (*set_legacy)(const clone_host *host, uint32_t flags, clone_err *err);
  /* A PCI segment's ECAM window, for the MCFG table (PCI Firmware Specification 3.3 §4.1.2). */
  clone_status (*set_ecam)(const clone_host *host, uint64_t base, uint32_t first_bus, uint32_t last_bus,
                           clone_err *err);
} clone_host_acpi;

#ifdef __cplusplus
}
#endif

#endif
