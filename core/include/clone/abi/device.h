/* SPDX-License-Identifier: Apache-2.0 */
/* clone.device/1: the factory of devices, and a device's life.
 *
 *   create → configure → start → (quiesce → save | load → resume)* → destroy
 *            &inactive   &active   &quiesced
 *
 * A VM restored from a snapshot goes create → configure → load → start; load() then is called &inactive. */
#ifndef CLONE_ABI_DEVICE_H
#define CLONE_ABI_DEVICE_H

#include "descriptor.h"
#include "host.h"
#include "state.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLONE_DEVICE_FACTORY "clone.device/1"

typedef struct clone_device_ops {
  uint32_t size;
  uint32_t reserved;
  /* [control] `host` lasts until destroy() returned. Calls nothing of the host but its log. */
  clone_status (*create)(const clone_host *host, void **device, clone_err *err);
  /* [control] &inactive or &quiesced. Stops whatever still runs; releases everything. */
  void (*destroy)(void *device);
  /* [control] Once, &inactive. Opens files, claims ranges and interrupts, adds ACPI nodes. What cannot be opened is an
   * error here, before the VM runs. */
  clone_status (*configure)(void *device, const clone_options *options, clone_err *err);
  /* [control] After every device is configured, before the first vCPU runs. Optional. */
  clone_status (*start)(void *device, clone_err *err);
  /* [control] &active. Returns when workers are parked and all I/O that was begun is done. vCPUs do not run. */
  clone_status (*quiesce)(void *device, clone_err *err);
  /* [control] &quiesced. */
  clone_status (*resume)(void *device, clone_err *err);
  /* [control] &quiesced. Back to the state after start(), as a machine reset does. */
  clone_status (*reset)(void *device, clone_err *err);
  /* [control] &quiesced. A device that has CLONE_CAN_SAVE; CLONE_ERR_UNSUPPORTED otherwise, never a silent success. */
  clone_status (*save)(void *device, const clone_writer *writer, clone_err *err);
  /* [control] &inactive, configured; or &quiesced. Required sections that are missing are an error by name. */
  clone_status (*load)(void *device, const clone_reader *reader, clone_err *err);
  /* [any] After create(). The table of an ability by id (clone.virtio-device/1, clone.boot-root/1, clone.vhost/1), or
   * NULL. Functions of the table take this `device`. */
  const void *(*get_extension)(void *device, const char *id);
} clone_device_ops;

typedef struct clone_device_type {
  uint32_t size;
  uint32_t reserved;
  const clone_descriptor *descriptor;
  const clone_device_ops *ops;
} clone_device_type;

typedef struct clone_device_factory {
  uint32_t size;
  uint32_t count;
  /* [control] Constant tables, for index < count. */
  const clone_device_type *(*type)(uint32_t index);
} clone_device_factory;

#ifdef __cplusplus
}
#endif

#endif
