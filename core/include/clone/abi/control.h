/* SPDX-License-Identifier: Apache-2.0 */
/* clone.host-control/1 and clone.host-instances/1: commands and metrics on a VM's control socket, and the VMs around. A host
 * without a control socket returns NULL for these ids. */
#ifndef CLONE_ABI_CONTROL_H
#define CLONE_ABI_CONTROL_H

#include "host.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLONE_HOST_CONTROL "clone.host-control/1"

/* [any] The answer to one command; called once, then the reply is gone. `json` is a JSON value, or for fail() a message. */
typedef struct clone_reply {
  uint32_t size;
  uint32_t reserved;
  void *context;
  void (*succeed)(void *context, const char *json);
  void (*fail)(void *context, const char *message);
} clone_reply;

#define CLONE_METRIC_COUNTER 1u
#define CLONE_METRIC_GAUGE 2u

typedef struct clone_host_control {
  uint32_t size;
  uint32_t reserved;
  /* [control] &inactive. The method "instance.name". `call` runs on [control] with the parameters as JSON; it may answer
   * later and must answer once. */
  clone_status (*add_command)(const clone_host *host, const char *name, const char *help,
                              void (*call)(void *context, const char *json, const clone_reply *reply), void *context,
                              clone_err *err);
  /* [control] &inactive. `read` is called [any]. */
  clone_status (*add_metric)(const clone_host *host, const char *name, const char *help, uint32_t kind,
                             double (*read)(void *context), void *context, clone_err *err);
  /* [any] A notification to whoever listens on the control socket. */
  void (*notify)(const clone_host *host, const char *name, const char *json);
} clone_host_control;

#define CLONE_HOST_INSTANCES "clone.host-instances/1"

typedef struct clone_instance {
  uint32_t size;
  uint32_t pid;
  const char *id;
  uint64_t memory_bytes;
  uint64_t resident_bytes;
  uint64_t private_bytes;
} clone_instance;

typedef struct clone_host_instances {
  uint32_t size;
  uint32_t reserved;
  /* [control] Calls `visit` for each VM of this user on the host, this one first. */
  clone_status (*list)(const clone_host *host, void (*visit)(void *context, const clone_instance *instance),
                       void *context, clone_err *err);
} clone_host_instances;

#ifdef __cplusplus
}
#endif

#endif
