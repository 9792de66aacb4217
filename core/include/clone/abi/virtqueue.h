/* SPDX-License-Identifier: Apache-2.0 */
/* clone.virtqueue/1: split and packed virtqueues (virtio 1.2 §2.6 to §2.8). Chains are walked and checked by the host, so
 * that a mend there needs no plugin to be built again. */
#ifndef CLONE_ABI_VIRTQUEUE_H
#define CLONE_ABI_VIRTQUEUE_H

#include "host.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLONE_VIRTQUEUE "clone.virtqueue/1"

typedef struct clone_virtqueue clone_virtqueue;

typedef struct clone_segment {
  void *host_address;
  uint64_t guest_address;
  uint32_t size_bytes;
  uint32_t reserved;
} clone_segment;

/* One descriptor chain. Every segment lies whole in guest memory; the readable ones come first; the sizes add up to less
 * than 2^32. `segments` and `capacity` are the caller's; the queue's size is always capacity enough. The contents of
 * the buffers are the guest's and may change while they are looked at. */
typedef struct clone_chain {
  uint32_t size;
  uint32_t capacity;
  clone_segment *segments;
  uint32_t readable_count;
  uint32_t writable_count;
  uint32_t readable_bytes;
  uint32_t writable_bytes;
  uint32_t head;        /* the host's: what push() gives back */
  uint32_t descriptors; /* the host's: ring entries that the chain takes (packed) */
} clone_chain;

typedef struct clone_virtqueue_layout {
  uint32_t size;
  uint32_t queue_size;
  uint64_t features;           /* that were negotiated */
  uint64_t descriptor_address; /* guest physical; of the split or packed ring's three areas */
  uint64_t driver_address;
  uint64_t device_address;
} clone_virtqueue_layout;

/* Where the device stands in the rings. Packed: bit 15 is the wrap counter (virtio 1.2 §2.8.1). */
typedef struct clone_virtqueue_position {
  uint32_t size;
  uint16_t next_available;
  uint16_t next_used;
} clone_virtqueue_position;

typedef struct clone_virtqueue_config {
  uint32_t size;
  uint32_t index;
  clone_virtqueue_layout layout;
  int32_t kick_fd; /* eventfd that a guest's notification signals; duplicated */
  int32_t call_fd; /* eventfd that is wired to the guest's interrupt; duplicated */
  /* [any] Called instead of signalling call_fd when not NULL: a transport with an interrupt status register. */
  void (*interrupt)(void *context, uint32_t index);
  void *context;
} clone_virtqueue_config;

typedef struct clone_host_virtqueue {
  uint32_t size;
  uint32_t reserved;
  /* [any] For transports. The ring features that this host implements; offered besides those of the device. */
  uint64_t (*ring_features)(const clone_host *host);
  /* [vcpu] or [control]. For transports: a queue, after its areas were checked to lie in guest memory and to be aligned;
   * CLONE_ERR_GUEST when not. */
  clone_status (*create)(const clone_host *host, const clone_virtqueue_config *config, clone_virtqueue **queue,
                         clone_err *err);
  void (*destroy)(clone_virtqueue *queue);

  /* The rest is for the device that was given the queue; one thread at a time for each queue, [worker] or [control]. */

  /* Signalled when the driver made chains available. Owned by the queue. */
  int32_t (*kick_fd)(clone_virtqueue *queue);
  uint32_t (*queue_size)(clone_virtqueue *queue);
  /* The next chain; CLONE_EMPTY when there is none; CLONE_ERR_GUEST when the driver broke a rule: the queue then gives
   * nothing more and the device should ask for a reset (clone_virtio_port.needs_reset). */
  clone_status (*pop)(clone_virtqueue *queue, clone_chain *chain, clone_err *err);
  /* Gives a chain back, `written_bytes` of its writable part filled from the start; marks those pages dirty. In any order.
   * The driver sees it at once; it is told by signal(). */
  clone_status (*push)(clone_virtqueue *queue, const clone_chain *chain, uint32_t written_bytes);
  /* Interrupts the driver if it wants to know of what was pushed since the last call (virtio 1.2 §2.7.7, §2.7.10). */
  void (*signal)(clone_virtqueue *queue);
  /* While busy: notifications are not needed. Advice only. */
  void (*disable_kick)(clone_virtqueue *queue);
  /* Before sleeping. Returns 1 when chains came in meanwhile: pop() again instead of sleeping. */
  int32_t (*enable_kick)(clone_virtqueue *queue);

  /* For kernel backends (vhost): addresses, and an eventfd that interrupts the driver when written. Taking call_fd,
   * inside of activate(), tells the transport that interrupts come from elsewhere. Owned by the queue. */
  clone_status (*layout)(clone_virtqueue *queue, clone_virtqueue_layout *layout);
  int32_t (*call_fd)(clone_virtqueue *queue);
  /* [any] 1 when call_fd() was taken. */
  int32_t (*call_fd_taken)(clone_virtqueue *queue);

  /* [control] &quiesced or before the first pop. */
  clone_status (*get_position)(clone_virtqueue *queue, clone_virtqueue_position *position);
  clone_status (*set_position)(clone_virtqueue *queue, const clone_virtqueue_position *position, clone_err *err);
} clone_host_virtqueue;

#ifdef __cplusplus
}
#endif

#endif
