// SPDX-License-Identifier: Apache-2.0
// The requests of the protocol as structures: bounded, NUL-terminated, checked. Needs no C library and calls nothing.
#pragma once

#include "protocol.hpp"
#include "text.hpp"

namespace agent_protocol {

constexpr size_t kPathBytes = 4096;  // with the NUL, as the kernel takes them

// Strings of one payload, each with a NUL: they have four bytes of length there, so they fit.
class Strings {
 public:
  void clear() { used_ = 0; }
  // Null if the string has a NUL within, which no argument, variable or path can have.
  const char* take(Reader& reader) {
    const Reader::Text text = reader.text();
    if (reader.failed() || text.size_bytes >= sizeof bytes_ - used_) return nullptr;
    char* const start = bytes_ + used_;
    for (size_t i = 0; i < text.size_bytes; ++i) {
      if (text.data[i] == 0) return nullptr;
      start[i] = text.data[i];
    }
    start[text.size_bytes] = 0;
    used_ += text.size_bytes + 1;
    return start;
  }

 private:
  char bytes_[kMaxPayloadBytes];
  size_t used_ = 0;
};

struct ExecRequest {
  static constexpr size_t kMostWords = kMaxPayloadBytes / 4;

  uint32_t flags;
  uint16_t rows, columns;
  const char* user;
  const char* directory;
  size_t argument_count, variable_count;
  // A free place before the first argument, and a null after the last.
  const char* argument_places[kMostWords + 2];
  const char* variables[kMostWords + 1];  // null after the last
  Strings strings;

  const char** arguments() { return argument_places + 1; }

  bool parse(Reader reader) {
    strings.clear();
    flags = reader.u32();
    rows = reader.u16();
    columns = reader.u16();
    user = strings.take(reader);
    directory = user ? strings.take(reader) : nullptr;
    if (!directory) return false;
    if (!parse_words(reader, arguments(), argument_count) || argument_count == 0 || arguments()[0][0] == 0)
      return false;
    if (!parse_words(reader, variables, variable_count)) return false;
    for (size_t i = 0; i < variable_count; ++i)
      if (!is_variable(variables[i])) return false;
    return true;
  }

 private:
  bool parse_words(Reader& reader, const char** words, size_t& count) {
    count = reader.u32();
    if (reader.failed() || count > kMostWords) return false;
    for (size_t i = 0; i < count; ++i)
      if (!(words[i] = strings.take(reader))) return false;
    words[count] = nullptr;
    return true;
  }
  static bool is_variable(const char* text) {
    if (*text == '=') return false;
    while (*text != 0 && *text != '=') ++text;
    return *text == '=';
  }
};

struct IdentityRequest {
  uint32_t fields;
  const char* hostname;
  const char* address;
  const char* gateway;
  uint64_t cid;
  Reader::Text entropy;  // within the payload
  uint64_t clock_ns;
  Strings strings;

  bool parse(Reader reader) {
    constexpr uint32_t known = kIdentityHostname | kIdentityAddress | kIdentityCid | kIdentityEntropy | kIdentityClock;
    strings.clear();
    fields = reader.u32();
    if (fields & ~known) return false;
    if ((fields & kIdentityHostname) && !(hostname = strings.take(reader))) return false;
    if ((fields & kIdentityAddress) && !(address = strings.take(reader))) return false;
    if ((fields & kIdentityAddress) && !(gateway = strings.take(reader))) return false;
    if (fields & kIdentityCid) cid = reader.u64();
    if (fields & kIdentityEntropy) entropy = reader.text();
    if (fields & kIdentityClock) clock_ns = reader.u64();
    return !reader.failed();
  }
};

struct CopyRequest {
  uint32_t flags;
  const char* path;  // the target, or the source
  const char* name;  // of copy_in: "" takes the target as it is
  Strings strings;

  bool parse(Reader reader) {
    strings.clear();
    flags = reader.u32();
    if (!(path = strings.take(reader)) || path[0] != '/') return false;
    name = "";
    if (reader.left_bytes() > 0 && !(name = strings.take(reader))) return false;
    for (const char* c = name; *c != 0; ++c)
      if (*c == '/') return false;
    return !equal(name, ".") && !equal(name, "..") && length(path) + length(name) + 2 <= kPathBytes;
  }
};

// Whether a relative path stays below where it starts: no "..", ".", empty part or leading '/'. "" is the start itself.
static inline bool is_below(const char* path) {
  if (*path == 0) return true;
  for (;;) {
    const char* const part = path;
    while (*path != 0 && *path != '/') ++path;
    const size_t size = static_cast<size_t>(path - part);
    if (size == 0 || size > 255) return false;
    if (part[0] == '.' && (size == 1 || (size == 2 && part[1] == '.'))) return false;
    if (*path++ == 0) return true;
  }
}

struct Entry {
  uint32_t mode, uid, gid;
  uint64_t mtime_s;  // two's complement
  uint32_t mtime_ns;
  uint64_t size_bytes;
  const char* path;
  const char* link_target;
  Strings strings;

  bool parse(Reader reader) {
    strings.clear();
    mode = reader.u32();
    uid = reader.u32();
    gid = reader.u32();
    mtime_s = reader.u64();
    mtime_ns = reader.u32();
    size_bytes = reader.u64();
    if (!(path = strings.take(reader)) || !(link_target = strings.take(reader))) return false;
    return mtime_ns < 1000000000 && length(path) < kPathBytes && length(link_target) < kPathBytes && is_below(path);
  }
};

struct Address {
  uint8_t bytes[4];
  uint32_t prefix_bits;

  // "192.0.2.5/24", or without a prefix "192.0.2.5".
  bool parse(const char* text, bool has_prefix) {
    for (int i = 0; i < 4; ++i) {
      uint32_t value = 0;
      if (!parse_part(text, 255, value)) return false;
      bytes[i] = static_cast<uint8_t>(value);
      if (i < 3 && *text++ != '.') return false;
    }
    if (!has_prefix) return *text == 0;
    return *text++ == '/' && parse_part(text, 32, prefix_bits) && *text == 0;
  }

 private:
  static bool parse_part(const char*& text, uint32_t most, uint32_t& value) {
    const char* const start = text;
    for (value = 0; *text >= '0' && *text <= '9' && text - start < 3; ++text)
      value = value * 10 + static_cast<uint32_t>(*text - '0');
    return text != start && value <= most;
  }
};

}  // namespace agent_protocol
