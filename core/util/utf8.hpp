// SPDX-License-Identifier: Apache-2.0
// Text for JSON and for terminals, from bytes that a guest or a file may have chosen.
#pragma once

#include <string>
#include <string_view>

namespace vmm {

// The text with U+FFFD in place of every byte that is not part of valid UTF-8 (RFC 3629).
std::string valid_utf8(std::string_view bytes);

// The same with '?' in place of what a terminal would obey: control characters but line feeds.
std::string printable(std::string_view bytes);

}  // namespace vmm
