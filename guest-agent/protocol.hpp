// SPDX-License-Identifier: Apache-2.0
// The protocol between the host and the guest's agent (docs/agent.md), for both ends: no C library is needed.
//
// The agent listens on vsock port kPort and serves only the host (CID 2) from a source port below 1024, which no other
// user of the host can have. Each connection is one conversation: both sides send `hello` at once, the host its request
// behind it without waiting. All numbers are little-endian; a string is its length (u32) and its bytes, without NUL.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace agent_protocol {

constexpr uint32_t kPort = 1000;
constexpr uint32_t kHostCid = 2;
constexpr uint32_t kFirstUnprivilegedPort = 1024;
constexpr uint32_t kMagic = 0x41'4e'4c'43;  // "CLNA"
constexpr uint16_t kMajor = 1;              // another major is refused
constexpr uint16_t kMinor = 0;              // grows with new messages and with fields at the end of old ones

// A frame: this header, then the payload. A longer payload, or flags, end the connection.
struct Header {
  uint32_t length_bytes;  // of the payload
  uint16_t type;
  uint16_t flags;  // 0
};
static_assert(sizeof(Header) == 8);
constexpr uint32_t kMaxPayloadBytes = 64 * 1024;

enum class Type : uint16_t {
  hello = 0x01,  // both ways, first: u32 magic, u16 major, u16 minor, string version of the program
  error = 0x02,  // the answer to what failed: u32 errno, u16 type of what it answers, string message. A type that is
                 // not known is answered with ENOSYS, and the connection goes on.
  done = 0x03,   // the answer to what succeeded; its payload depends on the request

  watch = 0x10,   // host: u32 longest interval in ms. The agent sends a `report` now, at each change of activity, and
                  // then at least that often, until the connection ends.
  report = 0x11,  // agent: the fields of Report in their order

  exec = 0x20,     // host: u32 ExecFlags, u16 rows, u16 columns, string user ("" root), string directory ("" the user's
                   // home), u32 count, strings: the arguments; u32 count, strings "NAME=value" added to the environment
  started = 0x21,  // agent: u32 process id
  input = 0x22,    // host: bytes of standard input; none: its end
  output = 0x23,   // agent: bytes of standard output (or of the terminal)
  errors = 0x24,   // agent: bytes of standard error
  resize = 0x25,   // host: u16 rows, u16 columns
  signal = 0x26,   // host: u32 number, sent to the process group
  exited = 0x27,   // agent, last: u32 exit code, u32 signal (0: none). All output came before.

  power = 0x30,     // host: u32 Power. Answered by `done` before it happens.
  identity = 0x31,  // host: u32 IdentityFields, then each field that is set, in the order of the bits
  freeze = 0x32,    // host: u32 longest time in ms, or left out; freezes what is writable; done: u32 count of file
                    // systems. They thaw when the connection ends. After that time, and after 60 s in any case, they
                    // thaw by themselves: the agent says so in an `error`, and ends the connection.
  thaw = 0x33,      // host: done: u32 count

  copy_in =
      0x40,  // host: u32 CopyFlags, string target, string name ("" or left out: the root becomes the target itself;
             // otherwise it becomes target/name where the target is a directory); then `entry` and `data` frames,
             // `copy_end`. Answer: done or error; what the host still sends after an error is passed over.
  copy_out = 0x41,  // host: u32 CopyFlags, string source; the agent sends entries, data, `copy_end`, or error.
  entry = 0x42,     // u32 mode (type and permissions), u32 uid, u32 gid, i64 mtime seconds, u32 nanoseconds, u64 size,
                    // string path relative to the copy's root ("" the root itself), string target of a symbolic link.
                    // The root comes first, a directory before what is in it and everything in it before what is not.
                    // copy_out tells of special files too, without data; copy_in refuses them, and a symbolic link
                    // that is there where a directory is to be.
  data = 0x43,      // bytes of the file entered last; `size` bytes follow each regular file's entry
  copy_end = 0x44,
};

enum ExecFlags : uint32_t {
  kExecTerminal = 1,  // a pseudo terminal; `errors` is not used then
  kExecInput = 2,     // standard input follows; otherwise it is /dev/null
};

enum class Power : uint32_t { off = 0, reboot = 1 };

enum IdentityFields : uint32_t {
  kIdentityHostname = 1,  // string
  kIdentityAddress = 2,   // string "192.0.2.5/24", string gateway or "", of the first network interface
  kIdentityCid = 4,       // u64: the guest's. Nothing is to be done: its transport has it since its reset
  kIdentityEntropy = 8,   // string of bytes, credited and mixed in (RNDADDENTROPY, RNDRESEEDCRNG)
  kIdentityClock = 16,    // u64 nanoseconds since 1970
};

