/* SPDX-License-Identifier: Apache-2.0 */
/* clone.host-loop/1: event loops and threads. The main loop is [control]; a loop that a plugin creates is [worker]. */
#ifndef CLONE_ABI_LOOP_H
#define CLONE_ABI_LOOP_H

#include "host.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLONE_HOST_LOOP "clone.host-loop/1"

typedef struct clone_loop clone_loop;
typedef struct clone_thread clone_thread;

#define CLONE_READABLE 1u
#define CLONE_WRITABLE 2u
#define CLONE_HANGUP 4u /* reported always */

typedef struct clone_host_loop {
  uint32_t size;
  uint32_t reserved;
  /* [control] */
  clone_loop *(*main_loop)(const clone_host *host);
  /* [control] A loop with a thread of its own, which bears `name` (15 characters are kept). */
  clone_status (*create)(const clone_host *host, const char *name, clone_loop **loop, clone_err *err);
  /* [control] Ends the thread after the callback that may be running, and frees the loop. */
  void (*destroy)(clone_loop *loop);
  /* [any] Level-triggered. The callback runs on the loop's thread. The descriptor stays the caller's and is open until
   * remove_fd(). */
  clone_status (*add_fd)(clone_loop *loop, int32_t fd, uint32_t events,
                         void (*ready)(void *context, uint32_t events), void *context, clone_err *err);
  clone_status (*change_fd)(clone_loop *loop, int32_t fd, uint32_t events);
  /* [any] On return the callback does not run and will not run again (except when called from it: after it). */
  void (*remove_fd)(clone_loop *loop, int32_t fd);
  /* [any] Runs `call` on the loop's thread, in order. */
  clone_status (*post)(clone_loop *loop, void (*call)(void *context), void *context);
  /* [any] A thread of the plugin's own, started by the host so that it gets the name, the signal mask and the system
   * call filter of this VM. */
  clone_status (*spawn)(const clone_host *host, const char *name, void (*run)(void *context), void *context,
                        clone_thread **thread, clone_err *err);
  /* [any] Waits for it to return, and frees it. Every thread that was spawned is joined once. */
  void (*join)(clone_thread *thread);
} clone_host_loop;

#ifdef __cplusplus
}
#endif

#endif
