// SPDX-License-Identifier: Apache-2.0
// clone-agent runs on this machine and is asked for everything but what would change the machine.
#include <elf.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <map>

#include "agent_client.hpp"

using namespace agent_test;

namespace {

struct Agent {
  ScratchDir scratch;
  AgentProcess process{scratch.path() + "/agent"};
  const std::string& socket() const { return process.socket(); }
};

std::string text_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

bool is_root() { return ::geteuid() == 0; }

struct State {
  char letter = 0;  // 0: there is no such process
  pid_t parent = 0;
};

State state_of(const std::string& process) {
  const std::string text = text_of("/proc/" + process + "/stat");
  const size_t end = text.rfind(')');
  State state;
  if (end != text.npos) std::sscanf(text.c_str() + end + 1, " %c %d", &state.letter, &state.parent);
  return state;
}

// A zombie is not: whose child it is need not be ours.
bool is_alive(pid_t process) {
  const State state = state_of(std::to_string(process));
  return state.letter != 0 && state.letter != 'Z';
}

int zombies_of(pid_t parent) {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const std::string name = entry.path().filename();
    if (!std::isdigit(static_cast<unsigned char>(name[0]))) continue;
    const State state = state_of(name);
    if (state.letter == 'Z' && state.parent == parent) ++count;
  }
  return count;
}

}  // namespace

TEST_CASE("agent: the program is small and needs nothing of the guest") {
  const std::string program = text_of(program_path());
  REQUIRE(program.size() > sizeof(Elf64_Ehdr));
  CHECK(program.size() < 1 << 20);
  Elf64_Ehdr header;
  std::memcpy(&header, program.data(), sizeof header);
  REQUIRE(header.e_phoff + header.e_phnum * sizeof(Elf64_Phdr) <= program.size());
  int loaded = 0;
  for (int i = 0; i < header.e_phnum; ++i) {
    Elf64_Phdr segment;
    std::memcpy(&segment, program.data() + header.e_phoff + i * sizeof segment, sizeof segment);
    CHECK(segment.p_type != PT_INTERP);
    CHECK(segment.p_type != PT_DYNAMIC);
    loaded += segment.p_type == PT_LOAD;
  }
  CHECK(loaded > 0);
}

TEST_CASE("agent: a program's output, errors and exit code") {
  Agent agent;
  Client client(agent.socket());
  const Outcome outcome = run(client, shell("echo out; echo err >&2; exit 7"));
  CHECK(outcome.process > 0);
  CHECK(outcome.output == "out\n");
  CHECK(outcome.errors == "err\n");
  CHECK(outcome.has_exited);
  CHECK(outcome.code == 7);
  CHECK(outcome.signal == 0);
  SUBCASE("the conversation goes on with the next") { CHECK(run(client, shell("exit 255")).code == 255); }
  SUBCASE("a signal that ends it is told") {
    const Outcome killed = run(client, shell("kill -SEGV $$"));
    CHECK(killed.has_exited);
    CHECK(killed.signal == SIGSEGV);
  }
  SUBCASE("frames that come after its end are passed over") {
    client.send(Type::input, "late");
    client.send(Type::resize, Payload().u16(1).u16(1).bytes);
    client.send(Type::signal, Payload().u32(SIGKILL).bytes);
    CHECK(run(client, shell("echo next")).output == "next\n");
  }
}

TEST_CASE("agent: 20 MiB of output arrive whole, and errors beside them") {
  Agent agent;
  Client client(agent.socket());
  const Outcome outcome = run(
      client, shell("head -c 20971520 /dev/zero | tr '\\0' x; head -c 1048576 /dev/zero | tr '\\0' y >&2; echo end"));
  REQUIRE(outcome.has_exited);
  CHECK(outcome.output.size() == 20971520 + 4);
  CHECK(std::count(outcome.output.begin(), outcome.output.end(), 'x') == 20971520);
  CHECK(outcome.output.ends_with("xend\n"));
  CHECK(outcome.errors.size() == 1048576);
  CHECK(std::count(outcome.errors.begin(), outcome.errors.end(), 'y') == 1048576);
}

