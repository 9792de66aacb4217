// SPDX-License-Identifier: Apache-2.0
// Option texts: how they are taken apart, and how they are held against a table.
#include <doctest/doctest.h>

#include <limits>
#include <optional>

#include "clone/sdk/options.hpp"
#include "plugin/options.hpp"

using namespace vmm;

namespace {

constexpr clone_option kPath = clone_sdk::required(clone_sdk::path_option("path", nullptr, "A file."));
constexpr clone_option kReadOnly = clone_sdk::bool_option("readonly", "off", "Whether.");
constexpr clone_option kQueues = clone_sdk::number_option("queues", "1", "How many.", 1, 16);
constexpr clone_option kSize = clone_sdk::size_option("size", nullptr, "How large.", 4096, 1ull << 30);
constexpr clone_option kCache = clone_sdk::choice_option("cache", "writeback", "How.", "writeback|none|unsafe");
constexpr clone_option kSerial = clone_sdk::text_option("serial", nullptr, "Which.", 20);
constexpr const clone_option* kTable[] = {&kPath, &kReadOnly, &kQueues, &kSize, &kCache, &kSerial, nullptr};
constexpr clone_descriptor kDescriptor = {sizeof(clone_descriptor), 0, "disk", "A disk.", kTable, ""};

// The message, or "" when the options are good.
std::string mistakes(const KeyValues& given) {
  const auto checked = OptionValues::check(kDescriptor, given);
  return checked.ok() ? "" : checked.error().message;
}

}  // namespace

TEST_CASE("options: names and values are taken apart at single commas") {
  struct Case {
    const char* text;
    const char* name;
    KeyValues options;
  };
  for (const Case& c : {Case{"disk", "disk", {}},
                        {"disk,path=a.img", "disk", {{"path", "a.img"}}},
                        {"disk,path=a,,b.img,readonly", "disk", {{"path", "a,b.img"}, {"readonly", "on"}}},
                        {"a,,b", "a,b", {}},
                        {"disk,path=", "disk", {{"path", ""}}},
                        {"disk,serial=a=b", "disk", {{"serial", "a=b"}}},
                        {"disk,path=x,,", "disk", {{"path", "x,"}}},
                        {"disk,path=x,,,readonly=off", "disk", {{"path", "x,"}, {"readonly", "off"}}}}) {
    CAPTURE(c.text);
    const auto named = parse_named_options(c.text);
    REQUIRE(named.ok());
    CHECK(named->name == c.name);
    CHECK(named->options == c.options);
  }
  for (const char* text : {"", ",path=a", "disk,=a", "disk,", "disk,path=a,"}) {
    CAPTURE(text);
    CHECK(!parse_named_options(text).ok());
  }
}

TEST_CASE("options: quoted commas come back as they were") {
  for (const char* value : {"", ",", ",,", "a,b", ",a", "a,", "a,,,b"}) {
    CAPTURE(value);
    const auto named = parse_named_options("disk,path=" + quote_commas(value));
    REQUIRE(named.ok());
    CHECK(named->options == KeyValues{{"path", value}});
  }
}

TEST_CASE("options: numbers and sizes") {
  struct Case {
    const char* text;
    NumberKind kind;
    std::optional<uint64_t> value;
  };
  constexpr auto plain = NumberKind::plain, bytes = NumberKind::bytes;
  for (const Case& c : {Case{"0", plain, 0},
                        {"512", plain, 512},
                        {"0x1f", plain, 0x1f},
                        {"0X1F", plain, 0x1f},
                        {"18446744073709551615", plain, std::numeric_limits<uint64_t>::max()},
                        {"18446744073709551616", plain, std::nullopt},
                        {"64K", plain, std::nullopt},
                        {"64K", bytes, 64 << 10},
                        {"64k", bytes, 64 << 10},
                        {"64KB", bytes, 64 << 10},
                        {"64KiB", bytes, 64 << 10},
                        {"2G", bytes, 2ull << 30},
                        {"1T", bytes, 1ull << 40},
                        {"16777216T", bytes, std::nullopt},
                        {"64X", bytes, std::nullopt},
                        {"64KK", bytes, std::nullopt},
                        {"64 K", bytes, std::nullopt},
                        {"K", bytes, std::nullopt},
                        {"", plain, std::nullopt},
                        {"0x", plain, std::nullopt},
                        {"-1", plain, std::nullopt},
                        {"+1", plain, std::nullopt},
                        {" 1", plain, std::nullopt},
                        {"1.5", bytes, std::nullopt}}) {
    CAPTURE(c.text);
    const auto number = parse_number(c.text, c.kind);
    CHECK(number.ok() == c.value.has_value());
    if (number.ok() && c.value) CHECK(*number == *c.value);
  }
  for (uint64_t size : {uint64_t{0}, uint64_t{1000}, uint64_t{1024}, uint64_t{512} << 20, uint64_t{3} << 40}) {
    CAPTURE(size);
    CHECK(*parse_number(format_size(size), NumberKind::bytes) == size);
  }
  CHECK(format_size(512 << 20) == "512M");
}

