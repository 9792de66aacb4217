// SPDX-License-Identifier: Apache-2.0
// Runs a program for the host: its environment and user, its pipes or terminal, and what passes between them and the
// host.
#include <asm/errno.h>
#include <asm/ioctls.h>
#include <asm/termios.h>
#include <linux/fcntl.h>
#include <linux/wait.h>

#include <initializer_list>

#include "conversation.hpp"
#include "files.hpp"
#include "requests.hpp"
#include "user.hpp"

using namespace agent_protocol;

namespace {

// Once the program has ended, output is taken on from processes that it left behind: as long as each comes within this
// time of the one before, and no longer than that in all. What was written before the end is always taken.
constexpr unsigned long quiet_ms = 200;
constexpr unsigned long longest_rest_ms = 2000;
// A program whose client is gone has this long between SIGHUP and SIGKILL.
constexpr unsigned long hangup_ms = 2000;

constexpr const char* image_environment = "/etc/clone-init.conf";  // of a container's image; see plain_init.cpp

ExecRequest request;

struct Pipe {
  int read_end = -1, write_end = -1;
  bool open() {
    int ends[2];
    if (sys::call(__NR_pipe2, sys::word(ends), O_CLOEXEC) < 0) return false;
    read_end = ends[0];
    write_end = ends[1];
    return true;
  }
};

void close_fd(int& fd) {
  if (fd >= 0) sys::close(fd);
  fd = -1;
}

void set_non_blocking(int fd) { sys::call(__NR_fcntl, fd, F_SETFL, O_NONBLOCK); }

// Variables by name: the one added last counts.
class Environment {
 public:
  void add(const char* variable) {
    size_t at = 0;
    while (at < count_ && !is_same(variables_[at], variable)) ++at;
    if (at == most) return;
    variables_[at] = variable;
    if (at == count_) ++count_;
    variables_[count_] = nullptr;
  }
  const char* value(const char* prefix) const {
    for (size_t i = 0; i < count_; ++i)
      if (const char* rest = after(variables_[i], prefix)) return rest;
    return nullptr;
  }
  const char* const* list() const { return variables_; }
  void clear() { count_ = 0; }