TEST_CASE("agent: standard input is passed on, with its end") {
  Agent agent;
  Client client(agent.socket());
  SUBCASE("none: /dev/null") {
    CHECK(run(client, shell("wc -c; readlink /proc/self/fd/0")).output == "0\n/dev/null\n");
  }
  SUBCASE("echoed") {
    client.send(Type::exec, Exec{.arguments = {"cat"}, .flags = kExecInput}.payload());
    client.send(Type::input, "one ");
    client.send(Type::input, "two");
    client.send(Type::input, "");
    const Outcome outcome = finish(client);
    CHECK(outcome.output == "one two");
    CHECK(outcome.code == 0);
  }
  SUBCASE("more than any pipe holds, to a program that writes it all back") {
    client.send(Type::exec, Exec{.arguments = {"cat"}, .flags = kExecInput}.payload());
    std::thread writer([&] {
      const std::string part(60000, 'z');
      for (int i = 0; i < 100; ++i) client.send(Type::input, part);
      client.send(Type::input, "");
    });
    const Outcome outcome = finish(client);
    writer.join();
    CHECK(outcome.output.size() == 6000000);
    CHECK(outcome.has_exited);
  }
  SUBCASE("output goes on while nobody takes the input") {
    client.send(Type::exec,
                Exec{.arguments = {"sh", "-c", "sleep 0.3; head -c 500000 /dev/zero"}, .flags = kExecInput}.payload());
    std::thread writer([&] {
      const std::string part(60000, 'z');
      for (int i = 0; i < 10; ++i) client.send(Type::input, part);
    });
    const Outcome outcome = finish(client);
    writer.join();
    CHECK(outcome.output.size() == 500000);
    CHECK(outcome.has_exited);
  }
}

TEST_CASE("agent: arguments, environment, directory") {
  Agent agent;
  Client client(agent.socket());
  Exec exec{.arguments = {"sh", "-c", "printf '%s|' \"$@\"; echo $A-$B-$HOME; pwd; echo $PATH", "sh", "", "a b", "*"},
            .directory = "/usr",
            .environment = {"A=1", "B=x=y", "A=2"}};
  Outcome outcome = run(client, exec);
  CHECK(outcome.output.starts_with("|a b|*|2-x=y-"));
  CHECK(outcome.output.find("\n/usr\n/usr/local/sbin:/usr/local/bin:/usr/sbin:") != std::string::npos);
  exec.environment = {"PATH=/nowhere"};
  exec.arguments[0] = "/bin/sh";
  CHECK(run(client, exec).output.ends_with("/nowhere\n"));
  exec.arguments[0] = "sh";
  outcome = run(client, exec);
  REQUIRE(outcome.failure);
  CHECK(outcome.failure->code == ENOENT);

  SUBCASE("signals, descriptors and groups are a fresh program's own") {
    const Outcome state = run(client, shell("ls /proc/self/fd; grep -E 'SigBlk|SigIgn' /proc/self/status; "
                                            "cat /proc/self/oom_score_adj; ps -o sid=,pgid= -p $$ | xargs; echo $$"));
    std::string expected = "0\n1\n2\n3\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n0\n";
    const std::string process = std::to_string(state.process);
    CHECK(state.output == expected + process + " " + process + "\n" + process + "\n");
  }
}

TEST_CASE("agent: programs that do not start are told of, with why") {
  Agent agent;
  Client client(agent.socket());
  const auto failure = [&](const Exec& exec) {
    const Outcome outcome = run(client, exec);
    REQUIRE(outcome.failure);
    CHECK(outcome.process == 0);  // `started` is not sent
    CHECK(outcome.failure->answered == Type::exec);
    return *outcome.failure;
  };
  Failure told = failure({.arguments = {"no-such-program"}});
  CHECK(told.code == ENOENT);
  CHECK(told.message == "cannot run 'no-such-program': No such file or directory (ENOENT)");
  told = failure({.arguments = {"/etc/passwd"}});
  CHECK(told.code == EACCES);
  CHECK(told.message.find("'/etc/passwd'") != std::string::npos);
  told = failure({.arguments = {"true"}, .directory = "/no/such/folder"});
  CHECK(told.code == ENOENT);
  CHECK(told.message.find("'/no/such/folder'") != std::string::npos);
  told = failure({.arguments = {"true"}, .user = "nobody-such"});
  CHECK(told.code == EINVAL);
  CHECK(told.message == "no user 'nobody-such' in the guest's /etc/passwd");
  told = failure({.arguments = {"true"}, .user = "root:nogroup-such"});
  CHECK(told.message == "no group 'nogroup-such' in the guest's /etc/group");
  CHECK(failure({.arguments = {}}).code == EINVAL);
  CHECK(failure({.arguments = {""}}).code == EINVAL);
  CHECK(failure({.arguments = {"true"}, .environment = {"without"}}).code == EINVAL);
  CHECK(failure({.arguments = {std::string("a\0b", 3)}}).code == EINVAL);
  CHECK(run(client, {.arguments = {"true"}}).has_exited);

  SUBCASE("a script without a first line is the shell's") {
    const std::string script = agent.scratch.write("script", std::string_view("echo \"$0 $1\"\n"));
    ::chmod(script.c_str(), 0755);
    CHECK(run(client, {.arguments = {script, "one"}}).output == script + " one\n");
  }
}

TEST_CASE("agent: users and their groups") {
  if (!is_root()) return;
  Agent agent;
  Client client(agent.socket());
  const auto ids = [&](const std::string& user) {
    Exec exec = shell("id -u; id -g; id -G; echo $USER $LOGNAME $HOME");
    exec.user = user;
    return run(client, exec).output;
  };
  CHECK(ids("").starts_with("0\n0\n0"));
  CHECK(ids("").ends_with("root root /root\n"));
  CHECK(ids("daemon") == "1\n1\n1\ndaemon daemon /usr/sbin\n");
  CHECK(ids("1") == ids("daemon"));
  CHECK(ids("daemon:tty") == "1\n5\n5\ndaemon daemon /usr/sbin\n");
  CHECK(ids("4000000:77") == "4000000\n77\n77\n4000000 4000000 /\n");
}

