/* SPDX-License-Identifier: Apache-2.0 */
/* What a plugin says of each thing that it makes: its name, its options, what it needs of the guest. */
#ifndef CLONE_ABI_DESCRIPTOR_H
#define CLONE_ABI_DESCRIPTOR_H

#include "base.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLONE_OPTION_TEXT 1u
#define CLONE_OPTION_PATH 2u   /* of a file on the host; the profile's folder resolves a relative one */
#define CLONE_OPTION_BOOL 3u   /* on|off; yes|no, true|false, 1|0 are read too; number is 1 or 0 */
#define CLONE_OPTION_NUMBER 4u /* unsigned; decimal or 0x… */
#define CLONE_OPTION_SIZE 5u   /* bytes; a suffix K, M, G, T counts in 1024s */
#define CLONE_OPTION_CHOICE 6u /* one of `choices`; number is its index */

#define CLONE_OPTION_REQUIRED 1u
#define CLONE_OPTION_SECRET 2u /* never printed */

typedef struct clone_option {
  uint32_t size;
  uint32_t type;
  uint32_t flags;
  uint32_t reserved;
  const char *name;
  const char *default_value; /* as a user would write it; NULL: unset */
  const char *help;          /* one sentence */
  uint64_t minimum;          /* NUMBER, SIZE: range, both ends allowed; maximum 0: none. */
  uint64_t maximum;          /* TEXT, PATH: greatest length in bytes; 0: 4096. */
  const char *choices;       /* CHOICE: "writeback|none|unsafe"; PATH: words that are no paths, NULL for none */
} clone_option;

/* A value after the host's check against the table. */
typedef struct clone_option_value {
  uint32_t size;
  uint32_t type;
  const char *name;
  const char *text; /* NULL: unset */
  uint64_t number;  /* BOOL, NUMBER, SIZE, CHOICE */
} clone_option_value;

/* One value for each option of the table, in its order. Lasts until the call that was given it returns. */
typedef struct clone_options {
  uint32_t size;
  uint32_t count;
  const clone_option_value *const *values;
} clone_options;

#define CLONE_CAN_SAVE 1u
#define CLONE_CAN_MIGRATE 2u
#define CLONE_NEEDS_PCI 4u
#define CLONE_NEEDS_VHOST 8u

typedef struct clone_descriptor {
  uint32_t size;
  uint32_t capabilities;
  const char *name; /* on the command line; lower case letters, digits, '-' */
  const char *help; /* one sentence */
  const clone_option *const *options; /* ends in NULL */
  /* Kernel modules that a guest needs for it, separated by blanks, in any order; "" for none. The generated initrd
   * carries those of them that are not built in. */
  const char *guest_modules;
} clone_descriptor;

#ifdef __cplusplus
}
#endif

#endif
