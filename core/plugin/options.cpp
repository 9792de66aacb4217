// SPDX-License-Identifier: Apache-2.0
// Parses and checks option texts.
#include "plugin/options.hpp"

#include <algorithm>
#include <charconv>
#include <deque>
#include <limits>

namespace vmm {
namespace {

constexpr uint64_t kLongestText = 4096;

std::vector<std::string_view> choices_of(const clone_option& option) {
  std::vector<std::string_view> choices;
  std::string_view rest = option.choices ? option.choices : "";
  while (!rest.empty()) {
    const size_t end = rest.find('|');
    choices.push_back(rest.substr(0, end));
    rest.remove_prefix(end == std::string_view::npos ? rest.size() : end + 1);
  }
  return choices;
}

std::string range_of(const clone_option& option) {
  auto show = [&](uint64_t value) {
    return option.type == CLONE_OPTION_SIZE ? format_size(value) : std::to_string(value);
  };
  if (option.maximum == 0) return "at least " + show(option.minimum);
  return show(option.minimum) + " to " + show(option.maximum);
}

// What the option accepts, as an error message ends.
std::string allowed(const clone_option& option) {
  switch (option.type) {
    case CLONE_OPTION_BOOL:
      return "allowed are on and off";
    case CLONE_OPTION_NUMBER:
      return "allowed is a number, " + range_of(option);
    case CLONE_OPTION_SIZE:
      return "allowed is a size such as 64K or 2G, " + range_of(option);
    case CLONE_OPTION_CHOICE: {
      std::string text = "allowed are ";
      const auto choices = choices_of(option);
      for (size_t i = 0; i < choices.size(); ++i)
        text += (i == 0 ? "" : i + 1 == choices.size() ? " and " : ", ") + std::string(choices[i]);
      return text;
    }
    default:
      return "allowed is a text of at most " + std::to_string(option.maximum ? option.maximum : kLongestText) +
             " bytes";
  }
}

Result<uint64_t> parse_value(const clone_option& option, const std::string& text) {
  const Error wrong{std::string(option.name) + "=" + text + ": " + allowed(option)};
  switch (option.type) {
    case CLONE_OPTION_BOOL:
      for (const char* yes : {"on", "yes", "true", "1"})
        if (text == yes) return uint64_t{1};
      for (const char* no : {"off", "no", "false", "0"})
        if (text == no) return uint64_t{0};
      return wrong;
    case CLONE_OPTION_NUMBER:
    case CLONE_OPTION_SIZE: {
      auto number = parse_number(text, option.type == CLONE_OPTION_SIZE ? NumberKind::bytes : NumberKind::plain);
      if (!number.ok() || *number < option.minimum || (option.maximum != 0 && *number > option.maximum)) return wrong;
      return *number;
    }
    case CLONE_OPTION_CHOICE: {
      const auto choices = choices_of(option);
      const auto found = std::find(choices.begin(), choices.end(), text);
      if (found == choices.end()) return wrong;
      return static_cast<uint64_t>(found - choices.begin());
    }
    default:
      if (text.size() > (option.maximum ? option.maximum : kLongestText) || text.find('\0') != std::string::npos)
        return Error{std::string(option.name) + ": " + std::to_string(text.size()) + " bytes given; " +
                     allowed(option)};
      return uint64_t{0};
  }
}

std::vector<const clone_option*> table_of(const clone_descriptor& descriptor) {
  std::vector<const clone_option*> table;
  for (const clone_option* const* row = descriptor.options; row && *row; ++row) table.push_back(*row);
  return table;
}

}  // namespace

Result<NamedOptions> parse_named_options(std::string_view text) {
  std::vector<std::string> parts(1);
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != ',') {
      parts.back() += text[i];
    } else if (i + 1 < text.size() && text[i + 1] == ',') {
      parts.back() += ',';
      ++i;
    } else {
      parts.emplace_back();
    }
  }
  NamedOptions named;
  named.name = std::move(parts.front());
  if (named.name.empty()) return Error{"'" + std::string(text) + "': a name is missing before the first comma"};
  for (size_t i = 1; i < parts.size(); ++i) {
    const size_t equals = parts[i].find('=');
    std::string key = parts[i].substr(0, equals);
    if (key.empty()) return Error{"'" + std::string(text) + "': a key is missing before '='"};
    named.options.emplace_back(std::move(key), equals == std::string::npos ? "on" : parts[i].substr(equals + 1));
  }
  return named;
}

bool is_word_of(const clone_option& option, std::string_view text) {
  const auto words = choices_of(option);
  return std::find(words.begin(), words.end(), text) != words.end();
}

