// SPDX-License-Identifier: Apache-2.0
// A memory mapping that unmaps itself, and read-only mapped files.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <span>
#include <string>
#include <utility>

#include "util/result.hpp"

namespace vmm {

class Mapping {
 public:
  Mapping() = default;
  Mapping(void* start, size_t size_bytes) : start_(static_cast<std::byte*>(start)), size_bytes_(size_bytes) {}
  Mapping(Mapping&& other) noexcept
      : start_(std::exchange(other.start_, nullptr)), size_bytes_(std::exchange(other.size_bytes_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept {
    if (this != &other) {
      reset();
      start_ = std::exchange(other.start_, nullptr);
      size_bytes_ = std::exchange(other.size_bytes_, 0);
    }
    return *this;
  }
  ~Mapping() { reset(); }

  std::byte* data() const { return start_; }
  size_t size_bytes() const { return size_bytes_; }
  std::span<const std::byte> bytes() const { return {start_, size_bytes_}; }
  void reset() {
    if (start_) ::munmap(std::exchange(start_, nullptr), std::exchange(size_bytes_, 0));
  }

 private:
  std::byte* start_ = nullptr;
  size_t size_bytes_ = 0;
};

enum class ReadAhead { whole_file, nothing };

// A regular file, mapped read-only. An empty file is an error: nothing we map may be empty. Errors name the path.
Result<Mapping> map_file(const std::string& path, ReadAhead read_ahead = ReadAhead::whole_file);

}  // namespace vmm
