/* SPDX-License-Identifier: Apache-2.0 */
/* clone.virtio-device/1: a virtio device (virtio 1.2 §2, §5). It knows no transport. */
#ifndef CLONE_ABI_VIRTIO_H
#define CLONE_ABI_VIRTIO_H

#include "device.h"
#include "virtqueue.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLONE_VIRTIO_DEVICE "clone.virtio-device/1"

/* The way back to the transport. Lasts from activate() until reset() returned. */
typedef struct clone_virtio_port {
  uint32_t size;
  uint32_t reserved;
  void *context;
  /* [any] The configuration space changed (virtio 1.2 §2.5). */
  void (*config_changed)(void *context);
  /* [any] The device cannot go on until the driver resets it (DEVICE_NEEDS_RESET, virtio 1.2 §2.1.1). */
  void (*needs_reset)(void *context);
} clone_virtio_port;

typedef struct clone_virtio_activation {
  uint32_t size;
  uint32_t queue_count;
  uint64_t features;              /* negotiated */
  clone_virtqueue *const *queues; /* NULL for one that the driver did not enable; last until reset() returned */
  const clone_virtio_port *port;
} clone_virtio_activation;

typedef struct clone_virtio_device {
  uint32_t size;
  uint32_t device_type; /* virtio 1.2 §5: 1 network, 2 block, … */
  /* [any] After configure(). Bits of the device's own; the transport adds VERSION_1 and the ring's. */
  uint64_t (*features)(void *device);
  uint32_t (*queue_count)(void *device);
  uint32_t (*queue_max_size)(void *device, uint32_t index); /* a power of two, at most 32768 */
  uint32_t (*config_size)(void *device);
  /* [vcpu] offset + size_bytes lies within config_size. */
  void (*read_config)(void *device, uint32_t offset, void *data, uint32_t size_bytes);
  void (*write_config)(void *device, uint32_t offset, const void *data, uint32_t size_bytes);
  /* [vcpu] The driver set DRIVER_OK (or, [control], a saved device that was active is loaded). Begins to serve the queues.
   * A failure makes the transport set DEVICE_NEEDS_RESET. */
  clone_status (*activate)(void *device, const clone_virtio_activation *activation, clone_err *err);
  /* [vcpu] or [control]. Stops serving: on return the queues are not touched any more and can be destroyed. Harmless when
   * not active. */
  void (*reset)(void *device);
  /* [any] After configure(). Those of the host's ring features `offered` that the device can serve: a kernel backend may
   * not know packed rings. Optional: all of them. */
  uint64_t (*ring_features)(void *device, uint64_t offered);
} clone_virtio_device;

#ifdef __cplusplus
}
#endif

#endif
