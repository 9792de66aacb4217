// SPDX-License-Identifier: Apache-2.0
// The host's half of the guest's agent: its sessions, what it offers, and agents that mean ill.
#include <doctest/doctest.h>
#include <sys/socket.h>

#include <chrono>
#include <cmath>
#include <deque>
#include <functional>
#include <thread>

#include "clone/abi/guest.h"
#include "clone/abi/vsock.h"
#include "fake_host.hpp"
#include "fake_plugin.hpp"
#include "guest-agent/host_frames.hpp"

using namespace vmm::test;
using agent_protocol::Type;
using agent_protocol::Writer;
using clone_sdk::Fd;

namespace {

// The agent's end of one stream; nothing of it blocks.
class AgentEnd {
 public:
  explicit AgentEnd(Fd fd) : fd_(std::move(fd)) {}

  bool raw(std::string_view bytes) {
    return ::send(fd_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT) == ssize_t(bytes.size());
  }
  template <typename Fill>
  bool send(Type type, Fill&& fill) {
    return raw(agent_protocol::make_frame(type, fill));
  }
  bool hello(uint16_t major = agent_protocol::kMajor, uint32_t magic = agent_protocol::kMagic) {
    return send(Type::hello, [&](Writer& writer) {
      writer.u32(magic);
      writer.u16(major);
      writer.u16(0);
      agent_protocol::put_text(writer, "7.\"1\n");
    });
  }
  bool report(uint32_t activity, size_t fields = 8) {
    return send(Type::report, [&](Writer& writer) {
      const uint32_t numbers[] = {activity, 42, 1500, 2, 30, 11, ~0u, 0};
      for (size_t i = 0; i < fields; ++i) writer.u32(numbers[i]);
      if (fields == 8)
        for (const uint64_t value : {512ull << 20, 100ull << 20, 200ull << 20, 9000ull}) writer.u64(value);
    });
  }
  bool done(std::initializer_list<uint32_t> values = {}) {
    return send(Type::done, [&](Writer& writer) {
      for (const uint32_t value : values) writer.u32(value);
    });
  }
  // Frames that came, with their payloads.
  struct Got {
    Type type;
    std::string payload;
    uint32_t u32(size_t offset = 0) const {
      return agent_protocol::Reader(payload.data() + offset, payload.size() - offset).u32();
    }
  };
  std::deque<Got>& received() {
    while (true) {
      agent_protocol::Frame frame;
      while (buffer_->next(frame) == agent_protocol::FrameBuffer::Next::frame)
        got_.push_back({frame.type, std::string(agent_protocol::bytes_of(frame))});
      const ssize_t got = agent_protocol::receive(*buffer_, fd_.get());
      if (got == 0) closed_ = true;
      if (got <= 0) return got_;
    }
  }
  bool closed() {
    received();
    return closed_;
  }
  void close() { fd_.reset(); }

 private:
  Fd fd_;
  std::unique_ptr<agent_protocol::FrameBuffer> buffer_{new agent_protocol::FrameBuffer};
  std::deque<Got> got_;
  bool closed_ = false;
};

struct Machine {
  using Given = std::map<std::string, std::string>;
  enum class Guest { there, refuses, cannot };

  FakeHost host;
  std::deque<AgentEnd> ends;  // of every connection, in their order
  Guest guest = Guest::there;
  clone_status cannot_status = CLONE_ERR_STATE;
  uint32_t connects = 0;
  clone_vsock vsock{sizeof(clone_vsock), 5, this, connect};
  int changes = 0;
  std::unique_ptr<DeviceUnderTest> device;

  explicit Machine(const Given& options = {}, bool with_vsock = true) {
    if (with_vsock) host.offer(CLONE_VSOCK, &vsock);
    device = std::make_unique<DeviceUnderTest>(PluginFile("guest-agent").device("guest-agent"),
                                               host.handle("guest-agent.0"));
    REQUIRE_MESSAGE(device->configure(options) == CLONE_OK, device->error);
    table().subscribe(
        table().context, [](void* self) { ++static_cast<Machine*>(self)->changes; }, this);
    REQUIRE_MESSAGE(device->start() == CLONE_OK, device->error);
  }
  ~Machine() { device->quiesce(); }

