// SPDX-License-Identifier: Apache-2.0
// Raw images: the guest's disk byte for byte, in a regular file or on a block device.
#include <cerrno>
#include <cstring>

#include "image.hpp"

namespace virtio_blk {

namespace {

constexpr uint64_t kSector = 512;

class RawImage final : public Image {
 public:
  RawImage(Storage storage, uint64_t size_bytes, bool flushes)
      : storage_(std::move(storage)), size_bytes_(size_bytes), flushes_(flushes) {
    storage_.add_to(files_);
  }

  uint64_t size_bytes() const override { return size_bytes_; }
  uint32_t logical_block_bytes() const override { return storage_.logical_block_bytes(); }
  uint32_t physical_block_bytes() const override { return storage_.physical_block_bytes(); }
  std::span<const ImageFile> files() const override { return files_; }
  bool read(uint64_t offset, std::span<std::byte> into) override {
    return ::pread(storage_.fd(), into.data(), into.size(), static_cast<off_t>(offset)) ==
           static_cast<ssize_t>(into.size());
  }
  Result<void> resize(uint64_t size_bytes) override;

  void begin(IoEngine& engine, ImageRequest& request) override;
  void step_finished(IoEngine& engine, ImageRequest& request, int64_t result) override;

 private:
  void begin_transfer(IoEngine& engine, ImageRequest& request, FileOperation::Kind kind);
  void fill_with_zeroes(IoEngine& engine, ImageRequest& request);

  Storage storage_;
  std::vector<ImageFile> files_;
  uint64_t size_bytes_;
  bool flushes_;
};

void RawImage::begin(IoEngine& engine, ImageRequest& request) {
  request.image = this;
  request.retries = 0;
  request.file = storage_.file();
  request.offset = request.start;
  request.size_bytes = request.length;
  request.vectors = request.data;
  request.durable = request.write_through && flushes_ && request.type != ImageRequest::Type::read;
  switch (request.type) {
    case ImageRequest::Type::read:
      return begin_transfer(engine, request, FileOperation::Kind::read);
    case ImageRequest::Type::write:
      return begin_transfer(engine, request, FileOperation::Kind::write);
    case ImageRequest::Type::flush:
      if (!flushes_) return request.done(0);
      request.kind = FileOperation::Kind::sync;
      break;
    case ImageRequest::Type::discard:
      request.kind = storage_.block_device() ? FileOperation::Kind::discard : FileOperation::Kind::punch_hole;
      break;
    case ImageRequest::Type::write_zeroes:
      request.kind = request.may_unmap ? FileOperation::Kind::punch_hole : FileOperation::Kind::zero_range;
      break;
  }
  engine.begin(request);
}

void RawImage::begin_transfer(IoEngine& engine, ImageRequest& request, FileOperation::Kind kind) {
  request.kind = kind;
  storage_.transfer(engine, request);
}

void RawImage::fill_with_zeroes(IoEngine& engine, ImageRequest& request) {
  request.size_bytes = zero_vectors(request.zeroes, request.start + request.length - request.offset);
  request.vectors = request.zeroes;
  begin_transfer(engine, request, FileOperation::Kind::write);
}

void RawImage::step_finished(IoEngine& engine, ImageRequest& request, int64_t result) {
  if (request.kind == FileOperation::Kind::read || request.kind == FileOperation::Kind::write) {
    const std::optional<int> outcome = storage_.continue_transfer(engine, request, result);
    if (!outcome) return;
    const bool more =
        request.type == ImageRequest::Type::write_zeroes && request.offset < request.start + request.length;
    if (*outcome == 0 && more) return fill_with_zeroes(engine, request);
    return request.done(*outcome);
  }
  if ((result == -EINTR || result == -EAGAIN) && request.retries++ < kMostRetries) return engine.begin(request);
  if (request.kind == FileOperation::Kind::sync) return request.done(static_cast<int>(-result));

  const bool unsupported = result == -EOPNOTSUPP || result == -ENOTTY || result == -ENOSYS;
  if (unsupported && request.type == ImageRequest::Type::write_zeroes) return fill_with_zeroes(engine, request);
  // A discard is advice.
  if (unsupported) result = 0;
  if (result < 0 || !request.durable) return request.done(static_cast<int>(-result));
  request.kind = FileOperation::Kind::sync;
  engine.begin(request);
}

Result<void> RawImage::resize(uint64_t size_bytes) {
  const std::string given = "size_bytes=" + std::to_string(size_bytes);
  const uint64_t now_bytes = storage_.size_bytes();
  if (storage_.block_device()) {
    if (size_bytes != now_bytes)
      return Error{given + ": the block device has " + std::to_string(now_bytes) +
                   " bytes; allowed is that size, after the device itself was resized"};
  } else {
    // Longer than the disk where somebody else made it so.
    if (size_bytes < now_bytes)
      return Error{given + ": the file has " + std::to_string(now_bytes) + " bytes and can only grow"};
    const bool possible = size_bytes <= uint64_t{INT64_MAX};
    if (!possible || ::ftruncate(storage_.fd(), static_cast<off_t>(size_bytes)) != 0) {
      const int code = possible ? errno : EFBIG;
      return Error{given + ": " + std::strerror(code), code, CLONE_ERR_SYSTEM};
    }
  }
  size_bytes_ = size_bytes;
  return {};
}

}  // namespace

Result<std::unique_ptr<Image>> open_raw_image(Storage storage, const ImageConfig& config, const clone_sdk::Host& host) {
  const uint64_t size = storage.size_bytes();
  if (size == 0) return Error{"is empty; a disk has at least one sector of 512 bytes"};
  const uint64_t whole = size - size % kSector;
  if (whole == 0) return Error{"has " + std::to_string(size) + " bytes; a disk has at least one sector of 512"};
  if (whole != size)
    host.log(CLONE_LOG_WARNING, "path=" + config.path + ": the last " + std::to_string(size % kSector) +
                                    " bytes are no whole sector and not part of the disk");
  const bool flushes = config.cache != Cache::unsafe && !config.read_only;
  return std::unique_ptr<Image>(std::make_unique<RawImage>(std::move(storage), whole, flushes));
}

}  // namespace virtio_blk
