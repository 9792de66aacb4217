// SPDX-License-Identifier: Apache-2.0
// Raw images: the guest's disk byte for byte, in a regular file or on a block device.
#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "file_lock.hpp"
#include "image.hpp"

namespace virtio_blk {

namespace {

constexpr uint64_t kSector = 512;
constexpr uint64_t kPage = 4096;
constexpr uint32_t kMostRetries = 16;
constexpr size_t kZeroesBytes = 64 << 10;
constexpr size_t kZeroVectors = 16;
constexpr uint64_t kBounceBytes = 256 << 10;

alignas(kPage) std::byte zero_block[kZeroesBytes];

// Drops the first `count` bytes.
void advance(std::span<iovec>& vectors, uint64_t count) {
  while (!vectors.empty() && count >= vectors.front().iov_len) {
    count -= vectors.front().iov_len;
    vectors = vectors.subspan(1);
  }
  if (vectors.empty()) return;
  vectors.front().iov_base = static_cast<std::byte*>(vectors.front().iov_base) + count;
  vectors.front().iov_len -= count;
}

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
  if (!opened) return Error{std::strerror(errno), errno, CLONE_ERR_SYSTEM};
  return opened;
}

struct FreeDeleter {
  void operator()(std::byte* memory) const { std::free(memory); }
};

}  // namespace

class RawImage final : public Image {
 public:
  static Result<std::unique_ptr<Image>> open(const ImageConfig& config, const clone_sdk::Host& host);

  uint64_t size_bytes() const override { return size_bytes_; }
  uint32_t logical_block_bytes() const override { return logical_block_bytes_; }
  uint32_t physical_block_bytes() const override { return physical_block_bytes_; }
  std::span<const ImageFile> files() const override { return files_; }
  bool read(uint64_t offset, std::span<std::byte> into) const override {
    return ::pread(fds_[0].get(), into.data(), into.size(), static_cast<off_t>(offset)) ==
           static_cast<ssize_t>(into.size());
  }

  void begin(IoEngine& engine, ImageRequest& request) override;
  void step_finished(IoEngine& engine, ImageRequest& request, int64_t result) override;

 private:
  static constexpr uint8_t kCached = 0;
  static constexpr uint8_t kDirect = 1;

  Result<void> open_files(const ImageConfig& config, const clone_sdk::Host& host);
  Result<void> open_direct(const ImageConfig& config);
  void transfer(IoEngine& engine, ImageRequest& request);
  int64_t bounce(const ImageRequest& request) const;
  void fill_with_zeroes(ImageRequest& request);

  Fd lock_fd_;
  std::vector<Fd> fds_;
  std::vector<ImageFile> files_;
  uint64_t size_bytes_ = 0;
  uint32_t logical_block_bytes_ = kSector;
  uint32_t physical_block_bytes_ = kPage;
  bool flushes_ = true;
  uint64_t direct_align_ = 0;         // of offsets and sizes; 0: everything goes through the page cache
  uint64_t direct_memory_align_ = 0;  // of addresses
};

Result<std::unique_ptr<Image>> RawImage::open(const ImageConfig& config, const clone_sdk::Host& host) {
  auto image = std::make_unique<RawImage>();
  CLONE_TRY(image->open_files(config, host).context("path=" + config.path));
  return std::unique_ptr<Image>(std::move(image));
}