  static clone_status connect(void* self, uint32_t port, int32_t* fd, clone_err* err) {
    auto& machine = *static_cast<Machine*>(self);
    CHECK(port == agent_protocol::kPort);
    ++machine.connects;
    if (machine.guest == Guest::cannot)
      return clone_sdk::report(err, {"the guest has no driver", 0, machine.cannot_status});
    int fds[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) != 0) return CLONE_ERR_SYSTEM;
    *fd = fds[0];
    machine.ends.emplace_back(Fd(fds[1]));
    if (machine.guest == Guest::refuses) machine.ends.back().close();
    return CLONE_OK;
  }
  const clone_guest& table() {
    const auto* table =
        static_cast<const clone_guest*>(host.handle("other.0")->get_extension(host.handle("other.0"), CLONE_GUEST));
    REQUIRE(table);
    return *table;
  }
  clone_guest_report report() {
    clone_guest_report report{};
    report.size = sizeof report;
    table().report(table().context, &report);
    return report;
  }
  // The end of the next connection that is made.
  AgentEnd& next_end() {
    const size_t count = ends.size();
    REQUIRE(host.run_until([&] { return ends.size() > count; }));
    return ends.back();
  }
  AgentEnd& session() {
    AgentEnd& end = ends.empty() ? next_end() : ends.back();
    end.hello();
    end.report(CLONE_ACTIVITY_IDLE);
    REQUIRE(host.run_until([&] { return report().connected == 1; }));
    return end;
  }
  void begin(const std::string& command, const std::string& json, FakeHost::Answer& answer) {
    host.begin_command("guest-agent.0." + command, json, answer);
  }
  std::string call(const std::string& command, const std::string& json = "{}") {
    return host.call_command("guest-agent.0." + command, json);
  }
  bool waits_for(FakeHost::Answer& answer) {
    return host.run_until([&] { return !answer.text.empty(); });
  }
};

}  // namespace

TEST_CASE("guest-agent: a session, its reports and who hears of them") {
  Machine m(Machine::Given{{"interval", "3000"}});
  CHECK(m.report().connected == 0);
  CHECK(m.report().age_ms == ~0u);
  CHECK(m.report().total_bytes == ~uint64_t{0});
  AgentEnd& end = m.next_end();
  REQUIRE(m.host.run_until([&] { return end.received().size() == 2; }));
  CHECK(end.received()[0].type == Type::hello);
  CHECK(end.received()[0].u32() == agent_protocol::kMagic);
  CHECK(end.received()[1].type == Type::watch);
  CHECK(end.received()[1].u32() == 3000);

  end.hello();
  m.host.run_main_loop(10);
  CHECK(m.report().connected == 0);  // not before it reported
  CHECK(m.changes == 0);
  end.report(CLONE_ACTIVITY_IDLE);
  REQUIRE(m.host.run_until([&] { return m.changes == 1; }));
  const clone_guest_report report = m.report();
  CHECK(report.connected == 1);
  CHECK(report.activity == CLONE_ACTIVITY_IDLE);
  CHECK(report.age_ms < 2000);
  CHECK(report.process_count == 42);
  CHECK(report.load_permille == 1500);
  CHECK(report.pressure_some_permille == 11);
  CHECK(report.pressure_full_permille == ~0u);
  CHECK(report.total_bytes == 512ull << 20);
  CHECK(report.free_bytes == 100ull << 20);
  CHECK(report.available_bytes == 200ull << 20);
  CHECK(m.host.metric("guest-agent.0.guest_connected") == 1);
  CHECK(m.host.metric("guest-agent.0.guest_processes") == 42);
  CHECK(m.host.metric("guest-agent.0.guest_memory_available_bytes") == double(200 << 20));
  CHECK(std::isnan(m.host.metric("guest-agent.0.guest_pressure_full_permille")));
  const std::string status = m.call("status");
  for (const char* part : {"\"connected\":true", "\"version\":\"7.\\\"1?\"", "\"cid\":5", "\"activity\":\"idle\"",
                           "\"run_queue\":2", "\"pressure_full_permille\":null", "\"uptime_ms\":9000"})
    CHECK_MESSAGE(status.find(part) != std::string::npos, part, " in ", status);

  end.report(CLONE_ACTIVITY_IDLE);
  m.host.run_main_loop(10);
  CHECK(m.changes == 1);
  end.report(CLONE_ACTIVITY_ACTIVE);
  REQUIRE(m.host.run_until([&] { return m.changes == 2; }));
  CHECK(m.report().activity == CLONE_ACTIVITY_ACTIVE);
  // A caller of an earlier version gets what it knows.
  struct {
    clone_guest_report report;
  } small{};
  small.report.size = 12;
  small.report.age_ms = 77;
  m.table().report(m.table().context, &small.report);
  CHECK(small.report.activity == CLONE_ACTIVITY_ACTIVE);
  CHECK(small.report.age_ms == 77);

  end.close();
  REQUIRE(m.host.run_until([&] { return m.changes == 3; }));
  CHECK(m.report().connected == 0);
  CHECK(m.report().activity == CLONE_ACTIVITY_UNKNOWN);
  CHECK(m.call("status").find("\"error\":\"the agent closed the connection\"") != std::string::npos);
  m.next_end();
  m.session();
  CHECK(m.changes == 4);
}

