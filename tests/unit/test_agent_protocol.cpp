// SPDX-License-Identifier: Apache-2.0
// The agent's messages: frames cut from a stream, requests taken apart, and when a machine counts as active.
#include <algorithm>
#include <memory>

#include "agent_client.hpp"
#include "guest-agent/activity.hpp"
#include "guest-agent/requests.hpp"

using namespace agent_test;

namespace {

std::vector<uint8_t> frame(Type type, std::string_view payload) {
  std::vector<uint8_t> bytes(sizeof(Header) + payload.size());
  Writer writer(bytes.data(), bytes.size());
  writer.begin(type);
  writer.bytes(payload.data(), payload.size());
  writer.end();
  REQUIRE_FALSE(writer.failed());
  return bytes;
}

void put(FrameBuffer& buffer, std::span<const uint8_t> bytes) {
  uint8_t* const space = buffer.space();
  REQUIRE(bytes.size() <= buffer.space_bytes());
  std::memcpy(space, bytes.data(), bytes.size());
  buffer.added(bytes.size());
}

}  // namespace

TEST_CASE("agent protocol: what a writer puts together, a reader takes apart") {
  uint8_t bytes[64];
  Writer writer(bytes, sizeof bytes);
  writer.begin(Type::exec);
  writer.u16(0x1234);
  writer.u32(0x89abcdef);
  writer.u64(0x0123456789abcdef);
  writer.text("name", 4);
  writer.end();
  REQUIRE_FALSE(writer.failed());
  CHECK(writer.size_bytes() == sizeof(Header) + 2 + 4 + 8 + 8);
  const uint8_t header[] = {22, 0, 0, 0, 0x20, 0, 0, 0, 0x34, 0x12, 0xef};
  CHECK(std::memcmp(bytes, header, sizeof header) == 0);
  Reader reader(bytes + sizeof(Header), 22);
  CHECK(reader.u16() == 0x1234);
  CHECK(reader.u32() == 0x89abcdef);
  CHECK(reader.u64() == 0x0123456789abcdef);
  const auto text = reader.text();
  CHECK(std::string(text.data, text.size_bytes) == "name");
  CHECK_FALSE(reader.failed());
  CHECK(reader.left_bytes() == 0);
  CHECK(reader.u16() == 0);
  CHECK(reader.failed());

  SUBCASE("a text longer than what is left fails, and all after it") {
    const auto payload = Payload().u32(100).u32(7).bytes;
    Reader cut(payload.data(), payload.size());
    CHECK(cut.text().size_bytes == 0);
    CHECK(cut.failed());
    CHECK(cut.u32() == 0);
  }
  SUBCASE("nothing is written past the end") {
    uint8_t small[10] = {};
    Writer full(small, 9);
    full.begin(Type::data);
    full.u32(~0u);
    CHECK(full.failed());
    full.end();
    CHECK(small[9] == 0);
  }
}

TEST_CASE("agent protocol: frames are cut from a stream however it arrives") {
  const auto buffer = std::make_unique<FrameBuffer>();
  auto stream = frame(Type::input, "first");
  for (const auto& next :
       {frame(Type::output, ""), frame(Type::data, std::string(kMaxPayloadBytes, 'x')), frame(Type::done, "last")})
    stream.insert(stream.end(), next.begin(), next.end());
  for (const size_t step : {size_t{1}, size_t{7}, size_t{4096}, size_t{60000}}) {
    std::vector<std::pair<Type, std::string>> seen;
    for (size_t at = 0; at < stream.size();) {
      const size_t count = std::min({step, stream.size() - at, buffer->space_bytes()});
      REQUIRE(count > 0);
      put(*buffer, std::span(stream).subspan(at, count));
      at += count;
      Frame one;
      while (buffer->next(one) == FrameBuffer::Next::frame)
        seen.emplace_back(one.type, std::string(reinterpret_cast<const char*>(one.payload), one.length_bytes));
      REQUIRE(buffer->next(one) == FrameBuffer::Next::incomplete);
    }
    REQUIRE(seen.size() == 4);
    CHECK(seen[0] == std::pair(Type::input, std::string("first")));
    CHECK(seen[1] == std::pair(Type::output, std::string()));
    CHECK(seen[2].second == std::string(kMaxPayloadBytes, 'x'));
    CHECK(seen[3] == std::pair(Type::done, std::string("last")));
  }
  SUBCASE("one that is too long, or has flags, breaks it for good") {
    for (const auto& header :
         {Payload().u32(kMaxPayloadBytes + 1).u16(1).u16(0).bytes, Payload().u32(0).u16(1).u16(0x8000).bytes}) {
      const auto fresh = std::make_unique<FrameBuffer>();
      put(*fresh, header);
      Frame one;
      CHECK(fresh->next(one) == FrameBuffer::Next::broken);
      put(*fresh, frame(Type::input, "good"));
      CHECK(fresh->next(one) == FrameBuffer::Next::broken);
    }
  }
}

