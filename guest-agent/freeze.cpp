// SPDX-License-Identifier: Apache-2.0
// Freezes the file systems that are on disks, so that a copy of the disks is whole.
#include <asm/errno.h>
#include <linux/fcntl.h>
#include <linux/fs.h>
#include <linux/stat.h>

#include "conversation.hpp"
#include "files.hpp"

using namespace agent_protocol;

namespace {

// They thaw by themselves after this time at the latest: a host that hangs must not keep the guest from writing for
// ever.
constexpr uint32_t longest_ms = 60000;
constexpr int sending_ms = 10000;  // nor may one that does not take the answer
constexpr int most_file_systems = 64;

int candidates[most_file_systems];
unsigned long devices[most_file_systems];
int candidate_count;
int frozen[most_file_systems];
int frozen_count;
unsigned long until_ms;
char mounts[262144];

// Takes a field of /proc/mounts: up to the next space, "\040" and its like decoded.
char* take_field(char*& at) {
  char* const start = at;
  char* to = at;
  while (*at != 0 && *at != ' ' && *at != '\n') {
    if (at[0] == '\\' && at[1] >= '0' && at[1] <= '3' && at[2] != 0 && at[3] != 0) {
      *to++ = static_cast<char>((at[1] - '0') * 64 + (at[2] - '0') * 8 + (at[3] - '0'));
      at += 4;
    } else {
      *to++ = *at++;
    }
  }
  if (*at == ' ') ++at;
  *to = 0;
  return start;
}

bool is_writable(const char* options) { return after(options, "rw") && (options[2] == ',' || options[2] == 0); }

// Whether a disk may be below. Told by the names alone: with a server that is gone, even opening the root would hang.
bool may_be_on_disk(const char* source, const char* type) {
  return after(source, "/dev/") && !after(type, "fuse") && !after(type, "nfs");
}

// The device below a file system; 0 if there is none.
unsigned long device_of(const char* source, const struct stat& root) {
  struct stat status;
  if (sys::fstatat(AT_FDCWD, source, &status, 0) == 0 && S_ISBLK(status.st_mode)) return status.st_rdev;
  return (root.st_dev >> 8 & 0xfff) != 0 ? root.st_dev : 0;  // an anonymous one has major 0
}

// Opens the root of each, in the order of their mounts.
long find_candidates() {
  candidate_count = 0;
  const long size = read_file(AT_FDCWD, "/proc/mounts", mounts, sizeof mounts);
  if (size < 0) return size;
  for (char* at = mounts; *at != 0 && candidate_count < most_file_systems;) {
    char* line_end = at;
    while (*line_end != 0 && *line_end != '\n') ++line_end;
    char* const next = *line_end == 0 ? line_end : line_end + 1;
    *line_end = 0;
    const char* source = take_field(at);
    const char* folder = take_field(at);
    const char* type = take_field(at);
    const char* options = take_field(at);
    at = next;
    if (!is_writable(options) || !may_be_on_disk(source, type)) continue;
    const int fd = sys::open(folder, open_read);
    struct stat root;
    if (fd < 0) continue;
    const unsigned long device = sys::fstat(fd, &root) == 0 ? device_of(source, root) : 0;
    bool is_known = device == 0;
    for (int i = 0; i < candidate_count; ++i) is_known |= devices[i] == device;
    if (is_known) {
      sys::close(fd);
      continue;
    }
    devices[candidate_count] = device;
    candidates[candidate_count++] = fd;
  }
  return 0;
}

}  // namespace

namespace freezer {

bool is_frozen() { return frozen_count > 0; }

void thaw_all() {
  for (; frozen_count > 0; --frozen_count) {
    const int fd = frozen[frozen_count - 1];
    sys::ioctl(fd, FITHAW, 0l);
    sys::close(fd);
  }
  sys::call(__NR_munlockall);
  sys::block_signals(0);
}

int left_ms() {
  if (!is_frozen()) return -1;
  const unsigned long now_ms = sys::monotonic_ms();
  return now_ms < until_ms ? static_cast<int>(until_ms - now_ms) : 0;
}

void freeze(Conversation& conversation, const Connection::Frame& frame) {
  Reader reader = frame.reader();
  const uint32_t wanted_ms = reader.u32();
  Connection& connection = conversation.connection;
  if (conversation.machine == Machine::not_ours) {
    connection.error(-EPERM, Type::freeze, "this agent does not run in a virtual machine");
    return;
  }
  if (const long result = find_candidates(); result < 0) {
    connection.error(result, Type::freeze, (Message() << "/proc/mounts: " << result).c_str());
    return;
  }
  // From here on nothing is read from a file, not even a page of this program; nor is it ended by a shutdown's signals.
  sys::call(__NR_mlockall, 1 /* MCL_CURRENT */);
  sys::block_signals(~0ul);
  sys::sync();
  connection.set_patience_ms(sending_ms);
  until_ms = sys::monotonic_ms() + (reader.failed() || wanted_ms > longest_ms ? longest_ms : wanted_ms);
  long failure = 0;
  // The last first: it may be a file on one of those before.
  while (candidate_count > 0) {
    const int fd = candidates[--candidate_count];
    const long result = failure < 0 ? -ECANCELED : sys::ioctl(fd, FIFREEZE, 0l);
    if (result >= 0) {
      frozen[frozen_count++] = fd;
      continue;
    }
    sys::close(fd);
    // What cannot be frozen at all is left out.
    if (result != -EOPNOTSUPP && result != -ENOTTY && result != -EINVAL && failure == 0) failure = result;
  }
  if (failure < 0) {
    thaw_all();
    connection.error(failure, Type::freeze, (Message() << "a file system cannot be frozen: " << failure).c_str());
    return;
  }
  const auto count = static_cast<uint32_t>(frozen_count);
  if (count == 0) thaw_all();
  connection.send_numbers(Type::done, &count, 1);
}

void thaw(Conversation& conversation) {
  const auto count = static_cast<uint32_t>(frozen_count);
  if (count > 0) thaw_all();
  conversation.connection.send_numbers(Type::done, &count, 1);
}

}  // namespace freezer