TEST_CASE("guest-agent: a guest that boots is called again, ever less often") {
  Machine m;
  SUBCASE("it refuses") { m.guest = Machine::Guest::refuses; }
  SUBCASE("its transport is not there yet") { m.guest = Machine::Guest::cannot; }
  const auto start = std::chrono::steady_clock::now();
  m.host.run_until([] { return false; }, 1);
  int callbacks = 0;
  while (std::chrono::steady_clock::now() - start < std::chrono::milliseconds(1000))
    callbacks += m.host.run_main_loop(20);
  // At 0, 100, 300, 700 ms, and nothing in between.
  CHECK(m.connects >= 3);
  CHECK(m.connects <= 5);
  CHECK(callbacks < 40);
  m.guest = Machine::Guest::there;
  m.next_end();
  m.session();
}

TEST_CASE("guest-agent: no vsock, no control socket") {
  Machine m({}, false);
  CHECK(m.host.main_loop_watch_count() == 0);
  CHECK(m.call("connect") == "error: this machine has no device for streams to the guest (virtio-vsock)");
  CHECK(m.call("freeze") == "error: this machine has no device for streams to the guest (virtio-vsock)");
  CHECK(m.call("status") == "{\"connected\":false,\"frozen\":false,\"cid\":null}");
  clone_err err{sizeof err, 0, {}};
  CHECK(m.table().request(m.table().context, CLONE_GUEST_POWER_OFF, &err) == CLONE_EMPTY);
}

