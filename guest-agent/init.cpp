// SPDX-License-Identifier: Apache-2.0
// clone-init: process 1 of the initrd that `clone run --rootfs` generates. Loads kernel modules, mounts the root file
// system and becomes the real init. Reads /clone/init.conf, which core/boot/initrd.cpp writes.
#include <linux/fcntl.h>
#include <linux/magic.h>
#include <linux/mount.h>
#include <linux/reboot.h>
#include <linux/stat.h>

#include <initializer_list>

#include "errors.hpp"
#include "files.hpp"
#include "syscalls.hpp"
#include "text.hpp"

namespace {

// These bounds are known to core/boot/initrd.cpp.
constexpr size_t configuration_bytes = 65536;
constexpr int most_arguments = 256;  // the configuration's and the kernel's together
constexpr size_t options_bytes = 4096;

constexpr const char* new_root = "/root";
// With an overlay, out of sight once that is there.
constexpr const char* overlay_base = "/clone/base";
constexpr const char* overlay_memory = "/clone/memory";
constexpr int detach = 2;  // MNT_DETACH, umount2(2)

// Static storage is zero from the start and costs no space in the file.
char configuration[configuration_bytes + 1];
const char* arguments[most_arguments + 1];

using Path = Text<512>;

void print(const Message& message) {
  Text<1100> line;
  line << "clone-init: " << message.c_str() << "\n";
  sys::write(2, line.c_str(), line.size());
}

// Says what went wrong and switches the machine off, with time for the console to show it.
[[noreturn]] void fail(const Message& message) {
  print(message);
  sys::sync();
  sys::sleep_ms(1000);
  sys::reboot(LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_POWER_OFF);
  for (;;) sys::sleep_ms(1000000);
}

// The values of a key in the configuration, in order. Lines have become NUL-terminated strings.
class Values {
 public:
  explicit Values(const char* key) : key_(key) {}
  const char* next() {
    while (*line_ != 0) {
      const char* line = line_;
      line_ += length(line_) + 1;
      const char* value = after(line, key_);
      if (value && *value == '=') return value + 1;
    }
    return nullptr;
  }

