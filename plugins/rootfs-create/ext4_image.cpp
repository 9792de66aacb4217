// SPDX-License-Identifier: Apache-2.0
// An empty file system by mke2fs, filled through libext2fs.
#include "ext4_image.hpp"

#include <ext2fs/ext2fs.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <unordered_map>

#include "process.hpp"

namespace rootfs {
namespace {

constexpr uint64_t kBlockBytes = 4096;
constexpr uint64_t kMiB = uint64_t{1} << 20;

uint64_t blocks_for(uint64_t bytes) { return (bytes + kBlockBytes - 1) / kBlockBytes; }

void measure(const Inode& inode, TreeSize& size, std::unordered_map<const Inode*, bool>& seen) {
  if (!inode.is_directory() && !seen.emplace(&inode, true).second) return;
  ++size.inodes;
  // An attribute that does not fit into the inode takes a block; a link of 60 bytes or more another.
  uint64_t attribute_bytes = 0;
  for (const auto& [name, value] : inode.attributes) attribute_bytes += name.size() + value.size() + 32;
  size.blocks += blocks_for(attribute_bytes);
  if (inode.is_symlink()) size.blocks += inode.target.size() >= 60;
  if (inode.is_regular()) {
    const uint64_t blocks =
        blocks_for(inode.content.size_bytes - std::min(inode.content.hole_bytes, inode.content.size_bytes));
    size.content_bytes += inode.content.size_bytes;
    size.blocks += blocks + blocks / 10000;  // and the extent tree's
  }
  if (inode.is_directory()) {
    uint64_t entry_bytes = 64;
    for (const auto& [name, child] : inode.children) {
      entry_bytes += 12 + ((name.size() + 3) & ~size_t{3});
      measure(*child, size, seen);
    }
    // Entries do not cross blocks: allow for what is lost at their ends.
    size.blocks += blocks_for(entry_bytes + entry_bytes / 8);
  }
}

int file_type(mode_t mode) {
  switch (mode & S_IFMT) {
    case S_IFREG:
      return EXT2_FT_REG_FILE;
    case S_IFBLK:
      return EXT2_FT_BLKDEV;
    case S_IFCHR:
      return EXT2_FT_CHRDEV;
    case S_IFIFO:
      return EXT2_FT_FIFO;
    case S_IFSOCK:
      return EXT2_FT_SOCK;
    default:
      return EXT2_FT_UNKNOWN;
  }
}

class Writer {
 public:
  Writer(const Tree& tree, const TreeSize& size, Progress& progress) : tree_(tree), size_(size), progress_(progress) {}
  ~Writer() {
    if (fs_) ext2fs_free(fs_);
  }

  Result<void> run(const std::string& path, uint64_t image_bytes) {
    const errcode_t opened = ext2fs_open(path.c_str(), EXT2_FLAG_RW | EXT2_FLAG_64BITS, 0, 0, unix_io_manager, &fs_);
    if (opened) return failure("opening the new file system", opened);
    TRY(check(ext2fs_read_bitmaps(fs_), "reading the bitmaps of the new file system"));
    const uint64_t free_blocks = ext2fs_free_blocks_count(fs_->super);
    if (free_blocks < size_.blocks) {
      // What the file system keeps for itself grows with it; a rounded figure that is sure to do.
      const uint64_t missing = (size_.blocks - free_blocks) * kBlockBytes;
      const uint64_t needed = (image_bytes + missing + missing / 32 + 32 * kMiB - 1) / (16 * kMiB) * (16 * kMiB);
      return Error{"--size: " + human_size(image_bytes) + " given; the files need at least " +
                       std::to_string(needed / kMiB) + "M",
                   ENOSPC};
    }
    TRY(write_inode_data(EXT2_ROOT_INO, tree_.root(), "/"));
    TRY(write_children(EXT2_ROOT_INO, tree_.root(), "/"));
    for (const auto& [inode, number] : links_) TRY(write_link_count(number.inode, number.names));
    const errcode_t closed = ext2fs_close_free(&fs_);
    return closed ? failure("writing the file system's tables", closed) : Result<void>();
  }

 private:
  struct Written {
    ext2_ino_t inode;
    unsigned names;
  };

  Error failure(const std::string& what, errcode_t code) const {
    if (code == EXT2_ET_BLOCK_ALLOC_FAIL || code == EXT2_ET_INODE_ALLOC_FAIL)
      return Error{what + ": the file system is full; give a larger --size", ENOSPC};
    return Error{what + ": " + error_message(code), code < 4096 ? static_cast<int>(code) : 0};
  }
  Result<void> check(errcode_t code, const std::string& what) const {
    if (code) return failure(what, code);
    return {};
  }