TEST_CASE("guest-agent: agents that mean ill are left, and called again") {
  Machine m(Machine::Given{{"timeout", "300"}, {"interval", "100"}});
  std::function<void(AgentEnd&)> mischief;
  bool greets = true;
  SUBCASE("another protocol") {
    greets = false;
    mischief = [](AgentEnd& end) { end.raw("SSH-2.0-OpenSSH_9.2\r\n"); };
  }
  SUBCASE("wrong magic") {
    greets = false;
    mischief = [](AgentEnd& end) { end.hello(1, 0x1234); };
  }
  SUBCASE("another major version") {
    greets = false;
    mischief = [](AgentEnd& end) { end.hello(2); };
  }
  SUBCASE("no hello but a report") {
    greets = false;
    mischief = [](AgentEnd& end) { end.report(1); };
  }
  SUBCASE("it never says hello") {
    greets = false;
    mischief = [](AgentEnd&) {};
  }
  SUBCASE("it falls silent") {
    mischief = [](AgentEnd&) {};
  }
  SUBCASE("a frame that is too long") {
    mischief = [](AgentEnd& end) { end.raw(std::string("\xff\xff\xff\xff\x11\x00\x00\x00", 8)); };
  }
  SUBCASE("flags") {
    mischief = [](AgentEnd& end) { end.raw(std::string("\x00\x00\x00\x00\x11\x00\x01\x00", 8)); };
  }
  SUBCASE("a report that is too short") {
    mischief = [](AgentEnd& end) { end.report(1, 7); };
  }
  SUBCASE("a flood of frames") {
    mischief = [](AgentEnd& end) {
      std::string flood;
      for (int i = 0; i < 1000; ++i) flood += agent_protocol::make_frame(static_cast<Type>(0x999), [](Writer&) {});
      end.raw(flood);
    };
  }
  AgentEnd& end = greets ? m.session() : m.next_end();
  const size_t before = m.ends.size();
  mischief(end);
  CHECK(m.host.run_until([&] { return end.closed(); }, 3000));
  CHECK(m.report().connected == 0);
  REQUIRE(m.host.run_until([&] { return m.ends.size() > before; }));
  m.session();
}

TEST_CASE("guest-agent: connect hands over a stream of its own") {
  Machine m;
  m.session();
  FakeHost::Answer answer;
  m.begin("connect", "{}", answer);
  AgentEnd& end = m.ends.back();
  REQUIRE(m.waits_for(answer));
  CHECK(answer.text == "{}");
  REQUIRE(answer.fd);
  m.host.run_main_loop();
  CHECK(end.received().empty());  // hello is the client's to say
  CHECK(::send(answer.fd.get(), "\0\0\0\0\x44\0\0\0", 8, 0) == 8);
  REQUIRE(end.received().size() == 1);
  CHECK(end.received()[0].type == Type::copy_end);
  answer.fd.reset();
  CHECK(end.closed());  // nobody else holds it
  CHECK(m.report().connected == 1);
}

TEST_CASE("guest-agent: connect waits for a guest that boots, as long as it was told") {
  Machine m;
  m.guest = Machine::Guest::refuses;
  FakeHost::Answer answer;
  SUBCASE("whose driver comes") {
    m.guest = Machine::Guest::cannot;
    SUBCASE("it is not there yet") {}
    SUBCASE("too many streams begin") { m.cannot_status = CLONE_ERR_BUSY; }
    m.begin("connect", "{\"timeout_ms\": 5000}", answer);
    m.host.run_until([] { return false; }, 150);
    CHECK(answer.text.empty());
    m.guest = Machine::Guest::there;
    REQUIRE(m.waits_for(answer));
    CHECK(answer.text == "{}");
    CHECK(answer.fd);
  }
  SUBCASE("whose driver does not") {
    m.guest = Machine::Guest::cannot;
    m.begin("connect", "{\"timeout_ms\": 300}", answer);
    REQUIRE(m.waits_for(answer));
    CHECK(answer.text == "error: the guest has no driver");
    CHECK(m.connects >= 3);
  }
  SUBCASE("not for what does not pass") {
    m.guest = Machine::Guest::cannot;
    m.cannot_status = CLONE_ERR_SYSTEM;
    CHECK(m.call("connect", "{\"timeout_ms\": 5000}") == "error: the guest has no driver");
  }
  SUBCASE("that comes") {
    m.begin("connect", "{\"timeout_ms\": 5000}", answer);
    m.host.run_until([] { return false; }, 150);
    CHECK(answer.text.empty());
    m.guest = Machine::Guest::there;
    REQUIRE(m.waits_for(answer));
    CHECK(answer.text == "{}");
    CHECK(answer.fd);
  }
  SUBCASE("that does not") {
    m.begin("connect", "{\"timeout_ms\": 300}", answer);
    REQUIRE(m.waits_for(answer));
    CHECK(answer.text.starts_with("error: "));
    CHECK_FALSE(answer.fd);
  }
  SUBCASE("with parameters that make no sense") {
    CHECK(m.call("connect", "{\"timeout_ms\": \"x\"}") == "error: timeout_ms: allowed is a number of milliseconds");
    CHECK(m.call("connect", "{\"port\": 1}") == "error: unknown parameter 'port'; there are: timeout_ms");
    for (const char* json :
         {"", "[]", "{", "{\"a\":1,}", "{\"a\":-1}", "{\"a\":{}}", "{\"a\":1}x", "{\"a\":\"\\u0041\"}",
          "{\"a\":1,\"a\":2}", "{\"a", "{\"a\":\"", "{\"a\":99999999999999999999}"})
      CHECK_MESSAGE(m.call("connect", json).starts_with("error: the parameters are no JSON object"), json);
  }
}

