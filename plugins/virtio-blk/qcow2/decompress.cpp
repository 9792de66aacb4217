// SPDX-License-Identifier: Apache-2.0
// zlib without its header (RFC 1951), or a Zstandard frame (RFC 8878): the output's size bounds the work.
#include "decompress.hpp"

#include <zlib.h>
#include <zstd.h>

namespace virtio_blk::qcow2 {

namespace {

// QEMU compresses with windows of 4 KiB; any window is read.
bool decompress_zlib(std::span<const std::byte> compressed, std::span<std::byte> cluster) {
  z_stream stream{};
  if (inflateInit2(&stream, -15) != Z_OK) return false;
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(compressed.data()));
  stream.avail_in = static_cast<uInt>(compressed.size());
  stream.next_out = reinterpret_cast<Bytef*>(cluster.data());
  stream.avail_out = static_cast<uInt>(cluster.size());
  const int result = inflate(&stream, Z_FINISH);
  inflateEnd(&stream);
  return (result == Z_STREAM_END || result == Z_BUF_ERROR) && stream.avail_out == 0;
}

bool decompress_zstd(std::span<const std::byte> compressed, std::span<std::byte> cluster) {
  ZSTD_DCtx* context = ZSTD_createDCtx();
  if (!context) return false;
  ZSTD_inBuffer in{compressed.data(), compressed.size(), 0};
  ZSTD_outBuffer out{cluster.data(), cluster.size(), 0};
  bool going = true;
  while (going && out.pos < out.size) {
    const size_t before = in.pos + out.pos;
    const size_t result = ZSTD_decompressStream(context, &out, &in);
    going = !ZSTD_isError(result) && in.pos + out.pos > before;
  }
  ZSTD_freeDCtx(context);
  return out.pos == out.size;
}

}  // namespace

bool decompress(Compression compression, std::span<const std::byte> compressed, std::span<std::byte> cluster) {
  return compression == Compression::zlib ? decompress_zlib(compressed, cluster) : decompress_zstd(compressed, cluster);
}

}  // namespace virtio_blk::qcow2