Result<void> RawImage::open_files(const ImageConfig& config, const clone_sdk::Host& host) {
  // O_NONBLOCK: a FIFO is refused below, not waited for.
  const int flags = (config.read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC;
  Fd fd(::open(config.path.c_str(), flags | O_NONBLOCK));
  if (!fd) {
    const int code = errno;
    std::string message = std::strerror(code);
    if (!config.read_only && (code == EACCES || code == EROFS || code == EPERM))
      message += " (opened for writing; readonly=on opens it for reading only)";
    return Error{message, code, CLONE_ERR_SYSTEM};
  }
  struct stat status {};
  if (::fstat(fd.get(), &status) != 0) return Error{std::strerror(errno), errno, CLONE_ERR_SYSTEM};
  const bool block_device = S_ISBLK(status.st_mode);
  if (!block_device && !S_ISREG(status.st_mode)) return Error{"is neither a regular file nor a block device"};
  if (::fcntl(fd.get(), F_SETFL, ::fcntl(fd.get(), F_GETFL) & ~O_NONBLOCK) != 0)
    return Error{std::strerror(errno), errno, CLONE_ERR_SYSTEM};

  auto size = static_cast<uint64_t>(status.st_size);
  if (block_device) {
    unsigned physical = 0;
    int logical = 0;
    if (::ioctl(fd.get(), BLKGETSIZE64, &size) != 0 || ::ioctl(fd.get(), BLKSSZGET, &logical) != 0 ||
        ::ioctl(fd.get(), BLKPBSZGET, &physical) != 0)
      return Error{std::strerror(errno), errno, CLONE_ERR_SYSTEM};
    logical_block_bytes_ = static_cast<uint32_t>(logical);
    physical_block_bytes_ = std::max(physical, logical_block_bytes_);
  }
  if (size == 0) return Error{"is empty; a disk has at least one sector of 512 bytes"};
  size_bytes_ = size - size % kSector;
  if (size_bytes_ == 0) return Error{"has " + std::to_string(size) + " bytes; a disk has at least one sector of 512"};
  if (size_bytes_ != size)
    host.log(CLONE_LOG_WARNING, "path=" + config.path + ": the last " + std::to_string(size % kSector) +
                                    " bytes are no whole sector and not part of the disk");

  // On an open file description of its own: io_uring lets go of those it knows some time after the process is gone.
  lock_fd_ = CLONE_TRY(open_again(fd.get(), O_RDONLY));
  CLONE_TRY(lock_image(lock_fd_.get(), config.read_only, host));
  flushes_ = config.cache != Cache::unsafe && !config.read_only;

  std::byte probe[kSector];
  iovec vector{probe, sizeof probe};
  const bool nowait_reads = ::preadv2(fd.get(), &vector, 1, 0, RWF_NOWAIT) >= 0 || errno == EAGAIN;
  files_.push_back({fd.get(), false, block_device, nowait_reads});
  fds_.push_back(std::move(fd));
  if (config.cache == Cache::none) CLONE_TRY(open_direct(config));
  return {};
}

// A second open file description: what O_DIRECT does not take goes through the page cache, which the kernel keeps in
// step with direct I/O as long as no page is used both ways at once.
Result<void> RawImage::open_direct(const ImageConfig& config) {
  const ImageFile& cached = files_[kCached];
  auto opened = open_again(cached.fd, (config.read_only ? O_RDONLY : O_RDWR) | O_DIRECT);
  if (!opened.ok() && opened.error().code == EINVAL)
    return Error{"cache=none is not possible on its file system; allowed are writeback and unsafe", EINVAL};
  Fd fd = CLONE_TRY(std::move(opened).context("cache=none"));
  direct_align_ = direct_memory_align_ = cached.block_device ? logical_block_bytes_ : kPage;
#ifdef STATX_DIOALIGN
  struct statx status {};
  if (::statx(fd.get(), "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 && (status.stx_mask & STATX_DIOALIGN) &&
      status.stx_dio_offset_align) {
    direct_align_ = status.stx_dio_offset_align;
    direct_memory_align_ = std::max<uint64_t>(status.stx_dio_mem_align, 1);
  }
#endif
  // Sectors go directly, or else whole pages only, so that no page is used both ways.
  if (direct_align_ <= kSector)
    direct_align_ = kSector;
  else
    direct_align_ = std::max(direct_align_, kPage);
  files_.push_back({fd.get(), true, cached.block_device, true});
  fds_.push_back(std::move(fd));
  return {};
}

void RawImage::begin(IoEngine& engine, ImageRequest& request) {
  request.image = this;
  request.retries = 0;
  request.file = kCached;
  request.offset = request.start;
  request.size_bytes = request.length;
  request.vectors = request.data;
  request.durable = request.write_through && flushes_;
  switch (request.type) {
    case ImageRequest::Type::read:
      request.kind = FileOperation::Kind::read;
      request.durable = false;
      return transfer(engine, request);
    case ImageRequest::Type::write:
      request.kind = FileOperation::Kind::write;
      return transfer(engine, request);
    case ImageRequest::Type::flush:
      if (!flushes_) return request.done(0);
      request.kind = FileOperation::Kind::sync;
      break;
    case ImageRequest::Type::discard:
      request.kind = files_[kCached].block_device ? FileOperation::Kind::discard : FileOperation::Kind::punch_hole;
      break;
    case ImageRequest::Type::write_zeroes:
      request.kind = request.may_unmap ? FileOperation::Kind::punch_hole : FileOperation::Kind::zero_range;
      break;
  }
  engine.begin(request);
}

// Reads or writes what is left of the request.
void RawImage::transfer(IoEngine& engine, ImageRequest& request) {
  const auto aligned = [](uint64_t value, uint64_t to) { return value % to == 0; };
  request.file = kCached;
  if (direct_align_ && aligned(request.offset, direct_align_) && aligned(request.size_bytes, direct_align_)) {
    request.file = kDirect;
    const bool memory_aligned = std::all_of(request.vectors.begin(), request.vectors.end(), [&](const iovec& vector) {
      return aligned(reinterpret_cast<uintptr_t>(vector.iov_base), direct_memory_align_) &&
             aligned(vector.iov_len, direct_align_);
    });
    if (!memory_aligned) return step_finished(engine, request, bounce(request));
  }
  engine.begin(request);
}

// Direct I/O between the disk and memory that is not aligned for it: through a buffer, here and now. Rare, since guests
// align their buffers to sectors. Returns what finished() is told.
int64_t RawImage::bounce(const ImageRequest& request) const {
  const uint64_t largest = std::max(kBounceBytes, direct_align_);
  const std::unique_ptr<std::byte, FreeDeleter> buffer(static_cast<std::byte*>(std::aligned_alloc(kPage, largest)));
  if (!buffer) return -ENOMEM;
  const int fd = files_[kDirect].fd;
  std::vector<iovec> guest(request.vectors.begin(), request.vectors.end());
  std::span<iovec> left(guest);
  uint64_t done = 0;
  while (done < request.size_bytes) {
    const uint64_t size = std::min(request.size_bytes - done, largest);
    const auto offset = static_cast<off_t>(request.offset + done);
    iovec piece{buffer.get(), size};
    if (request.kind == FileOperation::Kind::write) {
      copy(left, size,
           [&](std::byte* at, uint64_t from, uint64_t count) { std::memcpy(buffer.get() + from, at, count); });
      const ssize_t result = ::pwritev2(fd, &piece, 1, offset, request.durable ? RWF_DSYNC : 0);
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

void RawImage::fill_with_zeroes(ImageRequest& request) {
  request.kind = FileOperation::Kind::write;
  request.zeroes.clear();
  const uint64_t left = request.start + request.length - request.offset;
  request.size_bytes = 0;
  while (request.size_bytes < left && request.zeroes.size() < kZeroVectors) {
    const uint64_t count = std::min<uint64_t>(left - request.size_bytes, kZeroesBytes);
    request.zeroes.push_back({zero_block, count});
    request.size_bytes += count;
  }
  request.vectors = request.zeroes;
}

void RawImage::step_finished(IoEngine& engine, ImageRequest& request, int64_t result) {
  const bool transfers = request.kind == FileOperation::Kind::read || request.kind == FileOperation::Kind::write;
  if ((result == -EINTR || result == -EAGAIN) && request.retries++ < kMostRetries) {
    if (transfers) return transfer(engine, request);
    return engine.begin(request);
  }

  if (transfers) {
    // The file ends where it did not when it was opened.
    if (result == 0 && request.size_bytes > 0) result = -EIO;
    if (result < 0) return request.done(static_cast<int>(-result));
    const auto count = static_cast<uint64_t>(result);
    advance(request.vectors, count);
    request.offset += count;
    request.size_bytes -= count;
    if (request.size_bytes == 0 && request.type == ImageRequest::Type::write_zeroes &&
        request.offset < request.start + request.length)
      fill_with_zeroes(request);
    if (request.size_bytes > 0) return transfer(engine, request);
    return request.done(0);
  }

  if (request.kind == FileOperation::Kind::sync) return request.done(static_cast<int>(-result));

  const bool unsupported = result == -EOPNOTSUPP || result == -ENOTTY || result == -ENOSYS;
  if (unsupported && request.type == ImageRequest::Type::write_zeroes) {
    fill_with_zeroes(request);
    return transfer(engine, request);
  }
  // A discard is advice.
  if (unsupported) result = 0;
  if (result < 0 || !request.durable) return request.done(static_cast<int>(-result));
  request.kind = FileOperation::Kind::sync;
  engine.begin(request);
}

Result<std::unique_ptr<Image>> open_raw_image(const ImageConfig& config, const clone_sdk::Host& host) {
  return RawImage::open(config, host);
}

}  // namespace virtio_blk