TEST_CASE("guest-agent: identity, power and their answers") {
  Machine m(Machine::Given{{"timeout", "300"}});
  m.session();
  FakeHost::Answer answer;
  SUBCASE("identity has the fields in the order of their bits") {
    m.begin("identity",
            "{ \"entropy\": \"00fFa0\", \"hostname\": \"web\", \"cid\": 9, \"address\": \"192.0.2.5\\/24\", "
            "\"clock\": 123456789012 }",
            answer);
    AgentEnd& end = m.ends.back();
    REQUIRE(m.host.run_until([&] { return end.received().size() == 2; }));
    CHECK(end.received()[1].type == Type::identity);
    const std::string payload = end.received()[1].payload;
    agent_protocol::Reader reader(payload.data(), payload.size());
    CHECK(reader.u32() == 31);
    CHECK(agent_protocol::printable(reader.text()) == "web");
    CHECK(agent_protocol::printable(reader.text()) == "192.0.2.5/24");
    CHECK(agent_protocol::printable(reader.text()) == "");
    CHECK(reader.u64() == 9);
    const auto entropy = reader.text();
    CHECK(std::string(entropy.data, entropy.size_bytes) == std::string("\x00\xff\xa0", 3));
    CHECK(reader.u64() == 123456789012);
    CHECK(reader.left_bytes() == 0);
    CHECK(answer.text.empty());
    end.hello();
    end.done();
    REQUIRE(m.waits_for(answer));
    CHECK(answer.text == "{}");
    CHECK(end.closed());
  }
  SUBCASE("mistakes") {
    CHECK(m.call("identity").starts_with("error: identity: nothing is given"));
    CHECK(m.call("identity", "{\"entropy\":\"0\"}").starts_with("error: entropy: allowed are"));
    CHECK(m.call("identity", "{\"entropy\":\"0g\"}").starts_with("error: entropy: allowed are"));
    CHECK(m.call("identity", "{\"gateway\":\"192.0.2.1\"}") == "error: gateway: needs address");
    CHECK(m.call("identity", "{\"clock\":false}").starts_with("error: clock: allowed is"));
    CHECK(m.call("power", "{\"action\":\"sleep\"}") == "error: action: allowed is \"off\" or \"reboot\"");
    CHECK(m.ends.size() == 1);
  }
  SUBCASE("power by command; the agent refuses") {
    m.begin("power", "{\"action\": \"reboot\"}", answer);
    AgentEnd& end = m.ends.back();
    REQUIRE(m.host.run_until([&] { return end.received().size() == 2; }));
    CHECK(end.received()[1].type == Type::power);
    CHECK(end.received()[1].u32() == 1);
    end.hello();
    end.send(Type::error, [](Writer& writer) {
      writer.u32(EPERM);
      writer.u16(0x30);
      agent_protocol::put_text(writer, "not here");
    });
    REQUIRE(m.waits_for(answer));
    CHECK(answer.text == "error: the agent: not here");
  }
  SUBCASE("power by another device") {
    clone_err err{sizeof err, 0, {}};
    CHECK(m.table().request(m.table().context, 3, &err) == CLONE_ERR_INVALID);
    REQUIRE(m.table().request(m.table().context, CLONE_GUEST_POWER_OFF, &err) == CLONE_OK);
    AgentEnd& end = m.ends.back();
    REQUIRE(m.host.run_until([&] { return end.received().size() == 2; }));
    CHECK(end.received()[1].type == Type::power);
    CHECK(end.received()[1].u32() == 0);
    end.hello();
    end.done();
    CHECK(m.host.run_until([&] { return end.closed(); }));
  }
  SUBCASE("an agent that never answers") {
    m.begin("power", "{\"action\": \"off\"}", answer);
    m.ends.back().hello();
    REQUIRE(m.waits_for(answer));
    CHECK(answer.text == "error: the agent in the guest did not answer within its time");
    CHECK(m.ends.back().closed());
  }
  SUBCASE("a machine that ends answers first") {
    m.begin("power", "{\"action\": \"off\"}", answer);
    m.device->quiesce();
    m.device->destroy();
    CHECK(answer.text == "error: the machine has ended");
    CHECK(m.ends.back().closed());
    CHECK(m.host.main_loop_watch_count() == 0);
    m.device = std::make_unique<DeviceUnderTest>(PluginFile("guest-agent").device("guest-agent"),
                                                 m.host.handle("guest-agent.1"));
  }
}

