// SPDX-License-Identifier: Apache-2.0
// The parameters of a command: a flat JSON object of strings, whole numbers and truth values. By hand: Boost.JSON would
// make the plugin several times as large.
#pragma once

#include <charconv>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <variant>

#include "clone/sdk/result.hpp"

using Parameter = std::variant<std::string, uint64_t, bool>;
using Parameters = std::map<std::string, Parameter, std::less<>>;

class ParameterParser {
 public:
  static clone_sdk::Result<Parameters> parse(std::string_view json) {
    Parameters parameters;
    ParameterParser parser(json);
    if (!parser.object(parameters))
      return clone_sdk::Error{"the parameters are no JSON object of strings, whole numbers, true and false"};
    return parameters;
  }

 private:
  explicit ParameterParser(std::string_view json) : rest_(json) {}

  bool take(std::string_view token) {
    rest_.remove_prefix(std::min(rest_.find_first_not_of(" \t\r\n"), rest_.size()));
    if (!rest_.starts_with(token)) return false;
    rest_.remove_prefix(token.size());
    return true;
  }
  bool object(Parameters& parameters) {
    if (!take("{")) return false;
    if (!take("}")) {
      do {
        std::string name;
        Parameter value;
        if (!text(name) || !take(":") || !this->value(value)) return false;
        if (!parameters.emplace(std::move(name), std::move(value)).second) return false;
      } while (take(","));
      if (!take("}")) return false;
    }
    return take("") && rest_.empty();
  }
  bool value(Parameter& value) {
    if (take("true")) return value = true, true;
    if (take("false")) return value = false, true;
    if (take("\"")) {
      rest_ = {rest_.data() - 1, rest_.size() + 1};
      return text(value.emplace<std::string>());
    }
    const auto [end, error] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), value.emplace<uint64_t>());
    if (error != std::errc()) return false;
    rest_.remove_prefix(static_cast<size_t>(end - rest_.data()));
    return true;
  }
  // Of the escapes those that stand for themselves: no name, address or number here needs another.
  bool text(std::string& text) {
    if (!take("\"")) return false;
    while (!rest_.empty()) {
      char letter = rest_.front();
      rest_.remove_prefix(1);
      if (letter == '"') return true;
      if (static_cast<unsigned char>(letter) < ' ') return false;
      if (letter == '\\') {
        if (rest_.empty() || std::string_view("\"\\/").find(rest_.front()) == std::string_view::npos) return false;
        letter = rest_.front();
        rest_.remove_prefix(1);
      }
      text += letter;
    }
    return false;
  }

  std::string_view rest_;
};
