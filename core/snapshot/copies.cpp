// SPDX-License-Identifier: Apache-2.0
// Copies what an opened snapshot holds into a new one, or a file.
#include "snapshot/copies.hpp"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <utility>

#include "snapshot/export_file.hpp"
#include "util/fd.hpp"

namespace vmm {
namespace {

static_assert(kSnapshotPieceBytes <= kMostExportedPieceBytes);

// Calls visit(offset, bytes) for what lies in the extents. Holes of their files are zeroes and passed over.
template <typename Visit>
Result<void> visit_extents(std::span<const MemoryExtent> extents, Visit&& visit) {
  std::vector<std::byte> buffer(kSnapshotPieceBytes);
  for (const MemoryExtent& extent : extents) {
    const uint64_t end = extent.fd_offset + extent.size_bytes;
    for (uint64_t at = extent.fd_offset; at < end;) {
      // Data may begin in the middle of a page. A file system without holes, or none that is known, is all data.
      const off_t data = ::lseek(extent.fd, static_cast<off_t>(at), SEEK_DATA);
      if (data < 0 && errno == ENXIO) break;
      if (data >= 0) at = std::max(at, static_cast<uint64_t>(data) / kPageSize * kPageSize);
      if (at >= end) break;
      const off_t hole = ::lseek(extent.fd, static_cast<off_t>(at), SEEK_HOLE);
      const uint64_t data_end = hole < 0 ? end : (static_cast<uint64_t>(hole) + kPageSize - 1) / kPageSize * kPageSize;
      const uint64_t stop = std::min({end, at + buffer.size(), std::max(data_end, at + kPageSize)});
      const std::span<std::byte> piece = std::span(buffer).first(stop - at);
      TRY(read_snapshot_memory(extent.fd, at, piece));
      TRY(visit(extent.memory_offset + (at - extent.fd_offset), std::span<const std::byte>(piece)));
      at = stop;
    }
  }
  return {};
}

// An opened snapshot without damage.
struct Original {
  SnapshotImage image;
  uint64_t memory_bytes;
};
Result<Original> open_whole(const SnapshotBackend& backend, const std::string& name) {
  Original original{TRY(backend.open(name)), 0};
  TRY(original.image.verify());
  for (const SnapshotBackend::Entry& entry : TRY(backend.list()))
    if (entry.name == name) original.memory_bytes = entry.memory_bytes;
  return original;
}

// A new file that has no name until it is whole: nothing is left of it when the process is killed. Where the file system
// cannot do that it has a temporary name beside its own.
class NewFile {
 public:
  static Result<NewFile> create(const std::string& path) {
    NewFile file(path);
    if (std::error_code ignored; std::filesystem::exists(path, ignored)) return Error{path + ": is there already"};
    file.fd_ = Fd(::open(file.folder_.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
    if (!file.fd_ && (errno == EOPNOTSUPP || errno == EISDIR || errno == EINVAL)) {
      file.temporary_ =
          file.folder_ + "/." + std::filesystem::path(path).filename().string() + ".XXXXXX";
      file.fd_ = Fd(::mkostemp(file.temporary_.data(), O_CLOEXEC));  // mode 0600
    }
    if (!file.fd_) return errno_error(path);
    return file;
  }
  NewFile(NewFile&&) = default;
  ~NewFile() {
    if (fd_ && !temporary_.empty()) ::unlink(temporary_.c_str());
  }
  Result<void> write(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      const ssize_t count = ::write(fd_.get(), bytes.data(), bytes.size());
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) return errno_error(path_);
      bytes = bytes.subspan(static_cast<size_t>(count));
    }
    return {};
  }
  Result<void> publish() {
    const std::string nameless = "/proc/self/fd/" + std::to_string(fd_.get());
    if (::fsync(fd_.get()) != 0 ||
        (temporary_.empty()
             ? ::linkat(AT_FDCWD, nameless.c_str(), AT_FDCWD, path_.c_str(), AT_SYMLINK_FOLLOW)
             : ::renameat2(AT_FDCWD, temporary_.c_str(), AT_FDCWD, path_.c_str(), RENAME_NOREPLACE)) != 0)
      return errno_error(path_);
    fd_.reset();
    const Fd folder(::open(folder_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (!folder || ::fsync(folder.get()) != 0) return errno_error(folder_);
    return {};
  }

 private:
  explicit NewFile(const std::string& path)
      : path_(path), folder_(std::filesystem::path(path).parent_path().string()) {
    if (folder_.empty()) folder_ = ".";
  }

  std::string path_, folder_, temporary_;
  Fd fd_;
};

}  // namespace

Result<void> flatten_snapshot(const SnapshotBackend& backend, const std::string& name, const std::string& copy) {
  Original original = TRY(open_whole(backend, name));
  SnapshotImage image = TRY(backend.begin(copy, "", original.memory_bytes));
  const Sections sections = TRY(original.image.sections());
  const auto extents = TRY(original.image.extents());
  TRY(image.write(sections));
  TRY(visit_extents(
      extents, [&](uint64_t offset, std::span<const std::byte> bytes) { return image.write_memory(offset, bytes); }));
  return image.commit();
}

Result<uint64_t> export_snapshot(const SnapshotBackend& backend, const std::string& name, const std::string& path) {
  NewFile file = TRY(NewFile::create(path));
  Original original = TRY(open_whole(backend, name));
  uint64_t size_bytes = 0;
  ExportWriter to([&](std::span<const std::byte> bytes) {
    size_bytes += bytes.size();
    return file.write(bytes);
  });
  TRY(to.write_header({original.memory_bytes, name}));
  const Sections sections = TRY(original.image.sections());
  const auto extents = TRY(original.image.extents());
  for (const auto& [key, section] : sections.all())
    TRY(to.write_section(key.first, key.second, section.version, section.bytes));
  TRY(visit_extents(
      extents, [&](uint64_t offset, std::span<const std::byte> bytes) { return to.write_memory(offset, bytes); }));
  TRY(to.write_end());
  TRY(file.publish());
  return size_bytes;
}

Result<std::string> import_snapshot(const SnapshotBackend& backend, const std::string& path, std::string name) {
  Fd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file) return errno_error(path);
  ExportReader from(std::move(file));
  const ExportHeader header = TRY(from.read_header().context(path));
  if (name.empty()) name = header.name;
  SnapshotImage image = TRY(backend.begin(name, "", header.memory_bytes));
  const ExportReader::Visitor into{
      [&](const std::string& owner, const std::string& tag, uint32_t version, std::span<const std::byte> bytes) {
        return image.write_section(owner, tag, version, bytes);
      },
      [&](uint64_t offset, std::span<const std::byte> bytes) { return image.write_memory(offset, bytes); }};
  TRY(from.read_contents(header, into).context(path));
  TRY(image.commit());
  return name;
}

}  // namespace vmm