TEST_CASE("guest-agent: freeze keeps its connection until thaw") {
  Machine m;
  m.session();
  CHECK(m.call("thaw") == "error: the guest's file systems are not frozen");
  for (const char* limit : {"0", "60001", "true"})
    CHECK(m.call("freeze", std::string("{\"limit_ms\": ") + limit + "}")
              .starts_with("error: limit_ms: allowed is 1 to "));
  FakeHost::Answer frozen;
  m.begin("freeze", "{\"limit_ms\": 2500}", frozen);
  AgentEnd& end = m.ends.back();
  REQUIRE(m.host.run_until([&] { return end.received().size() == 2; }));
  CHECK(end.received()[1].type == Type::freeze);
  CHECK(end.received()[1].u32() == 2500);
  CHECK(m.call("thaw") == "error: the guest's file systems are not frozen");  // not yet
  end.hello();
  end.done({3});
  REQUIRE(m.waits_for(frozen));
  CHECK(frozen.text == "{\"file_systems\":3}");
  m.host.run_main_loop(20);
  CHECK_FALSE(end.closed());
  CHECK(m.call("freeze") == "error: the guest's file systems are frozen already");
  CHECK(m.call("status").find("\"frozen\":true") != std::string::npos);
  SUBCASE("thaw, behind a pause") {
    REQUIRE(m.device->quiesce() == CLONE_OK);
    CHECK(m.call("thaw") == "error: the machine is paused");
    CHECK(m.call("status").find("\"frozen\":true") != std::string::npos);
    REQUIRE(m.device->resume() == CLONE_OK);
    FakeHost::Answer thawed;
    m.begin("thaw", "{}", thawed);
    REQUIRE(m.host.run_until([&] { return end.received().size() == 3; }));
    CHECK(end.received()[2].type == Type::thaw);
    end.done({3});
    REQUIRE(m.waits_for(thawed));
    CHECK(thawed.text == "{\"file_systems\":3}");
    CHECK(end.closed());
  }
  SUBCASE("they thawed by themselves") {
    end.send(Type::error, [](Writer& writer) {
      writer.u32(ETIMEDOUT);
      writer.u16(0x32);
      agent_protocol::put_text(writer, "too long");
    });
    SUBCASE("and it is noticed") {
      CHECK(m.host.run_until([&] { return m.call("status").find("\"frozen\":false") != std::string::npos; }));
      CHECK(m.call("thaw") == "error: the guest's file systems are not frozen");
    }
    SUBCASE("while a thaw was on its way") {
      FakeHost::Answer thawed;
      m.begin("thaw", "{}", thawed);
      REQUIRE(m.waits_for(thawed));
      CHECK(thawed.text == "error: the agent: too long");
    }
    CHECK(end.closed());
  }
  SUBCASE("the agent goes away") {
    end.close();
    CHECK(m.host.run_until([&] { return m.call("status").find("\"frozen\":false") != std::string::npos; }));
  }
  SUBCASE("the machine is reset") {
    m.device->quiesce();
    REQUIRE(m.device->reset() == CLONE_OK);
    CHECK(end.closed());
    REQUIRE(m.device->resume() == CLONE_OK);
    CHECK(m.call("status").find("\"frozen\":false") != std::string::npos);
  }
}