  Result<void> write_children(ext2_ino_t folder, const Inode& inode, const std::string& path) {
    for (const auto& [name, child] : inode.children) {
      TRY(interrupted());
      const std::string child_path = path + name;
      const ext2_ino_t number = TRY(write_child(folder, name, *child, child_path));
      if (child->is_directory()) TRY(write_children(number, *child, child_path + "/"));
    }
    return {};
  }

  Result<ext2_ino_t> write_child(ext2_ino_t folder, const std::string& name, const Inode& inode,
                                 const std::string& path) {
    if (folder == EXT2_ROOT_INO && name == "lost+found" && inode.is_directory()) {
      ext2_ino_t there = 0;  // mke2fs made one
      if (ext2fs_lookup(fs_, folder, name.data(), static_cast<int>(name.size()), nullptr, &there) == 0) return there;
    }
    if (!inode.is_directory()) {
      const auto known = links_.find(&inode);
      if (known != links_.end()) {
        ++known->second.names;
        TRY(add_name(folder, name, known->second.inode, S_ISLNK(inode.mode) ? EXT2_FT_SYMLINK : file_type(inode.mode),
                     path));
        return known->second.inode;
      }
    }
    ext2_ino_t number = 0;
    TRY(check(ext2fs_new_inode(fs_, folder, static_cast<int>(inode.mode), nullptr, &number), path));
    if (inode.is_directory()) {
      TRY(check(expanding(folder, [&] { return ext2fs_mkdir(fs_, folder, number, name.c_str()); }), path));
    } else if (inode.is_symlink()) {
      TRY(check(
          expanding(folder, [&] { return ext2fs_symlink(fs_, folder, number, name.c_str(), inode.target.c_str()); }),
          path));
    } else {
      TRY(add_name(folder, name, number, file_type(inode.mode), path));
      ext2fs_inode_alloc_stats2(fs_, number, +1, 0);
      ext2_inode_large raw = {};
      raw.i_mode = static_cast<__u16>(inode.mode);
      raw.i_links_count = 1;
      raw.i_extra_isize = sizeof(ext2_inode_large) - EXT2_GOOD_OLD_INODE_SIZE;
      auto* small = reinterpret_cast<ext2_inode*>(&raw);
      if (inode.is_regular()) {
        // An empty extent tree.
        ext2_extent_handle_t handle = nullptr;
        TRY(check(ext2fs_extent_open2(fs_, number, small, &handle), path));
        ext2fs_extent_free(handle);
      } else if (S_ISBLK(inode.mode) || S_ISCHR(inode.mode)) {
        // The kernel's old and new encodings of device numbers.
        const unsigned major_number = major(inode.device);
        const unsigned minor_number = minor(inode.device);
        if (major_number < 256 && minor_number < 256) {
          raw.i_block[0] = major_number * 256 + minor_number;
        } else {
          raw.i_block[1] = (minor_number & 0xff) | (major_number << 8) | ((minor_number & ~0xffu) << 12);
        }
      }
      TRY(check(ext2fs_write_inode_full(fs_, number, small, sizeof raw), path));
    }
    TRY(write_inode_data(number, inode, path));
    if (!inode.is_directory()) links_[&inode] = {number, 1};
    return number;
  }

  // libext2fs leaves it to its caller to make a directory longer.
  template <typename Call>
  errcode_t expanding(ext2_ino_t folder, Call call) {
    errcode_t code = call();
    if (code == EXT2_ET_DIR_NO_SPACE) {
      code = ext2fs_expand_dir(fs_, folder);
      if (code == 0) code = call();
    }
    return code;
  }
  Result<void> add_name(ext2_ino_t folder, const std::string& name, ext2_ino_t number, int type,
                        const std::string& path) {
    return check(expanding(folder, [&] { return ext2fs_link(fs_, folder, name.c_str(), number, type); }), path);
  }

