// SPDX-License-Identifier: Apache-2.0
// Saved state as tagged, versioned sections.
#pragma once

#include <cstring>
#include <span>
#include <string>
#include <type_traits>

#include "clone/abi/state.h"
#include "clone/sdk/error.hpp"

namespace clone_sdk {

class Writer {
 public:
  explicit Writer(const clone_writer& writer) : writer_(&writer) {}

  Result<void> put_bytes(const char* tag, uint32_t version, std::span<const std::byte> bytes) const {
    ErrorBuffer error;
    return error.result(writer_->put(writer_->context, tag, version, bytes.data(), bytes.size(), error));
  }
  // A struct without padding: every byte of it is state.
  template <typename T>
  requires std::is_trivially_copyable_v<T> && std::has_unique_object_representations_v<T> Result<void> put(
      const char* tag, uint32_t version, const T& value)
  const { return put_bytes(tag, version, std::as_bytes(std::span(&value, 1))); }

 private:
  const clone_writer* writer_;
};

class Reader {
 public:
  struct Section {
    uint32_t version = 0;
    std::span<const std::byte> bytes;
  };

  explicit Reader(const clone_reader& reader) : reader_(&reader) {}

  // A section that must be there. An older or the same version is good, a newer one is refused by name.
  Result<Section> section(const char* tag, uint32_t newest_known) const {
    Section section;
    const void* data = nullptr;
    uint64_t size_bytes = 0;
    ErrorBuffer error;
    const clone_status status = reader_->get(reader_->context, tag, &section.version, &data, &size_bytes, error);
    if (status == CLONE_ERR_NOT_FOUND)
      return Error{std::string("section ") + tag + " is missing", 0, CLONE_ERR_CORRUPT};
    CLONE_TRY(error.result(status));
    if (section.version == 0 || section.version > newest_known)
      return Error{std::string("section ") + tag + " has version " + std::to_string(section.version) +
                       ", known are 1 to " + std::to_string(newest_known),
                   0, CLONE_ERR_CORRUPT};
    section.bytes = {static_cast<const std::byte*>(data), size_bytes};
    return section;
  }
  template <typename T>
  requires std::is_trivially_copyable_v<T> Result<T> get(const char* tag, uint32_t newest_known)
  const {
    const Section section = CLONE_TRY(this->section(tag, newest_known));
    T value;
    if (section.bytes.size() != sizeof value)
      return Error{std::string("section ") + tag + " has " + std::to_string(section.bytes.size()) + " bytes, not " +
                       std::to_string(sizeof value),
                   0, CLONE_ERR_CORRUPT};
    std::memcpy(&value, section.bytes.data(), sizeof value);
    return value;
  }

 private:
  const clone_reader* reader_;
};

}  // namespace clone_sdk
