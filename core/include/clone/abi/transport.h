/* SPDX-License-Identifier: Apache-2.0 */
/* clone.transport/1: the factory of transports: how virtio devices appear to the guest (virtio 1.2 §4). */
#ifndef CLONE_ABI_TRANSPORT_H
#define CLONE_ABI_TRANSPORT_H

#include "device.h"
#include "virtio.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLONE_TRANSPORT_FACTORY "clone.transport/1"

/* What a transport is given of a device. The transport is destroyed before the devices that are attached to it. */
typedef struct clone_virtio_attachment {
  uint32_t size;
  uint32_t reserved;
  const char *name; /* of the instance, e.g. "serial.0" */
  void *device;
  const clone_virtio_device *table;
  const clone_host *host; /* of the device: what is claimed through it carries the device's name */
} clone_virtio_attachment;

/* A transport lives as a device does: `ops` has the same functions with the same meaning. Its save() holds the registers
 * and queue positions of every attached device; its load(), after the devices' own, activates those that were active. */
typedef struct clone_transport_type {
  uint32_t size;
  uint32_t reserved;
  const clone_descriptor *descriptor;
  const clone_device_ops *ops;
  /* [control] &inactive, after configure() of both. Takes a slot, claims its window and interrupt, describes it to the
   * guest. Slots are taken in the order of the calls, so that the same plan gives the same machine. */
  clone_status (*attach)(void *transport, const clone_virtio_attachment *attachment, clone_err *err);
} clone_transport_type;

typedef struct clone_transport_factory {
  uint32_t size;
  uint32_t count;
  const clone_transport_type *(*type)(uint32_t index);
} clone_transport_factory;

#ifdef __cplusplus
}
#endif

#endif
