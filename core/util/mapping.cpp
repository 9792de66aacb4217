// SPDX-License-Identifier: Apache-2.0
// Read-only mapped files.
#include "util/mapping.hpp"

#include <fcntl.h>
#include <sys/stat.h>

#include "util/fd.hpp"

namespace vmm {

Result<Mapping> map_file(const std::string& path, ReadAhead read_ahead) {
  // O_NONBLOCK: a FIFO given by mistake is refused below, not waited for.
  Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd) return errno_error(path);
  struct stat status {};
  if (::fstat(fd.get(), &status) != 0) return errno_error(path);
  if (S_ISDIR(status.st_mode)) return errno_error(path, EISDIR);
  if (!S_ISREG(status.st_mode)) return Error{path + ": not a regular file", EINVAL};
  if (status.st_size == 0) return Error{path + ": the file is empty", EINVAL};
  const auto size_bytes = static_cast<size_t>(status.st_size);
  void* start = ::mmap(nullptr, size_bytes, PROT_READ, MAP_PRIVATE, fd.get(), 0);
  if (start == MAP_FAILED) return errno_error(path);
  ::madvise(start, size_bytes, read_ahead == ReadAhead::whole_file ? MADV_WILLNEED : MADV_RANDOM);
  return Mapping(start, size_bytes);
}

}  // namespace vmm
