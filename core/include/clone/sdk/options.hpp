// SPDX-License-Identifier: Apache-2.0
// Option tables written down as constants, and the values a device is configured with.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "clone/abi/descriptor.h"

namespace clone_sdk {

// A row of an option table: `static constexpr clone_option path = path_option("path", …);`
constexpr clone_option make_option(uint32_t type, const char* name, const char* default_value, const char* help,
                                   uint64_t minimum = 0, uint64_t maximum = 0, const char* choices = nullptr,
                                   uint32_t flags = 0) {
  return {sizeof(clone_option), type, flags, 0, name, default_value, help, minimum, maximum, choices};
}
constexpr clone_option text_option(const char* name, const char* default_value, const char* help,
                                   uint64_t longest_bytes = 0) {
  return make_option(CLONE_OPTION_TEXT, name, default_value, help, 0, longest_bytes);
}
constexpr clone_option path_option(const char* name, const char* default_value, const char* help) {
  return make_option(CLONE_OPTION_PATH, name, default_value, help);
}
// A path, or one of the words: "none|memory".
constexpr clone_option path_or_word_option(const char* name, const char* default_value, const char* help,
                                           const char* words) {
  return make_option(CLONE_OPTION_PATH, name, default_value, help, 0, 0, words);
}
constexpr clone_option bool_option(const char* name, const char* default_value, const char* help) {
  return make_option(CLONE_OPTION_BOOL, name, default_value, help);
}
constexpr clone_option number_option(const char* name, const char* default_value, const char* help, uint64_t minimum,
                                     uint64_t maximum) {
  return make_option(CLONE_OPTION_NUMBER, name, default_value, help, minimum, maximum);
}
constexpr clone_option size_option(const char* name, const char* default_value, const char* help, uint64_t minimum,
                                   uint64_t maximum) {
  return make_option(CLONE_OPTION_SIZE, name, default_value, help, minimum, maximum);
}
constexpr clone_option choice_option(const char* name, const char* default_value, const char* help,
                                     const char* choices) {
  return make_option(CLONE_OPTION_CHOICE, name, default_value, help, 0, 0, choices);
}
constexpr clone_option required(clone_option option) {
  option.flags |= CLONE_OPTION_REQUIRED;
  return option;
}

// The checked values. Strings last until configure() returns.
class Options {
 public:
  explicit Options(const clone_options& options) : options_(&options) {}

  // Asking for an option that is not in the device's table is a bug in the device: it reads as unset.
  std::optional<std::string_view> text(std::string_view name) const {
    const clone_option_value* value = find(name);
    if (!value || !value->text) return std::nullopt;
    return value->text;
  }
  uint64_t number(std::string_view name, uint64_t if_unset = 0) const {
    const clone_option_value* value = find(name);
    return value && value->text ? value->number : if_unset;
  }
  bool flag(std::string_view name) const { return number(name) != 0; }

 private:
  const clone_option_value* find(std::string_view name) const {
    for (uint32_t i = 0; i < options_->count; ++i)
      if (name == options_->values[i]->name) return options_->values[i];
    return nullptr;
  }

  const clone_options* options_;
};

}  // namespace clone_sdk
