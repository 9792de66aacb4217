// SPDX-License-Identifier: Apache-2.0
// clone-plain-init: process 1 of an image that has no init of its own, as `clone rootfs create` installs it. A shell on
// the console, started again when it ends; the agent and a DHCP client if there are any; power-off on SIGTERM, SIGUSR2
// or the power button. Reads /etc/clone-init.conf: lines env=NAME=VALUE, directory=PATH, command=WORD.
#include <asm/errno.h>
#include <linux/fcntl.h>
#include <linux/if.h>
#include <linux/input-event-codes.h>
#include <linux/input.h>
#include <linux/mount.h>
#include <linux/reboot.h>
#include <linux/sockios.h>
#include <linux/stat.h>
#include <linux/wait.h>

#include "syscalls.hpp"
#include "text.hpp"

namespace {

constexpr int signal_interrupt = 2, signal_kill = 9, signal_user1 = 10, signal_user2 = 12, signal_terminate = 15,
              signal_child = 17;
constexpr unsigned long mask(int number) { return 1ul << (number - 1); }

constexpr size_t configuration_bytes = 65536;
constexpr int most_words = 256;
char configuration[configuration_bytes + 1];
const char* environment[most_words + 1];
const char* command[most_words + 1];
const char* directory = "/root";

void print(const char* text) {
  constexpr const char* prefix = "clone-plain-init: ";
  sys::write(2, prefix, length(prefix));
  sys::write(2, text, length(text));
  sys::write(2, "\n", 1);
}

size_t read_file(const char* path, char* buffer, size_t capacity) {
  const int fd = sys::openat(AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return 0;
  size_t used = 0;
  long count = 0;
  while (used < capacity && (count = sys::read(fd, buffer + used, capacity - used)) > 0)
    used += static_cast<size_t>(count);
  sys::close(fd);
  buffer[used] = 0;
  return used;
}

void read_configuration() {
  int variables = 0, words = 0;
  bool has_path = false;
  const size_t size = read_file("/etc/clone-init.conf", configuration, configuration_bytes);
  for (char* line = configuration; line < configuration + size;) {
    char* end = line;
    while (*end != 0 && *end != '\n') ++end;
    *end = 0;
    if (const char* value = after(line, "env="); value && variables < most_words - 3) {
      environment[variables++] = value;
      has_path |= after(value, "PATH=") != nullptr;
    }
    if (const char* value = after(line, "directory=")) directory = value;
    if (const char* value = after(line, "command="); value && words < most_words) command[words++] = value;
    line = end + 1;
  }
  if (!has_path) environment[variables++] = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
  environment[variables++] = "HOME=/root";
  environment[variables++] = "TERM=vt100";
}

// Whether a file system is mounted there: a path of another device than the folder above it.
bool is_mounted(const char* path) {
  struct stat there {
  }, parent{};
  char above[32] = {};
  size_t slash = 0;
  for (size_t i = 0; path[i] != 0 && i < sizeof above - 1; ++i) {
    above[i] = path[i];
    if (path[i] == '/') slash = i;
  }
  above[slash == 0 ? 1 : slash] = 0;
  return sys::fstatat(AT_FDCWD, path, &there, 0) == 0 && sys::fstatat(AT_FDCWD, above, &parent, 0) == 0 &&
         there.st_dev != parent.st_dev;
}

void mount_file_systems() {
  static constexpr struct {
    const char* type;
    const char* path;
    unsigned long flags;
    const char* options;
  } mounts[] = {{"proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, nullptr},
                {"sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, nullptr},
                {"devtmpfs", "/dev", MS_NOSUID, nullptr},
                {"devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666"},
                {"tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV, "mode=1777"},
                {"tmpfs", "/run", MS_NOSUID | MS_NODEV, "mode=0755"}};
  for (const auto& mount : mounts) {
    sys::mkdir(mount.path, 0755);
    if (is_mounted(mount.path)) continue;  // clone-init did it
    sys::mount(mount.type, mount.path, mount.type, mount.flags, mount.options);
  }
  sys::call(__NR_symlink, sys::word("/proc/self/fd"), sys::word("/dev/fd"));
}

void set_hostname() {
  char name[256];
  size_t size = read_file("/etc/hostname", name, sizeof name - 1);
  while (size > 0 && name[size - 1] <= ' ') --size;
  if (size > 0) sys::call(__NR_sethostname, sys::word(name), static_cast<long>(size));
}

void bring_up_loopback() {
  const int fd = static_cast<int>(sys::call(__NR_socket, 2 /* AF_INET */, 2 | O_CLOEXEC /* SOCK_DGRAM */, 0));
  ifreq request{};
  request.ifr_name[0] = 'l';
  request.ifr_name[1] = 'o';
  request.ifr_flags = IFF_UP;
  sys::call(__NR_ioctl, fd, SIOCSIFFLAGS, sys::word(&request));
  sys::close(fd);
}

long fork() { return sys::call(__NR_fork); }

// In a child: the signals that process 1 blocks are as a program expects them.
void unblock_signals() {
  const unsigned long none = 0;
  sys::call(__NR_rt_sigprocmask, 2 /* SIG_SETMASK */, sys::word(&none), 0, sizeof none);
}

void execute(const char* program, const char* const* words) { sys::execve(program, words, environment); }

// The first of the programs that is there, in a session of its own whose terminal is the console.
[[noreturn]] void become_shell() {
  sys::call(__NR_setsid);
  const int console = sys::openat(AT_FDCWD, "/dev/console", O_RDWR);
  if (console >= 0) {
    sys::call(__NR_ioctl, console, 0x540e /* TIOCSCTTY */, 1);
    for (int fd = 0; fd < 3; ++fd) sys::dup2(console, fd);
    if (console > 2) sys::close(console);
  }
  unblock_signals();
  if (sys::chdir(directory) < 0 && sys::chdir("/root") < 0) sys::chdir("/");
  static constexpr const char* bash[] = {"-bash", nullptr};
  static constexpr const char* sh[] = {"-sh", nullptr};
  static constexpr const char* busybox[] = {"sh", "-l", nullptr};
  execute("/bin/bash", bash);
  execute("/usr/bin/bash", bash);
  execute("/bin/sh", sh);
  execute("/bin/busybox", busybox);
  if (command[0] && command[0][0] == '/') execute(command[0], command);
  print("there is no shell in this image, and no program to run instead");
  sys::sleep_ms(60000);
  sys::exit(1);
}

long start_shell() {
  const long child = fork();
  if (child == 0) become_shell();
  return child;
}

void start_agent() {
  static constexpr const char* path = "/usr/sbin/clone-agent";
  static constexpr const char* words[] = {path, nullptr};
  if (sys::access(path) < 0 || fork() != 0) return;
  sys::call(__NR_setsid);
  unblock_signals();
  execute(path, words);
  print("the agent does not start");
  sys::exit(1);
}

// An address for eth0, if the image has a client to ask for one.
void start_dhcp_client() {
  if (sys::access("/sys/class/net/eth0") < 0 || fork() != 0) return;
  sys::call(__NR_setsid);
  unblock_signals();
  static constexpr const char* udhcpc[] = {"udhcpc", "-b", "-S", "-i", "eth0", nullptr};
  static constexpr const char* dhclient[] = {"dhclient", "-nw", "eth0", nullptr};
  static constexpr const char* dhcpcd[] = {"dhcpcd", "-b", "eth0", nullptr};
  execute("/sbin/udhcpc", udhcpc);
  execute("/usr/sbin/udhcpc", udhcpc);
  execute("/sbin/dhclient", dhclient);
  execute("/usr/sbin/dhclient", dhclient);
  execute("/sbin/dhcpcd", dhcpcd);
  execute("/usr/sbin/dhcpcd", dhcpcd);
  sys::exit(0);
}

// One process for each input device: it tells process 1 when the power button is pressed.
void watch_power_button() {
  char path[] = "/dev/input/event0";
  for (char digit = '0'; digit <= '9'; ++digit) {
    path[sizeof path - 2] = digit;
    const int fd = sys::openat(AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) continue;
    if (fork() == 0) {
      input_event event;
      while (sys::read(fd, &event, sizeof event) == sizeof event) {
        if (event.type == EV_KEY && event.code == KEY_POWER && event.value == 1)
          sys::call(__NR_kill, 1, signal_terminate);
      }
      sys::exit(0);
    }
    sys::close(fd);
  }
}

// Whether any child is left.
bool reap(long& shell) {
  for (;;) {
    const long child = sys::call(__NR_wait4, -1, 0, WNOHANG, 0);
    if (child == 0) return true;
    if (child < 0) return false;
    if (child == shell) shell = 0;
  }
}

[[noreturn]] void end_machine(unsigned how) {
  long nobody = -1;
  // -1: every process but this one.
  sys::call(__NR_kill, -1, signal_terminate);
  sys::call(__NR_kill, -1, 18 /* SIGCONT */);
  sys::call(__NR_kill, -1, 1 /* SIGHUP: what an interactive shell ends by */);
  for (int tenths = 0; tenths < 30 && reap(nobody); ++tenths) sys::sleep_ms(100);
  sys::call(__NR_kill, -1, signal_kill);
  sys::sync();
  sys::mount(nullptr, "/", nullptr, MS_REMOUNT | MS_RDONLY, nullptr);
  sys::reboot(LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, how);
  for (;;) sys::sleep_ms(1000000);
}

}  // namespace

extern "C" [[noreturn]] void clone_plain_init_main() {
  if (sys::getpid() != 1) {
    print("this is the first process of a virtual machine, not a command");
    sys::exit(1);
  }
  // Signals wait until they are asked for: no handler is needed.
  const unsigned long signals =
      mask(signal_interrupt) | mask(signal_user1) | mask(signal_user2) | mask(signal_terminate) | mask(signal_child);
  sys::call(__NR_rt_sigprocmask, 2 /* SIG_SETMASK */, sys::word(&signals), 0, sizeof signals);
  sys::reboot(LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_CAD_OFF);
  mount_file_systems();
  read_configuration();
  set_hostname();
  bring_up_loopback();
  watch_power_button();
  start_agent();
  start_dhcp_client();
  long shell = start_shell();
  for (;;) {
    const long number = sys::call(__NR_rt_sigtimedwait, sys::word(&signals), 0, 0, sizeof signals);
    if (number == signal_terminate || number == signal_user1 || number == signal_user2)
      end_machine(LINUX_REBOOT_CMD_POWER_OFF);
    if (number == signal_interrupt) end_machine(LINUX_REBOOT_CMD_RESTART);  // Ctrl-Alt-Del
    reap(shell);
    if (shell == 0) {
      sys::sleep_ms(200);  // a shell that fails at once is not to keep the machine busy
      shell = start_shell();
    }
  }
}

asm(R"(
  .globl _start
_start:
  xor %ebp, %ebp
  and $-16, %rsp
  call clone_plain_init_main
)");
