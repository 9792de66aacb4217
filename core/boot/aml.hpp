// SPDX-License-Identifier: Apache-2.0
// ACPI machine language, built from the inside out: each function returns the bytes of one term (ACPI 6.5 §20).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace vmm::aml {

using Bytes = std::vector<std::byte>;

// Terms one after another: a body, or an argument list.
Bytes join(std::span<const Bytes> terms);
Bytes join(std::initializer_list<Bytes> terms);

// Names: "\\_SB.PCI0", "^DEV0", "_HID". Segments of up to 4 characters from A-Z, 0-9 and _, which is what the caller
// has to make sure of.
Bytes name_string(std::string_view path);

// Data.
Bytes integer(uint64_t value);
Bytes string(std::string_view text);  // without NUL characters
Bytes eisa_id(std::string_view id);   // "PNP0501": three capital letters, four hexadecimal digits
Bytes buffer(std::span<const std::byte> content);
Bytes package(std::span<const Bytes> elements);
Bytes package(std::initializer_list<Bytes> elements);

// Objects.
Bytes name(std::string_view path, const Bytes& value);
Bytes scope(std::string_view path, const Bytes& body);
Bytes device(std::string_view path, const Bytes& body);
enum class Serialized { no, yes };
Bytes method(std::string_view path, unsigned argument_count, const Bytes& body, Serialized serialized = Serialized::no);

// Statements.
Bytes return_value(const Bytes& value);
Bytes notify(std::string_view object, uint64_t value);

// Resources (ACPI 6.5 §6.4): descriptors, which resource_template() makes the buffer of a _CRS of.
enum class Trigger { edge, level };
enum class Polarity { active_high, active_low };
enum class Sharing { exclusive, shared };
enum class AddressSpace { memory, io, bus_number };
enum class AddressWidth { word = 2, dword = 4, qword = 8 };
// Consumed by the device itself, or handed on to the devices behind it (the windows of a bridge).
enum class AddressUse { consumed, produced };

Bytes resource_template(std::span<const Bytes> descriptors);
Bytes resource_template(std::initializer_list<Bytes> descriptors);
Bytes io_ports(uint16_t start, uint8_t count);
Bytes memory32_fixed(uint32_t start, uint32_t size_bytes);
// A fixed range of `length` from `start`; both have to fit the width.
Bytes address_range(AddressSpace space, AddressWidth width, AddressUse use, uint64_t start, uint64_t length);
Bytes interrupt(uint32_t gsi, Trigger trigger, Polarity polarity, Sharing sharing = Sharing::exclusive);
Bytes legacy_irq(unsigned irq, Trigger trigger, Polarity polarity, Sharing sharing = Sharing::exclusive);  // 0 to 15

}  // namespace vmm::aml