TEST_CASE("agent: a terminal with its size, job control, resizing and hangup") {
  Agent agent;
  Client client(agent.socket());
  Exec exec = shell(
      "tty >/dev/null && stty size; trap 'stty size; exit 3' WINCH; echo ready; read line; echo got $line; "
      "while :; do sleep 0.05; done");
  exec.flags = kExecTerminal | kExecInput;
  exec.rows = 31;
  exec.columns = 97;
  REQUIRE(client.send(Type::exec, exec.payload()));
  std::string seen;
  const auto wait_for = [&](std::string_view text) {
    while (seen.find(text) == seen.npos) {
      const auto message = client.receive(5000);
      REQUIRE_MESSAGE(message, seen);
      if (message->type == Type::output) seen.append(message->payload.begin(), message->payload.end());
    }
  };
  wait_for("31 97\r\nready\r\n");
  client.send(Type::input, "word\n");
  wait_for("word\r\ngot word\r\n");  // the terminal echoes
  SUBCASE("resize") {
    client.send(Type::resize, Payload().u16(10).u16(20).bytes);
    const Outcome outcome = finish(client);
    CHECK(outcome.output.find("10 20\r\n") != std::string::npos);
    CHECK(outcome.code == 3);
  }
  SUBCASE("Ctrl-C is a signal") {
    client.send(Type::input, "\x03");
    CHECK(finish(client).signal == SIGINT);
  }
  SUBCASE("the end of input is Ctrl-D's") {
    Client other(agent.socket());
    other.send(Type::exec, Exec{.arguments = {"cat"}, .flags = kExecTerminal | kExecInput}.payload());
    other.send(Type::input, "x\n");
    other.send(Type::input, "");
    const Outcome outcome = finish(other);
    CHECK(outcome.has_exited);
    CHECK(outcome.output.find("x\r\nx\r\n") != std::string::npos);
  }
}

TEST_CASE("agent: signals reach the program's group") {
  Agent agent;
  Client client(agent.socket());
  REQUIRE(client.send(Type::exec,
                      shell("trap 'echo usr1; exit 9' USR1; echo ready; while :; do sleep 0.05; done").payload()));
  while (client.receive()->type != Type::output) {
  }
  client.send(Type::signal, Payload().u32(1000).bytes);  // no such signal
  client.send(Type::signal, Payload().u32(SIGUSR1).bytes);
  const Outcome outcome = finish(client);
  CHECK(outcome.output == "usr1\n");
  CHECK(outcome.code == 9);
}

TEST_CASE("agent: a client that goes away takes its program with it") {
  Agent agent;
  const auto start = [&](Client& client, const std::string& script, std::string* output = nullptr) {
    REQUIRE(client.send(Type::exec, shell(script).payload()));
    pid_t process = 0;
    for (;;) {
      const auto message = client.receive();
      REQUIRE(message);
      if (message->type == Type::started) process = static_cast<pid_t>(message->reader().u32());
      if (message->type != Type::output) continue;
      if (output) output->assign(message->payload.begin(), message->payload.end());
      return process;
    }
  };
  SUBCASE("by SIGHUP, at once") {
    Client client(agent.socket());
    const std::string mark = agent.scratch.path() + "/mark";
    const pid_t process = start(client, "trap 'echo hup > " + mark + "; exit' HUP; echo; while :; do sleep 0.05; done");
    client.close();
    CHECK(within_ms(1000, [&] { return !is_alive(process); }));
    CHECK(text_of(mark) == "hup\n");
  }
  SUBCASE("by SIGKILL two seconds later, with all of its group") {
    Client client(agent.socket());
    std::string output;
    const pid_t process = start(client, "trap '' HUP; sleep 1000 & echo $!; sleep 1000; sleep 1000", &output);
    const pid_t sleeper = std::stoi(output);
    CHECK(is_alive(sleeper));
    const int64_t start_ms = now_ms();
    client.close();
    ::usleep(500000);
    CHECK(is_alive(process));
    CHECK(within_ms(4000, [&] { return !is_alive(process); }));
    CHECK(now_ms() - start_ms >= 1900);
    CHECK(within_ms(1000, [&] { return !is_alive(sleeper); }));
  }
  SUBCASE("while it floods, and while it takes no input") {
    Client client(agent.socket());
    const pid_t flood = start(client, "exec yes");
    client.close();
    CHECK(within_ms(3500, [&] { return !is_alive(flood); }));
    Client other(agent.socket());
    REQUIRE(other.send(Type::exec,
                       Exec{.arguments = {"sh", "-c", "echo; exec sleep 1000"}, .flags = kExecInput}.payload()));
    pid_t process = 0;
    for (bool ready = false; !ready;) {
      const auto message = other.receive();
      REQUIRE(message);
      if (message->type == Type::started) process = static_cast<pid_t>(message->reader().u32());
      ready = message->type == Type::output;
    }
    ::fcntl(other.fd(), F_SETFL, O_NONBLOCK);
    const std::string part(60000, 'z');
    while (other.send(Type::input, part)) {
    }
    other.close();
    CHECK(within_ms(3500, [&] { return !is_alive(process); }));
  }
  CHECK(within_ms(1000, [&] { return zombies_of(agent.process.process()) == 0; }));
  Client again(agent.socket());
  CHECK(run(again, shell("echo fine")).output == "fine\n");
}