std::string quote_commas(std::string_view value) {
  std::string quoted;
  for (char c : value) quoted.append(c == ',' ? 2 : 1, c);
  return quoted;
}

Result<uint64_t> parse_number(std::string_view text, NumberKind kind) {
  const Error wrong{"'" + std::string(text) + "' is not a number"};
  const bool hexadecimal = text.starts_with("0x") || text.starts_with("0X");
  const std::string_view digits = hexadecimal ? text.substr(2) : text;
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value, hexadecimal ? 16 : 10);
  if (error != std::errc() || digits.empty()) return wrong;
  std::string_view suffix(end, static_cast<size_t>(digits.data() + digits.size() - end));
  if (suffix.empty()) return value;
  if (kind != NumberKind::bytes) return wrong;
  if (suffix.size() > 1 && (suffix.substr(1) == "B" || suffix.substr(1) == "iB")) suffix = suffix.substr(0, 1);
  if (suffix.size() != 1) return wrong;
  constexpr std::string_view units = "KMGT";
  const size_t unit = units.find(static_cast<char>(suffix[0] & ~0x20));
  if (unit == std::string_view::npos) return wrong;
  const unsigned shift = 10 * static_cast<unsigned>(unit + 1);
  if (value > (std::numeric_limits<uint64_t>::max() >> shift)) return Error{"'" + std::string(text) + "' is too large"};
  return value << shift;
}

std::string format_size(uint64_t bytes) {
  constexpr std::string_view units = "TGMK";
  for (size_t i = 0; i < units.size(); ++i) {
    const unsigned shift = 10 * static_cast<unsigned>(units.size() - i);
    if (bytes != 0 && (bytes & ((uint64_t{1} << shift) - 1)) == 0) return std::to_string(bytes >> shift) + units[i];
  }
  return std::to_string(bytes);
}

struct OptionValues::Storage {
  std::deque<std::string> texts;
  std::deque<clone_option_value> values;
  std::vector<const clone_option_value*> pointers;
  clone_options raw{};
};

Result<OptionValues> OptionValues::check(const clone_descriptor& descriptor, const KeyValues& given) {
  const auto table = table_of(descriptor);
  std::string mistakes;
  auto mistake = [&](const std::string& text) { mistakes += (mistakes.empty() ? "" : "; ") + text; };

  for (const auto& [key, value] : given) {
    if (std::any_of(table.begin(), table.end(), [&](const clone_option* option) { return key == option->name; }))
      continue;
    std::string known;
    for (const clone_option* option : table) known += (known.empty() ? "" : ", ") + std::string(option->name);
    mistake("unknown option '" + key + "'; there are: " + (known.empty() ? "none" : known));
  }

  auto storage = std::make_shared<Storage>();
  for (const clone_option* option : table) {
    const std::string* text = nullptr;
    for (const auto& [key, value] : given) {
      if (key != option->name) continue;
      if (text) mistake(key + " is given twice");
      text = &value;
    }
    clone_option_value value{sizeof(clone_option_value), option->type, option->name, nullptr, 0};
    if (text || option->default_value) {
      storage->texts.push_back(text ? *text : option->default_value);
      value.text = storage->texts.back().c_str();
      auto number = parse_value(*option, storage->texts.back());
      if (number.ok()) {
        value.number = *number;
      } else {
        mistake(number.error().message);
      }
    } else if (option->flags & CLONE_OPTION_REQUIRED) {
      mistake(std::string(option->name) + " is required: " + option->help);
    }
    storage->values.push_back(value);
  }
  if (!mistakes.empty()) return Error{mistakes};

  for (const auto& value : storage->values) storage->pointers.push_back(&value);
  storage->raw = {sizeof(clone_options), static_cast<uint32_t>(storage->pointers.size()), storage->pointers.data()};
  OptionValues checked;
  checked.raw_ = &storage->raw;
  checked.storage_ = std::move(storage);
  return checked;
}

std::string describe_option_type(const clone_option& option) {
  switch (option.type) {
    case CLONE_OPTION_PATH:
      return (option.choices ? std::string(option.choices) + "|" : "") + "path";
    case CLONE_OPTION_BOOL:
      return "on|off";
    case CLONE_OPTION_NUMBER:
      return "number, " + range_of(option);
    case CLONE_OPTION_SIZE:
      return "size, " + range_of(option);
    case CLONE_OPTION_CHOICE:
      return option.choices ? option.choices : "";
    default:
      return "text";
  }
}

}  // namespace vmm
