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
  /* As succeed(), with a descriptor that travels to the client beside the answer (SCM_RIGHTS). The host takes a duplicate;
   * `fd` stays the caller's. */
  void (*succeed_with_fd)(void *context, const char *json, int32_t fd);
} clone_reply;

#define CLONE_METRIC_COUNTER 1u
#define CLONE_METRIC_GAUGE 2u

typedef struct clone_host_control {
  uint32_t size;
  uint32_t reserved;
  /* [control] &inactive. The method "instance.name" ("serial.0.reset"), of a type's first instance also "type.name". `call`
   * runs on [control] with the parameters as JSON (an object; "{}" when none were given); it may answer later and must
   * answer once, also when its device is destroyed before it could. `reply` is copied when it is kept: it lasts for the
   * call only, what it points to lasts until the answer. */
  clone_status (*add_command)(const clone_host *host, const char *name, const char *help,
                              void (*call)(void *context, const char *json, const clone_reply *reply), void *context,
                              clone_err *err);
  /* [control] &inactive. `name` is that of the Prometheus metric without the prefix "clone_"; the label "instance" is the
   * host's. `read` is called [control]. */
  clone_status (*add_metric)(const clone_host *host, const char *name, const char *help, uint32_t kind,
                             double (*read)(void *context), void *context, clone_err *err);
  /* [any] A notification to whoever listens on the control socket. */
  void (*notify)(const clone_host *host, const char *name, const char *json);
  /* [any] The VM's own directory (mode 0700; it goes with the VM), for sockets of devices. Its path may be longer than a
   * socket's address holds: bind to "/proc/self/fd/FD/NAME". Both stay the host's. */
  const char *(*directory)(const clone_host *host);
  int32_t (*directory_fd)(const clone_host *host);
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
