// SPDX-License-Identifier: Apache-2.0
// .xz through liblzma and .zst through libzstd, into a vector that grows up to a bound.
#include "util/decompress.hpp"

#include <lzma.h>
#include <zstd.h>

#include <algorithm>
#include <memory>

namespace vmm {
namespace {

constexpr size_t first_output_bytes = 65536;
constexpr uint64_t decoder_memory_limit_bytes = 128 << 20;

Error corrupt(std::string_view name, std::string_view format, std::string_view reason) {
  return Error{std::string(name) + ": not a valid " + std::string(format) + " file: " + std::string(reason), EINVAL};
}

Error too_large(std::string_view name, size_t limit_bytes) {
  return Error{std::string(name) + ": unpacks to more than " + std::to_string(limit_bytes) + " bytes", EFBIG};
}

// Room for more output, up to one byte above the bound: that byte tells "too large" from "exactly full".
void grow(std::vector<std::byte>& output, size_t limit_bytes) {
  output.resize(std::min(limit_bytes + 1, std::max(first_output_bytes, output.size() * 2)));
}

std::string_view lzma_message(lzma_ret status) {
  switch (status) {
    case LZMA_BUF_ERROR:
      return "it ends too early";
    case LZMA_FORMAT_ERROR:
      return "unknown header";
    case LZMA_OPTIONS_ERROR:
      return "unsupported options";
    case LZMA_MEMLIMIT_ERROR:
      return "its dictionary is too large";
    case LZMA_MEM_ERROR:
      return "out of memory";
    default:
      return "corrupt data";
  }
}

Result<std::vector<std::byte>> decompress_xz(std::span<const std::byte> input, size_t limit_bytes,
                                             std::string_view name) {
  lzma_stream stream = LZMA_STREAM_INIT;
  if (lzma_stream_decoder(&stream, decoder_memory_limit_bytes, LZMA_CONCATENATED) != LZMA_OK)
    return Error{std::string(name) + ": the xz decoder does not start", ENOMEM};
  const std::unique_ptr<lzma_stream, decltype(&lzma_end)> end(&stream, lzma_end);
  stream.next_in = reinterpret_cast<const uint8_t*>(input.data());
  stream.avail_in = input.size();
  std::vector<std::byte> output;
  for (;;) {
    if (stream.avail_out == 0) {
      const size_t used_bytes = output.size();
      if (used_bytes > limit_bytes) return too_large(name, limit_bytes);
      grow(output, limit_bytes);
      stream.next_out = reinterpret_cast<uint8_t*>(output.data() + used_bytes);
      stream.avail_out = output.size() - used_bytes;
    }
    const lzma_ret status = lzma_code(&stream, LZMA_FINISH);
    if (status == LZMA_STREAM_END) break;
    if (status != LZMA_OK) return corrupt(name, "xz", lzma_message(status));
  }
  output.resize(output.size() - stream.avail_out);
  if (output.size() > limit_bytes) return too_large(name, limit_bytes);
  return output;
}

Result<std::vector<std::byte>> decompress_zstd(std::span<const std::byte> input, size_t limit_bytes,
                                               std::string_view name) {
  const std::unique_ptr<ZSTD_DStream, decltype(&ZSTD_freeDStream)> stream(ZSTD_createDStream(), ZSTD_freeDStream);
  if (!stream) return Error{std::string(name) + ": the zstd decoder does not start", ENOMEM};
  std::vector<std::byte> output;
  // A hint only: the header may lie, so the bound below still holds.
  const unsigned long long hint_bytes = ZSTD_getFrameContentSize(input.data(), input.size());
  if (hint_bytes <= limit_bytes) output.resize(hint_bytes);
  ZSTD_inBuffer in{input.data(), input.size(), 0};
  ZSTD_outBuffer out{output.data(), output.size(), 0};
  for (;;) {
    const size_t read_before = in.pos, written_before = out.pos;
    const size_t status = ZSTD_decompressStream(stream.get(), &out, &in);
    if (ZSTD_isError(status)) return corrupt(name, "zstd", ZSTD_getErrorName(status));
    if (out.pos > limit_bytes) return too_large(name, limit_bytes);
    if (status == 0 && in.pos == in.size) break;
    if (out.pos == out.size) {
      grow(output, limit_bytes);
      out = {output.data(), output.size(), out.pos};
    } else if (in.pos == read_before && out.pos == written_before) {
      return corrupt(name, "zstd", "it ends too early");
    }
  }
  output.resize(out.pos);
  return output;
}

bool starts_with(std::span<const std::byte> input, std::string_view magic) {
  return input.size() >= magic.size() && std::memcmp(input.data(), magic.data(), magic.size()) == 0;
}

}  // namespace

Compression detect_compression(std::span<const std::byte> input) {
  using namespace std::string_view_literals;
  if (starts_with(input,
                  "\xfd"
                  "7zXZ\0"sv))
    return Compression::xz;
  if (starts_with(input, "\x28\xb5\x2f\xfd"sv)) return Compression::zstd;
  if (starts_with(input, "\x1f\x8b"sv)) return Compression::gzip;
  return Compression::none;
}

Result<std::vector<std::byte>> decompress(std::span<const std::byte> input, size_t limit_bytes, std::string_view name) {
  switch (detect_compression(input)) {
    case Compression::xz:
      return decompress_xz(input, limit_bytes, name);
    case Compression::zstd:
      return decompress_zstd(input, limit_bytes, name);
    case Compression::gzip:
      return Error{std::string(name) + ": gzip is not supported (plain, xz and zstd are)", EINVAL};
    case Compression::none:
      break;
  }
  if (input.size() > limit_bytes) return too_large(name, limit_bytes);
  return std::vector<std::byte>(input.begin(), input.end());
}

Result<FileContent> FileContent::load(const std::string& path, size_t limit_bytes) {
  FileContent content;
  Mapping mapping = TRY(map_file(path));
  if (detect_compression(mapping.bytes()) != Compression::none) {
    content.unpacked_ = TRY(decompress(mapping.bytes(), limit_bytes, path));
  } else if (mapping.size_bytes() > limit_bytes) {
    return Error{path + ": larger than " + std::to_string(limit_bytes) + " bytes", EFBIG};
  } else {
    content.mapping_ = std::move(mapping);
  }
  return content;
}

}  // namespace vmm
