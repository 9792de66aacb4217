/* SPDX-License-Identifier: Apache-2.0 */
/* clone.boot-arguments/1: what a device adds to the kernel's command line ("console=ttyS0"). */
#ifndef CLONE_ABI_BOOT_ARGUMENTS_H
#define CLONE_ABI_BOOT_ARGUMENTS_H

#include "device.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLONE_BOOT_ARGUMENTS "clone.boot-arguments/1"

typedef struct clone_boot_arguments {
  uint32_t size;
  uint32_t reserved;
  /* [control] After configure(). Arguments separated by blanks, "" for none; the device's, lasts as long as it. */
  const char *(*arguments)(void *device);
} clone_boot_arguments;

#ifdef __cplusplus
}
#endif

#endif
