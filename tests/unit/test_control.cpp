// SPDX-License-Identifier: Apache-2.0
// A VM's directory and what tells a live one from a dead one; the control socket, good requests and bad; console
// watchers.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <future>
#include <optional>
#include <thread>

#include "clone/sdk/error.hpp"
#include "console/attachment.hpp"
#include "console/console_watchers.hpp"
#include "control/client.hpp"
#include "control/control_server.hpp"
#include "control/instances.hpp"
#include "plugin/host_context.hpp"
#include "scratch_dir.hpp"
#include "util/local_socket.hpp"
#include "util/utf8.hpp"

using namespace std::chrono_literals;
using namespace vmm;
namespace json = boost::json;

namespace {

class RuntimeRoot {
 public:
  RuntimeRoot() { ::setenv("CLONE_RUNTIME_DIR", path().c_str(), 1); }
  ~RuntimeRoot() { ::unsetenv("CLONE_RUNTIME_DIR"); }
  std::string path() const { return scratch_.path() + "/run"; }

 private:
  ScratchDir scratch_;
};

// A VM in another process, which ends as it is told.
class OtherVm {
 public:
  explicit OtherVm(const char* name) {
    int ends[2];
    REQUIRE(::pipe2(ends, O_CLOEXEC) == 0);
    Fd reader(ends[0]), writer(ends[1]);
    pid_ = ::fork();
    if (pid_ == 0) {
      auto made = InstanceDirectory::create(name, 2, 1 << 20);
      const char told = made.ok() ? 'y' : 'n';
      if (::write(writer.get(), &told, 1) != 1) ::_exit(1);
      ::pause();
      ::_exit(0);
    }
    char told = 0;
    REQUIRE(::read(reader.get(), &told, 1) == 1);
    REQUIRE(told == 'y');
  }
  ~OtherVm() { kill(); }
  void kill() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
    pid_ = 0;
  }
  int pid() const { return pid_; }

 private:
  int pid_ = 0;
};

// A control server on a loop of its own, and raw clients.
class Served {
 public:
  explicit Served(std::chrono::milliseconds line_limit = 30s) {
    auto made = InstanceDirectory::create("served", 1, 1 << 20);
    REQUIRE(made.ok());
    directory.emplace(std::move(made).value());
    auto socket = listen_in(directory->fd(), "control.sock");
    REQUIRE(socket.ok());
    auto made_loop = LoopThread::create("test-control");
    REQUIRE(made_loop.ok());
    loop = std::move(made_loop).value();
    server.emplace(*loop, std::move(socket).value(), line_limit);
    REQUIRE(server
                ->add_method("test.0", "test.echo", "Answers its parameters.",
                             [](const json::object& given, ControlServer::Reply reply) { reply.succeed(given); })
                .ok());
    REQUIRE(server
                ->add_method("test.0", "test.fail", "Fails.",
                             [](const json::object&, ControlServer::Reply reply) { reply.fail("it is so"); })
                .ok());
    REQUIRE(
        server->add_method("test.0", "test.forget", "Never answers.", [](const json::object&, ControlServer::Reply) {})
            .ok());
    REQUIRE(server
                ->add_method(
                    "test.0", "test.later", "Answers when it is told.",
                    [this](const json::object&, ControlServer::Reply reply) { later.emplace_back(std::move(reply)); })
                .ok());
    REQUIRE(server
                ->add_method("test.0", "test.fd", "Hands out a descriptor.",
                             [](const json::object&, ControlServer::Reply reply) {
                               reply.succeed(json::object{}, Fd(::open("/dev/zero", O_RDONLY | O_CLOEXEC)));
                             })
                .ok());
    REQUIRE(server
                ->add_method("test.0", "test.large", "Answers 3 MiB.",
                             [](const json::object&, ControlServer::Reply reply) {
                               reply.succeed(json::string(std::string(3 << 20, 'x')));
                             })
                .ok());
    server->add_metric("test.0", {"rows", "Rows.", CLONE_METRIC_COUNTER, "test.0", [] { return 7.0; }});
    server->add_metric("test.1", {"rows", "Rows.", CLONE_METRIC_COUNTER, "test.1", [] { return 0.5; }});
    REQUIRE(server->start().ok());
  }
  ~Served() {
    on_loop([this] {
      later.clear();
      server.reset();
    });
  }

  template <typename Call>
  void on_loop(Call call) {
    std::mutex mutex;
    std::condition_variable done;
    bool is_done = false;
    loop->post([&] {
      call();
      const std::lock_guard lock(mutex);
      is_done = true;
      done.notify_all();
    });
    std::unique_lock lock(mutex);
    REQUIRE(done.wait_for(lock, 10s, [&] { return is_done; }));
  }
  Fd raw() {
    auto socket = connect_in(directory->fd(), "control.sock");
    REQUIRE(socket.ok());
    return std::move(socket).value();
  }
  ControlClient client() {
    auto made = ControlClient::connect(directory->record());
    REQUIRE(made.ok());
    return std::move(made).value();
  }

