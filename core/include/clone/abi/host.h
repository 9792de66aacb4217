/* SPDX-License-Identifier: Apache-2.0 */
/* The host as a plugin sees it: a version and services by name. */
#ifndef CLONE_ABI_HOST_H
#define CLONE_ABI_HOST_H

#include "base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Each plugin, and each device that it makes, is given its own: what is claimed through it carries that name and is
 * given back when the owner is destroyed. */
typedef struct clone_host {
  uint32_t size;
  uint32_t abi_major;
  uint32_t abi_minor;
  uint32_t reserved;
  void *context;    /* the host's own */
  const char *name; /* of the instance this host handle belongs to, e.g. "serial.0" */
  /* [any] The table of a service, or NULL when this host does not offer it. Tables last until the process ends.
   * Services: clone.host-log/1 clone.host-memory/1 clone.host-bus/1 clone.host-irq/1 clone.host-loop/1
   * clone.host-machine/1 clone.host-acpi/1 clone.host-console/1 clone.host-control/1 clone.host-instances/1
   * clone.host-publish/1 clone.virtqueue/1 clone.pci-bus/1 (the last from the transport that has one). */
  const void *(*get_extension)(const struct clone_host *host, const char *id);
} clone_host;

/* --- clone.host-log/1 ----------------------------------------------------------------------------------------- */
#define CLONE_HOST_LOG "clone.host-log/1"
#define CLONE_LOG_ERROR 0u
#define CLONE_LOG_WARNING 1u
#define CLONE_LOG_INFO 2u
#define CLONE_LOG_DEBUG 3u

typedef struct clone_host_log {
  uint32_t size;
  uint32_t reserved;
  /* [any] One line; the host puts the instance's name in front. What a guest can cause more than a few times belongs
   * to CLONE_LOG_DEBUG. */
  void (*log)(const clone_host *host, uint32_t level, const char *message);
} clone_host_log;

/* --- clone.host-publish/1 ------------------------------------------------------------------------------------- */
#define CLONE_HOST_PUBLISH "clone.host-publish/1"

typedef struct clone_host_publish {
  uint32_t size;
  uint32_t reserved;
  /* [control] &inactive. Offers a table to every other plugin of this VM under `id` (a transport's clone.pci-bus/1).
   * The table lasts as long as the publisher. CLONE_ERR_BUSY names the plugin that already offers the id. */
  clone_status (*publish)(const clone_host *host, const char *id, const void *table, clone_err *err);
} clone_host_publish;

#ifdef __cplusplus
}
#endif

#endif