TEST_CASE("agent: what a program leaves behind does not hold up its end") {
  Agent agent;
  Client client(agent.socket());
  int64_t start_ms = now_ms();
  Outcome outcome = run(client, shell("sleep 1000 & echo $!"));
  CHECK(outcome.has_exited);
  CHECK(now_ms() - start_ms < 1500);
  const pid_t sleeper = std::stoi(outcome.output);
  CHECK(is_alive(sleeper));  // as a daemon would be
  ::kill(sleeper, SIGKILL);

  start_ms = now_ms();
  outcome = run(client, shell("(while :; do echo again; sleep 0.01; done) & echo $!"));
  CHECK(outcome.has_exited);
  CHECK(now_ms() - start_ms < 4000);
  // Nobody reads it: SIGPIPE ends it.
  CHECK(within_ms(1000, [&] { return !is_alive(std::stoi(outcome.output)); }));

  // What a descendant writes soon after is still taken.
  CHECK(run(client, shell("(sleep 0.02; echo late) & echo soon")).output == "soon\nlate\n");
}

TEST_CASE("agent: a hundred programs at once") {
  Agent agent;
  std::vector<std::unique_ptr<Client>> clients;
  for (int i = 0; i < 100; ++i) {
    clients.push_back(std::make_unique<Client>(agent.socket()));
    REQUIRE(clients.back()->send(Type::exec, shell("read line; echo $line; exit " + std::to_string(i)).payload()));
  }
  for (int i = 0; i < 100; ++i) {
    const Outcome outcome = finish(*clients[static_cast<size_t>(i)]);
    CHECK(outcome.has_exited);
    CHECK(outcome.code == static_cast<uint32_t>(i));
  }
  clients.clear();
  CHECK(within_ms(2000, [&] { return zombies_of(agent.process.process()) == 0; }));
}

TEST_CASE("agent: more connections than it serves are closed, and it serves again") {
  Agent agent;
  std::vector<std::unique_ptr<Client>> clients;
  for (int i = 0; i < 256; ++i) clients.push_back(std::make_unique<Client>(agent.socket()));
  {
    Client one_more(agent.socket(), Client::Greeting::none);
    CHECK(one_more.ends_within_ms(3000));
  }
  clients.clear();
  CHECK(within_ms(5000, [&] {
    Client client(agent.socket(), Client::Greeting::none);
    const auto hello = client.receive(1000);
    return hello && hello->type == Type::hello;
  }));
}

