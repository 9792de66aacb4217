// SPDX-License-Identifier: Apache-2.0
// Temporary names and their end.
#include "output_file.hpp"

#include <fcntl.h>
#include <fts.h>
#include <stdlib.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>

namespace rootfs {
namespace fs = std::filesystem;

Result<OutputFile> OutputFile::make(const std::string& path, Existing existing) {
  struct stat status {};
  if (::stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode))
    return Error{path + ": is a directory; give the name of a file", EISDIR};
  if (::lstat(path.c_str(), &status) == 0) {
    if (!S_ISREG(status.st_mode)) return Error{path + ": not a regular file: it is not replaced", EEXIST};
    if (existing == Existing::refuse) return Error{path + ": it exists already (--force replaces it)", EEXIST};
  }
  if (fs::path(path).filename().empty()) return Error{"'" + path + "' is not the name of a file"};
  OutputFile file = TRY(make_temporary(path));
  file.existing_ = existing;
  return file;
}

Result<OutputFile> OutputFile::make_temporary(const std::string& path) {
  const fs::path target(path);
  OutputFile file;
  file.path_ = path;
  file.temporary_ = (target.parent_path() / ("." + target.filename().string().substr(0, 200) + ".XXXXXX")).string();
  file.fd_ = Fd(::mkostemp(file.temporary_.data(), O_CLOEXEC));
  if (!file.fd_) {
    file.temporary_.clear();
    return errno_error(path);
  }
  return file;
}

OutputFile::OutputFile(OutputFile&& other) noexcept
    : path_(std::move(other.path_)),
      temporary_(std::exchange(other.temporary_, {})),
      existing_(other.existing_),
      fd_(std::move(other.fd_)) {}

OutputFile::~OutputFile() {
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

Result<void> OutputFile::commit() {
  const mode_t mask = ::umask(0);
  ::umask(mask);
  if (::fchmod(fd_.get(), 0666 & ~mask) != 0 || ::fsync(fd_.get()) != 0) return errno_error(path_);
  // A file that came in the meantime is not lost.
  const unsigned flags = existing_ == Existing::refuse ? RENAME_NOREPLACE : 0;
  int result = ::renameat2(AT_FDCWD, temporary_.c_str(), AT_FDCWD, path_.c_str(), flags);
  if (result != 0 && errno == EINVAL && flags != 0) {  // some file systems have no such flag
    result = ::link(temporary_.c_str(), path_.c_str());
    if (result == 0) ::unlink(temporary_.c_str());
  }
  if (result != 0) return errno_error(path_);
  temporary_.clear();
  const std::string parent = fs::path(path_).parent_path().string();
  const Fd folder(::open(parent.empty() ? "." : parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!folder || (::fsync(folder.get()) != 0 && errno != EINVAL)) return errno_error(path_);
  return {};
}

Result<WorkFolder> WorkFolder::make() {
  const char* temporary = ::getenv("TMPDIR");
  WorkFolder folder;
  folder.path_ = std::string(temporary && *temporary ? temporary : "/var/tmp") + "/clone-rootfs.XXXXXX";
  const std::string pattern = folder.path_;
  if (!::mkdtemp(folder.path_.data())) {
    folder.path_.clear();
    return errno_error(pattern);
  }
  return folder;
}

WorkFolder::~WorkFolder() {
  if (path_.empty()) return;
  // FTS_XDEV: nothing that a program left mounted in it is entered.
  char* paths[] = {path_.data(), nullptr};
  FTS* walk = ::fts_open(paths, FTS_PHYSICAL | FTS_XDEV | FTS_NOCHDIR, nullptr);
  if (!walk) return;
  while (FTSENT* entry = ::fts_read(walk)) {
    if (entry->fts_info == FTS_D) continue;
    if (entry->fts_info == FTS_DNR) ::chmod(entry->fts_accpath, 0700);
    ::remove(entry->fts_accpath);
  }
  ::fts_close(walk);
}

}  // namespace rootfs
