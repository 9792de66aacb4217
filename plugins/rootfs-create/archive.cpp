// SPDX-License-Identifier: Apache-2.0
// Reads tar archives with libarchive. Nothing is written to the host but contents, to the spool.
#include "archive.hpp"

#include <archive.h>
#include <archive_entry.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <memory>
#include <optional>

namespace rootfs {
namespace {

// Bounds that no root file system meets, so that a hostile archive ends.
constexpr uint64_t kMostEntries = 8'000'000;
constexpr uint64_t kMostBytes = uint64_t{1} << 42;
constexpr size_t kMostAttributes = 64;
constexpr size_t kLargestAttribute = 65536;

struct Reader {
  const ByteSource& source;
  std::optional<Error> error;
};

la_ssize_t read_block(archive* handle, void* client, const void** buffer) {
  auto& reader = *static_cast<Reader*>(client);
  auto block = reader.source();
  if (!block.ok()) {
    reader.error = block.error();
    archive_set_error(handle, block.error().code, "%s", block.error().message.c_str());
    return -1;
  }
  *buffer = block->data();
  return static_cast<la_ssize_t>(block->size());
}

std::string text_of(const char* text) { return text ? text : ""; }

InodePointer inode_of(archive_entry* entry) {
  auto inode = std::make_shared<Inode>();
  inode->mode = archive_entry_filetype(entry) | (archive_entry_perm(entry) & 07777u);
  inode->uid = static_cast<uid_t>(archive_entry_uid(entry));
  inode->gid = static_cast<gid_t>(archive_entry_gid(entry));
  inode->mtime_s = archive_entry_mtime(entry);
  inode->mtime_ns = static_cast<uint32_t>(archive_entry_mtime_nsec(entry));
  if (S_ISBLK(inode->mode) || S_ISCHR(inode->mode))
    inode->device = makedev(archive_entry_rdevmajor(entry), archive_entry_rdevminor(entry));
  return inode;
}

Result<void> read_attributes(archive_entry* entry, Inode& inode, const std::string& name) {
  archive_entry_xattr_reset(entry);
  const char* key = nullptr;
  const void* value = nullptr;
  size_t size_bytes = 0;
  while (archive_entry_xattr_next(entry, &key, &value, &size_bytes) == ARCHIVE_OK) {
    if (size_bytes > kLargestAttribute || inode.attributes.size() >= kMostAttributes)
      return Error{"entry '" + name + "': too many or too large extended attributes"};
    inode.attributes[text_of(key)] = std::string(static_cast<const char*>(value), size_bytes);
  }
  return {};
}

class Unpacker {
 public:
  Unpacker(Reader& reader, Tree& tree, Spool& spool, const ArchiveOptions& options)
      : reader_(reader), tree_(tree), spool_(spool), options_(options), archive_(archive_read_new()) {}

  Result<void> run() {
    archive* handle = archive_.get();
    archive_read_support_filter_gzip(handle);
    archive_read_support_filter_zstd(handle);
    archive_read_support_filter_xz(handle);
    archive_read_support_format_tar(handle);
    archive_read_support_format_empty(handle);
    if (archive_read_open(handle, &reader_, nullptr, read_block, nullptr) != ARCHIVE_OK) return failure();
    const uint64_t begin = spool_.size_bytes();
    for (uint64_t count = 0;; ++count) {
      archive_entry* entry = nullptr;
      const int status = archive_read_next_header(handle, &entry);
      if (status == ARCHIVE_EOF) return {};
      if (status != ARCHIVE_OK && status != ARCHIVE_WARN) return failure();
      if (count >= kMostEntries) return Error{"more than " + std::to_string(kMostEntries) + " entries"};
      TRY(interrupted());
      TRY(take(entry));
      if (spool_.size_bytes() - begin > kMostBytes) return Error{"contents of more than " + human_size(kMostBytes)};
      if (options_.on_bytes) options_.on_bytes(spool_.size_bytes() - begin);
    }
  }

 private:
  struct Free {
    void operator()(archive* handle) const { archive_read_free(handle); }
  };

  Error failure() const {
    if (reader_.error) return *reader_.error;
    return Error{"not a sound tar archive: " + text_of(archive_error_string(archive_.get()))};
  }

