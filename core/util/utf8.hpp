// SPDX-License-Identifier: Apache-2.0
// Text for JSON, from bytes that a guest may have chosen.
#pragma once

#include <string>
#include <string_view>

namespace vmm {

// The text with U+FFFD in place of every byte that is not part of valid UTF-8 (RFC 3629).
std::string valid_utf8(std::string_view bytes);

}  // namespace vmm
