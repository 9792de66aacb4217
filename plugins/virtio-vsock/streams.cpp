// SPDX-License-Identifier: Apache-2.0
// Streams of virtio 1.2 §5.10.6: requests, credit (§5.10.6.3), shutdown (§5.10.6.5) and resets.
#include "streams.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <utility>

namespace virtio_vsock {

namespace {

constexpr uint32_t kBoth = VIRTIO_VSOCK_SHUTDOWN_RCV | VIRTIO_VSOCK_SHUTDOWN_SEND;
constexpr uint32_t kFirstOrdinaryPort = 1024;
constexpr uint32_t kAnyPort = UINT32_MAX;  // VMADDR_PORT_ANY: no port of anybody's

uint64_t total_bytes(std::span<const iovec> parts) {
  uint64_t total = 0;
  for (const iovec& part : parts) total += part.iov_len;
  return total;
}

// The bytes [offset, offset + size) of the parts.
std::vector<iovec> cut(std::span<const iovec> parts, uint64_t offset, uint64_t size) {
  std::vector<iovec> result;
  for (const iovec& part : parts) {
    if (size == 0) break;
    if (offset >= part.iov_len) {
      offset -= part.iov_len;
      continue;
    }
    const size_t count = std::min<uint64_t>(size, part.iov_len - offset);
    result.push_back({static_cast<std::byte*>(part.iov_base) + offset, count});
    offset = 0;
    size -= count;
  }
  return result;
}

// Bytes that wait, in a ring of kBufferBytes; no memory while there are none.
class Buffer {
 public:
  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  std::array<iovec, 2> parts() const {
    const size_t first = std::min(size_, kBufferBytes - begin_);
    return {iovec{ring_.get() + begin_, first}, iovec{ring_.get(), size_ - first}};
  }
  // No more than there is room for, which credit takes care of.
  void append(std::span<const iovec> parts) {
    if (!ring_) ring_ = std::make_unique_for_overwrite<std::byte[]>(kBufferBytes);
    for (const iovec& part : parts) {
      const auto* const from = static_cast<const std::byte*>(part.iov_base);
      const size_t end = (begin_ + size_) % kBufferBytes;
      const size_t first = std::min(part.iov_len, kBufferBytes - end);
      std::copy_n(from, first, ring_.get() + end);
      std::copy_n(from + first, part.iov_len - first, ring_.get());
      size_ += part.iov_len;
    }
  }
  void consume(size_t count) {
    begin_ = (begin_ + count) % kBufferBytes;
    size_ -= count;
    if (empty()) clear();
  }
  void clear() {
    ring_.reset();
    begin_ = size_ = 0;
  }

 private:
  std::unique_ptr<std::byte[]> ring_;
  size_t begin_ = 0;
  size_t size_ = 0;
};

}  // namespace

enum class State {
  requested,  // by the host; the guest has not answered
  open,
  lingering  // the guest is done with it
};

// All counts of bytes are modulo 2^32, as those of the packets.
struct Stream {
  uint32_t host_port = 0;
  uint32_t guest_port = 0;
  State state = State::open;
  bool guest_began = false;
  std::unique_ptr<Partner> partner;

  // From the guest to the host.
  uint32_t received = 0;
  uint32_t forwarded = 0;
  uint32_t told_forwarded = 0;  // in the last packet to the guest
  Buffer buffer;                // received - forwarded bytes
  bool host_takes_nothing = false;

  // From the host to the guest.
  uint32_t sent = 0;
  uint32_t guest_forwarded = 0;
  uint32_t guest_buffer = 0;
  bool readable = false;  // as far as is known
  bool hung_up = false;
  std::chrono::milliseconds last_moment{0};  // of one that hung up, for the guest to take what it left

  // Packets that wait to be sent.
  bool request = false;
  bool response = false;
  bool credit_update = false;
  bool credit_request = false;

  uint32_t guest_shutdown = 0;  // flags of VIRTIO_VSOCK_OP_SHUTDOWN that came
  uint32_t host_shutdown = 0;   // and those that are to go
  uint32_t told_shutdown = 0;   // and that went
  bool told = false;            // the guest knows of the stream
  bool credit_asked = false;

  bool waits = false;      // in waiting_
  bool unsettled = false;  // in unsettled_
  std::optional<std::chrono::milliseconds> deadline;

