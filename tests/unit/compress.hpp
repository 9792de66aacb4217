// SPDX-License-Identifier: Apache-2.0
// Compressed test data, made by the libraries themselves.
#pragma once

#include <doctest/doctest.h>
#include <lzma.h>
#include <zstd.h>

#include <string>
#include <string_view>

inline std::string compress_xz(std::string_view plain) {
  std::string packed(lzma_stream_buffer_bound(plain.size()), '\0');
  size_t used = 0;
  REQUIRE(lzma_easy_buffer_encode(6, LZMA_CHECK_CRC32, nullptr, reinterpret_cast<const uint8_t*>(plain.data()),
                                  plain.size(), reinterpret_cast<uint8_t*>(packed.data()), &used,
                                  packed.size()) == LZMA_OK);
  packed.resize(used);
  return packed;
}

enum class ContentSize { stated, unknown };

inline std::string compress_zstd(std::string_view plain, ContentSize content_size = ContentSize::stated) {
  ZSTD_CCtx* context = ZSTD_createCCtx();
  ZSTD_CCtx_setParameter(context, ZSTD_c_contentSizeFlag, content_size == ContentSize::stated);
  ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, 1);
  std::string packed(ZSTD_compressBound(plain.size()), '\0');
  const size_t used = ZSTD_compress2(context, packed.data(), packed.size(), plain.data(), plain.size());
  ZSTD_freeCCtx(context);
  REQUIRE_FALSE(ZSTD_isError(used));
  packed.resize(used);
  return packed;
}
