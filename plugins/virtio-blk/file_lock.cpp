// SPDX-License-Identifier: Apache-2.0
// Image locks. QEMU's scheme for raw files is used, so that either program keeps off what the other has open: a read
// lock on byte 100 + n says "I do n", one on byte 200 + n "nobody else may do n".
#include "file_lock.hpp"

#include <fcntl.h>

#include <cerrno>

namespace virtio_blk {

namespace {

constexpr int kConsistentRead = 0;
constexpr int kWrite = 1;
constexpr int kResize = 3;
constexpr off_t kDone = 100;
constexpr off_t kForbidden = 200;

struct flock byte_lock(short type, off_t byte) {
  struct flock lock {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = byte;
  lock.l_len = 1;
  return lock;
}

bool hold(int fd, off_t byte) {
  struct flock lock = byte_lock(F_RDLCK, byte);
  return ::fcntl(fd, F_OFD_SETLK, &lock) == 0;
}

bool held_by_another(int fd, off_t byte) {
  struct flock lock = byte_lock(F_WRLCK, byte);
  return ::fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

}  // namespace

clone_sdk::Result<void> lock_image(int fd, bool read_only, const clone_sdk::Host& host) {
  // Locks first, then looks: of two that begin at once, at least one sees the other.
  const bool held = hold(fd, kDone + kConsistentRead) && hold(fd, kForbidden + kWrite) &&
                    hold(fd, kForbidden + kResize) && (read_only || hold(fd, kDone + kWrite));
  if (!held) {
    if (errno == EAGAIN || errno == EACCES)
      return clone_sdk::Error{"in use by another process, which locked all of it", EBUSY, CLONE_ERR_BUSY};
    host.log(CLONE_LOG_WARNING, "no lock on the image: its file system refuses locks");
    return {};
  }
  if (held_by_another(fd, kDone + kWrite) || held_by_another(fd, kDone + kResize))
    return clone_sdk::Error{"in use by another process (opened for writing)", EBUSY, CLONE_ERR_BUSY};
  if (held_by_another(fd, kForbidden + kConsistentRead) || (!read_only && held_by_another(fd, kForbidden + kWrite)))
    return clone_sdk::Error{read_only ? "in use by another process, which allows no reader"
                                      : "in use by another process (opened for reading); readonly=on shares it",
                            EBUSY, CLONE_ERR_BUSY};
  return {};
}

bool is_locked(int fd) {
  struct flock lock = byte_lock(F_WRLCK, 0);
  lock.l_len = 0;  // to the end
  return ::fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

}  // namespace virtio_blk
