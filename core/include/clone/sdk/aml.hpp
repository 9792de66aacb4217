// SPDX-License-Identifier: Apache-2.0
// AML (ACPI 6.5 §20.2) for clone_host_acpi.add_aml(), as much of it as a few devices with an event take.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace clone_sdk::aml {

// Terms, one behind the other. Names are of four characters.
using Code = std::string;

// PkgLength counts itself; one byte reaches 63, two 4095, which nothing here may exceed.
inline Code sized(std::string_view opcode, const Code& body) {
  if (body.size() + 1 < 0x40) return Code(opcode) + static_cast<char>(body.size() + 1) + body;
  const size_t length = body.size() + 2;
  return Code(opcode) + static_cast<char>(0x40 | (length & 0xf)) + static_cast<char>(length >> 4) + body;
}
inline Code word(uint16_t value) { return {static_cast<char>(value), static_cast<char>(value >> 8)}; }
inline Code dword(uint32_t value) {
  return word(static_cast<uint16_t>(value)) + word(static_cast<uint16_t>(value >> 16));
}
inline Code byte(uint8_t value) {
  const Code number(1, static_cast<char>(value));
  return value < 2 ? number : '\x0a' + number;
}
inline Code text(const char* value) { return std::string("\x0d") + value + '\0'; }

inline Code name(const char* path, const Code& value) { return std::string("\x08") + path + value; }
inline Code device(const char* path, const Code& body) { return sized("\x5b\x82", path + body); }
enum class Serialized : char { no = 0, yes = 8 };
inline Code method(const char* path, unsigned argument_count, const Code& body,
                   Serialized serialized = Serialized::no) {
  return sized("\x14", path + Code(1, static_cast<char>(argument_count | static_cast<unsigned>(serialized))) + body);
}

// §6.4: the _CRS of a device.
inline Code memory(uint32_t start, uint32_t size_bytes) {
  return Code("\x86\x09\x00\x01", 4) + dword(start) + dword(size_bytes);
}
// Of a consumer, edge-triggered, active high, exclusive.
inline Code interrupt(uint32_t gsi) { return Code("\x89\x06\x00\x03\x01", 5) + dword(gsi); }
// Of at most 253 bytes.
inline Code resources(const Code& descriptors) {
  const Code all = descriptors + Code("\x79\x00", 2);
  return name("_CRS", sized("\x11", byte(static_cast<uint8_t>(all.size())) + all));
}

// A Generic Event Device (§5.6.9): an edge of `gsi` is Notify (object, value).
inline Code event_device(const char* path, uint32_t gsi, const char* object, uint8_t value) {
  return device(path, name("_HID", text("ACPI0013")) + name("_UID", text(path)) + resources(interrupt(gsi)) +
                          method("_EVT", 1, '\x86' + Code(object) + byte(value), Serialized::yes));
}

}  // namespace clone_sdk::aml