enum CopyFlags : uint32_t {
  kCopyPreserveOwners = 1,
};

// ~0 for what is not known.
struct Report {
  uint32_t activity;  // 1 idle, 2 active
  uint32_t process_count;
  uint32_t load_permille;           // of one processor, 1 minute average
  uint32_t run_queue;               // tasks that want a processor now, without the agent
  uint32_t cpu_permille;            // of all processors since the last report
  uint32_t pressure_some_permille;  // PSI memory, average of 10 s
  uint32_t pressure_full_permille;
  uint32_t reserved;
  uint64_t total_bytes;
  uint64_t free_bytes;
  uint64_t available_bytes;
  uint64_t uptime_ms;
};
static_assert(sizeof(Report) == 64);

// Takes fields from a payload. Past its end everything is 0 or empty, and failed() holds from then on.
class Reader {
 public:
  struct Text {
    const char* data;
    size_t size_bytes;
  };

  Reader(const void* data, size_t size_bytes) : data_(static_cast<const uint8_t*>(data)), left_bytes_(size_bytes) {}

  uint16_t u16() { return static_cast<uint16_t>(number(2)); }
  uint32_t u32() { return static_cast<uint32_t>(number(4)); }
  uint64_t u64() { return number(8); }
  Text text() {
    const uint32_t size_bytes = u32();
    if (failed_ || size_bytes > left_bytes_) return fail();
    const Text text{reinterpret_cast<const char*>(data_), size_bytes};
    data_ += size_bytes;
    left_bytes_ -= size_bytes;
    return text;
  }

  bool failed() const { return failed_; }
  size_t left_bytes() const { return left_bytes_; }

 private:
  uint64_t number(size_t size_bytes) {
    if (failed_ || size_bytes > left_bytes_) {
      fail();
      return 0;
    }
    uint64_t value = 0;
    for (size_t i = 0; i < size_bytes; ++i) value |= uint64_t{data_[i]} << (8 * i);
    data_ += size_bytes;
    left_bytes_ -= size_bytes;
    return value;
  }
  Text fail() {
    failed_ = true;
    left_bytes_ = 0;
    return {"", 0};
  }

  const uint8_t* data_;
  size_t left_bytes_;
  bool failed_ = false;
};

// Puts a frame together in a buffer of the caller's. What does not fit sets failed(); nothing is written past the end.
class Writer {
 public:
  Writer(void* buffer, size_t capacity_bytes) : data_(static_cast<uint8_t*>(buffer)), capacity_bytes_(capacity_bytes) {}

  void begin(Type type) {
    start_ = size_bytes_;
    u32(0);
    u16(static_cast<uint16_t>(type));
    u16(0);
  }
  // Sets the length of the frame that was begun.
  void end() {
    const size_t length_bytes = size_bytes_ - start_ - sizeof(Header);
    if (failed_ || length_bytes > kMaxPayloadBytes) {
      failed_ = true;
      return;
    }
    for (size_t i = 0; i < 4; ++i) data_[start_ + i] = static_cast<uint8_t>(length_bytes >> (8 * i));
  }

  void u16(uint16_t value) { number(value, 2); }
  void u32(uint32_t value) { number(value, 4); }
  void u64(uint64_t value) { number(value, 8); }
  void text(const char* data, size_t size_bytes) {
    u32(static_cast<uint32_t>(size_bytes));
    bytes(data, size_bytes);
  }
  void bytes(const void* data, size_t size_bytes) {
    if (failed_ || size_bytes > capacity_bytes_ - size_bytes_) {
      failed_ = true;
      return;
    }
    for (size_t i = 0; i < size_bytes; ++i) data_[size_bytes_ + i] = static_cast<const uint8_t*>(data)[i];
    size_bytes_ += size_bytes;
  }

  const uint8_t* data() const { return data_; }
  size_t size_bytes() const { return size_bytes_; }
  bool failed() const { return failed_; }

 private:
  void number(uint64_t value, size_t size_bytes) {
    if (failed_ || size_bytes > capacity_bytes_ - size_bytes_) {
      failed_ = true;
      return;
    }
    for (size_t i = 0; i < size_bytes; ++i) data_[size_bytes_++] = static_cast<uint8_t>(value >> (8 * i));
  }

  uint8_t* data_;
  size_t capacity_bytes_;
  size_t size_bytes_ = 0;
  size_t start_ = 0;
  bool failed_ = false;
};

}  // namespace agent_protocol