 private:
  static constexpr size_t most = ExecRequest::kMostWords + 1024;
  static bool is_same(const char* a, const char* b) {
    for (; *a == *b; ++a, ++b)
      if (*a == '=' || *a == 0) return true;
    return false;
  }
  const char* variables_[most + 1];
  size_t count_ = 0;
};
Environment environment;
char image_variables[65536];
Text<1100> home, shell, name_of_user, name_of_login;

void build_environment(const User& user) {
  environment.add("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
  if (request.flags & kExecTerminal) environment.add("TERM=xterm");
  const long size = read_file(AT_FDCWD, image_environment, image_variables, sizeof image_variables);
  for (char* text = image_variables; size > 0 && *text != 0;) {
    char* end = text;
    while (*end != 0 && *end != '\n') ++end;
    const bool is_last = *end == 0;
    *end = 0;
    if (const char* variable = after(text, "env=")) environment.add(variable);
    if (is_last) break;
    text = end + 1;
  }
  environment.add((home << "HOME=" << user.home.c_str()).c_str());
  environment.add((shell << "SHELL=" << user.shell.c_str()).c_str());
  environment.add((name_of_user << "USER=" << user.name.c_str()).c_str());
  environment.add((name_of_login << "LOGNAME=" << user.name.c_str()).c_str());
  for (size_t i = 0; i < request.variable_count; ++i) environment.add(request.variables[i]);
}

// As execvp(3) does: along PATH, and a script without "#!" is the shell's. Returns the failure.
long execute(const char** arguments) {
  const auto attempt = [&](const char* path) {
    const long result = sys::execve(path, arguments, environment.list());
    if (result != -ENOEXEC) return result;
    arguments[-1] = "/bin/sh";
    arguments[0] = path;
    return sys::execve("/bin/sh", arguments - 1, environment.list());
  };
  const char* const program = arguments[0];
  for (const char* c = program; *c != 0; ++c)
    if (*c == '/') return attempt(program);
  const char* path = environment.value("PATH=");
  if (!path) path = "/usr/bin:/bin";
  long failure = -ENOENT;
  for (;;) {
    Text<kPathBytes> candidate;
    const char* const start = path;
    while (*path != 0 && *path != ':') {
      const char letter[2] = {*path++, 0};
      candidate << letter;
    }
    if (path != start) candidate << "/";
    candidate << program;
    const long result = candidate.full() ? -ENAMETOOLONG : attempt(candidate.c_str());
    if (result != -ENOENT && result != -ENOTDIR && failure == -ENOENT) failure = result;
    if (*path++ == 0) return failure;
  }
}

// What failed in the child before it became the program; result 0: nothing.
struct Failure {
  enum class Step { program, directory, user, terminal } step;
  long result;
};

alignas(16) char start_stack[65536];  // of the child until then

class Program {
 public:
  explicit Program(Conversation& conversation) : connection_(conversation.connection), conversation_(conversation) {}

  void run() {
    if (!start()) return;
    const uint32_t id = static_cast<uint32_t>(process_);
    connection_.send_numbers(Type::started, &id, 1);
    take_frames();  // that came together with the request
    while (step()) {
    }
    if (connection_.is_gone() || is_broken_) {
      end_program();
    } else {
      int status = 0;
      sys::call(__NR_wait4, process_, sys::word(&status), 0, 0);
      const uint32_t signal = static_cast<uint32_t>(status & 0x7f);
      const uint32_t numbers[2] = {signal == 0 ? static_cast<uint32_t>(status >> 8 & 0xff) : 0, signal};
      connection_.send_numbers(Type::exited, numbers, 2);
    }
    close_all();
    if (is_broken_) conversation_.end();
  }

 private:
  bool has_terminal() const { return (request.flags & kExecTerminal) != 0; }
  bool has_input() const { return (request.flags & kExecInput) != 0; }

  bool fail(long result, const Message& message) {
    connection_.error(result, Type::exec, message.c_str());
    close_all();
    return false;
  }

  void close_all() {
    if (has_terminal()) input_ = -1;
    for (int* fd : {&output_, &errors_, &input_, &terminal_, &signals_}) close_fd(*fd);
  }

  bool start() {
    User user;
    Message message;
    const long known = find_user(request.user, user, message);
    if (known < 0) return fail(known, message);
    build_environment(user);

    Pipe in, out, err;
    int slave = -1;
    if (has_terminal()) {
      const long result = open_terminal(user, slave);
      if (result < 0) return fail(result, Message() << "cannot open a terminal: " << result);
    } else if ((has_input() && !in.open()) || !out.open() || !err.open()) {
      for (int* fd : {&in.read_end, &in.write_end, &out.read_end, &out.write_end}) close_fd(*fd);
      return fail(-EMFILE, Message() << "cannot open pipes: " << -long{EMFILE});
    }
    sys::block_signals(sys::signal_mask(sys::signal_child));
    signals_ = sys::signal_descriptor(sys::signal_mask(sys::signal_child));

    Start start{this, &user, {}, {}};
    start.standard[0] = has_terminal() ? slave : in.read_end;
    start.standard[1] = has_terminal() ? slave : out.write_end;
    start.standard[2] = has_terminal() ? slave : err.write_end;
    process_ = sys::fork_until_exec(start_stack + sizeof start_stack, become_program, &start);
    for (int* fd : {&slave, &in.read_end, &out.write_end, &err.write_end}) close_fd(*fd);
    if (has_terminal()) {
      output_ = terminal_;
      input_ = terminal_;
      terminal_ = -1;
    } else {
      input_ = in.write_end;
      output_ = out.read_end;
      errors_ = err.read_end;
    }
    for (const int fd : {input_, output_, errors_})
      if (fd >= 0) set_non_blocking(fd);
    if (process_ < 0) return fail(process_, Message() << "cannot start a process: " << process_);
    if (start.failure.result == 0) return true;
    sys::call(__NR_wait4, process_, 0, 0, 0);
    return fail(start.failure.result, describe(start.failure, user));
  }

  static Message describe(const Failure& failure, const User& user) {
    Message message;
    switch (failure.step) {
      case Failure::Step::program:
        message << "cannot run '" << request.arguments()[0] << "': " << failure.result;
        break;
      case Failure::Step::directory:
        message << "cannot change to the directory '" << request.directory << "': " << failure.result;
        break;
      case Failure::Step::user:
        message << "cannot become the user '" << user.name.c_str() << "': " << failure.result;
        break;
      case Failure::Step::terminal:
        message << "cannot set up the terminal or /dev/null: " << failure.result;
        break;
    }
    return message;
  }

  long open_terminal(const User& user, int& slave) {
    constexpr int flags = O_RDWR | O_NOCTTY | O_CLOEXEC;
    terminal_ = sys::open("/dev/ptmx", flags);
    if (terminal_ < 0) terminal_ = sys::open("/dev/pts/ptmx", flags);
    if (terminal_ < 0) return terminal_;
    const int unlocked = 0;
    sys::ioctl(terminal_, TIOCSPTLCK, &unlocked);
    // By number where the kernel is older than 4.13.
    slave = static_cast<int>(sys::ioctl(terminal_, TIOCGPTPEER, static_cast<long>(flags)));
    if (slave < 0) {
      unsigned number = 0;
      sys::ioctl(terminal_, TIOCGPTN, &number);
      Text<32> path;
      path << "/dev/pts/" << static_cast<unsigned long>(number);
      slave = sys::open(path.c_str(), flags);
    }
    if (slave < 0) return slave;
    resize(terminal_, request.rows, request.columns);
    sys::call(__NR_fchown, slave, user.uid, -1);
    sys::call(__NR_fchmod, slave, 0620);
    return 0;
  }

  static void resize(int fd, uint16_t rows, uint16_t columns) {
    const winsize size{rows, columns, 0, 0};
    sys::ioctl(fd, TIOCSWINSZ, &size);
  }

  // What the child is given, and leaves behind: it shares the parent's memory.
  struct Start {
    Program* program;
    const User* user;
    int standard[3];
    Failure failure;
  };
  static void become_program(void* given) {
    auto* start = static_cast<Start*>(given);
    start->failure = start->program->execute_as(*start->user, start->standard);
    sys::exit(127);
  }

  // Returns only if the program does not start. Changes nothing that the parent, or the next program, needs.
  Failure execute_as(const User& user, const int* standard) {
    using Step = Failure::Step;
    sys::call(__NR_setsid);
    if (has_terminal()) {
      const long result = sys::ioctl(standard[0], TIOCSCTTY, 0l);
      if (result < 0) return {Step::terminal, result};
    }
    int from[3] = {standard[0], standard[1], standard[2]};
    if (from[0] < 0 && (from[0] = sys::open("/dev/null", O_RDWR | O_CLOEXEC)) < 0) return {Step::terminal, from[0]};
    for (int fd = 0; fd < 3; ++fd) sys::dup2(from[fd], fd);  // all of them are above 2
    set_oom_score("0");
    sys::call(__NR_umask, 022);
    for (int signal = 1; signal <= sys::last_signal; ++signal) sys::set_disposition(signal, sys::Disposition::standard);
    sys::block_signals(0);

    // Not asked for where nothing changes: a user of their own may run the agent, for tests.
    if (sys::call(__NR_geteuid) == 0 || user.uid != sys::call(__NR_geteuid)) {
      long result = sys::call(__NR_setgroups, user.group_count, sys::word(user.groups));
      if (result >= 0) result = sys::call(__NR_setresgid, user.gid, user.gid, user.gid);
      if (result >= 0) result = sys::call(__NR_setresuid, user.uid, user.uid, user.uid);
      if (result < 0) return {Step::user, result};
    }
    if (request.directory[0] != 0) {
      const long result = sys::chdir(request.directory);
      if (result < 0) return {Step::directory, result};
    } else if (sys::chdir(user.home.c_str()) < 0) {
      sys::chdir("/");
    }
    return {Step::program, execute(request.arguments())};
  }

  // Waits for something to do, and does it. False at the end.
  bool step() {
    sys::Poll polls[5] = {
        {connection_.fd(), sys::poll_peer_closed, 0},
        {signals_, sys::poll_in, 0},
        {-1, sys::poll_in, 0},
        {-1, sys::poll_in, 0},
        {-1, sys::poll_out, 0},
    };
    if (!has_pending_input()) polls[0].events |= sys::poll_in;
    if (!connection_.is_idle()) polls[0].events |= sys::poll_out;
    if (connection_.is_idle()) {
      polls[2].fd = output_;
      polls[3].fd = errors_;
    }
    if (has_pending_input()) polls[4].fd = input_;
    int timeout_ms = -1;
    if (has_ended_) {
      if (output_ < 0 && errors_ < 0 && connection_.is_idle()) return false;
      if (connection_.is_idle()) timeout_ms = static_cast<int>(quiet_ms);
    }
    const long ready = sys::poll(polls, 5, timeout_ms);
    if (ready == 0) return false;  // quiet after the end
    if (ready < 0) return true;    // EINTR

    constexpr short over = sys::poll_peer_closed | sys::poll_hangup | sys::poll_error;
    if (polls[0].returned & over) connection_.give_up();
    if ((polls[0].returned & sys::poll_in) && !has_pending_input()) connection_.receive();
    if (polls[0].returned & sys::poll_out) connection_.flush();
    if (polls[1].returned) notice_end();
    if (polls[4].returned) feed();
    if (!connection_.is_gone() && !has_pending_input()) take_frames();
    // Both are asked in turn, so that neither can keep the other from being read.
    for (int turn = 0; turn < 2; ++turn) {
      errors_first_ = !errors_first_;
      if (errors_first_ && polls[3].returned) forward(errors_, Type::errors);
      if (!errors_first_ && polls[2].returned) forward(output_, Type::output);
    }
    if (has_ended_ && rest_bytes_ == 0 && sys::monotonic_ms() - ended_ms_ > longest_rest_ms && connection_.is_idle())
      return false;
    return !connection_.is_gone() && !is_broken_;
  }

  void forward(int& fd, Type type) {
    if (fd < 0 || !connection_.is_idle()) return;
    const long count = sys::read(fd, connection_.begin_frame(), kMaxPayloadBytes);
    if (count == -EAGAIN || count == -EINTR) return;
    if (count <= 0) {  // EIO: the last to have the terminal open closed it
      if (has_terminal()) {
        drop_input();
        fd = -1;  // drop_input() closed it
      }
      close_fd(fd);
      return;
    }
    const auto size_bytes = static_cast<unsigned long>(count);
    rest_bytes_ -= size_bytes < rest_bytes_ ? size_bytes : rest_bytes_;
    connection_.end_frame(type, size_bytes);
    connection_.flush();
  }

  // The program stays a zombie until all is said, so that its number, and that of its group, are nobody else's.
  void notice_end() {
    sys::drain_signals(signals_);
    if (has_ended_) return;
    int information[32] = {};  // siginfo_t; the second word is si_errno, the first si_signo: 0 while it runs
    sys::call(__NR_waitid, 1 /* P_PID */, process_, sys::word(information), WEXITED | WNOHANG | WNOWAIT, 0);
    if (information[0] == 0) return;
    has_ended_ = true;
    ended_ms_ = sys::monotonic_ms();
    for (const int fd : {output_, errors_}) {
      int there = 0;
      if (fd >= 0 && sys::ioctl(fd, FIONREAD, &there) >= 0) rest_bytes_ += static_cast<unsigned long>(there);
    }
  }

  bool has_pending_input() const { return pending_bytes_ > 0; }

  void drop_input() {
    pending_bytes_ = 0;
    close_fd(input_);
  }

  // Writes of the input what the program takes now.
  void feed() {
    while (pending_bytes_ > 0) {
      const long count = sys::write(input_, pending_, pending_bytes_);
      if (count == -EAGAIN) return;
      if (count < 0) {  // nobody reads it any more
        pending_bytes_ = 0;
        if (!has_terminal()) drop_input();
        return;
      }
      pending_ += count;
      pending_bytes_ -= static_cast<size_t>(count);
    }
  }

  void take_frames() {
    Connection::Frame frame;
    while (!has_pending_input()) {
      const Connection::Next next = connection_.next(frame);
      if (next == Connection::Next::incomplete) return;
      if (next == Connection::Next::broken) {
        is_broken_ = true;
        return;
      }
      Reader reader = frame.reader();
      switch (frame.type) {
        case Type::input:
          take_input(frame);
          break;
        case Type::resize: {
          const uint16_t rows = reader.u16(), columns = reader.u16();
          if (has_terminal() && input_ >= 0 && !reader.failed()) resize(input_, rows, columns);
          break;
        }
        case Type::signal: {
          const uint32_t number = reader.u32();
          if (number >= 1 && number <= sys::last_signal && !has_ended_) sys::kill(-process_, static_cast<int>(number));
          break;
        }
        default:
          if (connection_.is_idle() || connection_.wait_until_sent())
            connection_.error(frame.type == Type::exec ? -EBUSY : -ENOSYS, frame.type,
                              "not while a program runs in this conversation");
      }
    }
  }

  void take_input(const Connection::Frame& frame) {
    if (input_ < 0) return;
    if (frame.length_bytes > 0) {
      pending_ = frame.payload;  // the frame stays where it is: nothing is received until it is written
      pending_bytes_ = frame.length_bytes;
    } else if (has_terminal()) {
      static constexpr uint8_t end_of_transmission = 4;
      pending_ = &end_of_transmission;
      pending_bytes_ = 1;
    } else {
      return drop_input();
    }
    feed();
  }

  // The client is gone: nobody is to go on for it.
  void end_program() {
    drop_input();  // a terminal hangs up
    if (has_terminal()) output_ = -1;
    sys::kill(-process_, sys::signal_hangup);
    sys::kill(-process_, sys::signal_continue);
    const unsigned long start_ms = sys::monotonic_ms();
    for (;;) {
      notice_end();
      const unsigned long passed_ms = sys::monotonic_ms() - start_ms;
      if (has_ended_ || passed_ms >= hangup_ms) break;
      sys::Poll poll{signals_, sys::poll_in, 0};
      sys::poll(&poll, 1, static_cast<int>(hangup_ms - passed_ms));
    }
    sys::kill(-process_, sys::signal_kill);
    sys::call(__NR_wait4, process_, 0, 0, 0);
  }

  Connection& connection_;
  Conversation& conversation_;
  long process_ = -1;
  int output_ = -1, errors_ = -1;
  int input_ = -1;     // with a terminal the same descriptor as output_
  int terminal_ = -1;  // until it is both
  int signals_ = -1;
  const uint8_t* pending_ = nullptr;  // input not yet written
  size_t pending_bytes_ = 0;
  bool has_ended_ = false;
  bool is_broken_ = false;
  bool errors_first_ = false;
  unsigned long ended_ms_ = 0;
  unsigned long rest_bytes_ = 0;  // of what was in the pipes at the end
};

}  // namespace

void run_program(Conversation& conversation, const Connection::Frame& frame) {
  if (!request.parse(frame.reader())) {
    conversation.connection.error(-EINVAL, Type::exec, "a malformed request");
    return;
  }
  environment.clear();
  home = shell = name_of_user = name_of_login = {};
  Program(conversation).run();
}