TEST_CASE("agent protocol: requests for programs") {
  const auto request = std::make_unique<ExecRequest>();
  const auto parses = [&](const std::vector<uint8_t>& payload) {
    return request->parse(Reader(payload.data(), payload.size()));
  };
  const Exec exec{.arguments = {"ls", "-l", ""},
                  .flags = kExecInput,
                  .rows = 3,
                  .columns = 4,
                  .user = "u",
                  .directory = "/d",
                  .environment = {"A=", "B=1"}};
  REQUIRE(parses(exec.payload()));
  CHECK(request->flags == kExecInput);
  CHECK(request->rows == 3);
  CHECK(request->columns == 4);
  CHECK(std::string(request->user) == "u");
  CHECK(std::string(request->directory) == "/d");
  REQUIRE(request->argument_count == 3);
  CHECK(std::string(request->arguments()[1]) == "-l");
  CHECK(std::string(request->arguments()[2]).empty());
  CHECK(request->arguments()[3] == nullptr);
  REQUIRE(request->variable_count == 2);
  CHECK(std::string(request->variables[1]) == "B=1");
  CHECK(request->variables[2] == nullptr);

  for (size_t size = 0; size < exec.payload().size(); ++size) {
    auto cut = exec.payload();
    cut.resize(size);
    CHECK_FALSE(parses(cut));
  }
  for (const char* variable : {"", "A", "=x", "="}) {
    Exec bad = exec;
    bad.environment = {variable};
    CHECK_FALSE(parses(bad.payload()));
  }
  // As many words as a frame holds, and a count that promises more than there is.
  Exec most{.arguments = {"x"}};
  most.arguments.insert(most.arguments.end(), (kMaxPayloadBytes - most.payload().size()) / 4, "");
  REQUIRE(most.payload().size() <= kMaxPayloadBytes);
  CHECK(parses(most.payload()));
  CHECK(request->argument_count == most.arguments.size());
  CHECK_FALSE(parses(Payload().u32(0).u16(0).u16(0).text("").text("").u32(~0u).bytes));
}

TEST_CASE("agent protocol: paths of copies stay below their root") {
  for (const char* path : {"", "a", "a/b", "...", "..a/b..", ".hidden", "a b"}) CHECK(is_below(path));
  for (const char* path : {"/", "/a", "..", "a/..", "../a", "a/../b", ".", "a/./b", "a//b", "a/"})
    CHECK_FALSE(is_below(path));
  CHECK_FALSE(is_below(std::string(256, 'a').c_str()));
  const auto request = std::make_unique<CopyRequest>();
  const auto parses = [&](const Payload& payload) {
    return request->parse(Reader(payload.bytes.data(), payload.bytes.size()));
  };
  CHECK(parses(Payload().u32(0).text("/a")));
  CHECK(std::string(request->name).empty());
  CHECK(parses(Payload().u32(0).text("/a").text("b")));
  CHECK(std::string(request->name) == "b");
  CHECK_FALSE(parses(Payload().u32(0).text("a")));
  CHECK_FALSE(parses(Payload().u32(0).text("")));
  for (const char* name : {"..", ".", "a/b", "/"}) CHECK_FALSE(parses(Payload().u32(0).text("/a").text(name)));
  CHECK_FALSE(parses(Payload().u32(0).text("/" + std::string(kPathBytes, 'a'))));
}

