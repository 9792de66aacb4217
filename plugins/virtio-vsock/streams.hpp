// SPDX-License-Identifier: Apache-2.0
// The device's side of all streams of a guest, as a state machine: packets from the guest go in, packets for the guest
// come out, and each stream has a partner on the host. It knows neither queues nor descriptors.
//
// Everything that it keeps is bounded. What the guest sends goes to the host at once, and into the stream's buffer only
// when the host does not take it; that buffer is the credit that the guest was given. What the host sends is read when
// the guest has room for it. Control packets are marks at their stream, apart from resets of streams that do not exist:
// while kMostResets of those wait, takes_packets() is false.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <chrono>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "packet.hpp"

namespace virtio_vsock {

struct Stream;

constexpr uint32_t kBufferBytes = 256 << 10;  // for each stream, in each direction's receiver
constexpr uint32_t kMostPayloadBytes = 64 << 10;
constexpr size_t kMostStreams = 1024;
constexpr size_t kReservedStreams = 64;  // of these, for the VMM: programs of the guest cannot keep it out
constexpr size_t kMostResets = 256;
// For a guest to answer a request, to answer the end of both directions, and to take more of what a host left that hung
// up.
constexpr std::chrono::milliseconds kPatience{8000};
// For the host to take more of what is left of a stream that a program of the guest began and is done with; and for the
// guest to take all of what a host left.
constexpr std::chrono::milliseconds kLingerPatience{60'000};

// The host's end of a stream. It tells Streams what happens by ready(), and is destroyed by HostSide::retire().
class Partner {
 public:
  virtual ~Partner() = default;
  // The guest accepted a stream that began on the host.
  virtual void accepted(uint32_t host_port) = 0;
  // Bytes; 0 at the end of what comes; a negative errno value, -EAGAIN when there is nothing now.
  virtual ssize_t read(std::span<const iovec> into) = 0;
  virtual ssize_t write(std::span<const iovec> from) = 0;
  virtual void end_writing() = 0;
  virtual void end_reading() = 0;
  // What ready() is to be called for; a hang-up always is told, once.
  virtual void watch(bool readable, bool writable) = 0;

  Stream* stream = nullptr;
};

class HostSide {
 public:
  virtual ~HostSide() = default;
  // Whoever listens for the guest on that port, or null.
  virtual std::unique_ptr<Partner> dial(uint32_t host_port) = 0;
  virtual void retire(std::unique_ptr<Partner> partner) = 0;
  virtual std::chrono::milliseconds now() = 0;
};

enum class PortRange { reserved, ordinary };  // below 1024, which only the VMM uses, or from there on

constexpr size_t most_streams(PortRange range) {
  return range == PortRange::reserved ? kMostStreams : kMostStreams - kReservedStreams;
}

// Read by any thread.
struct Counters {
  std::atomic<uint64_t> streams{0};  // that there are now
  std::atomic<uint64_t> to_guest_bytes{0};
  std::atomic<uint64_t> from_guest_bytes{0};
};

class Streams {
 public:
  Streams(uint32_t guest_cid, HostSide& host, uint32_t first_host_port);
  Streams(const Streams&) = delete;
  ~Streams();

  // --- The guest's side ---
  bool takes_packets() const { return resets_.size() < kMostResets; }
  // A packet and what follows it. The payload may be longer than the header says, never shorter: that is an error of
  // the guest's and resets the stream.
  void receive(const Packet& packet, std::span<const iovec> payload);
  bool has_packets() const { return !resets_.empty() || !waiting_.empty(); }
  // The next packet, its payload in `space`. &has_packets()
  Packet next(std::span<const iovec> space);

  // --- The host's side ---
  bool full(PortRange range) const { return streams_.size() + lingering_.size() >= most_streams(range); }
  // Asks the guest to accept; false when there are too many streams.
  bool open(uint32_t guest_port, std::unique_ptr<Partner> partner, PortRange range);
  void ready(Stream& stream, bool readable, bool writable, bool hung_up);
  // After a round of calls of the above: tells partners what to watch for.
  void settle();

  // Streams whose time is up end; true while there are others with a limit.
  bool expire();
  bool has_deadlines() const { return deadlines_ > 0; }
  // All end, and the guest is not told: it forgot them itself, or will be told by an event.
  void drop_all();
  const Counters& counters() const { return counters_; }

 private:
  using Key = uint64_t;
  static Key key(uint32_t host_port, uint32_t guest_port) { return uint64_t{host_port} << 32 | guest_port; }

  Stream& add(uint32_t host_port, uint32_t guest_port, std::unique_ptr<Partner> partner);
  std::optional<uint32_t> free_port(PortRange range, uint32_t guest_port);
  void request(const Packet& packet);
  void data(Stream& stream, const Packet& packet, std::span<const iovec> payload);
  void shutdown(Stream& stream, uint32_t flags);
  void end_unread(Stream& stream);
  void update_credit(Stream& stream, const Packet& packet);
  bool flush(Stream& stream);
  void writing_failed(Stream& stream);
  void forwarded(Stream& stream, uint32_t size_bytes);
  bool has_work(const Stream& stream) const;
  void enqueue(Stream& stream);
  void unsettle(Stream& stream);
  void set_deadline(Stream& stream, std::optional<std::chrono::milliseconds> patience);
  uint32_t read(Stream& stream, std::span<const iovec> space);
  void ask_for_credit(Stream& stream);
  Packet header(const Stream& stream, uint16_t operation) const;
  void reset(uint32_t host_port, uint32_t guest_port) { resets_.push_back({host_port, guest_port}); }
  void reset_and_remove(Stream& stream);
  void forget_marks(Stream& stream);
  void remove(Stream& stream);
  void linger(Stream& stream);
  void count();

  struct Ports {
    uint32_t host, guest;
  };

  const uint32_t guest_cid_;
  HostSide& host_;
  uint32_t next_reserved_port_;
  uint32_t next_ordinary_port_;
  std::unordered_map<Key, std::unique_ptr<Stream>> streams_;
  // Over for the guest, with bytes that the host has yet to take.
  std::unordered_map<Stream*, std::unique_ptr<Stream>> lingering_;
  std::deque<Stream*> waiting_;  // have a packet for the guest, in turn
  std::vector<Stream*> unsettled_;
  // Bounded by kMostResets and kMostStreams: a stream that was told to the guest adds one, and new ones are told after
  // it.
  std::deque<Ports> resets_;
  size_t deadlines_ = 0;
  Counters counters_;
};

}  // namespace virtio_vsock
