// SPDX-License-Identifier: Apache-2.0
// What the kernel's error numbers mean, in one line for a person.
#pragma once

#include <asm/errno.h>

#include "text.hpp"

using Message = Text<1024>;

// The failures that a mount, a module, an exec or a copy meets. `result` is -errno.
static inline const char* reason(long result) {
  switch (-result) {
    case EPERM:
      return "Operation not permitted (EPERM)";
    case ENOENT:
      return "No such file or directory (ENOENT)";
    case EIO:
      return "Input/output error (EIO)";
    case ENXIO:
      return "No such device or address (ENXIO)";
    case E2BIG:
      return "Argument list too long (E2BIG)";
    case ENOEXEC:
      return "Exec format error (ENOEXEC)";
    case ENOMEM:
      return "Out of memory (ENOMEM)";
    case EACCES:
      return "Permission denied (EACCES)";
    case ENOTBLK:
      return "Not a block device (ENOTBLK)";
    case EEXIST:
      return "File exists (EEXIST)";
    case ENAMETOOLONG:
      return "File name too long (ENAMETOOLONG)";
    case ENOTEMPTY:
      return "Directory not empty (ENOTEMPTY)";
    case EMFILE:
      return "Too many open files (EMFILE)";
    case ETXTBSY:
      return "Text file busy (ETXTBSY)";
    case EBUSY:
      return "Device or resource busy (EBUSY)";
    case ENODEV:
      return "No such device (ENODEV)";
    case ENOTDIR:
      return "Not a directory (ENOTDIR)";
    case EISDIR:
      return "Is a directory (EISDIR)";
    case EINVAL:
      return "Invalid argument (EINVAL)";
    case EFBIG:
      return "File too large (EFBIG)";
    case ENOSPC:
      return "No space left on device (ENOSPC)";
    case EROFS:
      return "Read-only file system (EROFS)";
    case ELOOP:
      return "Too many symbolic links (ELOOP)";
    case ENODATA:
      return "No data available (ENODATA)";
    case EBADMSG:
      return "Bad message (EBADMSG)";
    case EOPNOTSUPP:
      return "Operation not supported (EOPNOTSUPP)";
    case EUCLEAN:
      return "Structure needs cleaning (EUCLEAN)";
    case ENOKEY:
      return "Required key not available (ENOKEY)";
    case EKEYREJECTED:
      return "Key was rejected by service (EKEYREJECTED)";
    default:
      return nullptr;
  }
}

static inline Message& operator<<(Message& message, long result) {
  if (const char* text = reason(result)) return message << text;
  return message << "error " << static_cast<unsigned long>(-result);
}