  RuntimeRoot root;
  std::optional<InstanceDirectory> directory;
  std::unique_ptr<LoopThread> loop;
  std::vector<ControlServer::Reply> later;
  std::optional<ControlServer> server;
};

void send_all(int socket, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t count = ::send(socket, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (count <= 0) return;  // the other side has had enough
    bytes.remove_prefix(static_cast<size_t>(count));
  }
}

// One line, or what came before the end.
std::string read_line(int socket, std::chrono::milliseconds limit = 10s) {
  std::string line;
  char byte;
  pollfd wanted{socket, POLLIN, 0};
  while (::poll(&wanted, 1, static_cast<int>(limit.count())) == 1 && ::read(socket, &byte, 1) == 1) {
    if (byte == '\n') break;
    line += byte;
  }
  return line;
}

bool at_end(int socket, std::chrono::milliseconds limit = 10s) {
  char bytes[4096];
  pollfd wanted{socket, POLLIN, 0};
  while (::poll(&wanted, 1, static_cast<int>(limit.count())) == 1)
    if (::read(socket, bytes, sizeof bytes) <= 0) return true;
  return false;
}

int error_code(const std::string& line) {
  const json::value answer = json::parse(line);
  const auto* error = answer.as_object().if_contains("error");
  return error ? static_cast<int>(error->at("code").as_int64()) : 0;
}

std::string ask(int socket, std::string_view line) {
  send_all(socket, std::string(line) + "\n");
  return read_line(socket);
}

}  // namespace

TEST_CASE("a VM's directory: private, described, found by name, id and pid, gone with the VM") {
  const RuntimeRoot root;
  REQUIRE(list_instances().ok());
  CHECK(list_instances()->empty());
  CHECK(find_instance("").error().message == "no VM is running");
  std::string path;
  {
    auto made = InstanceDirectory::create("web", 3, 5 << 20);
    REQUIRE(made.ok());
    const InstanceRecord& record = made->record();
    path = record.directory;
    struct stat status {};
    REQUIRE(::stat(path.c_str(), &status) == 0);
    CHECK((status.st_mode & 07777) == 0700);
    REQUIRE(::stat(root.path().c_str(), &status) == 0);
    CHECK((status.st_mode & 077) == 0);
    REQUIRE(list_instances()->size() == 1);
    for (const std::string& what : {std::string("web"), record.id, std::to_string(::getpid()), std::string()}) {
      auto found = find_instance(what);
      REQUIRE(found.ok());
      CHECK(found->id == record.id);
      CHECK(found->vcpus == 3);
      CHECK(found->memory_bytes == 5 << 20);
      CHECK(found->started_ms == record.started_ms);
    }
    CHECK(find_instance("wob").error().message.find("'wob'; there are: web (id " + record.id) != std::string::npos);
    auto taken = InstanceDirectory::create("web", 1, 1);
    REQUIRE(!taken.ok());
    CHECK(taken.error().message.find("'web' is taken by the VM of process") != std::string::npos);
  }
  CHECK(!std::filesystem::exists(path));
  CHECK(list_instances()->empty());
}

TEST_CASE("names that --name refuses") {
  const RuntimeRoot root;
  for (const char* name : {"123", "-x", ".x", "a/b", "a b", "\n", "..", "é"}) {
    CAPTURE(name);
    CHECK(!InstanceDirectory::create(name, 1, 1).ok());
  }
  CHECK(!InstanceDirectory::create(std::string(64, 'a'), 1, 1).ok());
  CHECK(InstanceDirectory::create(std::string(63, 'a'), 1, 1).ok());
}

TEST_CASE("what a killed VM left is not listed, and cleared by the next one; its name is free") {
  const RuntimeRoot root;
  OtherVm other("web");
  REQUIRE(list_instances()->size() == 1);
  CHECK(find_instance("web")->pid == other.pid());
  const std::string left = list_instances()->front().directory;
  {
    auto second = InstanceDirectory::create("", 1, 1);
    REQUIRE(second.ok());
    REQUIRE(list_instances()->size() == 2);
    const auto ambiguous = find_instance("");
    REQUIRE(!ambiguous.ok());
    CHECK(ambiguous.error().message.find("2 VMs are running") == 0);
    CHECK(ambiguous.error().message.find("web (id ") != std::string::npos);
  }
  other.kill();
  CHECK(std::filesystem::exists(left));
  CHECK(list_instances()->empty());
  const Fd asking(::open(left.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));  // as a list does, at this moment
  REQUIRE(::flock(asking.get(), LOCK_SH | LOCK_NB) == 0);
  auto again = InstanceDirectory::create("web", 1, 1);
  REQUIRE(again.ok());
  CHECK(!std::filesystem::exists(left));
  CHECK(list_instances()->size() == 1);
}

