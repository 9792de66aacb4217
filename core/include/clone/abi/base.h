/* SPDX-License-Identifier: Apache-2.0 */
/* What every table of the plugin interface is made of: versions, status values, errors.
 *
 * Rules of the interface
 *  - Plain C11 crosses a plugin's border: fixed-width integers, pointers, tables of functions. No bool, enum, bit field,
 *    C++ type or exception.
 *  - Every struct begins with `uint32_t size`, its sizeof in the writer's header. Structs only grow at the end. A reader
 *    copies the smaller of both sizes into zeroed storage; a member beyond the size, or a NULL function marked
 *    optional, means "not offered".
 *  - Whatever is optional is an extension, found by name ("clone.virtio-device/1"). An extension's table never changes
 *    its meaning; a new meaning is a new revision, "…/2". Drafts live in abi/draft/ and load with --allow-draft-abi.
 *
 * Threads and states, written before each function
 *  [control]  the VMM's main thread. May block for a moment; calls of this kind never overlap for one VM.
 *  [vcpu]     a vCPU's thread, concurrent with every other thread. Must not block and must not wait for [control].
 *  [worker]   a thread that the plugin runs, or an event loop that it created.
 *  [any]      each of them, concurrently.
 *  &inactive  created, not started;  &active  started and running;  &quiesced  between quiesce() and resume().
 *
 * Ownership
 *  Pointers passed to a call last until it returns, unless said otherwise. Who creates destroys. A receiver that keeps
 *  a file descriptor duplicates it. Strings are UTF-8 and end in NUL. Sizes are bytes.
 *
 * Errors
 *  Functions that can fail return a clone_status and fill the caller's clone_err, which reaches the user behind the
 *  name of the plugin: "plugin serial: file=/x: No such file or directory". Nothing is thrown across the border.
 */
#ifndef CLONE_ABI_BASE_H
#define CLONE_ABI_BASE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The version of the interface in these headers. Same major: compatible. The minor grows with every addition. */
#define CLONE_ABI_MAJOR 1u
#define CLONE_ABI_MINOR 0u

typedef int32_t clone_status;
#define CLONE_OK 0
#define CLONE_EMPTY 1               /* nothing there now: not a failure */
#define CLONE_ERR_INVALID (-1)      /* an argument or option is wrong */
#define CLONE_ERR_SYSTEM (-2)       /* the operating system refused; clone_err.code is the errno value */
#define CLONE_ERR_MEMORY (-3)       /* no memory left on the host */
#define CLONE_ERR_UNSUPPORTED (-4)  /* this implementation does not offer it */
#define CLONE_ERR_STATE (-5)        /* not in this state of the object */
#define CLONE_ERR_GUEST (-6)        /* the guest broke a rule of the specification */
#define CLONE_ERR_BUSY (-7)         /* taken by somebody else */
#define CLONE_ERR_NOT_FOUND (-8)
#define CLONE_ERR_INTERNAL (-9)     /* a bug in the callee, caught */
#define CLONE_ERR_CORRUPT (-10)     /* saved state or an image does not make sense */

/* Owned by the caller, who sets `size` and zeroes the rest. May be NULL wherever a function takes one. */
typedef struct clone_err {
  uint32_t size;
  int32_t code;      /* an errno value, 0 where none applies */
  char message[504]; /* one line, no full stop; names the thing, what was given, what is allowed */
} clone_err;

#ifdef __cplusplus
}
#endif

#endif