TEST_CASE("agent: hostile conversations") {
  Agent agent;
  SUBCASE("a message that is not known is answered, and the conversation goes on") {
    Client client(agent.socket());
    client.send(static_cast<Type>(0x7777), "what");
    const Failure failure = client.receive_failure();
    CHECK(failure.code == ENOSYS);
    CHECK(failure.answered == static_cast<Type>(0x7777));
    CHECK(run(client, shell("echo on")).output == "on\n");
  }
  SUBCASE("a frame that is too long, or has flags, ends it") {
    for (const auto& [length, flags] : {std::pair{kMaxPayloadBytes + 1, 0u}, {~0u, 0u}, {0u, 1u}}) {
      Client client(agent.socket());
      const auto header = Payload().u32(length).u16(static_cast<uint16_t>(Type::watch)).u16(flags).bytes;
      REQUIRE(client.send_raw(header.data(), header.size()));
      CHECK(client.ends_within_ms(3000));
    }
    Client running(agent.socket());
    running.send(Type::exec, Exec{.arguments = {"sleep", "1000"}, .flags = kExecInput}.payload());
    const auto started = running.receive();
    REQUIRE(started);
    REQUIRE(started->type == Type::started);
    const auto process = static_cast<pid_t>(started->reader().u32());
    const auto header = Payload().u32(~0u).u32(0).bytes;
    running.send_raw(header.data(), header.size());
    CHECK(running.ends_within_ms(4000));
    CHECK(within_ms(3500, [&] { return !is_alive(process); }));
  }
  SUBCASE("the longest frame is taken, byte by byte and at once") {
    Client client(agent.socket());
    Exec exec{.arguments = {"sh", "-c", "echo ${#X}"}};
    const size_t rest = kMaxPayloadBytes - (exec.payload().size() + 6);
    exec.environment = {"X=" + std::string(rest, 'x')};
    REQUIRE(exec.payload().size() == kMaxPayloadBytes);
    CHECK(run(client, exec).output == std::to_string(rest) + "\n");
    const auto payload = shell("echo slow").payload();
    const auto header = Payload().u32(payload.size()).u16(static_cast<uint16_t>(Type::exec)).u16(0).bytes;
    for (const auto* part : {&header, &payload})
      for (const uint8_t byte : *part) REQUIRE(client.send_raw(&byte, 1));
    CHECK(finish(client).output == "slow\n");
  }
  SUBCASE("another protocol, or another version of this one") {
    Client client(agent.socket(), Client::Greeting::none);
    REQUIRE(client.receive());
    client.send(Type::hello, Payload().u32(kMagic).u16(kMajor + 1).u16(0).text("new").bytes);
    const Failure failure = client.receive_failure();
    CHECK(failure.code == EPROTO);
    CHECK(failure.message == "the protocol's version is 2, this agent speaks 1");
    CHECK(client.ends_within_ms(3000));
    Client other(agent.socket(), Client::Greeting::none);
    REQUIRE(other.receive());
    other.send_raw("GET / HTTP/1.1\r\n\r\n", 18);
    CHECK(other.ends_within_ms(3000));
  }
  SUBCASE("truncated requests") {
    Client client(agent.socket());
    for (const Type type : {Type::exec, Type::watch, Type::power, Type::identity, Type::copy_in, Type::copy_out}) {
      client.send(type, "\x01");
      const Failure failure = client.receive_failure();
      CHECK(failure.code == EINVAL);
      CHECK(failure.answered == type);
    }
    CHECK(run(client, shell("echo on")).output == "on\n");
  }
  SUBCASE("what would change this machine is refused") {
    Client client(agent.socket());
    client.send(Type::power, Payload().u32(0).bytes);
    CHECK(client.receive_failure().code == EPERM);
    client.send(Type::identity, Payload().u32(kIdentityHostname).text("x").bytes);
    CHECK(client.receive_failure().code == EPERM);
    client.send(Type::freeze);
    CHECK(client.receive_failure().code == EPERM);
  }
}

TEST_CASE("agent: a second one waits until the first is gone, whose conversations go on") {
  Agent agent;
  Client old(agent.socket());
  old.send(Type::exec, Exec{.arguments = {"cat"}, .flags = kExecInput}.payload());
  REQUIRE(old.receive());
  AgentProcess second(agent.socket());
  ::usleep(100000);
  agent.process.kill();
  Client client(agent.socket());  // tried for 5 s
  CHECK(run(client, shell("echo $PPID")).output != std::to_string(agent.process.process()) + "\n");
  old.send(Type::input, "still");
  old.send(Type::input, "");
  CHECK(finish(old).output == "still");
}

namespace {

Report take_report(Client& client, int64_t limit_ms) {
  const auto message = client.receive(limit_ms);
  REQUIRE(message);
  REQUIRE(message->type == Type::report);
  REQUIRE(message->payload.size() == sizeof(Report));
  Report report;
  std::memcpy(&report, message->payload.data(), sizeof report);
  return report;
}

}  // namespace

TEST_CASE("agent: reports say what the kernel says") {
  Agent agent;
  Client client(agent.socket());
  client.send(Type::watch, Payload().u32(300).bytes);
  Report report = take_report(client, 500);  // at once
  CHECK(report.activity == 2);
  CHECK(report.cpu_permille == ~0u);  // since when?
  const int64_t start_ms = now_ms();
  report = take_report(client, 1000);
  CHECK(now_ms() - start_ms >= 150);
  CHECK(report.cpu_permille <= 1000);
  struct sysinfo info {};
  REQUIRE(::sysinfo(&info) == 0);
  std::map<std::string, uint64_t> memory;
  std::ifstream meminfo("/proc/meminfo");
  std::string line;
  while (std::getline(meminfo, line))
    memory[line.substr(0, line.find(':'))] = std::strtoull(line.c_str() + line.find(':') + 1, nullptr, 10) * 1024;
  CHECK(report.total_bytes == memory["MemTotal"]);
  const auto is_near = [](uint64_t a, uint64_t b) { return (a > b ? a - b : b - a) < (uint64_t{1} << 30); };
  CHECK(is_near(report.free_bytes, memory["MemFree"]));
  CHECK(is_near(report.available_bytes, memory["MemAvailable"]));
  CHECK(report.available_bytes <= report.total_bytes);
  int processes = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc"))
    processes += std::isdigit(static_cast<unsigned char>(entry.path().filename().string()[0])) ? 1 : 0;
  CHECK(std::abs(static_cast<int>(report.process_count) - processes) < 60);
  double load = 0;
  std::ifstream("/proc/loadavg") >> load;
  CHECK(std::abs(report.load_permille - load * 1000) < 2000);
  CHECK(std::abs(static_cast<double>(report.uptime_ms) / 1000 - static_cast<double>(info.uptime)) < 5);
  const bool has_pressure = std::filesystem::exists("/proc/pressure/memory");
  CHECK((report.pressure_some_permille == ~0u) == !has_pressure);
  CHECK((report.pressure_some_permille <= 1000) == has_pressure);
  // Requests are served in between.
  client.send(Type::exec, shell("exit 4").payload());
  for (;;) {
    const auto message = client.receive(3000);
    REQUIRE(message);
    if (message->type != Type::exited) continue;
    CHECK(message->reader().u32() == 4);
    break;
  }
  CHECK(take_report(client, 2000).total_bytes == report.total_bytes);
}

