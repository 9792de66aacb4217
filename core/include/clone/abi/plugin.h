/* SPDX-License-Identifier: Apache-2.0 */
/* A plugin file: one exported function, and a manifest that is read before any code of the file runs. */
#ifndef CLONE_ABI_PLUGIN_H
#define CLONE_ABI_PLUGIN_H

#include "base.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct clone_host clone_host;

#define CLONE_MANIFEST_MAGIC "CLONEPLG"
#define CLONE_MANIFEST_SECTION ".clone_plugin"

/* Stands in the ELF section `.clone_plugin` of the file, without relocations, and is judged there: another major, or a
 * least host minor above the host's, is refused by name before dlopen. Text fields end in NUL. */
typedef struct clone_manifest {
  char magic[8]; /* CLONE_MANIFEST_MAGIC without its NUL */
  uint32_t size;
  uint32_t abi_major;        /* that the plugin was built with */
  uint32_t abi_minor;
  uint32_t least_host_minor; /* of the host, below which the plugin cannot work */
  char id[64];               /* lower case letters, digits, '-'; the file is called id.so */
  char version[32];
  char vendor[64];
  char licence[32];          /* an SPDX expression */
  char description[128];
  char provides[2560];       /* records made by the macros below */
} clone_manifest;

/* Records of `provides`: what the plugin holds, so that the host loads only the files that it needs. A host passes over
 * records of a kind that it does not know.
 * kind: "device", "transport", "balloon-policy", "snapshot-backend".
 * traits: "" or "default" (every machine gets one unless told otherwise). */
#define CLONE_PROVIDES(kind, name, traits) kind "\t" name "\t" traits "\n"
/* A short form on the command line: `--flag VALUE[,key=value…]` means `--device device,expansion[,key=value…]` with the
 * '%' in expansion replaced by VALUE. In an optional-value flag, value_name is in brackets: "[KIND]". */
#define CLONE_PROVIDES_FLAG(flag, device, value_name, expansion, help) \
  "flag\t" flag "\t" device "\t" value_name "\t" expansion "\t" help "\n"
/* A short form for an option of a device that another short form or --device makes: `--flag VALUE` sets option=VALUE on
 * the planned `device` that has `which` ("root=on", "" for any). It is an error when there is none. With value_name in
 * brackets the value may be left out, and means left_out then. */
#define CLONE_PROVIDES_FLAG_OPTION(flag, device, which, value_name, option, left_out, help) \
  "flag-option\t" flag "\t" device "\t" which "\t" value_name "\t" option "\t" left_out "\t" help "\n"

/* Kept by compiler and linker (--gc-sections) though nothing refers to it. */
#if defined(__has_attribute) && __has_attribute(retain)
#define CLONE_PLUGIN_SECTION __attribute__((section(CLONE_MANIFEST_SECTION), used, retain, aligned(8)))
#else
#define CLONE_PLUGIN_SECTION __attribute__((section(CLONE_MANIFEST_SECTION), used, aligned(8)))
#endif

/* What clone_plugin_entry() returns; constant, in the plugin's memory until the process ends. */
typedef struct clone_plugin {
  uint32_t size;
  uint32_t reserved;
  const clone_manifest *manifest;
  /* [control] Once, before any factory is asked for. `host` lasts until deinit returns. Optional. */
  clone_status (*init)(const clone_host *host, clone_err *err);
  /* [control] Once, after everything that the plugin made was destroyed. Optional. */
  void (*deinit)(void);
  /* [control] A factory's table by id ("clone.device/1"), or NULL. */
  const void *(*get_factory)(const char *id);
} clone_plugin;

/* The only symbol that a plugin exports. [control], may be called more than once, returns the same pointer. */
#define CLONE_PLUGIN_ENTRY "clone_plugin_entry"
typedef const clone_plugin *(*clone_plugin_entry_function)(void);

#ifdef __cplusplus
}
#endif

#endif
