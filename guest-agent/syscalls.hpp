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

}  // namespace sys
