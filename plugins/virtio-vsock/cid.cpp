// SPDX-License-Identifier: Apache-2.0
// Locks on files that stay: to remove one that another process is about to lock would let two hold the same CID.
#include "cid.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>

namespace virtio_vsock {

using clone_sdk::errno_error;
using clone_sdk::Error;
using clone_sdk::Fd;
using clone_sdk::Result;

namespace {

constexpr uint32_t kTries = 65536;
constexpr const char* kFolder = ".cid";

// Empty when another VM holds it.
Result<Fd> lock(int folder, const std::string& parent, uint32_t cid) {
  const std::string name = std::to_string(cid), path = parent + "/" + kFolder + "/" + name;
  Fd fd(::openat(folder, name.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd) return errno_error(path);
  if (::flock(fd.get(), LOCK_EX | LOCK_NB) == 0) return fd;
  if (errno == EWOULDBLOCK) return Fd();
  return errno_error(path);
}

// None where others could put something in its place: in a folder that is not this user's alone.
Result<Fd> open_folder(const std::string& parent) {
  const Fd fd(::open(parent.c_str(), O_DIRECTORY | O_RDONLY | O_CLOEXEC));
  struct stat status {};
  if (!fd || ::fstat(fd.get(), &status) != 0) return errno_error(parent);
  if (status.st_uid != ::geteuid() || status.st_mode & (S_IWGRP | S_IWOTH)) return Fd();
  if (::mkdirat(fd.get(), kFolder, 0700) != 0 && errno != EEXIST) return errno_error(parent + "/" + kFolder);
  Fd folder(::openat(fd.get(), kFolder, O_DIRECTORY | O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
  if (!folder) return errno_error(parent + "/" + kFolder);
  return folder;
}

uint32_t random_cid() {
  uint32_t number = 0;
  if (::getrandom(&number, sizeof number, 0) != sizeof number) return kFirstGuestCid;
  return kFirstGuestCid + number % (kLastGuestCid - kFirstGuestCid + 1);
}

}  // namespace

Result<Cid> take_cid(const std::string& parent, std::optional<uint32_t> wanted,
                     const std::function<Result<bool>(uint32_t)>& claim) {
  Fd locks;
  if (!parent.empty()) locks = CLONE_TRY(open_folder(parent));
  for (uint32_t i = 0; i < (wanted ? 1 : kTries); ++i) {
    Cid cid;
    cid.number = wanted ? *wanted : locks ? kFirstGuestCid + i : random_cid();
    if (locks) {
      cid.lock = CLONE_TRY(lock(locks.get(), parent, cid.number));
      if (!cid.lock) continue;
    }
    if (CLONE_TRY(claim(cid.number))) return cid;
  }
  if (wanted) return Error{"cid=" + std::to_string(*wanted) + ": in use by another machine", 0, CLONE_ERR_BUSY};
  return Error{"the CIDs from 3 to " + std::to_string(kFirstGuestCid + kTries - 1) + " are in use; cid= takes another",
               0, CLONE_ERR_BUSY};
}

}  // namespace virtio_vsock