TEST_CASE("a runtime directory that others can write to, or what stands in it, is not trusted") {
  const RuntimeRoot root;
  std::filesystem::create_directories(root.path());
  ::chmod(root.path().c_str(), 0777);
  auto refused = InstanceDirectory::create("", 1, 1);
  REQUIRE(!refused.ok());
  CHECK(refused.error().message.find("others can write to it") != std::string::npos);
  ::chmod(root.path().c_str(), 0700);
  // A link in place of a VM's directory is not followed; foreign names are left alone.
  std::filesystem::create_directories(root.path() + "/../elsewhere");
  std::filesystem::create_symlink(root.path() + "/../elsewhere", root.path() + "/abcdef01");
  std::filesystem::create_directories(root.path() + "/somebody's");
  auto made = InstanceDirectory::create("", 1, 1);
  REQUIRE(made.ok());
  CHECK(list_instances()->size() == 1);
  CHECK(std::filesystem::exists(root.path() + "/../elsewhere"));
  CHECK(std::filesystem::exists(root.path() + "/somebody's"));
}

TEST_CASE("a description that makes no sense is no VM") {
  const RuntimeRoot root;
  auto made = InstanceDirectory::create("", 1, 1);
  REQUIRE(made.ok());
  const std::string file = made->record().directory + "/vm.json";
  for (const std::string text : {"", "{", "[]", "{\"id\": 7}", "null"}) {
    CAPTURE(text);
    Fd out(::open(file.c_str(), O_WRONLY | O_TRUNC | O_CLOEXEC));
    REQUIRE(::write(out.get(), text.data(), text.size()) == static_cast<ssize_t>(text.size()));
    CHECK(list_instances()->empty());
  }
}

TEST_CASE("the control socket answers, by name, in order, with a descriptor, later") {
  Served served;
  ControlClient client = served.client();
  auto echo = client.call("test.echo", {{"a", 1}});
  REQUIRE(echo.ok());
  CHECK(json::serialize(echo->result) == R"({"a":1})");
  CHECK(client.call("test.fail").error().message == "VM served: it is so");
  CHECK(client.call("test.forget").error().message == "VM served: the machine ended before it answered");
  CHECK(client.call("test.none").error().message.find("no method 'test.none'") != std::string::npos);
  auto fd = client.call("test.fd");
  REQUIRE(fd.ok());
  char byte = 1;
  REQUIRE(fd->fd);
  CHECK(::read(fd->fd.get(), &byte, 1) == 1);
  CHECK(byte == 0);
  CHECK(client.call("test.large")->result.as_string().size() == 3 << 20);
  CHECK(client.call("test.later", {}, 50ms).error().code == ETIMEDOUT);
  served.on_loop([&] { served.later.front().succeed(json::object{{"late", true}}); });
  CHECK(client.call("test.echo", {{"b", 2}})->result.at("b").as_int64() == 2);  // the late answer is passed over

  auto methods = client.call("rpc.discover");
  REQUIRE(methods.ok());
  const std::string list = json::serialize(methods->result);
  for (const char* name : {"rpc.discover", "metrics.read", "events.subscribe", "test.echo"})
    CHECK(list.find(std::string("\"name\":\"") + name) != std::string::npos);

  const std::string metrics(client.call("metrics.read")->result.at("text").as_string());
  CHECK(metrics ==
        "# HELP clone_rows Rows.\n# TYPE clone_rows counter\nclone_rows{instance=\"test.0\"} 7\n"
        "clone_rows{instance=\"test.1\"} 0.5\n");
  served.on_loop([&] { served.server->remove_all_of("test.0"); });
  CHECK(!client.call("test.echo").ok());
  CHECK(client.call("metrics.read")->result.at("text").as_string().find("test.0") == json::string::npos);
}

TEST_CASE("notifications go to those who asked for them") {
  Served served;
  ControlClient listener = served.client(), other = served.client();
  REQUIRE(listener.call("events.subscribe").ok());
  REQUIRE(other.call("test.echo").ok());
  served.on_loop([&] { served.server->notify("vm.paused", {{"why", "test"}}); });
  auto told = listener.next_notification(10s);
  REQUIRE(told.ok());
  CHECK(told->at("method").as_string() == "vm.paused");
  CHECK(told->at("params").at("why").as_string() == "test");
  CHECK(!other.next_notification(50ms).ok());
}

