// SPDX-License-Identifier: Apache-2.0
// The state of a machine without its memory: bytes under an owner and a tag, each with a version.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "clone/abi/state.h"
#include "util/result.hpp"

namespace vmm {

// Owners beside the devices, which go by the names of their instances.
inline constexpr const char* kCoreSections = "core";
inline constexpr const char* kKvmSections = "kvm";
inline constexpr const char* kPolicySections = "balloon-policy";

class Sections {
 public:
  struct Section {
    uint32_t version = 0;
    std::vector<std::byte> bytes;
    bool operator==(const Section&) const = default;
  };
  using Key = std::pair<std::string, std::string>;  // owner, tag

  // A tag appears once for each owner.
  Result<void> put(std::string_view owner, std::string_view tag, uint32_t version, std::span<const std::byte> bytes);
  template <typename T>
  requires std::is_trivially_copyable_v<T> Result<void> put(std::string_view owner, std::string_view tag,
                                                            uint32_t version, const T& value) {
    return put(owner, tag, version, std::as_bytes(std::span(&value, 1)));
  }

  // An older version than the newest known is good; a missing section, or a newer one, is an error by name.
  Result<std::span<const std::byte>> get(std::string_view owner, std::string_view tag, uint32_t newest_known) const;
  // Of a size that this program was built with.
  template <typename T>
  requires std::is_trivially_copyable_v<T> Result<T> get(std::string_view owner, std::string_view tag,
                                                         uint32_t newest_known)
  const {
    const auto bytes = TRY(get(owner, tag, newest_known));
    if (bytes.size() != sizeof(T)) return wrong_size(owner, tag, bytes.size(), sizeof(T));
    T value;
    std::memcpy(&value, bytes.data(), sizeof value);
    return value;
  }
  // As many values as there are.
  template <typename T>
  requires std::is_trivially_copyable_v<T> Result<std::vector<T>> get_list(std::string_view owner, std::string_view tag,
                                                                           uint32_t newest_known)
  const {
    const auto bytes = TRY(get(owner, tag, newest_known));
    if (bytes.size() % sizeof(T) != 0) return wrong_size(owner, tag, bytes.size(), sizeof(T));
    std::vector<T> values(bytes.size() / sizeof(T));
    if (!values.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }

  bool has(std::string_view owner) const;
  const std::map<Key, Section>& all() const { return all_; }
  bool operator==(const Sections&) const = default;

 private:
  static Error wrong_size(std::string_view owner, std::string_view tag, size_t size_bytes, size_t unit_bytes);

  std::map<Key, Section> all_;
};

// What one owner writes and reads through the plugin interface.
class SectionWriter {
 public:
  SectionWriter(Sections& sections, std::string owner);
  SectionWriter(const SectionWriter&) = delete;
  SectionWriter& operator=(const SectionWriter&) = delete;
  const clone_writer& raw() const { return raw_; }

 private:
  Sections& sections_;
  std::string owner_;
  clone_writer raw_;
};

// An error by the name of a section of that owner that is none of these: its meaning would be lost.
Result<void> check_known(const Sections& sections, std::string_view owner,
                         const std::set<std::string, std::less<>>& known);

class SectionReader {
 public:
  SectionReader(const Sections& sections, std::string owner);
  SectionReader(const SectionReader&) = delete;
  SectionReader& operator=(const SectionReader&) = delete;
  const clone_reader& raw() const { return raw_; }
  // An error when there is a section that nobody has asked for: its meaning would be lost.
  Result<void> check_all_read() const;

 private:
  const Sections& sections_;
  std::string owner_;
  std::set<std::string, std::less<>> read_;
  clone_reader raw_;
};

}  // namespace vmm