  Result<void> take(archive_entry* raw) {
    Entry entry{text_of(archive_entry_pathname(raw)), text_of(archive_entry_hardlink(raw)),
                text_of(archive_entry_uname(raw)), text_of(archive_entry_gname(raw)), inode_of(raw)};
    TRY(check_entry_name(entry.name));
    Inode& inode = *entry.inode;
    if (options_.whiteouts == Whiteouts::remove && TRY(take_whiteout(entry.name))) return {};
    if (inode.is_symlink()) inode.target = text_of(archive_entry_symlink(raw));
    TRY(read_attributes(raw, inode, entry.name));
    if (inode.is_regular() && entry.hard_link.empty()) inode.content = TRY(spool(raw));
    if (options_.filter && !TRY(options_.filter(entry))) return {};
    if (!entry.hard_link.empty()) return tree_.link(entry.name, entry.hard_link);
    return tree_.put(entry.name, entry.inode);
  }

  Result<bool> take_whiteout(const std::string& name) {
    constexpr std::string_view prefix = ".wh.";
    const size_t slash = name.rfind('/');
    const std::string folder = slash == name.npos ? "" : name.substr(0, slash + 1);
    const std::string last = slash == name.npos ? name : name.substr(slash + 1);
    if (!last.starts_with(prefix)) return false;
    if (last == ".wh..wh..opq") {
      TRY(tree_.hide_lower_layers(folder));
    } else if (last.size() > prefix.size()) {
      TRY(tree_.remove(folder + last.substr(prefix.size())));
    }
    return true;
  }

  Result<Content> spool(archive_entry* entry) {
    const int64_t size_bytes = archive_entry_size(entry);
    if (size_bytes < 0 || static_cast<uint64_t>(size_bytes) > kMostBytes)
      return Error{"entry '" + text_of(archive_entry_pathname(entry)) + "': a size out of range"};
    spool_.begin();
    int64_t at = 0;
    for (;;) {
      const void* block = nullptr;
      size_t count = 0;
      int64_t offset = 0;
      const int status = archive_read_data_block(archive_.get(), &block, &count, &offset);
      if (status == ARCHIVE_EOF) break;
      if (status != ARCHIVE_OK && status != ARCHIVE_WARN) return failure();
      if (offset < at || offset > size_bytes || count > static_cast<uint64_t>(size_bytes - offset))
        return Error{"entry '" + text_of(archive_entry_pathname(entry)) + "': its parts overlap"};
      spool_.skip(static_cast<uint64_t>(offset - at));
      TRY(spool_.write(block, count));
      at = offset + static_cast<int64_t>(count);
      TRY(interrupted());
    }
    spool_.skip(static_cast<uint64_t>(size_bytes - at));
    return spool_.end();
  }

  Reader& reader_;
  Tree& tree_;
  Spool& spool_;
  const ArchiveOptions& options_;
  std::unique_ptr<archive, Free> archive_;
};

}  // namespace

ByteSource bytes_of(std::span<const char> memory) {
  auto left = std::make_shared<std::span<const char>>(memory);
  return [left]() -> Result<std::span<const char>> { return std::exchange(*left, {}); };
}

ByteSource bytes_of(Process& process) {
  auto buffer = std::make_shared<std::vector<char>>(1 << 18);
  return [buffer, &process]() -> Result<std::span<const char>> {
    return std::span<const char>(buffer->data(), TRY(process.read(*buffer)));
  };
}

ByteSource bytes_of(const Fd& fd) {
  auto buffer = std::make_shared<std::vector<char>>(1 << 18);
  return [buffer, &fd]() -> Result<std::span<const char>> {
    for (;;) {
      const ssize_t count = ::read(fd.get(), buffer->data(), buffer->size());
      if (count >= 0) return std::span<const char>(buffer->data(), static_cast<size_t>(count));
      if (errno != EINTR) return errno_error("reading the archive");
      TRY(interrupted());
    }
  };
}

Result<void> unpack(const ByteSource& source, Tree& tree, Spool& spool, const ArchiveOptions& options) {
  Reader reader{source, std::nullopt};
  return Unpacker(reader, tree, spool, options).run();
}

}  // namespace rootfs
