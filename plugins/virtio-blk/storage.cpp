// SPDX-License-Identifier: Apache-2.0
// Opening, locking, direct I/O and its alignment: the same for every format.
#include "storage.hpp"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "file_lock.hpp"
#include "system_error.hpp"

namespace virtio_blk {

namespace {

constexpr uint64_t kSector = 512;
constexpr uint64_t kPage = 4096;
constexpr size_t kZeroesBytes = 64 << 10;
constexpr size_t kZeroVectors = 16;
constexpr uint64_t kBounceBytes = 256 << 10;

alignas(kPage) std::byte zero_block[kZeroesBytes];

// Calls each(address, offset, count) for the first `size` bytes of the vectors.
template <typename Each>
void copy(std::span<const iovec> vectors, uint64_t size, Each&& each) {
  uint64_t at = 0;
  for (const iovec& vector : vectors) {
    const uint64_t count = std::min<uint64_t>(vector.iov_len, size - at);
    each(static_cast<std::byte*>(vector.iov_base), at, count);
    at += count;
  }
}

// Another open file description of the same file, whatever has become of its name.
Result<Fd> open_again(int fd, int flags) {
  Fd opened(::open(("/proc/self/fd/" + std::to_string(fd)).c_str(), flags | O_CLOEXEC));
  if (!opened) return system_error();
  return opened;
}

int flags_of(Access access) { return access == Access::read_only ? O_RDONLY : O_RDWR; }

struct FreeDeleter {
  void operator()(std::byte* memory) const { std::free(memory); }
};

}  // namespace

void advance(std::span<iovec>& vectors, uint64_t count) {
  while (!vectors.empty() && count >= vectors.front().iov_len) {
    count -= vectors.front().iov_len;
    vectors = vectors.subspan(1);
  }
  if (vectors.empty()) return;
  vectors.front().iov_base = static_cast<std::byte*>(vectors.front().iov_base) + count;
  vectors.front().iov_len -= count;
}

void take(std::span<iovec>& vectors, uint64_t count, std::vector<iovec>& taken) {
  taken.clear();
  for (uint64_t left = count; const iovec& vector : vectors) {
    if (left == 0) break;
    taken.push_back({vector.iov_base, std::min<uint64_t>(vector.iov_len, left)});
    left -= taken.back().iov_len;
  }
  advance(vectors, count);
}

uint64_t zero_vectors(std::vector<iovec>& vectors, uint64_t size_bytes) {
  vectors.clear();
  uint64_t total = 0;
  while (total < size_bytes && vectors.size() < kZeroVectors) {
    const uint64_t count = std::min<uint64_t>(size_bytes - total, kZeroesBytes);
    vectors.push_back({zero_block, count});
    total += count;
  }
  return total;
}

Result<Storage> Storage::open(const std::string& path, Access access, Cache cache, const clone_sdk::Host& host) {
  // O_NONBLOCK: a FIFO is refused below, not waited for.
  Fd fd(::open(path.c_str(), flags_of(access) | O_CLOEXEC | O_NONBLOCK));
  if (!fd) {
    Error error = system_error();
    if (access == Access::read_write && (error.code == EACCES || error.code == EROFS || error.code == EPERM))
      error.message += " (opened for writing; readonly=on opens it for reading only)";
    return error;
  }
  return open(std::move(fd), access, cache, host);
}

// A block device is the same by every node that leads to it.
bool Storage::is_at(const std::string& path) const {
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0 || S_ISBLK(status.st_mode) != block_device_) return false;
  return block_device_ ? status.st_rdev == inode_ : status.st_dev == device_ && status.st_ino == inode_;
}

Result<Storage> Storage::open(Fd fd, Access access, Cache cache, const clone_sdk::Host& host) {
  struct stat status {};
  if (::fstat(fd.get(), &status) != 0) return system_error();
  Storage storage;
  storage.access_ = access;
  storage.block_device_ = S_ISBLK(status.st_mode);
  if (!storage.block_device_ && !S_ISREG(status.st_mode)) return Error{"is neither a regular file nor a block device"};
  if (::fcntl(fd.get(), F_SETFL, ::fcntl(fd.get(), F_GETFL) & ~O_NONBLOCK) != 0) return system_error();
  storage.device_ = status.st_dev;
  storage.inode_ = storage.block_device_ ? status.st_rdev : status.st_ino;
  if (storage.block_device_) {
    unsigned physical = 0;
    int logical = 0;
    if (::ioctl(fd.get(), BLKSSZGET, &logical) != 0 || ::ioctl(fd.get(), BLKPBSZGET, &physical) != 0)
      return system_error();
    storage.logical_block_bytes_ = static_cast<uint32_t>(logical);
    storage.physical_block_bytes_ = std::max(physical, storage.logical_block_bytes_);
  }

  // On an open file description of its own: io_uring lets go of those it knows some time after the process is gone.
  storage.lock_fd_ = CLONE_TRY(open_again(fd.get(), O_RDONLY));
  CLONE_TRY(lock_image(storage.lock_fd_.get(), access == Access::read_only, host));

  std::byte probe[kSector];
  iovec vector{probe, sizeof probe};
  storage.nowait_reads_ = ::preadv2(fd.get(), &vector, 1, 0, RWF_NOWAIT) >= 0 || errno == EAGAIN;
  storage.cached_fd_ = std::move(fd);
  if (cache == Cache::none) CLONE_TRY(storage.open_direct());
  return storage;
}