 private:
  const char* key_;
  const char* line_ = configuration;
};

const char* setting(const char* key, const char* otherwise) {
  const char* value = Values(key).next();
  return value ? value : otherwise;
}

void read_configuration() {
  constexpr const char* path = "/clone/init.conf";
  const long size = read_file(AT_FDCWD, path, configuration, configuration_bytes);
  if (size < 0) fail(Message() << path << ": " << size);
  // An empty line would end the list early: it becomes a line without a key.
  char previous = '\n';
  for (char* c = configuration; c != configuration + size; ++c) {
    const char current = *c;
    if (current == 0 || (current == '\n' && previous == '\n')) *c = '#';
    if (current == '\n' && *c == '\n') *c = 0;
    previous = current;
  }
}

void mount_kernel_file_systems() {
  static constexpr struct {
    const char* type;
    const char* path;
    unsigned long flags;
  } mounts[] = {{"devtmpfs", "/dev", MS_NOSUID},
                {"proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC},
                {"sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC}};
  for (const auto& mount : mounts) {
    const long result = sys::mount(mount.type, mount.path, mount.type, mount.flags, nullptr);
    if (result < 0 && result != -EBUSY)
      print(Message() << "mounting " << mount.type << " on " << mount.path << ": " << result);
  }
}

// The console of the new /dev for standard input, output and error, as the real init shall have them.
void open_console() {
  const int console = sys::openat(AT_FDCWD, "/dev/console", O_RDWR);
  if (console < 0) return;
  for (int fd = 0; fd < 3; ++fd)
    if (fd != console) sys::dup2(console, fd);
  if (console > 2) sys::close(console);
}

void load_modules() {
  Values paths("module");
  while (const char* path = paths.next()) {
    const int fd = sys::openat(AT_FDCWD, path, open_read);
    const long result = fd < 0 ? fd : sys::finit_module(fd, "");
    if (fd >= 0) sys::close(fd);
    // ENODEV: a driver for hardware that this machine does not have, such as crc32c_intel without SSE 4.2.
    if (result < 0 && result != -EEXIST && result != -ENODEV) print(Message() << "module " << path << ": " << result);
  }
}

// The serial number of a disk: virtio-blk's own attribute, or that of an NVMe controller. Empty if it has none.
void read_serial(const char* disk, char* serial, size_t capacity) {
  for (const char* attribute : {"/serial", "/device/serial"}) {
    Path path;
    path << "/sys/block/" << disk << attribute;
    long size = read_file(AT_FDCWD, path.c_str(), serial, capacity);
    if (size <= 0) continue;
    while (size > 0 && serial[size - 1] == ' ') serial[--size] = 0;
    return;
  }
  serial[0] = 0;
}

bool find_disk(const char* wanted_serial, Path& device) {
  const int directory = sys::openat(AT_FDCWD, "/sys/block", open_read | O_DIRECTORY);
  if (directory < 0) return false;
  const bool found = any_entry(directory, [&](const char* disk) {
    char serial[128];
    read_serial(disk, serial, sizeof serial);
    if (!equal(serial, wanted_serial)) return false;
    device = Path();
    device << "/dev/" << disk;
    return true;
  });
  sys::close(directory);
  return found && sys::access(device.c_str()) == 0;
}

// "vda (serial root), vdb"
void list_disks(Message& message) {
  bool first = true;
  const int directory = sys::openat(AT_FDCWD, "/sys/block", open_read | O_DIRECTORY);
  if (directory >= 0) {
    any_entry(directory, [&](const char* disk) {
      char serial[128];
      read_serial(disk, serial, sizeof serial);
      message << (first ? "" : ", ") << disk;
      if (serial[0] != 0) message << " (serial " << serial << ")";
      first = false;
      return false;
    });
    sys::close(directory);
  }
  if (first) message << "none";
}

unsigned long parse_number(const char* text) {
  unsigned long number = 0;
  for (; *text >= '0' && *text <= '9' && number < 100000000; ++text)
    number = number * 10 + static_cast<unsigned long>(*text - '0');
  return number;
}

// Calls `attempt` until it succeeds or the time given for the root device is over.
template <typename Attempt>
bool wait_for(unsigned longest_pause_ms, Attempt attempt) {
  const unsigned long wait_ms = parse_number(setting("wait_ms", "10000"));
  const unsigned long start_ms = sys::monotonic_ms();
  for (unsigned pause_ms = 1; !attempt();
       pause_ms = pause_ms * 2 < longest_pause_ms ? pause_ms * 2 : longest_pause_ms) {
    if (sys::monotonic_ms() - start_ms >= wait_ms) return false;
    sys::sleep_ms(pause_ms);
  }
  return true;
}

// The options of mount(8): some words are flags of mount(2), the rest is the file system's.
struct MountOptions {
  unsigned long flags = 0;
  Text<options_bytes> data;

  MountOptions() {
    if (equal(setting("mode", "rw"), "ro")) flags |= MS_RDONLY;
    const char* rest = setting("options", "");
    while (*rest != 0) {
      Text<options_bytes> word;
      for (; *rest != 0 && *rest != ','; ++rest) {
        const char letter[2] = {*rest, 0};
        word << letter;
      }
      if (*rest == ',') ++rest;
      if (!word.empty() && !add_flag(word.c_str())) data << (data.empty() ? "" : ",") << word.c_str();
    }
  }

 private:
  bool add_flag(const char* word) {
    static constexpr struct {
      const char* word;
      unsigned long flag;
    } known[] = {{"ro", MS_RDONLY},         {"nosuid", MS_NOSUID},
                 {"nodev", MS_NODEV},       {"noexec", MS_NOEXEC},
                 {"sync", MS_SYNCHRONOUS},  {"dirsync", MS_DIRSYNC},
                 {"noatime", MS_NOATIME},   {"nodiratime", MS_NODIRATIME},
                 {"relatime", MS_RELATIME}, {"strictatime", MS_STRICTATIME},
                 {"lazytime", MS_LAZYTIME}, {"defaults", 0}};
    for (const auto& option : known) {
      if (!equal(word, option.word)) continue;
      flags |= option.flag;
      return true;
    }
    return false;
  }
};

// Mounts `source` on `target` with the first type that works. The failures of all go into `failures`.
bool mount_root(const char* source, const char* target, const MountOptions& options, Message& failures) {
  const auto attempt = [&](const char* type) {
    const long result = sys::mount(source, target, type, options.flags, options.data.c_str());
    if (result == 0) return true;
    failures << (failures.empty() ? "" : ", ") << type << ": ";
    if (result == -ENODEV) {
      failures << "the kernel does not know this file system (ENODEV)";
    } else if (result == -EACCES && !(options.flags & MS_RDONLY)) {
      failures << "the device is read-only (EACCES)";
    } else if (result == -EROFS && (options.flags & MS_RDONLY)) {
      failures
          << "it was not cleanly unmounted, and its journal cannot be replayed on a read-only disk (EROFS): run fsck "
             "on the image, or boot it once read-write";
    } else {
      failures << result;
    }
    return false;
  };
  Values types("fstype");
  const char* type = types.next();
  if (type) {
    for (; type; type = types.next())
      if (attempt(type)) return true;
    return false;
  }
  // /proc/filesystems: "nodev\tproc\n\text4\n"
  char list[4096];
  const long size = read_file(AT_FDCWD, "/proc/filesystems", list, sizeof list);
  if (size < 0) {
    failures << "/proc/filesystems: " << size;
    return false;
  }
  for (char* line = list; *line != 0;) {
    char* end = line;
    while (*end != 0 && *end != '\n') ++end;
    const bool last = *end == 0;
    *end = 0;
    if (*line == '\t' && attempt(line + 1)) return true;
    line = last ? end : end + 1;
  }
  if (failures.empty()) failures << "the kernel knows no file system for a block device";
  return false;
}

// Waits for the device or share that `root` names and mounts it on `target`.
void find_and_mount_root(const char* root, const char* target, const MountOptions& options) {
  if (const char* tag = after(root, "tag:")) {
    Message failures;
    // The kernel logs each failure, so these pauses grow long.
    const bool mounted = wait_for(1000, [&] {
      failures = Message();
      return mount_root(tag, target, options, failures);
    });
    if (!mounted) fail(Message() << "cannot mount the share " << tag << " as root: " << failures.c_str());
    return;
  }
  Path device;
  const char* serial = after(root, "serial:");
  if (!serial) device << root;
  const bool found =
      wait_for(20, [&] { return serial ? find_disk(serial, device) : sys::access(device.c_str()) == 0; });
  if (!found) {
    Message message;
    if (serial) {
      message << "no block device with serial " << serial;
    } else {
      message << "no root device " << root;
    }
    list_disks(message << " within " << setting("wait_ms", "10000") << " ms; block devices: ");
    fail(message);
  }
  Message failures;
  if (!mount_root(device.c_str(), target, options, failures))
    fail(Message() << "cannot mount " << device.c_str() << (options.flags & MS_RDONLY ? " read-only" : " read-write")
                   << " as root: " << failures.c_str());
}

// Mounts on new_root what the base holds, with a tmpfs for what is written over it: at most half of the memory. The
// kernel holds on to both layers by itself, so their own mounts go again.
void mount_overlay(unsigned long flags) {
  const auto check = [](const char* what, long result) {
    if (result < 0) fail(Message() << "overlay over the root file system: " << what << ": " << result);
  };
  check(overlay_memory, sys::mkdir(overlay_memory, 0755));
  check("tmpfs", sys::mount("tmpfs", overlay_memory, "tmpfs", 0, "mode=0755,size=50%"));
  Path upper, work;
  upper << overlay_memory << "/upper";
  work << overlay_memory << "/work";
  check(upper.c_str(), sys::mkdir(upper.c_str(), 0755));
  check(work.c_str(), sys::mkdir(work.c_str(), 0755));
  // The merged root directory has the owner and mode of the upper one.
  struct stat base {};
  check(overlay_base, sys::fstatat(AT_FDCWD, overlay_base, &base, 0));
  check(upper.c_str(), sys::chown(upper.c_str(), base.st_uid, base.st_gid));
  check(upper.c_str(), sys::chmod(upper.c_str(), base.st_mode & 07777));
  // Directories of the base can be renamed, its hard links stay links, inodes are all of one device: an ordinary root.
  Text<options_bytes> options;
  options << "lowerdir=" << overlay_base << ",upperdir=" << upper.c_str() << ",workdir=" << work.c_str()
          << ",redirect_dir=on,index=on,xino=on";
  const long result = sys::mount("overlay", new_root, "overlay", flags, options.c_str());
  if (result == -ENODEV)
    fail(Message()
         << "overlay over the root file system: this kernel has no overlayfs (ENODEV): it needs the module overlay");
  check("overlay", result);
  check(overlay_base, sys::umount2(overlay_base, detach));
  check(overlay_memory, sys::umount2(overlay_memory, detach));
}

void mount_root_file_system(const char* root) {
  MountOptions options;
  const char* overlay = setting("overlay", "none");
  if (equal(overlay, "none")) return find_and_mount_root(root, new_root, options);
  if (!equal(overlay, "tmpfs")) fail(Message() << "unknown overlay " << overlay << "; known is tmpfs");
  const unsigned long flags = options.flags & ~static_cast<unsigned long>(MS_RDONLY);
  options.flags |= MS_RDONLY;
  const long result = sys::mkdir(overlay_base, 0755);
  if (result < 0) fail(Message() << overlay_base << ": " << result);
  find_and_mount_root(root, overlay_base, options);
  mount_overlay(flags);
}

void move_kernel_file_systems() {
  for (const char* path : {"/dev", "/proc", "/sys"}) {
    Path target;
    target << new_root << path;
    sys::mkdir(target.c_str(), 0755);  // fails where it is there, or the root is read-only
    const long result = sys::mount(path, target.c_str(), nullptr, MS_MOVE, nullptr);
    if (result < 0) print(Message() << "moving " << path << " into the root file system: " << result);
  }
}

// Deletes what is below a directory on file system `device`, so that its memory is free again.
void delete_tree(int directory, unsigned long device, int depth) {
  any_entry(directory, [&](const char* name) {
    struct stat status;
    if (sys::fstatat(directory, name, &status, AT_SYMLINK_NOFOLLOW) < 0 || status.st_dev != device) return false;
    if (!S_ISDIR(status.st_mode)) {
      sys::unlinkat(directory, name, 0);
      return false;
    }
    if (depth == 0) return false;
    const int child = sys::openat(directory, name, open_read | O_DIRECTORY | O_NOFOLLOW);
    if (child < 0) return false;
    delete_tree(child, device, depth - 1);
    sys::close(child);
    sys::unlinkat(directory, name, AT_REMOVEDIR);
    return false;
  });
}

// The new root becomes "/"; the initrd, which nothing can reach any more, is emptied.
void switch_root() {
  move_kernel_file_systems();
  const int old_root = sys::openat(AT_FDCWD, "/", open_read | O_DIRECTORY);
  struct stat old_status {
  }, new_status{};
  if (old_root < 0 || sys::fstat(old_root, &old_status) < 0) fail(Message() << "cannot open the initrd's root");
  long result = sys::chdir(new_root);
  if (result == 0) result = sys::mount(".", "/", nullptr, MS_MOVE, nullptr);
  if (result == 0) result = sys::chroot(".");
  if (result == 0) result = sys::chdir("/");
  if (result < 0) fail(Message() << "changing to the root file system: " << result);
  if (sys::fstatat(AT_FDCWD, "/", &new_status, 0) == 0 && new_status.st_dev != old_status.st_dev)
    delete_tree(old_root, old_status.st_dev, 8);
  sys::close(old_root);
}

// Keeps the guest's agent running beside its init, which need not know of it: started again a second after its end. One
// that the init starts as well waits for the end of this one. The modules it needs are there, as devices ask for them.
void start_agent() {
  for (const char* path : {"/usr/sbin/clone-agent", "/usr/bin/clone-agent"}) {
    if (sys::access(path) < 0) continue;
    if (sys::fork() != 0) return;
    sys::call(__NR_setsid);
    const int nothing = sys::open("/dev/null", O_RDWR);
    for (int fd = 0; fd < 3 && nothing >= 0; ++fd) sys::dup2(nothing, fd);
    if (nothing > 2) sys::close(nothing);
    for (;; sys::sleep_ms(1000)) {
      const long agent = sys::fork();
      if (agent == 0) {
        const char* const words[] = {path, nullptr};
        const char* const environment[] = {nullptr};
        sys::execve(path, words, environment);
        sys::exit(1);
      }
      if (agent > 0) sys::call(__NR_wait4, agent, 0, 0, 0);
    }
  }
}

[[noreturn]] void become(const char* init, const char* const* kernel_arguments, const char* const* environment) {
  int count = 0;
  const auto add = [&count](const char* argument) {
    if (count < most_arguments) arguments[count++] = argument;
  };
  add(init);
  Values configured("init-arg");
  while (const char* argument = configured.next()) add(argument);
  while (*kernel_arguments) add(*kernel_arguments++);
  const long result = sys::execve(init, arguments, environment);
  Message message;
  message << init << ": " << result;
  if (result == -ENOENT && sys::access(init) == 0) message << "; it exists, but its interpreter does not";
  fail(message);
}

}  // namespace

// `stack`: the argument count, the arguments, NULL, the environment, NULL (x86-64 psABI 3.4.1).
extern "C" [[noreturn]] void clone_init_main(const long* stack) {
  const long count = stack[0];
  const auto* strings = reinterpret_cast<const char* const*>(stack + 1);
  if (sys::getpid() != 1) {
    print(Message() << "this is the first process of a virtual machine, not a command");
    sys::exit(1);
  }
  mount_kernel_file_systems();
  open_console();
  read_configuration();
  load_modules();
  const char* root = setting("root", "none");
  if (!equal(root, "none")) {
    mount_root_file_system(root);
    switch_root();
    start_agent();
  }
  become(setting("init", "/sbin/init"), strings + (count > 0 ? 1 : 0), strings + count + 1);
}

asm(R"(
  .globl _start
_start:
  xor %ebp, %ebp
  mov %rsp, %rdi
  and $-16, %rsp
  call clone_init_main
)");
