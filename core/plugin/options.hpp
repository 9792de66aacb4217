// SPDX-License-Identifier: Apache-2.0
// What a user wrote for a plugin's options, checked against the table that the plugin declares.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "clone/abi/descriptor.h"
#include "util/result.hpp"

namespace vmm {

using KeyValues = std::vector<std::pair<std::string, std::string>>;

// "name,key=value,key=a,,b": the name and its options; a doubled comma stands for one, a key alone for key=on.
struct NamedOptions {
  std::string name;
  KeyValues options;
};
Result<NamedOptions> parse_named_options(std::string_view text);

// Whether it is one of the words that a path option takes besides paths.
bool is_word_of(const clone_option& option, std::string_view text);

// The same text again, for messages and for a profile.
std::string quote_commas(std::string_view value);

// "512", "64K", "2G", "0x1000": bytes or a number. Suffixes count in 1024s and are for sizes only.
enum class NumberKind { plain, bytes };
Result<uint64_t> parse_number(std::string_view text, NumberKind kind);

// How a size is shown: "512M", "64K", "1000".
std::string format_size(uint64_t bytes);

// A device's option values: what was given, the defaults for the rest. Every mistake is reported, by name, with what
// was given and what is allowed, before anything is opened. `raw()` stays valid as long as this object.
class OptionValues {
 public:
  static Result<OptionValues> check(const clone_descriptor& descriptor, const KeyValues& given);
  const clone_options& raw() const { return *raw_; }

 private:
  struct Storage;
  std::shared_ptr<Storage> storage_;
  const clone_options* raw_ = nullptr;
};

// "path=FILE (required): …" and the like: a line for a person, for help and inspect.
std::string describe_option_type(const clone_option& option);

}  // namespace vmm
