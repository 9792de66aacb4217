// SPDX-License-Identifier: Apache-2.0
// Files that may be stored compressed (.xz, .zst): their plain content, with a bound on its size.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "util/mapping.hpp"
#include "util/result.hpp"

namespace vmm {

enum class Compression { none, xz, zstd, gzip };

// By the magic number at the start, not by the file's name.
Compression detect_compression(std::span<const std::byte> input);

// One whole .xz or .zst file (concatenated streams too). Truncated, corrupt or gzip input, and content of more than
// `limit_bytes`, is an error that begins with `name`. Plain input is copied.
Result<std::vector<std::byte>> decompress(std::span<const std::byte> input, size_t limit_bytes, std::string_view name);

// The plain content of a file: the file itself, mapped, where it is not compressed.
class FileContent {
 public:
  static Result<FileContent> load(const std::string& path, size_t limit_bytes);
  std::span<const std::byte> bytes() const { return mapping_.data() ? mapping_.bytes() : unpacked_; }

 private:
  Mapping mapping_;
  std::vector<std::byte> unpacked_;
};

}  // namespace vmm
