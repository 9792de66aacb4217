/* SPDX-License-Identifier: Apache-2.0 */
/* clone.host-machine/1: the machine as a whole: its vCPUs, its end, its power button, its name. */
#ifndef CLONE_ABI_MACHINE_H
#define CLONE_ABI_MACHINE_H

#include "host.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLONE_HOST_MACHINE "clone.host-machine/1"

/* Guest physical: a page of memory that guests are told is reserved, for what makes this machine unlike its copies. */
#define CLONE_IDENTITY_PAGE 0x6000u

#define CLONE_MACHINE_POWER_OFF 1u /* the guest turned itself off */
#define CLONE_MACHINE_RESET 2u     /* the guest asked for a reset */
#define CLONE_MACHINE_PANIC 3u     /* the guest reported that it crashed */

/* This boot, also of a device that was added to a saved machine: load() is not called then. */
#define CLONE_ORIGIN_BOOT 0u
/* A template, or another machine: load() comes before its first start(), and others may come from there. */
#define CLONE_ORIGIN_SAVED 1u

typedef struct clone_host_machine {
  uint32_t size;
  uint32_t reserved;
  /* [any] */
  uint32_t (*vcpu_count)(const clone_host *host);
  uint64_t (*memory_bytes)(const clone_host *host);
  /* [any] Returns at once; the VM's main thread acts on it. The first request wins. */
  void (*request)(const clone_host *host, uint32_t what);
  /* [control] &inactive. `pressed` is called, [control], when somebody wants the guest to power off in good order. It
   * returns CLONE_OK when the guest has been told, CLONE_EMPTY when it will be once it listens. */
  clone_status (*on_power_button)(const clone_host *host, clone_status (*pressed)(void *context), void *context,
                                  clone_err *err);
  /* [any] As --name gave it, "" when it was not given. Lasts as long as the machine. */
  const char *(*name)(const clone_host *host);
  /* [any] Where the instance that this host handle belongs to comes from, CLONE_ORIGIN_…; the same after a reset. */
  uint32_t (*origin)(const clone_host *host);
} clone_host_machine;

#ifdef __cplusplus
}
#endif

#endif