TEST_CASE("agent protocol: addresses") {
  Address address{};
  REQUIRE(address.parse("192.0.2.255/32", true));
  CHECK(address.bytes[0] == 192);
  CHECK(address.bytes[3] == 255);
  CHECK(address.prefix_bits == 32);
  CHECK(address.parse("0.0.0.0", false));
  for (const char* text : {"1.2.3", "1.2.3.4", "1.2.3.4/", "1.2.3.4/33", "1.2.3.4.5/8", "256.1.1.1/8", "1..2.3/8",
                           " 1.2.3.4/8", "0001.2.3.4/8"})
    CHECK_FALSE(address.parse(text, true));
  CHECK_FALSE(address.parse("1.2.3.4/8", false));
}

TEST_CASE("agent protocol: a machine is active while something shows it, and for a while after") {
  Activity activity;
  Sample sample{};
  sample.busy_ticks = 1000;
  sample.io_sectors = 5000;
  sample.newest_input_s = 100;
  sample.time_ms = 50000;
  CHECK_FALSE(activity.add(sample));  // active from the start
  CHECK(activity.is_active());
  // Returns after how many quiet samples it is idle.
  const auto quiet_until_idle = [&] {
    int count = 0;
    do {
      sample.time_ms += Activity::kSampleMs;
      sample.run_queue = 0;
      activity.add(sample);
      ++count;
    } while (activity.is_active() && count < 100);
    return count;
  };
  CHECK(quiet_until_idle() == 4);
  const auto step = [&](uint64_t ticks, uint32_t queue, uint64_t sectors, uint64_t input_s) {
    sample.busy_ticks += ticks;
    sample.run_queue = queue;
    sample.io_sectors += sectors;
    sample.newest_input_s += input_s;
    sample.time_ms += Activity::kSampleMs;
    return activity.add(sample);
  };
  SUBCASE("processors") {
    CHECK_FALSE(step(2, 0, 0, 0));  // 40 thousandths
    CHECK(step(3, 0, 0, 0));        // 60
    CHECK(activity.is_active());
    CHECK(quiet_until_idle() == 4);
  }
  SUBCASE("one tick is none, however short the sample") {
    sample.time_ms += 10 - Activity::kSampleMs;
    CHECK_FALSE(step(1, 0, 0, 0));
  }
  SUBCASE("waiting tasks count with some use of the processors, and twice") {
    CHECK_FALSE(step(2, 5, 0, 0));
    CHECK(step(2, 1, 0, 0));
    CHECK(quiet_until_idle() == 4);
    CHECK_FALSE(step(0, 5, 0, 0));
    CHECK_FALSE(step(0, 5, 0, 0));
  }
  SUBCASE("what the kernel does while the balloon moves is not the machine's work; what programs do is") {
    const auto balloon = [&](uint64_t pages, uint64_t kernel_ticks, uint64_t user_ticks) {
      sample.balloon_pages += pages;
      sample.kernel_ticks += kernel_ticks;
      return step(kernel_ticks + user_ticks, 1, 0, 0);
    };
    CHECK_FALSE(balloon(8192, 40, 1));
    CHECK_FALSE(balloon(100, 40, 0));
    CHECK_FALSE(balloon(0, 20, 1));  // the last of it
    CHECK(balloon(0, 20, 0));
    CHECK(quiet_until_idle() == 4);
    CHECK(balloon(8192, 40, 5));
    CHECK(quiet_until_idle() == 4);
    sample.kernel_ticks -= 10;
    CHECK_FALSE(balloon(1, 0, 1));
  }
  SUBCASE("reading and writing") {
    CHECK_FALSE(step(0, 0, 1023, 0));
    CHECK(step(0, 0, 1024, 0));
    CHECK(quiet_until_idle() == 4);
  }
  SUBCASE("input at a terminal holds longer") {
    CHECK(step(0, 0, 0, 1));
    CHECK(quiet_until_idle() == 20);
  }
  SUBCASE("counters that go back, and clocks that stand, show nothing") {
    sample.busy_ticks -= 500;
    sample.io_sectors -= 5000;
    sample.newest_input_s -= 50;
    CHECK_FALSE(step(0, 0, 0, 0));
    sample.time_ms -= Activity::kSampleMs;  // no time between two
    CHECK_FALSE(step(0, 0, 0, 0));
  }
}
