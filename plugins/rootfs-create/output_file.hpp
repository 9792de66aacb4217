// SPDX-License-Identifier: Apache-2.0
// The image under a temporary name until it is whole, and the folder for what is needed on the way; both are gone on
// every way out but a kill.
#pragma once

#include <string>

#include "tree.hpp"

namespace rootfs {

enum class Existing { refuse, replace };

class OutputFile {
 public:
  // A new empty file beside `path`, under a name that nobody can foresee, readable by us only.
  static Result<OutputFile> make(const std::string& path, Existing existing);
  // The same for what is never committed: `path` itself is not looked at.
  static Result<OutputFile> make_temporary(const std::string& path);
  OutputFile(OutputFile&& other) noexcept;
  OutputFile& operator=(OutputFile&&) = delete;
  ~OutputFile();

  const std::string& temporary_path() const { return temporary_; }
  const Fd& fd() const { return fd_; }
  // Permissions as the umask says, all on disk, then the real name.
  Result<void> commit();

 private:
  OutputFile() = default;

  std::string path_;
  std::string temporary_;
  Existing existing_ = Existing::refuse;
  Fd fd_;
};

class WorkFolder {
 public:
  // Below $TMPDIR, or /var/tmp: what goes there can be large.
  static Result<WorkFolder> make();
  WorkFolder(WorkFolder&& other) noexcept : path_(std::exchange(other.path_, {})) {}
  WorkFolder& operator=(WorkFolder&&) = delete;
  ~WorkFolder();
  const std::string& path() const { return path_; }

 private:
  WorkFolder() = default;
  std::string path_;
};

}  // namespace rootfs