// A second open file description: what O_DIRECT does not take goes through the page cache, which the kernel keeps in
// step with direct I/O as long as no page is used both ways at once.
Result<void> Storage::open_direct() {
  auto opened = open_again(cached_fd_.get(), flags_of(access_) | O_DIRECT);
  if (!opened.ok() && opened.error().code == EINVAL)
    return Error{"cache=none is not possible on its file system; allowed are writeback and unsafe", EINVAL};
  direct_fd_ = CLONE_TRY(std::move(opened).context("cache=none"));
  direct_align_ = direct_memory_align_ = block_device_ ? logical_block_bytes_ : kPage;
#ifdef STATX_DIOALIGN
  struct statx status {};
  if (::statx(direct_fd_.get(), "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 &&
      (status.stx_mask & STATX_DIOALIGN) && status.stx_dio_offset_align) {
    direct_align_ = status.stx_dio_offset_align;
    direct_memory_align_ = std::max<uint64_t>(status.stx_dio_mem_align, 1);
  }
#endif
  // Sectors go directly, or else whole pages only, so that no page is used both ways.
  if (direct_align_ <= kSector)
    direct_align_ = kSector;
  else
    direct_align_ = std::max(direct_align_, kPage);
  return {};
}

uint64_t Storage::size_bytes() const {
  const off_t end = ::lseek(cached_fd_.get(), 0, SEEK_END);  // of a block device too
  return end < 0 ? 0 : static_cast<uint64_t>(end);
}

void Storage::add_to(std::vector<ImageFile>& files) {
  cached_file_ = static_cast<uint8_t>(files.size());
  files.push_back({cached_fd_.get(), false, block_device_, nowait_reads_});
  if (!direct_fd_) return;
  direct_file_ = static_cast<uint8_t>(files.size());
  files.push_back({direct_fd_.get(), true, block_device_, true});
}

void Storage::transfer(IoEngine& engine, FileOperation& operation) const {
  const auto aligned = [](uint64_t value, uint64_t to) { return value % to == 0; };
  operation.file = cached_file_;
  if (direct_align_ && aligned(operation.offset, direct_align_) && aligned(operation.size_bytes, direct_align_)) {
    operation.file = direct_file_;
    const auto& vectors = operation.vectors;
    const bool memory_aligned = std::all_of(vectors.begin(), vectors.end(), [&](const iovec& vector) {
      return aligned(reinterpret_cast<uintptr_t>(vector.iov_base), direct_memory_align_) &&
             aligned(vector.iov_len, direct_align_);
    });
    if (!memory_aligned) return operation.finished(engine, bounce(operation));
  }
  engine.begin(operation);
}

std::optional<int> Storage::continue_transfer(IoEngine& engine, FileOperation& operation, int64_t result) const {
  if ((result == -EINTR || result == -EAGAIN) && operation.retries++ < kMostRetries) {
    transfer(engine, operation);
    return std::nullopt;
  }
  // The file ends where it did not when it was opened.
  if (result == 0 && operation.size_bytes > 0) result = -EIO;
  if (result < 0) return static_cast<int>(-result);
  const auto count = static_cast<uint64_t>(result);
  advance(operation.vectors, count);
  operation.offset += count;
  operation.size_bytes -= count;
  if (operation.size_bytes == 0) return 0;
  transfer(engine, operation);
  return std::nullopt;
}

// Direct I/O between the disk and memory that is not aligned for it: through a buffer, here and now. Rare, since guests
// align their buffers to sectors. Returns what finished() is told.
int64_t Storage::bounce(const FileOperation& operation) const {
  const uint64_t largest = std::max(kBounceBytes, direct_align_);
  const std::unique_ptr<std::byte, FreeDeleter> buffer(static_cast<std::byte*>(std::aligned_alloc(kPage, largest)));
  if (!buffer) return -ENOMEM;
  const int fd = direct_fd_.get();
  std::vector<iovec> guest(operation.vectors.begin(), operation.vectors.end());
  std::span<iovec> left(guest);
  uint64_t done = 0;
  while (done < operation.size_bytes) {
    const uint64_t size = std::min(operation.size_bytes - done, largest);
    const auto offset = static_cast<off_t>(operation.offset + done);
    iovec piece{buffer.get(), size};
    if (operation.kind == FileOperation::Kind::write) {
      copy(left, size,
           [&](std::byte* at, uint64_t from, uint64_t count) { std::memcpy(buffer.get() + from, at, count); });
      const ssize_t result = ::pwritev2(fd, &piece, 1, offset, operation.durable ? RWF_DSYNC : 0);
      if (result != static_cast<ssize_t>(size)) return result < 0 ? -errno : -EIO;
    } else {
      const ssize_t result = ::preadv(fd, &piece, 1, offset);
      if (result != static_cast<ssize_t>(size)) return result < 0 ? -errno : -EIO;
      copy(left, size,
           [&](std::byte* at, uint64_t from, uint64_t count) { std::memcpy(at, buffer.get() + from, count); });
    }
    advance(left, size);
    done += size;
  }
  return static_cast<int64_t>(done);
}

}  // namespace virtio_blk
