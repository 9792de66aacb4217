/* SPDX-License-Identifier: Apache-2.0 */
/* clone.host-console/1: the machine's console. The host owns the terminal: raw mode, the escape key, who watches. */
#ifndef CLONE_ABI_CONSOLE_H
#define CLONE_ABI_CONSOLE_H

#include "host.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLONE_HOST_CONSOLE "clone.host-console/1"

typedef struct clone_host_console {
  uint32_t size;
  uint32_t reserved;
  /* [control] &inactive. The caller's device is the console from now on; CLONE_ERR_BUSY names the one that already is.
   * `input` is called on the main loop, [control], with what was typed; it returns how many bytes it took. When that is
   * fewer than given, nothing more comes until input_wanted(). */
  clone_status (*attach)(const clone_host *host, uint64_t (*input)(void *context, const void *data, uint64_t size_bytes),
                         void *context, clone_err *err);
  /* [any] The device has room for input again. */
  void (*input_wanted)(const clone_host *host);
  /* [any] Output of the guest. Never waits for a slow watcher longer than it takes to buffer. */
  void (*write)(const clone_host *host, const void *data, uint64_t size_bytes);
} clone_host_console;

#ifdef __cplusplus
}
#endif

#endif
