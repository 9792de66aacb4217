// SPDX-License-Identifier: Apache-2.0
// Writes a snapshot's memory anew in a temporary folder, and moves it beside the state.
#include "compression.hpp"

#include <stdio.h>
#include <unistd.h>

#include "stored_snapshot.hpp"
#include "zstd_file.hpp"

namespace snapshot_file {
namespace {

class TemporaryFile {
 public:
  static Result<TemporaryFile> create(const Store& store, const std::string& snapshot, const char* name) {
    const auto lock = CLONE_TRY(store.lock());
    store.clear_left_folders();
    TemporaryFile file(store, CLONE_TRY(store.make_temporary(snapshot)), name);
    file.fd_ = CLONE_TRY(create_file(file.folder_.fd.get(), name).context(file.path()));
    return file;
  }
  TemporaryFile(TemporaryFile&&) = default;
  ~TemporaryFile() {
    if (folder_.fd) store_->clear(folder_.fd.get(), folder_.name);
  }
  int fd() const { return fd_.get(); }
  std::string path() const { return store_->path_of(folder_.name) + "/" + name_; }
  Result<void> move_to(int folder_fd) const {
    CLONE_TRY(sync(fd_.get()).context(path()));
    if (::renameat(folder_.fd.get(), name_, folder_fd, name_) != 0) return system_error().context(path());
    return sync(folder_fd).context(path());
  }

 private:
  TemporaryFile(const Store& store, TemporaryFolder folder, const char* name)
      : store_(&store), folder_(std::move(folder)), name_(name) {}

  const Store* store_;
  TemporaryFolder folder_;
  const char* name_;
  Fd fd_;
};

Result<void> expect_whole(int memory_fd, const Member& member, const std::string& path) {
  if (CLONE_TRY(digest_of(memory_fd, member.state.extents).context(path)) == member.state.memory_digest) return {};
  return Error{path + ": is damaged: its checksum is another", 0, CLONE_ERR_CORRUPT};
}

}  // namespace

Result<void> set_compressed(const Store& store, const std::string& name, bool on) {
  const Fd folder = CLONE_TRY(store.lock_folder(name));
  const Member member = CLONE_TRY(open_member(store, name));
  const char* const before = on ? kMemoryName : kCompressedName;
  const std::string path = member.path + "/" + before;
  if (static_cast<bool>(member.compressed) != on) {
    const TemporaryFile file = CLONE_TRY(TemporaryFile::create(store, name, on ? kCompressedName : kMemoryName));
    if (on) {
      CLONE_TRY(expect_whole(member.memory.get(), member, path));
      CLONE_TRY(compress(member.memory.get(), member.state.extents, file.fd()).context(file.path()));
    } else {
      if (::ftruncate(file.fd(), static_cast<off_t>(member.state.memory_bytes)) != 0)
        return system_error().context(file.path());
      CLONE_TRY(decompress(member.compressed.get(), member.state.extents, file.fd()).context(path));
      CLONE_TRY(expect_whole(file.fd(), member, path));
    }
    CLONE_TRY(file.move_to(folder.get()));
  }
  // The one before, or what a process that was killed here has left of it.
  if (::unlinkat(folder.get(), before, 0) != 0 && errno != ENOENT) return system_error().context(path);
  return {};
}

}  // namespace snapshot_file
