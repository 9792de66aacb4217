// SPDX-License-Identifier: Apache-2.0
// Powers the machine off or restarts it, the way its init does that.
#include <asm/errno.h>
#include <linux/fcntl.h>
#include <linux/mount.h>
#include <linux/reboot.h>
#include <linux/wait.h>

#include <initializer_list>

#include "conversation.hpp"
#include "files.hpp"
#include "requests.hpp"

using namespace agent_protocol;

namespace {

// An init that was asked has this long until it ends the agent, or the agent ends the machine.
constexpr unsigned patience_ms = 20000;
// systemd(1), SIGNALS: SIGRTMIN+4 and +5, where the C library's SIGRTMIN is 34.
constexpr int systemd_power_off = 38, systemd_reboot = 39;

bool exists(const char* path) { return sys::access(path) == 0; }

const char* last_part(const char* path) {
  const char* last = path;
  for (const char* c = path; *c != 0; ++c)
    if (*c == '/') last = c + 1;
  return last;
}

// The last part of the path of process 1's program.
bool init_is(const char* name) {
  char path[kPathBytes];
  const long size = sys::call(__NR_readlink, sys::word("/proc/1/exe"), sys::word(path), sizeof path - 1);
  if (size <= 0) return false;
  path[size] = 0;
  return equal(last_part(path), name);
}

// Runs poweroff(8) or reboot(8); false where there is none, or it fails.
bool run_command(Power power) {
  static constexpr const char* const paths[][3] = {{"/sbin/poweroff", "/usr/sbin/poweroff", "/bin/poweroff"},
                                                   {"/sbin/reboot", "/usr/sbin/reboot", "/bin/reboot"}};
  static constexpr const char* const environment[] = {"PATH=/usr/sbin:/usr/bin:/sbin:/bin", nullptr};
  const long child = sys::fork();
  if (child == 0) {
    for (const char* path : paths[power == Power::off ? 0 : 1]) {
      const char* const words[] = {path, nullptr};
      sys::execve(path, words, environment);
    }
    sys::exit(127);
  }
  int status = -1;
  sys::call(__NR_wait4, child, sys::word(&status), 0, 0);
  return child > 0 && status == 0;
}

// Whether process 1 was asked, so that it is the one to end the machine.
bool ask_init(Power power) {
  const bool off = power == Power::off;
  if (exists("/run/systemd/system")) return sys::kill(1, off ? systemd_power_off : systemd_reboot) == 0;
  if (init_is("init") && exists("/etc/clone-init.conf"))  // plain_init.cpp
    return sys::kill(1, off ? sys::signal_user2 : sys::signal_interrupt) == 0;
  // Busybox may be a shell, too, also one that runs a script by the name of init: its first word tells.
  char words[kPathBytes];
  if (init_is("busybox") && read_file(AT_FDCWD, "/proc/1/cmdline", words, sizeof words) > 0 &&
      !equal(last_part(words), "init") && !equal(last_part(words), "linuxrc"))
    return false;
  for (const char* known : {"init", "busybox", "openrc-init", "runit", "runit-init", "s6-svscan", "dinit"})
    if (init_is(known)) return run_command(power);
  return false;  // a shell, or a program of the user's: it would not understand
}

[[noreturn]] void end_machine(Power power) {
  sys::call(__NR_setsid);
  for (int signal : {sys::signal_terminate, sys::signal_hangup})
    sys::set_disposition(signal, sys::Disposition::ignored);
  sys::kill(-1, sys::signal_terminate);
  sys::kill(-1, sys::signal_continue);
  sys::sleep_ms(1000);
  sys::kill(-1, sys::signal_kill);
  sys::sync();
  sys::mount(nullptr, "/", nullptr, MS_REMOUNT | MS_RDONLY, nullptr);
  sys::reboot(LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2,
              power == Power::off ? LINUX_REBOOT_CMD_POWER_OFF : LINUX_REBOOT_CMD_RESTART);
  sys::exit(1);
}

}  // namespace

void set_power(Conversation& conversation, const Connection::Frame& frame) {
  Connection& connection = conversation.connection;
  Reader reader = frame.reader();
  const uint32_t power = reader.u32();
  if (reader.failed() || power > static_cast<uint32_t>(Power::reboot)) {
    connection.error(-EINVAL, Type::power, "allowed are 0, power off, and 1, reboot");
    return;
  }
  if (conversation.machine == Machine::not_ours) {
    connection.error(-EPERM, Type::power, "this agent does not run in a virtual machine");
    return;
  }
  connection.done();
  // A process of its own: the host may close the connection, and need not wait.
  if (sys::fork() != 0) return;
  sys::sync();
  const auto what = static_cast<Power>(power);
  // An orderly end kills this process, with all others, before its time is over.
  if (ask_init(what)) sys::sleep_ms(patience_ms);
  end_machine(what);
}