TEST_CASE("agent: load makes the machine active within a second") {
  Agent agent;
  Client client(agent.socket());
  client.send(Type::watch, Payload().u32(60000).bytes);
  CHECK(take_report(client, 500).activity == 2);
  // Other work on this machine may keep it active: then nothing can be said.
  const auto idle = client.receive(8000);
  if (!idle) {
    MESSAGE("the machine is never idle: not tested");
    return;
  }
  Report report;
  std::memcpy(&report, idle->payload.data(), sizeof report);
  REQUIRE(report.activity == 1);
  Client worker(agent.socket());
  const int64_t start_ms = now_ms();
  worker.send(Type::exec, shell("while :; do :; done").payload());
  CHECK(take_report(client, 1500).activity == 2);
  CHECK(now_ms() - start_ms <= 1200);
}

namespace {

// What a tree holds, to be compared: a line for each path.
std::string list(const std::string& root) {
  std::vector<std::string> lines;
  const auto add = [&](const std::filesystem::path& path) {
    struct stat status {};
    REQUIRE(::lstat(path.c_str(), &status) == 0);
    std::string line = path.lexically_relative(root).string() + " " + std::to_string(status.st_mode) + " " +
                       std::to_string(status.st_uid) + " " + std::to_string(status.st_mtim.tv_sec) + "." +
                       std::to_string(status.st_mtim.tv_nsec);
    if (S_ISREG(status.st_mode)) line += " " + std::to_string(std::hash<std::string>()(text_of(path.string())));
    if (S_ISLNK(status.st_mode)) line += " -> " + std::filesystem::read_symlink(path).string();
    lines.push_back(line);
  };
  add(root);
  for (const auto& entry : std::filesystem::recursive_directory_iterator(root)) add(entry.path());
  std::sort(lines.begin(), lines.end());
  std::string all;
  for (const auto& line : lines) all += line + "\n";
  return all;
}

std::string make_tree(const ScratchDir& scratch) {
  scratch.write("tree/empty", std::string_view(""));
  scratch.write("tree/small", std::string_view("small\n"));
  scratch.write("tree/a/b/c/deep", std::string(200000, 'd'));
  scratch.write("tree/a/exact", std::string(kMaxPayloadBytes, 'e'));
  scratch.write("tree/with space\nand line", std::string_view("x"));
  const std::string root = scratch.path() + "/tree";
  std::filesystem::create_directory(root + "/none");
  REQUIRE(::symlink("a/b", (root + "/link").c_str()) == 0);
  REQUIRE(::symlink("/nowhere/at all", (root + "/dangling").c_str()) == 0);
  ::chmod((root + "/small").c_str(), 04751);
  const timespec old[2] = {{1000000000, 123456789}, {1000000000, 123456789}};
  ::utimensat(AT_FDCWD, (root + "/small").c_str(), old, 0);
  ::utimensat(AT_FDCWD, (root + "/link").c_str(), old, AT_SYMLINK_NOFOLLOW);
  ::chmod((root + "/a/b").c_str(), 0750);
  for (const char* folder : {"/a/b/c", "/a/b", "/a", "/none", ""})
    ::utimensat(AT_FDCWD, (root + folder).c_str(), old, 0);
  if (is_root()) REQUIRE(::lchown((root + "/empty").c_str(), 12, 34) == 0);
  return root;
}

// Takes what copy_out sends and passes it to a copy_in.
void pipe_copy(Client& from, Client& to) {
  for (;;) {
    const auto message = from.receive();
    REQUIRE(message);
    REQUIRE((message->type == Type::entry || message->type == Type::data || message->type == Type::copy_end));
    REQUIRE(to.send(message->type, message->payload));
    if (message->type == Type::copy_end) return;
  }
}

std::vector<uint8_t> entry_of(uint32_t mode, uint64_t size, std::string_view path, std::string_view target = "") {
  return Payload().u32(mode).u32(0).u32(0).u64(5).u32(6).u64(size).text(path).text(target).bytes;
}

}  // namespace