TEST_CASE("malformed requests are answered with an error, and the client may go on") {
  Served served;
  const Fd socket = served.raw();
  const std::pair<const char*, int> rows[] = {
      {"{", -32700},
      {"nonsense", -32700},
      {"\xff\xfe", -32700},
      {"[]", -32600},
      {"7", -32600},
      {"{}", -32600},
      {R"([{"jsonrpc":"2.0","id":1,"method":"test.echo"}])", -32600},
      {R"({"id":1,"method":"test.echo"})", -32600},
      {R"({"jsonrpc":"1.0","id":1,"method":"test.echo"})", -32600},
      {R"({"jsonrpc":2.0,"id":1,"method":"test.echo"})", -32600},
      {R"({"jsonrpc":"2.0","id":1,"method":7})", -32600},
      {R"({"jsonrpc":"2.0","id":{},"method":"test.echo"})", -32600},
      {R"({"jsonrpc":"2.0","id":1,"method":"none"})", -32601},
      {R"({"jsonrpc":"2.0","id":1,"method":"test.echo","params":[1]})", -32602},
      {R"({"jsonrpc":"2.0","id":1,"method":"test.echo","params":"x"})", -32602},
      {R"({"jsonrpc":"2.0","id":1,"method":"test.fail"})", -32000},
      {R"({"jsonrpc":"2.0","id":1,"method":"test.echo","params":[]})", 0},
      {R"({"jsonrpc":"2.0","id":"x","method":"test.echo"})", 0},
  };
  for (const auto& [line, code] : rows) {
    CAPTURE(line);
    CHECK(error_code(ask(socket.get(), line)) == code);
  }
  // Nested beyond measure.
  CHECK(error_code(ask(socket.get(), std::string(10'000, '['))) == -32700);
  // Without an id nothing is answered.
  send_all(socket.get(),
           "{\"jsonrpc\":\"2.0\",\"method\":\"none\"}\n{\"jsonrpc\":\"2.0\",\"method\":\"test.fail\"}\n\n");
  CHECK(ask(socket.get(), R"({"jsonrpc":"2.0","id":9,"method":"test.echo"})") ==
        R"({"jsonrpc":"2.0","result":{},"id":9})");
}

TEST_CASE("requests over 1 MiB, byte by byte, half-closed, unread") {
  Served served;
  {
    const Fd socket = served.raw();
    std::string fits = R"({"jsonrpc":"2.0","id":1,"method":"test.echo","params":{"x":")";
    fits += std::string((1 << 20) - fits.size() - 3, 'y') + "\"}}";
    REQUIRE(fits.size() == 1 << 20);
    CHECK(error_code(ask(socket.get(), fits)) == 0);
    std::thread sender([&] { send_all(socket.get(), std::string(3 << 20, 'z')); });
    CHECK(read_line(socket.get()).find("longer than 1 MiB") != std::string::npos);
    ::shutdown(socket.get(), SHUT_RD);
    sender.join();
  }
  {
    const Fd socket = served.raw();
    for (const char byte : std::string(R"({"jsonrpc":"2.0","id":1,"method":"test.echo"})"
                                       "\n"))
      send_all(socket.get(), {&byte, 1});
    CHECK(error_code(read_line(socket.get())) == 0);
  }
  {  // The answer still comes; then the server closes.
    const Fd socket = served.raw();
    send_all(socket.get(), "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"test.later\"}\n");
    ::shutdown(socket.get(), SHUT_WR);
    while (true) {
      size_t waiting = 0;
      served.on_loop([&] { waiting = served.later.size(); });
      if (waiting == 1) break;
    }
    served.on_loop([&] { served.later.front().succeed("late"); });
    CHECK(error_code(read_line(socket.get())) == 0);
    CHECK(at_end(socket.get()));
  }
  {  // Half a request and gone.
    const Fd socket = served.raw();
    send_all(socket.get(), "{\"jsonrpc\"");
  }
  {  // Never reads: it is dropped, and nobody else suffers.
    const Fd socket = served.raw();
    for (int i = 0; i < 8; ++i) send_all(socket.get(), "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"test.large\"}\n");
    CHECK(served.client().call("test.echo").ok());
    CHECK(at_end(socket.get()));
  }
}

TEST_CASE("a request that does not end in its time is refused, and nobody else") {
  Served served(300ms);
  const Fd idle = served.raw();
  const Fd slow = served.raw();
  const auto start = std::chrono::steady_clock::now();
  std::thread sender([&] {  // one byte a moment does not help it
    for (int i = 0; i < 20; ++i, std::this_thread::sleep_for(100ms)) send_all(slow.get(), "[");
  });
  CHECK(read_line(slow.get()).find("the request did not end in its time") != std::string::npos);
  CHECK(at_end(slow.get()));
  const auto took = std::chrono::steady_clock::now() - start;
  sender.join();
  CHECK(took >= 300ms);
  CHECK(took < 5s);
  CHECK(error_code(ask(idle.get(), R"({"jsonrpc":"2.0","id":1,"method":"test.echo"})")) == 0);
}

TEST_CASE("a VM that does not accept is waited for no longer than told") {
  RuntimeRoot root;
  auto made = InstanceDirectory::create("stuck", 1, 1 << 20);
  REQUIRE(made.ok());
  const auto socket = listen_in(made->fd(), "control.sock");
  REQUIRE(socket.ok());
  std::vector<ControlClient> queued;
  const auto connect = [&] {
    auto client = ControlClient::connect(made->record(), 200ms);
    if (client.ok()) queued.push_back(std::move(client).value());
    return client;
  };
  while (queued.size() < 1000 && connect().ok()) {
  }
  REQUIRE(queued.size() < 1000);
  const auto start = std::chrono::steady_clock::now();
  const auto beyond = connect();
  const auto took = std::chrono::steady_clock::now() - start;
  REQUIRE(!beyond.ok());
  CHECK(beyond.error().code == ETIMEDOUT);
  CHECK(beyond.error().message == "VM stuck: control.sock: nobody answers there");
  CHECK(took >= 150ms);
  CHECK(took < 5s);
  CHECK(queued.front().call("vm.info", {}, 100ms).error().code == ETIMEDOUT);
}

TEST_CASE("clients beyond the limit are told so; a place becomes free") {
  Served served;
  std::vector<Fd> sockets;
  for (int i = 0; i < 128; ++i) sockets.push_back(served.raw());
  CHECK(error_code(ask(sockets.back().get(), R"({"jsonrpc":"2.0","id":1,"method":"test.echo"})")) == 0);
  const Fd beyond = served.raw();
  CHECK(read_line(beyond.get()).find("too many clients") != std::string::npos);
  CHECK(at_end(beyond.get()));
  CHECK(served.client().call("test.echo").error().message == "VM served: too many clients");
  sockets.pop_back();
  for (int tries = 0; tries < 100; ++tries) {
    const Fd socket = served.raw();
    if (error_code(ask(socket.get(), R"({"jsonrpc":"2.0","id":1,"method":"test.echo"})")) == 0) return;
  }
  FAIL("no place became free");
}

TEST_CASE("plugins reach the control socket through their host: commands, metrics, notifications, the VMs around") {
  Served served;
  HostContext context;
  context.main_loop = served.loop.get();
  context.control = &*served.server;
  context.directory = &*served.directory;
  const HostHandle first("thing.0", context), second("thing.1", context);
  const auto table = [](const HostHandle& host, const char* id) { return host.raw()->get_extension(host.raw(), id); };
  const auto* control = static_cast<const clone_host_control*>(table(first, CLONE_HOST_CONTROL));
  REQUIRE(control);
  const auto call = [](void*, const char* text, const clone_reply* reply) {
    // Answered later, from another thread.
    std::thread([text = std::string(text), reply = *reply] {
      if (text == "{}") return reply.fail(reply.context, "nothing given");
      reply.succeed_with_fd(reply.context, text.c_str(), 0);
    }).detach();
  };
  served.on_loop([&] {
    clone_sdk::ErrorBuffer error;
    CHECK(control->add_command(first.raw(), "do", "Does.", call, nullptr, error) == CLONE_OK);
    CHECK(control->add_command(second.raw(), "do", "Does.", call, nullptr, error) == CLONE_OK);
    CHECK(control->add_command(first.raw(), "do", "Does.", call, nullptr, error) == CLONE_ERR_BUSY);
    const auto read = [](void*) { return 3.0; };
    CHECK(control->add_metric(first.raw(), "thing_rows", "Rows.", CLONE_METRIC_GAUGE, read, nullptr, error) ==
          CLONE_OK);
    CHECK(control->add_metric(first.raw(), "No good", "Rows.", CLONE_METRIC_GAUGE, read, nullptr, error) != CLONE_OK);
  });
  ControlClient client = served.client();
  for (const char* name : {"thing.do", "thing.0.do", "thing.1.do"}) {
    CAPTURE(name);
    auto answer = client.call(name, {{"a", 1}});
    REQUIRE(answer.ok());
    CHECK(json::serialize(answer->result) == R"({"a":1})");
    CHECK(answer->fd);
    CHECK(client.call(name).error().message == "VM served: nothing given");
  }
  CHECK(client.call("metrics.read")->result.at("text").as_string().find("clone_thing_rows{instance=\"thing.0\"} 3\n") !=
        json::string::npos);
  REQUIRE(client.call("events.subscribe").ok());
  control->notify(second.raw(), "happened", R"({"what": 1})");
  CHECK(client.next_notification(10s)->at("method").as_string() == "thing.1.happened");
  CHECK(control->directory(first.raw()) == served.directory->record().directory);
  CHECK(control->directory_fd(first.raw()) == served.directory->fd());

  OtherVm other("other");
  const auto* instances = static_cast<const clone_host_instances*>(table(first, CLONE_HOST_INSTANCES));
  REQUIRE(instances);
  std::vector<std::pair<uint32_t, uint64_t>> seen;
  const auto visit = [](void* list, const clone_instance* one) {
    CHECK(one->private_bytes <= one->resident_bytes);
    static_cast<decltype(seen)*>(list)->emplace_back(one->pid, one->memory_bytes);
  };
  clone_sdk::ErrorBuffer error;
  REQUIRE(instances->list(first.raw(), visit, &seen, error) == CLONE_OK);
  CHECK(seen ==
        decltype(seen){{static_cast<uint32_t>(::getpid()), 1 << 20}, {static_cast<uint32_t>(other.pid()), 1 << 20}});
}

TEST_CASE("metrics over HTTP on the control socket") {
  Served served;
  const Fd socket = served.raw();
  send_all(socket.get(), "GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n");
  CHECK(read_line(socket.get()) == "HTTP/1.1 200 OK\r");
  std::string all;
  for (std::string line; !(line = read_line(socket.get())).empty();) all += line + "\n";
  CHECK(all.find("clone_rows{instance=\"test.0\"} 7\n") != std::string::npos);
}

TEST_CASE("bytes that are not UTF-8 do not break answers") {
  CHECK(valid_utf8("plain \xc3\xa4 \xe2\x82\xac \xf0\x9f\x98\x80") == "plain \xc3\xa4 \xe2\x82\xac \xf0\x9f\x98\x80");
  const std::string bad = "\xef\xbf\xbd";
  CHECK(valid_utf8("a\xff"
                   "b") == "a" + bad + "b");
  CHECK(valid_utf8("\xc3") == bad);
  CHECK(valid_utf8("\xc0\xaf") == bad + bad);            // overlong
  CHECK(valid_utf8("\xed\xa0\x80") == bad + bad + bad);  // a surrogate
  CHECK(valid_utf8("\xf4\x90\x80\x80") == bad + bad + bad + bad);
  CHECK(valid_utf8("\xe2\x82") == bad + bad);
  CHECK(printable("a\n\x1b[2J\r\x7f\t\xc3\xa4\xc2\x9b\xff") == "a\n?[2J???\xc3\xa4?" + bad);
  Served served;
  REQUIRE(served.server
              ->add_method("", "test.bytes", "Fails with bytes.",
                           [](const json::object&, ControlServer::Reply reply) { reply.fail("no \xff"); })
              .ok());
  CHECK(served.client().call("test.bytes").error().message == "VM served: no " + bad);
}

TEST_CASE("a client that leaves while its answer is awaited costs nothing") {
  Served served;
  {
    const Fd socket = served.raw();
    send_all(socket.get(), "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"test.later\"}\n");
    ::shutdown(socket.get(), SHUT_WR);
    while (true) {
      size_t waiting = 0;
      served.on_loop([&] { waiting = served.later.size(); });
      if (waiting == 1) break;
    }
  }
  // The loop's thread sleeps: its processor time stands still.
  clockid_t clock{};
  served.on_loop([&] { REQUIRE(::pthread_getcpuclockid(::pthread_self(), &clock) == 0); });
  std::this_thread::sleep_for(50ms);
  timespec before{}, after{};
  REQUIRE(::clock_gettime(clock, &before) == 0);
  std::this_thread::sleep_for(200ms);
  REQUIRE(::clock_gettime(clock, &after) == 0);
  CHECK((after.tv_sec - before.tv_sec) * 1'000'000'000 + after.tv_nsec - before.tv_nsec < 50'000'000);
}

TEST_CASE("another user is not served") {
  if (::geteuid() != 0) return;  // the socket's mode keeps others out already; root can be another user
  Served served;
  REQUIRE(::chmod((served.directory->record().directory + "/control.sock").c_str(), 0777) == 0);
  const int directory = served.directory->fd();
  const pid_t child = ::fork();
  if (child == 0) {
    // The descriptor of the directory leads past the modes of the folders above.
    if (::fchmod(directory, 0755) != 0 || ::setresuid(65534, 65534, 65534) != 0) ::_exit(3);
    auto socket = connect_in(directory, "control.sock");
    if (!socket.ok()) ::_exit(2);
    send_all(socket->get(), "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"test.echo\"}\n");
    ::_exit(read_line(socket->get()).find("not allowed") != std::string::npos ? 0 : 1);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(WEXITSTATUS(status) == 0);
}

TEST_CASE("a watcher that leaves while what it typed has no room") {
  ScratchDir scratch;
  const Fd directory(::open(scratch.path().c_str(), O_DIRECTORY | O_RDONLY | O_CLOEXEC));
  auto loop = EventLoop::create();
  REQUIRE(loop.ok());
  unsigned refused = 0;
  ConsoleWatchers watchers(**loop, [&](std::string_view) {
    ++refused;
    return false;
  });
  auto socket = listen_in(directory.get(), "console.sock");
  REQUIRE(socket.ok());
  REQUIRE(watchers.listen(std::move(socket).value()).ok());
  auto run_for = [&](std::chrono::milliseconds time) {
    (*loop)->add_timer(time, [&] { (*loop)->stop(); });
    (*loop)->run();
  };
  auto client = connect_in(directory.get(), "console.sock");
  REQUIRE(client.ok());
  send_all(client->get(), std::string(100'000, 'x'));
  run_for(50ms);
  CHECK(refused >= 1);
  CHECK(watchers.list().size() == 1);
  client->reset();
  run_for(100ms);
  CHECK(watchers.list().empty());
  const unsigned before = refused;
  run_for(100ms);
  CHECK(refused == before);
}

TEST_CASE("console watchers: history first, then all that follows; one types; a slow one holds nobody up") {
  ScratchDir scratch;
  const Fd directory(::open(scratch.path().c_str(), O_DIRECTORY | O_RDONLY | O_CLOEXEC));
  auto loop = LoopThread::create("test-console");
  REQUIRE(loop.ok());
  std::mutex mutex;
  std::string typed;
  auto watchers = std::make_unique<ConsoleWatchers>(**loop, [&](std::string_view bytes) {
    const std::lock_guard lock(mutex);
    typed += bytes;
    return true;
  });
  auto typed_is = [&](const std::string& wanted) {
    for (int i = 0; i < 1000; ++i, std::this_thread::sleep_for(10ms)) {
      const std::lock_guard lock(mutex);
      if (typed == wanted) return true;
    }
    return false;
  };
  watchers->write("before\n");
  auto socket = listen_in(directory.get(), "console.sock");
  REQUIRE(socket.ok());
  REQUIRE(watchers->listen(std::move(socket).value()).ok());
  auto first = connect_in(directory.get(), "console.sock");
  REQUIRE(first.ok());
  CHECK(read_line(first->get()) == "before");
  auto second = connect_in(directory.get(), "console.sock");
  REQUIRE(second.ok());
  CHECK(read_line(second->get()) == "before");
  watchers->write("after\n");
  CHECK(read_line(first->get()) == "after");
  CHECK(read_line(second->get()) == "after");

  send_all(first->get(), "one");
  CHECK(typed_is("one"));
  send_all(second->get(), "two");
  send_all(first->get(), "\x01x");  // no escape keys here
  CHECK(typed_is("one\x01x"));
  first->reset();
  auto second_types = [&] {
    send_all(second->get(), "3");
    const std::lock_guard lock(mutex);
    return typed.ends_with("3");
  };
  bool took_over = false;  // once it is noticed that the first has left
  for (int i = 0; i < 1000 && !took_over; ++i, std::this_thread::sleep_for(10ms)) took_over = second_types();
  CHECK(took_over);
  // A watcher that only watches types nothing, and sees everything.
  auto third = connect_in(directory.get(), "console.sock");
  REQUIRE(third.ok());
  CHECK(read_line(third->get()) == "before");
  ::shutdown(third->get(), SHUT_WR);
  watchers->write("more\n");
  CHECK(read_line(third->get()) == "after");
  CHECK(read_line(third->get()) == "more");

  // Nobody reads now: 4 MiB go by without a wait.
  const auto start = std::chrono::steady_clock::now();
  const std::string block(4096, 'x');
  for (int i = 0; i < 1024; ++i) watchers->write(block);
  CHECK(std::chrono::steady_clock::now() - start < 5s);
  CHECK(watchers->history().size() == 128 * 1024);
  std::mutex done_mutex;
  std::condition_variable done;
  bool is_done = false;
  (*loop)->post([&] {
    watchers.reset();
    const std::lock_guard lock(done_mutex);
    is_done = true;
    done.notify_all();
  });
  std::unique_lock lock(done_mutex);
  CHECK(done.wait_for(lock, 10s, [&] { return is_done; }));
}

TEST_CASE("console watchers: one too many, and another user, are told why") {
  ScratchDir scratch;
  const Fd directory(::open(scratch.path().c_str(), O_DIRECTORY | O_RDONLY | O_CLOEXEC));
  auto loop = EventLoop::create();
  REQUIRE(loop.ok());
  ConsoleWatchers watchers(**loop, [](std::string_view) { return true; });
  auto socket = listen_in(directory.get(), "console.sock");
  REQUIRE(socket.ok());
  REQUIRE(watchers.listen(std::move(socket).value()).ok());
  auto run_for = [&](std::chrono::milliseconds time) {
    (*loop)->add_timer(time, [&] { (*loop)->stop(); });
    (*loop)->run();
  };
  pid_t child = 0;
  if (::geteuid() == 0) {
    REQUIRE(::chmod((scratch.path() + "/console.sock").c_str(), 0777) == 0);
    child = ::fork();
    if (child == 0) {
      if (::fchmod(directory.get(), 0755) != 0 || ::setresuid(65534, 65534, 65534) != 0) ::_exit(3);
      auto mine = connect_in(directory.get(), "console.sock");
      if (!mine.ok()) ::_exit(2);
      ::_exit(read_line(mine->get()) == "clone: not allowed\r" && at_end(mine->get()) ? 0 : 1);
    }
    int status = -1;
    for (int i = 0; i < 100 && ::waitpid(child, &status, WNOHANG) == 0; ++i) run_for(50ms);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
    CHECK(watchers.list().empty());
  }
  std::vector<Fd> clients;
  for (int i = 0; i < 17; ++i) {
    auto client = connect_in(directory.get(), "console.sock");
    REQUIRE(client.ok());
    clients.push_back(std::move(client).value());
    run_for(5ms);
  }
  run_for(50ms);
  CHECK(watchers.list().size() == 16);
  CHECK(read_line(clients.back().get()) == "clone: 16 are attached to this console already\r");
  CHECK(at_end(clients.back().get()));
  CHECK_FALSE(at_end(clients.front().get(), 50ms));
}

TEST_CASE("attached: a console that takes no input keeps neither its output nor Ctrl-Q from coming") {
  int pair[2], out[2];
  REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
  REQUIRE(::pipe2(out, O_CLOEXEC) == 0);
  const Fd ours(pair[0]), output(out[1]);
  Fd shown(out[0]), console(pair[1]), typist, input;
  const auto is_printed = [&](const std::string& line) {
    send_all(console.get(), line + "\n");
    return read_line(shown.get()) == line;
  };
  const auto attach = [&] {
    return std::async(std::launch::async,
                      [&] { return carry_console(ours.get(), input.get(), output.get(), Typing::sent); });
  };
  const auto type = [&](std::string_view bytes, std::chrono::milliseconds limit) {
    size_t typed = 0;
    for (pollfd wanted{typist.get(), POLLOUT, 0};
         typed < bytes.size() && ::poll(&wanted, 1, static_cast<int>(limit.count())) == 1;)
      if (const ssize_t count = ::write(typist.get(), bytes.data() + typed, bytes.size() - typed); count > 0)
        typed += static_cast<size_t>(count);
    return typed;
  };
  const std::string much(3 << 20, 'x');
  SUBCASE("a terminal") {
    typist = Fd(::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK));
    REQUIRE(::grantpt(typist.get()) == 0);
    REQUIRE(::unlockpt(typist.get()) == 0);
    input = Fd(::open(::ptsname(typist.get()), O_RDWR | O_NOCTTY | O_CLOEXEC));
    REQUIRE(input);
    termios mode{};
    REQUIRE(::tcgetattr(input.get(), &mode) == 0);
    ::cfmakeraw(&mode);
    REQUIRE(::tcsetattr(input.get(), TCSANOW, &mode) == 0);
    auto left = attach();
    CHECK(type(much, 10s) == much.size());  // it is read all the time
    CHECK(is_printed("printed meanwhile"));
    CHECK(type("\x11", 10s) == 1);
    const bool ended = left.wait_for(10s) == std::future_status::ready;
    CHECK(ended);
    if (!ended) console.reset();
    CHECK(left.get() == Left::by_user);
  }
  SUBCASE("a pipe: all of it arrives, later") {
    int in[2];
    REQUIRE(::pipe2(in, O_CLOEXEC) == 0);
    input = Fd(in[0]);
    typist = Fd(in[1]);
    REQUIRE(::fcntl(typist.get(), F_SETFL, O_NONBLOCK) == 0);
    auto left = attach();
    const size_t before = type(much, 300ms);
    CHECK(before >= 1 << 20);
    CHECK(before < 2 << 20);  // no more is taken in
    CHECK(is_printed("printed meanwhile"));
    std::string arrived;
    std::thread guest([&] {
      char bytes[4096];
      for (ssize_t count; (count = ::read(console.get(), bytes, sizeof bytes)) > 0;)
        arrived.append(bytes, static_cast<size_t>(count));
    });
    CHECK(type("the end\x11not this", 10s) == 16);
    CHECK(left.wait_for(10s) == std::future_status::ready);
    ::shutdown(ours.get(), SHUT_WR);
    guest.join();
    CHECK(left.get() == Left::by_user);
    CHECK(arrived.size() == before + 7);
    CHECK(arrived.ends_with("xthe end"));
  }
  SUBCASE("output that nobody takes does not keep Ctrl-Q from being read") {
    int in[2];
    REQUIRE(::pipe2(in, O_CLOEXEC) == 0);
    input = Fd(in[0]);
    typist = Fd(in[1]);
    auto left = attach();
    for (size_t sent = 0; sent < much.size();) {
      const ssize_t count = ::send(console.get(), much.data(), much.size() - sent, MSG_DONTWAIT);
      pollfd wanted{console.get(), POLLOUT, 0};
      if (count > 0)
        sent += static_cast<size_t>(count);
      else if (::poll(&wanted, 1, 300) != 1)
        break;
    }
    CHECK(type("\x11", 10s) == 1);
    const bool ended = left.wait_for(10s) == std::future_status::ready;
    CHECK(ended);
    if (!ended) shown.reset();
    CHECK(left.get() == Left::by_user);
  }
}