  // Contents first, then what they change: owner, permissions, times, attributes.
  Result<void> write_inode_data(ext2_ino_t number, const Inode& inode, const std::string& path) {
    if (inode.is_regular() && inode.content.size_bytes > 0) TRY(write_content(number, inode.content, path));
    ext2_inode_large raw = {};
    auto* small = reinterpret_cast<ext2_inode*>(&raw);
    TRY(check(ext2fs_read_inode_full(fs_, number, small, sizeof raw), path));
    raw.i_mode = static_cast<__u16>(inode.mode);
    raw.i_uid = static_cast<__u16>(inode.uid);
    raw.osd2.linux2.l_i_uid_high = static_cast<__u16>(inode.uid >> 16);
    raw.i_gid = static_cast<__u16>(inode.gid);
    raw.osd2.linux2.l_i_gid_high = static_cast<__u16>(inode.gid >> 16);
    raw.i_extra_isize = sizeof(ext2_inode_large) - EXT2_GOOD_OLD_INODE_SIZE;
    // 34 bits of seconds from 1901, and nanoseconds, share the extra field.
    const int64_t seconds = std::clamp<int64_t>(inode.mtime_s, INT32_MIN, (int64_t{1} << 34) - 1 + INT32_MIN);
    raw.i_mtime = raw.i_atime = raw.i_ctime = raw.i_crtime = static_cast<__u32>(seconds);
    const auto epoch = static_cast<__u32>(((seconds - static_cast<int32_t>(seconds)) >> 32) & 3);
    const __u32 extra = epoch | (inode.mtime_ns < 1'000'000'000 ? inode.mtime_ns : 0) << 2;
    raw.i_mtime_extra = raw.i_atime_extra = raw.i_ctime_extra = raw.i_crtime_extra = extra;
    TRY(check(ext2fs_write_inode_full(fs_, number, small, sizeof raw), path));
    if (!inode.attributes.empty()) TRY(write_attributes(number, inode, path));
    return {};
  }

  Result<void> write_attributes(ext2_ino_t number, const Inode& inode, const std::string& path) {
    ext2_xattr_handle* handle = nullptr;
    TRY(check(ext2fs_xattrs_open(fs_, number, &handle), path));
    errcode_t code = ext2fs_xattrs_read(handle);
    std::string name;
    for (auto entry = inode.attributes.begin(); code == 0 && entry != inode.attributes.end(); ++entry) {
      name = entry->first;
      code = ext2fs_xattr_set(handle, name.c_str(), entry->second.data(), entry->second.size());
    }
    const errcode_t closed = ext2fs_xattrs_close(&handle);
    if (code == EXT2_ET_EA_NO_SPACE)
      return Error{path + ": the attribute " + name + " does not fit into an ext4 inode"};
    return check(code ? code : closed, path + ": attribute " + name);
  }

  Result<Fd> open_content(const Content& content, const std::string& path) const {
    if (content.path.empty()) return Fd(::dup(content.file->get()));
    // No link that came in between is followed, and it is the file that was listed.
    open_how how{};
    how.flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK;
    how.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS;
    Fd fd(static_cast<int>(::syscall(SYS_openat2, content.file->get(), content.path.c_str(), &how, sizeof how)));
    struct stat status {};
    if (!fd || ::fstat(fd.get(), &status) != 0) return errno_error(path);
    if (status.st_dev != content.device || status.st_ino != content.inode ||
        static_cast<uint64_t>(status.st_size) != content.size_bytes)
      return Error{path + ": it changed while the image was made"};
    return fd;
  }

  Result<void> write_content(ext2_ino_t number, const Content& content, const std::string& path) {
    const Fd input = TRY(open_content(content, path));
    ext2_file_t output = nullptr;
    TRY(check(ext2fs_file_open(fs_, number, EXT2_FILE_WRITE, &output), path));
    const Result<void> copied = copy(input, content, output, path);
    const errcode_t closed = ext2fs_file_close(output);
    TRY(copied);
    return check(closed, path);
  }

  // Blocks of zeros become holes.
  Result<void> copy(const Fd& input, const Content& content, ext2_file_t output, const std::string& path) {
    uint64_t at = 0;
    while (at < content.size_bytes) {
      TRY(interrupted());
      const auto offset = static_cast<off_t>(content.offset + at);
      // Past what the host's file holds sparse. Where nothing but a hole is left, or the host cannot tell, read on.
      const off_t data = ::lseek(input.get(), offset, SEEK_DATA);
      if (data > offset) {
        const uint64_t gap = std::min<uint64_t>(static_cast<uint64_t>(data - offset), content.size_bytes - at);
        at += gap / kBlockBytes * kBlockBytes;
        if (gap >= kBlockBytes) continue;
      } else if (data < 0 && errno == ENXIO) {
        struct stat status {};
        if (::fstat(input.get(), &status) != 0) return errno_error(path);
        if (static_cast<uint64_t>(status.st_size) < content.offset + content.size_bytes)
          return Error{path + ": it became shorter while it was read"};
        break;
      }
      const size_t wanted = std::min<uint64_t>(buffer_.size(), content.size_bytes - at);
      const ssize_t count = ::pread(input.get(), buffer_.data(), wanted, offset);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) return errno_error(path);
      if (count == 0) return Error{path + ": it became shorter while it was read"};
      // Whole blocks, except at the end: a hole starts and ends at one.
      size_t usable = static_cast<size_t>(count);
      if (usable < wanted && usable > kBlockBytes) usable -= usable % kBlockBytes;
      TRY(write_blocks(output, at, {buffer_.data(), usable}, path));
      at += usable;
      progress_.bytes(written_ + at, size_.content_bytes);
    }
    written_ += content.size_bytes;
    progress_.bytes(written_, size_.content_bytes);
    return check(ext2fs_file_set_size2(output, static_cast<ext2_off64_t>(content.size_bytes)), path);
  }