TEST_CASE("agent: trees are copied out and in again, the same") {
  Agent agent;
  const std::string tree = make_tree(agent.scratch);
  Client from(agent.socket()), to(agent.socket());
  const std::string copy = agent.scratch.path() + "/copy";
  from.send(Type::copy_out, Payload().u32(0).text(tree).bytes);
  to.send(Type::copy_in, Payload().u32(is_root() ? uint32_t{kCopyPreserveOwners} : 0).text(copy).bytes);
  pipe_copy(from, to);
  auto answer = to.receive();
  REQUIRE(answer);
  CHECK(answer->type == Type::done);
  CHECK(list(copy) == list(tree));

  SUBCASE("into a directory, under its name; what is there already is merged with it") {
    std::filesystem::create_directory(agent.scratch.path() + "/into");
    const std::string mark = agent.scratch.write("into/tree/mark", std::string_view("stays"));
    ::chmod((agent.scratch.path() + "/into/tree").c_str(), 0711);
    from.send(Type::copy_out, Payload().u32(0).text(tree).bytes);
    to.send(Type::copy_in, Payload().u32(0).text(agent.scratch.path() + "/into").text("tree").bytes);
    pipe_copy(from, to);
    answer = to.receive();
    REQUIRE(answer);
    CHECK(answer->type == Type::done);
    CHECK(text_of(mark) == "stays");
    CHECK(text_of(agent.scratch.path() + "/into/tree/small") == "small\n");
    struct stat status {};
    ::stat((agent.scratch.path() + "/into/tree").c_str(), &status);
    CHECK((status.st_mode & 07777) == 0711);
    ::lstat((agent.scratch.path() + "/into/tree/empty").c_str(), &status);
    CHECK(status.st_uid == ::geteuid());  // owners only by flag
  }
  SUBCASE("a name, where there is no such directory, is the target's own") {
    from.send(Type::copy_out, Payload().u32(0).text(tree + "/small").bytes);
    to.send(Type::copy_in, Payload().u32(0).text(agent.scratch.path() + "/renamed").text("small").bytes);
    pipe_copy(from, to);
    answer = to.receive();
    REQUIRE(answer);
    CHECK(answer->type == Type::done);
    CHECK(text_of(agent.scratch.path() + "/renamed") == "small\n");
  }
  SUBCASE("the root may be a link to what is meant") {
    from.send(Type::copy_out, Payload().u32(0).text(tree + "/link").bytes);
    const auto entry = from.receive();
    REQUIRE(entry);
    REQUIRE(entry->type == Type::entry);
    CHECK(S_ISDIR(entry->reader().u32()));
  }
  SUBCASE("special files are told of") {
    REQUIRE(::mkfifo((tree + "/none/fifo").c_str(), 0600) == 0);
    from.send(Type::copy_out, Payload().u32(0).text(tree + "/none").bytes);
    REQUIRE(from.receive());
    const auto fifo = from.receive();
    REQUIRE(fifo);
    CHECK(S_ISFIFO(fifo->reader().u32()));
    CHECK(from.receive()->type == Type::copy_end);
    from.send(Type::copy_out, Payload().u32(0).text(tree + "/none/fifo").bytes);
    CHECK(from.receive_failure().code == EINVAL);
  }
  SUBCASE("what is not there") {
    from.send(Type::copy_out, Payload().u32(0).text("/no/such").bytes);
    const Failure failure = from.receive_failure();
    CHECK(failure.code == ENOENT);
    CHECK(failure.message == "/no/such: No such file or directory (ENOENT)");
  }
}

