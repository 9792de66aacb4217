// SPDX-License-Identifier: Apache-2.0
// Linux system calls on x86-64 without a C library. Each returns what the kernel returned: -errno on failure.
#pragma once

#include <asm/stat.h>
#include <asm/unistd.h>
#include <linux/time_types.h>

namespace sys {

inline long call(long number, long a = 0, long b = 0, long c = 0, long d = 0, long e = 0) {
  register long r10 asm("r10") = d;
  register long r8 asm("r8") = e;
  long result;
  asm volatile("syscall"
               : "=a"(result)
               : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
               : "rcx", "r11", "memory");
  return result;
}

inline long word(const void* pointer) { return reinterpret_cast<long>(pointer); }

inline long read(int fd, void* buffer, unsigned long size_bytes) {
  return call(__NR_read, fd, word(buffer), static_cast<long>(size_bytes));
}
inline long write(int fd, const void* buffer, unsigned long size_bytes) {
  return call(__NR_write, fd, word(buffer), static_cast<long>(size_bytes));
}
inline int openat(int directory, const char* path, int flags) {
  return static_cast<int>(call(__NR_openat, directory, word(path), flags));
}
inline long close(int fd) { return call(__NR_close, fd); }
inline long dup2(int from, int to) { return call(__NR_dup2, from, to); }
inline long mkdir(const char* path, int permissions) { return call(__NR_mkdir, word(path), permissions); }
inline long mount(const char* source, const char* target, const char* type, unsigned long flags, const char* options) {
  return call(__NR_mount, word(source), word(target), word(type), static_cast<long>(flags), word(options));
}
inline long umount2(const char* target, int flags) { return call(__NR_umount2, word(target), flags); }
inline long chmod(const char* path, unsigned permissions) { return call(__NR_chmod, word(path), permissions); }
inline long chown(const char* path, unsigned user, unsigned group) { return call(__NR_chown, word(path), user, group); }
inline long chdir(const char* path) { return call(__NR_chdir, word(path)); }
inline long chroot(const char* path) { return call(__NR_chroot, word(path)); }
inline long execve(const char* path, const char* const* arguments, const char* const* environment) {
  return call(__NR_execve, word(path), word(arguments), word(environment));
}
inline long access(const char* path) { return call(__NR_access, word(path), 0); }
inline long fstat(int fd, struct stat* status) { return call(__NR_fstat, fd, word(status)); }
inline long fstatat(int directory, const char* path, struct stat* status, int flags) {
  return call(__NR_newfstatat, directory, word(path), word(status), flags);
}
inline long unlinkat(int directory, const char* path, int flags) {
  return call(__NR_unlinkat, directory, word(path), flags);
}
inline long getdents64(int fd, void* buffer, unsigned long size_bytes) {
  return call(__NR_getdents64, fd, word(buffer), static_cast<long>(size_bytes));
}
inline long finit_module(int fd, const char* parameters) { return call(__NR_finit_module, fd, word(parameters), 0); }
inline long getpid() { return call(__NR_getpid); }
inline void sync() { call(__NR_sync); }
inline long reboot(unsigned magic1, unsigned magic2, unsigned command) {
  return call(__NR_reboot, magic1, magic2, command, 0);
}
[[noreturn]] inline void exit(int status) {
  for (;;) call(__NR_exit_group, status);
}

inline void sleep_ms(unsigned ms) {
  __kernel_timespec time{ms / 1000, static_cast<long>(ms % 1000) * 1000000};
  call(__NR_nanosleep, word(&time), 0);
}
inline unsigned long monotonic_ms() {
  __kernel_timespec time{};
  call(__NR_clock_gettime, 1 /* CLOCK_MONOTONIC */, word(&time));
  return static_cast<unsigned long>(time.tv_sec) * 1000 + static_cast<unsigned long>(time.tv_nsec) / 1000000;
}

inline int open(const char* path, int flags, unsigned permissions = 0) {
  return static_cast<int>(call(__NR_openat, -100 /* AT_FDCWD */, word(path), flags, permissions));
}
inline long fork() { return call(__NR_fork); }
// As vfork(2), but with a stack of the child's own: `entry` runs in the parent's memory, and must end in execve() or
// exit(). The parent waits for that.
inline long fork_until_exec(char* stack_end, void (*entry)(void*), void* argument) {
  constexpr long flags = 0x100 | 0x4000 | 17;  // CLONE_VM | CLONE_VFORK | SIGCHLD
  register long no_thread_id asm("r10") = 0;
  register long no_thread_pointer asm("r8") = 0;
  register void (*const kept_entry)(void*) asm("r12") = entry;
  register void* const kept_argument asm("r13") = argument;
  long result = __NR_clone;
  asm volatile(
      "syscall\n"
      "test %%rax, %%rax\n"
      "jnz 1f\n"
      "xor %%ebp, %%ebp\n"
      "mov %[argument], %%rdi\n"
      "call *%[entry]\n"
      "ud2\n"
      "1:\n"
      : "+a"(result)
      : "D"(flags), "S"(stack_end), "d"(0l), "r"(no_thread_id),
        "r"(no_thread_pointer), [entry] "r"(kept_entry), [argument] "r"(kept_argument)
      : "rcx", "r11", "memory");
  return result;
}
inline long kill(long process, int signal) { return call(__NR_kill, process, signal); }
inline long ioctl(int fd, unsigned long request, const void* argument) {
  return call(__NR_ioctl, fd, static_cast<long>(request), word(argument));
}
inline long ioctl(int fd, unsigned long request, long argument) {
  return call(__NR_ioctl, fd, static_cast<long>(request), argument);
}

struct Poll {  // struct pollfd, poll(2)
  int fd;      // negative: not looked at
  short events;
  short returned;
};
constexpr short poll_in = 1, poll_out = 4, poll_error = 8, poll_hangup = 16, poll_peer_closed = 0x2000;
// `timeout_ms` below 0: as long as it takes.
inline long poll(Poll* polls, unsigned long count, int timeout_ms) {
  return call(__NR_poll, word(polls), static_cast<long>(count), timeout_ms);
}

constexpr int signal_hangup = 1, signal_interrupt = 2, signal_kill = 9, signal_user1 = 10, signal_user2 = 12,
              signal_pipe = 13, signal_terminate = 15, signal_child = 17, signal_continue = 18, last_signal = 64;
constexpr unsigned long signal_mask(int number) { return 1ul << (number - 1); }
// Replaces the set of blocked signals.
inline void block_signals(unsigned long mask) {
  call(__NR_rt_sigprocmask, 2 /* SIG_SETMASK */, word(&mask), 0, sizeof mask);
}
enum class Disposition : unsigned long { standard = 0, ignored = 1 };
inline void set_disposition(int signal, Disposition disposition) {
  const struct {  // struct sigaction of the kernel
    Disposition handler;
    unsigned long flags, restorer, mask;
  } action{disposition, 0, 0, 0};
  call(__NR_rt_sigaction, signal, word(&action), 0, sizeof action.mask);
}
// A descriptor that becomes readable when a signal of the mask, which is blocked, arrives.
inline int signal_descriptor(unsigned long mask) {
  constexpr int flags = 02004000;  // SFD_CLOEXEC | SFD_NONBLOCK
  return static_cast<int>(call(__NR_signalfd4, -1, word(&mask), sizeof mask, flags));
}
inline void drain_signals(int fd) {
  char information[128];  // struct signalfd_siginfo
  while (read(fd, information, sizeof information) > 0) {
  }
}

}  // namespace sys