  // How much the guest takes. None when it claims room for less than is under way (§5.10.6.3).
  uint32_t credit() const {
    const uint32_t under_way = sent - guest_forwarded;
    return guest_buffer > under_way ? guest_buffer - under_way : 0;
  }
  bool guest_reads() const { return !(guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_RCV); }
  bool host_sends() const { return !(host_shutdown & VIRTIO_VSOCK_SHUTDOWN_SEND); }
  bool may_send() const { return state == State::open && readable && host_sends() && guest_reads() && credit() > 0; }
};

Streams::Streams(uint32_t guest_cid, HostSide& host, uint32_t first_host_port)
    : guest_cid_(guest_cid),
      host_(host),
      next_reserved_port_(1 + first_host_port % (kFirstOrdinaryPort - 1)),
      next_ordinary_port_(std::clamp(first_host_port, kFirstOrdinaryPort, kAnyPort - 1)) {}

Streams::~Streams() { drop_all(); }

void Streams::drop_all() {
  for (auto& [key, stream] : streams_) host_.retire(std::move(stream->partner));
  for (auto& [pointer, stream] : lingering_) host_.retire(std::move(stream->partner));
  streams_.clear();
  lingering_.clear();
  waiting_.clear();
  unsettled_.clear();
  resets_.clear();
  deadlines_ = 0;
  count();
}

void Streams::count() { counters_.streams.store(streams_.size() + lingering_.size(), std::memory_order_relaxed); }

Stream& Streams::add(uint32_t host_port, uint32_t guest_port, std::unique_ptr<Partner> partner) {
  auto made = std::make_unique<Stream>();
  made->host_port = host_port;
  made->guest_port = guest_port;
  made->partner = std::move(partner);
  made->partner->stream = made.get();
  Stream& stream = *made;
  streams_.emplace(key(host_port, guest_port), std::move(made));
  count();
  unsettle(stream);
  return stream;
}

std::optional<uint32_t> Streams::free_port(PortRange range, uint32_t guest_port) {
  const bool reserved = range == PortRange::reserved;
  uint32_t& next = reserved ? next_reserved_port_ : next_ordinary_port_;
  // Each in its turn, but those that a stream to the same port of the guest has.
  for (size_t tries = 0; tries < kFirstOrdinaryPort + kMostStreams; ++tries) {
    const uint32_t port = next;
    ++next;
    if (next == (reserved ? kFirstOrdinaryPort : kAnyPort)) next = reserved ? 1 : kFirstOrdinaryPort;
    if (!streams_.contains(key(port, guest_port))) return port;
  }
  return std::nullopt;
}

bool Streams::open(uint32_t guest_port, std::unique_ptr<Partner> partner, PortRange range) {
  const auto port = full(range) ? std::nullopt : free_port(range, guest_port);
  if (!port) {
    host_.retire(std::move(partner));
    return false;
  }
  Stream& stream = add(*port, guest_port, std::move(partner));
  stream.state = State::requested;
  stream.request = true;
  set_deadline(stream, kPatience);
  enqueue(stream);
  return true;
}

// --- From the guest ---

void Streams::receive(const Packet& packet, std::span<const iovec> payload) {
  // From or to somebody else: there is nobody to answer (§5.10.6.4).
  if (packet.source_cid != guest_cid_ || packet.destination_cid != kHostCid) return;
  const auto found = streams_.find(key(packet.destination_port, packet.source_port));
  if (found == streams_.end()) {
    const bool valid = packet.type == VIRTIO_VSOCK_TYPE_STREAM && packet.operation == VIRTIO_VSOCK_OP_REQUEST;
    if (valid) return request(packet);
    if (packet.operation != VIRTIO_VSOCK_OP_RST) reset(packet.destination_port, packet.source_port);
    return;
  }
  Stream& stream = *found->second;
  if (packet.operation == VIRTIO_VSOCK_OP_RST) return remove(stream);
  if (packet.type != VIRTIO_VSOCK_TYPE_STREAM || packet.size_bytes > total_bytes(payload))
    return reset_and_remove(stream);

  update_credit(stream, packet);
  if (stream.state == State::requested) {
    // Not before it was asked.
    if (packet.operation != VIRTIO_VSOCK_OP_RESPONSE || stream.request) return reset_and_remove(stream);
    stream.state = State::open;
    set_deadline(stream, std::nullopt);
    stream.partner->accepted(stream.host_port);
    return unsettle(stream);
  }
  switch (packet.operation) {
    case VIRTIO_VSOCK_OP_RW:
      return data(stream, packet, payload);
    case VIRTIO_VSOCK_OP_SHUTDOWN:
      return shutdown(stream, packet.flags & kBoth);
    case VIRTIO_VSOCK_OP_CREDIT_UPDATE:
      return;
    case VIRTIO_VSOCK_OP_CREDIT_REQUEST:
      stream.credit_update = true;
      return enqueue(stream);
    default:
      return reset_and_remove(stream);
  }
}

void Streams::request(const Packet& packet) {
  std::unique_ptr<Partner> partner = full(PortRange::ordinary) ? nullptr : host_.dial(packet.destination_port);
  if (!partner) return reset(packet.destination_port, packet.source_port);
  Stream& stream = add(packet.destination_port, packet.source_port, std::move(partner));
  stream.guest_began = true;
  stream.told = true;
  stream.response = true;
  update_credit(stream, packet);
  enqueue(stream);
}

void Streams::update_credit(Stream& stream, const Packet& packet) {
  stream.guest_buffer = packet.buffer_bytes;
  // Processors of the guest may send an older count after a newer one; one beyond what was sent cannot be. Both would
  // put more under way than is known to be.
  if (stream.sent - packet.forwarded_bytes <= stream.sent - stream.guest_forwarded)
    stream.guest_forwarded = packet.forwarded_bytes;
  if (stream.credit() > 0) {
    stream.credit_asked = false;
    stream.credit_request = false;
  }
  if (has_work(stream)) enqueue(stream);
}

void Streams::data(Stream& stream, const Packet& packet, std::span<const iovec> payload) {
  // The guest cannot know of more room than it was told of.
  const uint32_t most_bytes = kBufferBytes - (stream.received - stream.told_forwarded);
  if (packet.size_bytes > most_bytes || (stream.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_SEND))
    return reset_and_remove(stream);
  counters_.from_guest_bytes.fetch_add(packet.size_bytes, std::memory_order_relaxed);
  stream.received += packet.size_bytes;
  uint32_t taken_bytes = stream.host_takes_nothing ? packet.size_bytes : 0;
  const std::vector<iovec> all = cut(payload, 0, packet.size_bytes);
  if (!stream.host_takes_nothing && stream.buffer.empty() && packet.size_bytes > 0) {
    const ssize_t written = stream.partner->write(all);
    if (written > 0) taken_bytes = static_cast<uint32_t>(written);
    if (written < 0 && written != -EAGAIN) {
      writing_failed(stream);
      taken_bytes = packet.size_bytes;
    }
  }
  if (taken_bytes < packet.size_bytes) {
    stream.buffer.append(cut(all, taken_bytes, packet.size_bytes - taken_bytes));
    unsettle(stream);
  }
  forwarded(stream, taken_bytes);
}

// The guest is told before it believes to have half of the room left.
void Streams::forwarded(Stream& stream, uint32_t size_bytes) {
  stream.forwarded += size_bytes;
  if (stream.state == State::lingering || stream.credit_update) return;
  if (stream.received - stream.told_forwarded >= kBufferBytes / 2 && stream.forwarded != stream.told_forwarded) {
    stream.credit_update = true;
    enqueue(stream);
  }
}

void Streams::shutdown(Stream& stream, uint32_t flags) {
  const uint32_t added = flags & ~stream.guest_shutdown;
  stream.guest_shutdown |= flags;
  if (stream.guest_shutdown == kBoth) {
    reset(stream.host_port, stream.guest_port);
    if (stream.buffer.empty())
      remove(stream);
    else
      linger(stream);
    return;
  }
  if (added & VIRTIO_VSOCK_SHUTDOWN_SEND && stream.buffer.empty()) stream.partner->end_writing();
  if (added & VIRTIO_VSOCK_SHUTDOWN_RCV) {
    stream.readable = false;
    stream.partner->end_reading();
    if (stream.hung_up) end_unread(stream);
    unsettle(stream);
  }
}

// The host hung up, and the guest reads nothing more: there is no end to read up to.
void Streams::end_unread(Stream& stream) {
  stream.host_shutdown = kBoth;
  if (has_work(stream)) enqueue(stream);
}

// --- To the guest ---

bool Streams::has_work(const Stream& stream) const {
  if (stream.request || stream.response || stream.credit_update || stream.credit_request) return true;
  return stream.may_send() || (stream.state == State::open && (stream.host_shutdown & ~stream.told_shutdown));
}

void Streams::enqueue(Stream& stream) {
  if (stream.state == State::lingering || std::exchange(stream.waits, true)) return;
  waiting_.push_back(&stream);
}

void Streams::unsettle(Stream& stream) {
  if (std::exchange(stream.unsettled, true)) return;
  unsettled_.push_back(&stream);
}

Packet Streams::header(const Stream& stream, uint16_t operation) const {
  Packet packet;
  packet.source_cid = kHostCid;
  packet.destination_cid = guest_cid_;
  packet.source_port = stream.host_port;
  packet.destination_port = stream.guest_port;
  packet.operation = operation;
  packet.buffer_bytes = kBufferBytes;
  packet.forwarded_bytes = stream.forwarded;
  return packet;
}

Packet Streams::next(std::span<const iovec> space) {
  if (!resets_.empty()) {
    Stream gone;
    gone.host_port = resets_.front().host;
    gone.guest_port = resets_.front().guest;
    resets_.pop_front();
    return header(gone, VIRTIO_VSOCK_OP_RST);
  }
  Stream& stream = *waiting_.front();
  waiting_.pop_front();
  stream.waits = false;
  stream.told = true;

  Packet packet = header(stream, VIRTIO_VSOCK_OP_CREDIT_UPDATE);
  if (std::exchange(stream.request, false)) {
    packet.operation = VIRTIO_VSOCK_OP_REQUEST;
  } else if (std::exchange(stream.response, false)) {
    packet.operation = VIRTIO_VSOCK_OP_RESPONSE;
  } else if (stream.may_send()) {
    packet.size_bytes = read(stream, space);
    if (packet.size_bytes) packet.operation = VIRTIO_VSOCK_OP_RW;
  }
  if (packet.operation == VIRTIO_VSOCK_OP_CREDIT_UPDATE && stream.state == State::open) {
    if (stream.host_shutdown & ~stream.told_shutdown) {
      packet.operation = VIRTIO_VSOCK_OP_SHUTDOWN;
      packet.flags = stream.told_shutdown = stream.host_shutdown;
      if (stream.host_shutdown == kBoth) set_deadline(stream, kPatience);
    } else if (std::exchange(stream.credit_request, false)) {
      packet.operation = VIRTIO_VSOCK_OP_CREDIT_REQUEST;
    }
  }
  // Every packet tells of the room there is.
  packet.forwarded_bytes = stream.told_forwarded = stream.forwarded;
  stream.credit_update = false;
  if (has_work(stream)) enqueue(stream);
  return packet;
}

// Bytes that were read into `space`; 0 also when the host has nothing, or nothing more ever.
uint32_t Streams::read(Stream& stream, std::span<const iovec> space) {
  const uint64_t room_bytes = std::min<uint64_t>({total_bytes(space), stream.credit(), kMostPayloadBytes});
  if (room_bytes == 0) return 0;
  const ssize_t count = stream.partner->read(cut(space, 0, room_bytes));
  unsettle(stream);
  if (count > 0) {
    const auto size_bytes = static_cast<uint32_t>(count);
    // One that hung up is not watched any more: it is read to its end.
    if (stream.hung_up)
      set_deadline(stream, std::min(kPatience, stream.last_moment - host_.now()));
    else if (size_bytes < room_bytes)
      stream.readable = false;
    stream.sent += size_bytes;
    counters_.to_guest_bytes.fetch_add(size_bytes, std::memory_order_relaxed);
    ask_for_credit(stream);
    return size_bytes;
  }
  stream.readable = false;
  if (count == -EAGAIN && !stream.hung_up) return 0;
  if (count < 0) writing_failed(stream);
  stream.host_shutdown |= VIRTIO_VSOCK_SHUTDOWN_SEND;
  return 0;
}

// A driver tells of new room by itself when it sees fit; one that does not is asked, once.
void Streams::ask_for_credit(Stream& stream) {
  if (stream.state != State::open || !stream.readable || !stream.host_sends() || !stream.guest_reads() ||
      stream.credit() > 0 || std::exchange(stream.credit_asked, true))
    return;
  stream.credit_request = true;
  enqueue(stream);
}

// --- From the host ---

void Streams::ready(Stream& stream, bool readable, bool writable, bool hung_up) {
  if (hung_up) {
    if (stream.state == State::requested) return reset_and_remove(stream);
    if (stream.state == State::lingering) return remove(stream);
    stream.hung_up = true;
    stream.last_moment = host_.now() + kLingerPatience;
    set_deadline(stream, kPatience);
    writing_failed(stream);
    if (!stream.guest_reads()) end_unread(stream);
    readable = true;
  } else if (writable && !flush(stream)) {
    return;
  }
  if (readable && stream.state == State::open && stream.host_sends() && stream.guest_reads()) {
    stream.readable = true;
    ask_for_credit(stream);
  }
  if (has_work(stream)) enqueue(stream);
  unsettle(stream);
}

// False when the stream is no more.
bool Streams::flush(Stream& stream) {
  while (!stream.buffer.empty()) {
    const ssize_t written = stream.partner->write(stream.buffer.parts());
    if (written == -EAGAIN || written == 0) return true;
    if (written < 0) {
      if (stream.state != State::lingering) {
        writing_failed(stream);
        return true;
      }
      break;
    }
    stream.buffer.consume(static_cast<size_t>(written));
    forwarded(stream, static_cast<uint32_t>(written));
    if (stream.deadline && stream.state == State::lingering) set_deadline(stream, kLingerPatience);
  }
  if (stream.state == State::lingering) {
    remove(stream);
    return false;
  }
  if (stream.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_SEND) stream.partner->end_writing();
  return true;
}

// The host takes nothing more: what is buffered is lost, and so is what the guest sends before it knows.
void Streams::writing_failed(Stream& stream) {
  const auto lost_bytes = static_cast<uint32_t>(stream.buffer.size());
  stream.buffer.clear();
  stream.host_takes_nothing = true;
  stream.host_shutdown |= VIRTIO_VSOCK_SHUTDOWN_RCV;
  forwarded(stream, lost_bytes);
  if (has_work(stream)) enqueue(stream);
  unsettle(stream);
}

void Streams::settle() {
  for (Stream* stream : unsettled_) {
    stream->unsettled = false;
    const bool reads =
        stream->state == State::open && stream->host_sends() && stream->guest_reads() && !stream->readable;
    stream->partner->watch(reads, !stream->buffer.empty());
  }
  unsettled_.clear();
}

// --- Ends ---

void Streams::set_deadline(Stream& stream, std::optional<std::chrono::milliseconds> patience) {
  if (stream.deadline) --deadlines_;
  stream.deadline.reset();
  if (!patience) return;
  stream.deadline = host_.now() + *patience;
  ++deadlines_;
}

bool Streams::expire() {
  std::vector<Stream*> late;
  const auto now = host_.now();
  for (const auto& [key, stream] : streams_)
    if (stream->deadline && *stream->deadline <= now) late.push_back(stream.get());
  for (Stream* stream : late) reset_and_remove(*stream);
  late.clear();
  for (const auto& [pointer, stream] : lingering_)
    if (stream->deadline && *stream->deadline <= now) late.push_back(pointer);
  for (Stream* stream : late) remove(*stream);
  return has_deadlines();
}

void Streams::reset_and_remove(Stream& stream) {
  if (stream.told) reset(stream.host_port, stream.guest_port);
  remove(stream);
}

void Streams::forget_marks(Stream& stream) {
  set_deadline(stream, std::nullopt);
  if (std::exchange(stream.waits, false)) std::erase(waiting_, &stream);
  if (std::exchange(stream.unsettled, false)) std::erase(unsettled_, &stream);
}

void Streams::remove(Stream& stream) {
  forget_marks(stream);
  std::unique_ptr<Partner> partner = std::move(stream.partner);
  if (stream.state == State::lingering)
    lingering_.erase(&stream);
  else
    streams_.erase(key(stream.host_port, stream.guest_port));
  count();
  host_.retire(std::move(partner));  // last: who sees its end sees the count
}

void Streams::linger(Stream& stream) {
  forget_marks(stream);
  auto node = streams_.extract(key(stream.host_port, stream.guest_port));
  stream.state = State::lingering;
  lingering_.emplace(&stream, std::move(node.mapped()));
  if (stream.guest_began) set_deadline(stream, kLingerPatience);
  unsettle(stream);
}

}  // namespace virtio_vsock