TEST_CASE("agent: copies that cannot be made are refused, and leave nothing") {
  Agent agent;
  Client client(agent.socket());
  const std::string target = agent.scratch.path() + "/target";
  const auto start = [&](const std::string& where) { client.send(Type::copy_in, Payload().u32(0).text(where).bytes); };
  const auto refused = [&](uint32_t code) {
    const Failure failure = client.receive_failure();
    CHECK(failure.code == code);
    CHECK(failure.answered == Type::copy_in);
    // What follows is passed over.
    client.send(Type::data, "more");
    client.send(Type::copy_end);
    CHECK(run(client, shell("echo on")).output == "on\n");
    return failure.message;
  };
  const auto left = [&] {
    size_t count = 0;
    for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(agent.scratch.path())) ++count;
    return count - 1;  // the agent's socket
  };
  SUBCASE("paths that lead elsewhere") {
    for (const char* path : {"../out", "/etc/out", "a/../../out", "a//b", ".", "a/.", "a/"}) {
      start(target);
      client.send(Type::entry, entry_of(S_IFDIR | 0755, 0, ""));
      client.send(Type::entry, entry_of(S_IFREG | 0644, 0, path));
      CHECK(refused(EINVAL).find("below the target") != std::string::npos);
    }
    CHECK_FALSE(std::filesystem::exists(agent.scratch.path() + "/out"));
  }
  SUBCASE("a relative target") {
    start("target");
    refused(EINVAL);
    CHECK(left() == 0);
  }
  SUBCASE("special files") {
    start(target);
    client.send(Type::entry, entry_of(S_IFCHR | 0666, 0, ""));
    refused(EINVAL);
    CHECK(left() == 0);
  }
  SUBCASE("more data than was told of, or less") {
    start(target);
    client.send(Type::entry, entry_of(S_IFREG | 0644, 3, ""));
    client.send(Type::data, "four");
    refused(EINVAL);
    start(target);
    client.send(Type::entry, entry_of(S_IFREG | 0644, 3, ""));
    client.send(Type::copy_end);
    refused(EINVAL);
    CHECK(left() == 0);
  }
  SUBCASE("a directory is not replaced by a file, nor a device") {
    std::filesystem::create_directory(target);
    start(target);
    client.send(Type::entry, entry_of(S_IFREG | 0644, 0, ""));
    CHECK(refused(EISDIR) == target + ": Is a directory (EISDIR)");
    start("/dev/null");
    client.send(Type::entry, entry_of(S_IFREG | 0644, 0, ""));
    refused(EEXIST);
    struct stat status {};
    ::stat("/dev/null", &status);
    CHECK(S_ISCHR(status.st_mode));
    CHECK(left() == 1);
  }
  SUBCASE("links that lie in the target are not followed") {
    const std::string outside = agent.scratch.write("outside/file", std::string_view("safe"));
    const std::string folder = agent.scratch.path() + "/outside";
    ::chmod(folder.c_str(), 0711);
    std::filesystem::create_directory(target);
    REQUIRE(::symlink(folder.c_str(), (target + "/sub").c_str()) == 0);
    start(target);
    client.send(Type::entry, entry_of(S_IFDIR | 0700, 0, ""));
    client.send(Type::entry, entry_of(S_IFDIR | 0700, 0, "sub"));
    CHECK(refused(ENOTDIR) == target + "/sub: Not a directory (ENOTDIR)");
    start(target);
    client.send(Type::entry, entry_of(S_IFDIR | 0700, 0, ""));
    client.send(Type::entry, entry_of(S_IFREG | 0600, 0, "sub/file"));  // without the directory's own entry
    refused(ENOENT);
    // In the place of the copy's root, too.
    client.send(Type::copy_in, Payload().u32(0).text(target).text("sub").bytes);
    client.send(Type::entry, entry_of(S_IFDIR | 0700, 0, ""));
    refused(ENOTDIR);
    CHECK(text_of(outside) == "safe");
    CHECK(std::distance(std::filesystem::directory_iterator(folder), std::filesystem::directory_iterator()) == 1);
  }
  SUBCASE("a link that is put in the place of a directory while it is filled") {
    const std::string outside = agent.scratch.write("outside/file", std::string_view("safe"));
    const std::string folder = agent.scratch.path() + "/outside";
    ::chmod(folder.c_str(), 0711);
    start(target);
    client.send(Type::entry, entry_of(S_IFDIR | 0755, 0, ""));
    client.send(Type::entry, entry_of(S_IFDIR | 0750, 0, "sub"));
    client.send(Type::entry, entry_of(S_IFREG | 0600, 0, "sub/first"));
    REQUIRE(within_ms(2000, [&] { return std::filesystem::exists(target + "/sub/first"); }));
    REQUIRE(::rename((target + "/sub").c_str(), (target + "/moved").c_str()) == 0);
    REQUIRE(::symlink(folder.c_str(), (target + "/sub").c_str()) == 0);
    client.send(Type::entry, entry_of(S_IFREG | 0600, 4, "sub/file"));
    client.send(Type::data, "evil");
    client.send(Type::copy_end);
    const auto answer = client.receive();
    REQUIRE(answer);
    CHECK(answer->type == Type::done);
    CHECK(text_of(outside) == "safe");
    CHECK(text_of(target + "/moved/file") == "evil");
    struct stat status {};
    REQUIRE(::stat(folder.c_str(), &status) == 0);
    CHECK((status.st_mode & 07777) == 0711);
    REQUIRE(::stat((target + "/moved").c_str(), &status) == 0);
    CHECK((status.st_mode & 07777) == 0750);
    CHECK(status.st_mtim.tv_sec == 5);
  }
  SUBCASE("a target that names a directory takes no file") {
    start(target + "/");
    client.send(Type::entry, entry_of(S_IFREG | 0600, 0, ""));
    refused(ENOENT);
    CHECK(left() == 0);
  }
  SUBCASE("a client that goes away in the middle leaves the old file") {
    agent.scratch.write("target", std::string_view("old"));
    Client other(agent.socket());
    other.send(Type::copy_in, Payload().u32(0).text(target).bytes);
    other.send(Type::entry, entry_of(S_IFREG | 0644, 100, ""));
    other.send(Type::data, "new");
    CHECK(within_ms(2000, [&] { return left() == 2; }));  // the temporary one
    other.close();
    CHECK(within_ms(2000, [&] { return left() == 1; }));
    CHECK(text_of(target) == "old");
  }
}
