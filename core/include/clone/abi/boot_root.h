/* SPDX-License-Identifier: Apache-2.0 */
/* clone.boot-root/1: a device that can hold the guest's root file system says how the generated initrd finds it. */
#ifndef CLONE_ABI_BOOT_ROOT_H
#define CLONE_ABI_BOOT_ROOT_H

#include "device.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLONE_BOOT_ROOT "clone.boot-root/1"

/* The strings are the device's and last as long as it. */
typedef struct clone_boot_root_info {
  uint32_t size;
  uint32_t read_only;      /* 1: mount it read-only */
  const char *source;      /* "serial:TEXT" (a block device by its serial number), "/dev/NAME", "tag:TAG" */
  const char *file_system; /* as found on it, "" when unknown: then the guest tries what its kernel has */
  const char *guest_modules; /* that the file system needs, separated by blanks */
  /* "tmpfs": the guest keeps what it writes in its own memory, over this root, which is mounted read-only. "" for none;
   * a plugin from before this field leaves it as it is. */
  const char *overlay;
} clone_boot_root_info;

typedef struct clone_boot_root {
  uint32_t size;
  uint32_t reserved;
  /* [control] After configure(). CLONE_EMPTY when this device is not meant to be the root. */
  clone_status (*describe)(void *device, clone_boot_root_info *info, clone_err *err);
} clone_boot_root;

#ifdef __cplusplus
}
#endif

#endif