  Result<void> write_blocks(ext2_file_t output, uint64_t at, std::span<const char> data, const std::string& path) {
    const auto is_zero = [&data](size_t block) {
      const auto part = data.subspan(block, std::min<size_t>(kBlockBytes, data.size() - block));
      return std::all_of(part.begin(), part.end(), [](char c) { return c == 0; });
    };
    for (size_t begin = 0; begin < data.size();) {
      if (is_zero(begin)) {
        begin += kBlockBytes;
        continue;
      }
      size_t end = begin;
      while (end < data.size() && !is_zero(end)) end = std::min<size_t>(end + kBlockBytes, data.size());
      TRY(check(ext2fs_file_llseek(output, at + begin, EXT2_SEEK_SET, nullptr), path));
      while (begin < end) {
        unsigned written = 0;
        TRY(check(ext2fs_file_write(output, data.data() + begin, static_cast<unsigned>(end - begin), &written), path));
        begin += written;
      }
    }
    return {};
  }

  Result<void> write_link_count(ext2_ino_t number, unsigned names) {
    if (names == 1) return {};
    if (names > EXT2_LINK_MAX) return Error{"a file has " + std::to_string(names) + " names; ext4 allows 65000"};
    ext2_inode raw = {};
    TRY(check(ext2fs_read_inode(fs_, number, &raw), "hard links"));
    raw.i_links_count = static_cast<__u16>(names);
    return check(ext2fs_write_inode(fs_, number, &raw), "hard links");
  }

  const Tree& tree_;
  const TreeSize& size_;
  Progress& progress_;
  ext2_filsys fs_ = nullptr;
  std::unordered_map<const Inode*, Written> links_;
  std::vector<char> buffer_ = std::vector<char>(1 << 20);
  uint64_t written_ = 0;
};

}  // namespace

TreeSize measure(const Tree& tree) {
  TreeSize size;
  std::unordered_map<const Inode*, bool> seen;
  measure(tree.root(), size, seen);
  return size;
}

uint64_t default_image_size(const TreeSize& tree) {
  const uint64_t bytes = tree.blocks * kBlockBytes;
  const uint64_t roomy = (bytes + bytes / 3 + 256 * kMiB + 64 * kMiB - 1) / (64 * kMiB) * (64 * kMiB);
  return std::max(roomy, uint64_t{4} << 30);
}

Result<void> write_ext4(const std::string& path, uint64_t size_bytes, const Tree& tree, Progress& progress) {
  initialize_ext2_error_table();
  const TreeSize size = measure(tree);
  if (::truncate(path.c_str(), static_cast<off_t>(size_bytes)) != 0) return errno_error(path);
  std::vector<std::string> command = {"mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-L", "root",
                                      // The file is new and reads as zeros: nothing is left for the guest to clear.
                                      "-E", "assume_storage_prezeroed=1,nodiscard,root_owner=0:0"};
  // mke2fs gives an inode for each 16 KiB; trees of many small files need more.
  if (const uint64_t inodes = size.inodes + size.inodes / 4 + 1024; inodes > size_bytes / 16384) {
    command.push_back("-N");
    command.push_back(std::to_string(inodes));
  }
  command.push_back(path);
  command.push_back(std::to_string(size_bytes / 1024) + "k");
  TRY(Process::run(command));
  return Writer(tree, size, progress).run(path, size_bytes);
}

}  // namespace rootfs
