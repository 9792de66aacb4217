// SPDX-License-Identifier: Apache-2.0
// Streams through zstd with buffers of fixed sizes, so that neither memory nor a bomb matters.
#include "zstd_file.hpp"

#include <zstd.h>

#include <algorithm>
#include <memory>
#include <vector>

namespace snapshot_file {
namespace {

constexpr int kLevel = 3;
constexpr int kWindowLog = 21;  // what the reader allocates
constexpr uint64_t kBufferBytes = 1 << 20;

Error corrupt(const std::string& message) { return {message, 0, CLONE_ERR_CORRUPT}; }

// Calls visit(offset, size) for the extents in pieces of at most a buffer.
template <typename Visit>
Result<void> visit_pieces(std::span<const Extent> extents, Visit&& visit) {
  for (const Extent& extent : extents)
    for (uint64_t at = extent.offset; at < extent.end(); at += kBufferBytes)
      CLONE_TRY(visit(at, std::min(kBufferBytes, extent.end() - at)));
  return {};
}

class FrameReader {
 public:
  explicit FrameReader(int fd) : fd_(fd), context_(ZSTD_createDCtx()), buffer_(ZSTD_DStreamInSize()) {
    ZSTD_DCtx_setParameter(context_.get(), ZSTD_d_windowLogMax, kWindowLog);
  }
  // Less only at the end of the frame.
  Result<size_t> read(std::span<std::byte> into) {
    ZSTD_outBuffer out{into.data(), into.size(), 0};
    while (out.pos < out.size && !ended_) {
      const size_t before = out.pos;
      const size_t left = ZSTD_decompressStream(context_.get(), &out, &in_);
      if (ZSTD_isError(left)) return corrupt(std::string("is damaged: ") + ZSTD_getErrorName(left));
      ended_ = left == 0;
      if (out.pos == before && !ended_ && in_.pos == in_.size && !CLONE_TRY(refill())) return corrupt("ends too early");
    }
    return out.pos;
  }
  // The frame's end has its checksum.
  Result<void> expect_end() {
    std::byte more{};
    if (CLONE_TRY(read({&more, 1})) || in_.pos < in_.size || CLONE_TRY(refill()))
      return corrupt("goes on behind its end");
    return {};
  }

 private:
  // False at the end of the file.
  Result<bool> refill() {
    ssize_t count = 0;
    do count = ::pread(fd_, buffer_.data(), buffer_.size(), static_cast<off_t>(offset_));
    while (count < 0 && errno == EINTR);
    if (count < 0) return system_error();
    offset_ += static_cast<uint64_t>(count);
    in_ = {buffer_.data(), static_cast<size_t>(count), 0};
    return count > 0;
  }

  int fd_;
  uint64_t offset_ = 0;
  std::unique_ptr<ZSTD_DCtx, decltype([](ZSTD_DCtx* context) { ZSTD_freeDCtx(context); })> context_;
  std::vector<std::byte> buffer_;
  ZSTD_inBuffer in_{nullptr, 0, 0};
  bool ended_ = false;
};

}  // namespace

Result<void> compress(int memory_fd, std::span<const Extent> extents, int into_fd) {
  const std::unique_ptr<ZSTD_CCtx, decltype(&ZSTD_freeCCtx)> context(ZSTD_createCCtx(), ZSTD_freeCCtx);
  ZSTD_CCtx_setParameter(context.get(), ZSTD_c_compressionLevel, kLevel);
  ZSTD_CCtx_setParameter(context.get(), ZSTD_c_windowLog, kWindowLog);
  ZSTD_CCtx_setParameter(context.get(), ZSTD_c_checksumFlag, 1);
  std::vector<std::byte> plain(kBufferBytes), compressed(ZSTD_CStreamOutSize());
  uint64_t written_bytes = 0;
  const auto feed = [&](uint64_t size_bytes, ZSTD_EndDirective directive) -> Result<void> {
    ZSTD_inBuffer in{plain.data(), size_bytes, 0};
    for (size_t left = 1; left || in.pos < in.size;) {
      ZSTD_outBuffer out{compressed.data(), compressed.size(), 0};
      left = ZSTD_compressStream2(context.get(), &out, &in, directive);
      if (ZSTD_isError(left)) return Error{std::string("zstd: ") + ZSTD_getErrorName(left)};
      CLONE_TRY(write_at(into_fd, written_bytes, std::span<const std::byte>(compressed).first(out.pos)));
      written_bytes += out.pos;
      if (directive == ZSTD_e_continue) left = 0;
    }
    return {};
  };
  const auto feed_piece = [&](uint64_t at, uint64_t size_bytes) -> Result<void> {
    CLONE_TRY(read_at(memory_fd, at, std::span(plain).first(size_bytes)));
    return feed(size_bytes, ZSTD_e_continue);
  };
  CLONE_TRY(visit_pieces(extents, feed_piece));
  return feed(0, ZSTD_e_end);
}

Result<void> decompress(int compressed_fd, std::span<const Extent> extents, int into_fd) {
  FrameReader frame(compressed_fd);
  std::vector<std::byte> buffer(kBufferBytes);
  const auto write_piece = [&](uint64_t at, uint64_t size_bytes) -> Result<void> {
    const std::span<const std::byte> piece = std::span(buffer).first(size_bytes);
    if (CLONE_TRY(frame.read(std::span(buffer).first(size_bytes))) < size_bytes) return corrupt("ends too early");
    for (uint64_t page = 0, end = 0; page < size_bytes; page = std::max(end, page + kPageBytes)) {
      for (end = page; end < size_bytes && !is_zero_page(piece.data() + end);) end += kPageBytes;
      CLONE_TRY(write_at(into_fd, at + page, piece.subspan(page, end - page)));
    }
    return {};
  };
  CLONE_TRY(visit_pieces(extents, write_piece));
  return frame.expect_end();
}

}  // namespace snapshot_file