TEST_CASE("guest-agent: a guest without a file system on a disk is not frozen") {
  Machine m;
  m.session();
  FakeHost::Answer frozen;
  m.begin("freeze", "{}", frozen);
  AgentEnd& end = m.ends.back();
  end.hello();
  end.done({0});
  REQUIRE(m.waits_for(frozen));
  CHECK(frozen.text == "{\"file_systems\":0}");
  CHECK(m.call("status").find("\"frozen\":false") != std::string::npos);
  CHECK(m.call("thaw") == "error: the guest's file systems are not frozen");
  CHECK(end.closed());
}

TEST_CASE("guest-agent: a pause, a restore, a reset") {
  Machine m;
  AgentEnd& first = m.session();
  REQUIRE(m.device->quiesce() == CLONE_OK);
  CHECK(m.host.main_loop_watch_count() == 0);
  for (const auto& [command, json] : Machine::Given{{"connect", "{\"timeout_ms\": 5000}"},
                                                    {"identity", "{\"hostname\": \"web\"}"},
                                                    {"freeze", "{}"},
                                                    {"power", "{\"action\": \"off\"}"}})
    CHECK_MESSAGE(m.call(command, json) == "error: the machine is paused", command);
  SUBCASE("the agent is asked anew at once; nobody is told of a change that is none") {
    const int changes = m.changes;
    const size_t before = m.ends.size();
    // Nothing grows old meanwhile.
    const uint32_t age_ms = m.report().age_ms;
    m.host.run_until([] { return false; }, 600);
    CHECK(m.report().age_ms == age_ms);
    CHECK(m.call("status").find("\"age_ms\":" + std::to_string(age_ms) + ",") != std::string::npos);
    REQUIRE(m.device->resume() == CLONE_OK);
    CHECK(m.report().age_ms < age_ms + 500);
    REQUIRE(m.device->resume() == CLONE_OK);  // again changes nothing
    REQUIRE(m.host.run_until([&] { return m.ends.size() > before; }, 50));
    CHECK(first.closed());
    CHECK(m.report().connected == 1);
    m.session();
    m.host.run_main_loop(20);
    CHECK(m.changes == changes);
  }
  SUBCASE("after a reset the guest boots") {
    REQUIRE(m.device->reset() == CLONE_OK);
    CHECK(m.report().connected == 0);
    REQUIRE(m.device->resume() == CLONE_OK);
    m.next_end();
    m.session();
  }
  SUBCASE("a saved machine has nothing of it") {
    SavedState state;
    REQUIRE(m.device->save(state) == CLONE_OK);
    CHECK(state.sections.empty());
    REQUIRE(m.device->load(state) == CLONE_OK);
  }
}