TEST_CASE("options: values in the table's order, defaults for the rest") {
  const auto checked = OptionValues::check(kDescriptor, {{"size", "64K"}, {"path", "a.img"}, {"cache", "unsafe"}});
  REQUIRE(checked.ok());
  const clone_options& raw = checked->raw();
  REQUIRE(raw.count == 6);
  CHECK(std::string(raw.values[0]->name) == "path");
  CHECK(std::string(raw.values[0]->text) == "a.img");
  CHECK(raw.values[1]->number == 0);
  CHECK(raw.values[2]->number == 1);
  CHECK(raw.values[3]->number == 64 << 10);
  CHECK(raw.values[4]->number == 2);
  CHECK(raw.values[5]->text == nullptr);

  const clone_sdk::Options options(raw);
  CHECK(options.number("size") == 64 << 10);
  CHECK(options.number("serial", 9) == 9);
  CHECK(!options.flag("readonly"));
  CHECK(!options.text("unheard-of"));
}

TEST_CASE("options: a mistake names the option, what was given and what is allowed") {
  struct Case {
    KeyValues given;
    const char* message;
  };
  for (const Case& c : {
           Case{{{"path", "x"}}, ""},
           {{}, "path is required: A file."},
           {{{"path", "x"}, {"readonly", "perhaps"}}, "readonly=perhaps: allowed are on and off"},
           {{{"path", "x"}, {"queues", "0"}}, "queues=0: allowed is a number, 1 to 16"},
           {{{"path", "x"}, {"queues", "17"}}, "queues=17: allowed is a number, 1 to 16"},
           {{{"path", "x"}, {"queues", "1K"}}, "queues=1K: allowed is a number, 1 to 16"},
           {{{"path", "x"}, {"size", "1K"}}, "size=1K: allowed is a size such as 64K or 2G, 4K to 1G"},
           {{{"path", "x"}, {"cache", "None"}}, "cache=None: allowed are writeback, none and unsafe"},
           {{{"path", "x"}, {"serial", std::string(21, 's')}},
            "serial: 21 bytes given; allowed is a text of at most 20 bytes"},
           {{{"path", std::string(4097, 'p')}}, "path: 4097 bytes given; allowed is a text of at most 4096 bytes"},
           {{{"path", std::string("a\0b", 3)}}, "path: 3 bytes given; allowed is a text of at most 4096 bytes"},
           {{{"path", "x"}, {"path", "y"}}, "path is given twice"},
           {{{"path", "x"}, {"sise", "1"}},
            "unknown option 'sise'; there are: path, readonly, queues, size, cache, serial"},
       }) {
    CAPTURE(c.message);
    CHECK(mistakes(c.given) == c.message);
  }
  for (const char* yes : {"on", "yes", "true", "1"}) {
    CAPTURE(yes);
    CHECK(OptionValues::check(kDescriptor, {{"path", "x"}, {"readonly", yes}})->raw().values[1]->number == 1);
  }
  // All of them at once.
  const std::string all = mistakes({{"queues", "99"}, {"colour", "red"}});
  CHECK(all.find("'colour'") != std::string::npos);
  CHECK(all.find("queues=99") != std::string::npos);
  CHECK(all.find("path is required") != std::string::npos);
}

TEST_CASE("options: values outlive copies of their object") {
  const clone_option_value* serial = nullptr;
  OptionValues kept;
  {
    auto checked = OptionValues::check(kDescriptor, {{"path", "x"}, {"serial", "from-a-temporary"}});
    REQUIRE(checked.ok());
    kept = *checked;
    serial = checked->raw().values[5];
  }
  CHECK(kept.raw().values[5] == serial);
  CHECK(std::string(serial->text) == "from-a-temporary");
}
