// SPDX-License-Identifier: Apache-2.0
// Encodes AML terms and resource descriptors.
#include "boot/aml.hpp"

#include <iterator>

namespace vmm::aml {
namespace {

// Opcodes (ACPI 6.5 §20.2, §20.3).
constexpr uint8_t kZero = 0x00;
constexpr uint8_t kOne = 0x01;
constexpr uint8_t kName = 0x08;
constexpr uint8_t kBytePrefix = 0x0a;
constexpr uint8_t kWordPrefix = 0x0b;
constexpr uint8_t kDwordPrefix = 0x0c;
constexpr uint8_t kStringPrefix = 0x0d;
constexpr uint8_t kQwordPrefix = 0x0e;
constexpr uint8_t kScope = 0x10;
constexpr uint8_t kBuffer = 0x11;
constexpr uint8_t kPackage = 0x12;
constexpr uint8_t kVariablePackage = 0x13;
constexpr uint8_t kMethod = 0x14;
constexpr uint8_t kDualName = 0x2e;
constexpr uint8_t kMultiName = 0x2f;
constexpr uint8_t kExtended = 0x5b;
constexpr uint8_t kExtendedDevice = 0x82;
constexpr uint8_t kNotify = 0x86;
constexpr uint8_t kReturn = 0xa4;

void put(Bytes& bytes, uint64_t value, unsigned size_bytes) {
  for (unsigned index = 0; index < size_bytes; ++index) bytes.push_back(static_cast<std::byte>(value >> 8 * index));
}

void put(Bytes& bytes, std::span<const std::byte> more) { bytes.insert(bytes.end(), more.begin(), more.end()); }

void put(Bytes& bytes, std::string_view text) {
  for (char character : text) bytes.push_back(static_cast<std::byte>(character));
}

// PkgLength (§20.2.4) counts itself: 6 bits in one byte, or 4 bits and one to three bytes more.
void put_with_length(Bytes& bytes, const Bytes& body) {
  const uint64_t size_bytes = body.size();
  if (size_bytes + 1 < 1 << 6) {
    put(bytes, size_bytes + 1, 1);
  } else {
    unsigned following = 1;
    while (size_bytes + 1 + following >= uint64_t{1} << (4 + 8 * following)) ++following;
    const uint64_t length = size_bytes + 1 + following;
    put(bytes, following << 6 | (length & 0xf), 1);
    put(bytes, length >> 4, following);
  }
  put(bytes, body);
}

Bytes sized(std::initializer_list<uint8_t> opcode, const Bytes& body) {
  Bytes bytes;
  for (uint8_t byte : opcode) put(bytes, byte, 1);
  put_with_length(bytes, body);
  return bytes;
}

// The flags of both interrupt descriptors have the same meanings in different places.
bool is_edge(Trigger trigger) { return trigger == Trigger::edge; }
bool is_low(Polarity polarity) { return polarity == Polarity::active_low; }
bool is_shared(Sharing sharing) { return sharing == Sharing::shared; }

}  // namespace

Bytes join(std::span<const Bytes> terms) {
  Bytes bytes;
  for (const Bytes& term : terms) put(bytes, term);
  return bytes;
}
Bytes join(std::initializer_list<Bytes> terms) { return join(std::span(terms.begin(), terms.size())); }

Bytes name_string(std::string_view path) {
  Bytes bytes;
  while (!path.empty() && (path[0] == '\\' || path[0] == '^')) {
    put(bytes, path.substr(0, 1));
    path.remove_prefix(1);
  }
  Bytes segments;
  while (!path.empty()) {
    const size_t length = path.find('.');
    const std::string_view segment = path.substr(0, length);
    put(segments, segment.substr(0, 4));
    for (size_t size = segment.size(); size < 4; ++size) put(segments, "_");
    path.remove_prefix(length == path.npos ? path.size() : length + 1);
  }
  const size_t count = segments.size() / 4;
  if (count == 0) {
    put(bytes, kZero, 1);
  } else if (count == 2) {
    put(bytes, kDualName, 1);
  } else if (count > 2) {
    put(bytes, kMultiName, 1);
    put(bytes, count, 1);
  }
  put(bytes, segments);
  return bytes;
}

Bytes integer(uint64_t value) {
  Bytes bytes;
  const auto prefixed = [&](uint8_t prefix, unsigned size_bytes) {
    put(bytes, prefix, 1);
    put(bytes, value, size_bytes);
  };
  if (value <= 1) {
    put(bytes, value ? kOne : kZero, 1);
  } else if (value <= 0xff) {
    prefixed(kBytePrefix, 1);
  } else if (value <= 0xffff) {
    prefixed(kWordPrefix, 2);
  } else if (value <= 0xffff'ffff) {
    prefixed(kDwordPrefix, 4);
  } else {
    prefixed(kQwordPrefix, 8);
  }
  return bytes;
}

Bytes string(std::string_view text) {
  Bytes bytes;
  put(bytes, kStringPrefix, 1);
  put(bytes, text);
  put(bytes, 0, 1);
  return bytes;
}

// §19.3.4: five bits for each letter, four for each digit, most significant byte first.
Bytes eisa_id(std::string_view id) {
  uint32_t code = 0;
  for (char character : id.substr(0, 3)) code = code << 5 | static_cast<uint32_t>(character - 0x40);
  for (char character : id.substr(3)) {
    const int digit = character <= '9' ? character - '0' : (character | 0x20) - 'a' + 10;
    code = code << 4 | static_cast<uint32_t>(digit);
  }
  Bytes bytes;
  put(bytes, kDwordPrefix, 1);
  put(bytes, __builtin_bswap32(code), 4);
  return bytes;
}

Bytes buffer(std::span<const std::byte> content) {
  Bytes body = integer(content.size());
  put(body, content);
  return sized({kBuffer}, body);
}

Bytes package(std::span<const Bytes> elements) {
  const bool counted_by_byte = elements.size() <= 0xff;
  Bytes body;
  if (counted_by_byte) {
    put(body, elements.size(), 1);
  } else {
    body = integer(elements.size());
  }
  put(body, join(elements));
  return sized({counted_by_byte ? kPackage : kVariablePackage}, body);
}
Bytes package(std::initializer_list<Bytes> elements) { return package(std::span(elements.begin(), elements.size())); }

Bytes name(std::string_view path, const Bytes& value) {
  Bytes bytes;
  put(bytes, kName, 1);
  put(bytes, name_string(path));
  put(bytes, value);
  return bytes;
}

Bytes scope(std::string_view path, const Bytes& body) { return sized({kScope}, join({name_string(path), body})); }

Bytes device(std::string_view path, const Bytes& body) {
  return sized({kExtended, kExtendedDevice}, join({name_string(path), body}));
}

Bytes method(std::string_view path, unsigned argument_count, const Bytes& body, Serialized serialized) {
  Bytes content = name_string(path);
  put(content, (argument_count & 7) | (serialized == Serialized::yes ? 8u : 0u), 1);
  put(content, body);
  return sized({kMethod}, content);
}

Bytes return_value(const Bytes& value) {
  Bytes bytes;
  put(bytes, kReturn, 1);
  put(bytes, value);
  return bytes;
}

Bytes notify(std::string_view object, uint64_t value) {
  Bytes bytes;
  put(bytes, kNotify, 1);
  put(bytes, name_string(object));
  put(bytes, integer(value));
  return bytes;
}

Bytes resource_template(std::span<const Bytes> descriptors) {
  Bytes content = join(descriptors);
  put(content, 0x79, 1);  // end tag, with the checksum 0 that counts as right
  put(content, 0, 1);
  return buffer(content);
}
Bytes resource_template(std::initializer_list<Bytes> descriptors) {
  return resource_template(std::span(descriptors.begin(), descriptors.size()));
}

Bytes io_ports(uint16_t start, uint8_t count) {
  Bytes bytes;
  put(bytes, 0x47, 1);
  put(bytes, 1, 1);  // all 16 address lines decoded
  put(bytes, start, 2);
  put(bytes, start, 2);
  put(bytes, 1, 1);  // alignment
  put(bytes, count, 1);
  return bytes;
}

Bytes memory32_fixed(uint32_t start, uint32_t size_bytes) {
  Bytes bytes;
  put(bytes, 0x86, 1);
  put(bytes, 9, 2);
  put(bytes, 1, 1);  // writable
  put(bytes, start, 4);
  put(bytes, size_bytes, 4);
  return bytes;
}

Bytes address_range(AddressSpace space, AddressWidth width, AddressUse use, uint64_t start, uint64_t length) {
  const unsigned size_bytes = static_cast<unsigned>(width);
  Bytes bytes;
  put(bytes, width == AddressWidth::word ? 0x88 : width == AddressWidth::dword ? 0x87 : 0x8a, 1);
  put(bytes, 3 + 5 * size_bytes, 2);
  put(bytes, static_cast<unsigned>(space), 1);
  put(bytes, 0xc | (use == AddressUse::consumed ? 1 : 0), 1);  // minimum and maximum fixed
  // Memory: writable, not cacheable. I/O: the whole range, ISA or not.
  put(bytes, space == AddressSpace::memory ? 1 : space == AddressSpace::io ? 3 : 0, 1);
  put(bytes, 0, size_bytes);  // granularity
  put(bytes, start, size_bytes);
  put(bytes, start + length - 1, size_bytes);
  put(bytes, 0, size_bytes);  // translation
  put(bytes, length, size_bytes);
  return bytes;
}

Bytes interrupt(uint32_t gsi, Trigger trigger, Polarity polarity, Sharing sharing) {
  Bytes bytes;
  put(bytes, 0x89, 1);
  put(bytes, 6, 2);
  put(bytes, 1u | is_edge(trigger) << 1 | is_low(polarity) << 2 | is_shared(sharing) << 3, 1);
  put(bytes, 1, 1);
  put(bytes, gsi, 4);
  return bytes;
}

Bytes legacy_irq(unsigned irq, Trigger trigger, Polarity polarity, Sharing sharing) {
  Bytes bytes;
  put(bytes, 0x23, 1);
  put(bytes, 1u << irq, 2);
  put(bytes, 0u | is_edge(trigger) | is_low(polarity) << 3 | is_shared(sharing) << 4, 1);
  return bytes;
}

}  // namespace vmm::aml