TEST_CASE("guest-agent: a machine that was loaded is told who it is before it is watched, until it has answered") {
  Machine m(Machine::Given{{"timeout", "2000"}, {"interval", "100"}});
  m.session();
  REQUIRE(m.device->quiesce() == CLONE_OK);
  SavedState state;
  REQUIRE(m.device->load(state) == CLONE_OK);
  bool refuses = false;
  SUBCASE("with a name; the agent takes it") { m.host.machine_name = "web"; }
  SUBCASE("without one; the agent cannot do a part of it") { refuses = true; }
  const auto now_ns = [] { return std::chrono::system_clock::now().time_since_epoch().count(); };
  std::string entropies[2];
  const auto check_identity = [&](AgentEnd& end, std::string& entropy) {
    REQUIRE(m.host.run_until([&] { return end.received().size() == 1; }));
    m.host.run_main_loop(20);
    REQUIRE(end.received().size() == 1);  // nothing before the agent is there to take the time
    const auto before = now_ns();
    end.hello();
    REQUIRE(m.host.run_until([&] { return end.received().size() == 2; }));
    CHECK(end.received()[0].type == Type::hello);
    CHECK(end.received()[1].type == Type::identity);
    const std::string payload = end.received()[1].payload;
    agent_protocol::Reader reader(payload.data(), payload.size());
    using namespace agent_protocol;
    const bool named = !m.host.machine_name.empty();
    CHECK(reader.u32() == ((named ? kIdentityHostname : 0u) | kIdentityEntropy | kIdentityClock));
    if (named) CHECK(printable(reader.text()) == "web");
    const auto bytes = reader.text();
    entropy.assign(bytes.data, bytes.size_bytes);
    CHECK(entropy.size() == 32);
    const auto clock_ns = static_cast<int64_t>(reader.u64());
    CHECK(clock_ns >= before);
    CHECK(clock_ns <= now_ns());
    CHECK(reader.left_bytes() == 0);
  };
  REQUIRE(m.device->resume() == CLONE_OK);
  check_identity(m.next_end(), entropies[0]);
  // Without an answer it counts for nothing.
  AgentEnd& second = m.next_end();
  check_identity(second, entropies[1]);
  CHECK(entropies[0] != entropies[1]);
  // Nobody else gets to the agent before it has.
  FakeHost::Answer stream;
  m.begin("connect", "{\"timeout_ms\": 5000}", stream);
  m.host.run_until([] { return false; }, 20);
  CHECK(&m.ends.back() == &second);

  if (refuses) {
    second.send(Type::error, [](Writer& writer) {
      writer.u32(EPERM);
      writer.u16(static_cast<uint16_t>(Type::identity));
      agent_protocol::put_text(writer, "clock: no");
    });
  } else {
    // An answer that comes late says that the time may have, too: it is told again, until one is quick.
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    const auto before = now_ns();
    second.done();
    REQUIRE(m.host.run_until([&] { return second.received().size() == 3; }));
    const std::string payload = second.received()[2].payload;
    agent_protocol::Reader reader(payload.data(), payload.size());
    CHECK(second.received()[2].type == Type::identity);
    CHECK(reader.u32() == agent_protocol::kIdentityClock);
    CHECK(static_cast<int64_t>(reader.u64()) >= before);
    CHECK(reader.left_bytes() == 0);
    second.done();
  }
  // Where this machine is slow, its answers are late as well, and the time is told once more.
  size_t answered = second.received().size();
  const auto answer_clocks = [&] {
    for (const auto& received = second.received(); answered < received.size(); ++answered)
      if (received[answered].type == Type::identity) second.done();
  };
  const auto watches = [&] {
    return std::ranges::count_if(second.received(), [](const auto& frame) { return frame.type == Type::watch; });
  };
  // Who waited comes first, then reports are asked for.
  REQUIRE(m.host.run_until([&] {
    answer_clocks();
    return !stream.text.empty();
  }));
  CHECK(stream.text == "{}");
  CHECK(watches() == 0);
  REQUIRE(m.host.run_until([&] {
    answer_clocks();
    return watches() > 0;
  }));
  second.report(CLONE_ACTIVITY_IDLE);
  REQUIRE(m.host.run_until([&] {
    answer_clocks();
    return m.report().activity == CLONE_ACTIVITY_IDLE;
  }));
  CHECK(watches() == 1);
  if (refuses) CHECK(second.received().size() == 3);
  const auto lines = m.host.log_lines();
  CHECK(std::ranges::count(lines, "guest-agent.0: the guest keeps a part of the identity it had: clock: no") ==
        refuses);
  // Then it is a session like any other, and so is the next.
  second.close();
  AgentEnd& third = m.next_end();
  REQUIRE(m.host.run_until([&] { return third.received().size() == 2; }));
  CHECK(third.received()[1].type == Type::watch);
}
