// SPDX-License-Identifier: Apache-2.0
// A vsock packet in a chain: its header (virtio 1.2 §5.10.6) in the host's byte order, and its payload.
#pragma once

#include <endian.h>
#include <linux/virtio_vsock.h>
#include <sys/uio.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "clone/abi/virtqueue.h"

namespace virtio_vsock {

constexpr uint64_t kHostCid = 2;

struct Packet {
  uint64_t source_cid = 0;
  uint64_t destination_cid = 0;
  uint32_t source_port = 0;
  uint32_t destination_port = 0;
  uint32_t size_bytes = 0;  // of the payload
  uint16_t type = VIRTIO_VSOCK_TYPE_STREAM;
  uint16_t operation = VIRTIO_VSOCK_OP_INVALID;  // virtio_vsock_op, or whatever a guest made up
  uint32_t flags = 0;
  uint32_t buffer_bytes = 0;     // room that the sender has for the stream in all
  uint32_t forwarded_bytes = 0;  // what left that room again, counted from the stream's beginning, modulo 2^32
};

inline Packet decode(const virtio_vsock_hdr& wire) {
  return {le64toh(wire.src_cid),   le64toh(wire.dst_cid), le32toh(wire.src_port), le32toh(wire.dst_port),
          le32toh(wire.len),       le16toh(wire.type),    le16toh(wire.op),       le32toh(wire.flags),
          le32toh(wire.buf_alloc), le32toh(wire.fwd_cnt)};
}

inline virtio_vsock_hdr encode(const Packet& packet) {
  return {htole64(packet.source_cid),       htole64(packet.destination_cid), htole32(packet.source_port),
          htole32(packet.destination_port), htole32(packet.size_bytes),      htole16(packet.type),
          htole16(packet.operation),        htole32(packet.flags),           htole32(packet.buffer_bytes),
          htole32(packet.forwarded_bytes)};
}

// The segments of a chain without the header that they begin with.
inline void payload_of(std::span<const clone_segment> segments, std::vector<iovec>& parts) {
  parts.clear();
  size_t skip = sizeof(virtio_vsock_hdr);
  for (const clone_segment& segment : segments) {
    const size_t skipped = std::min<size_t>(skip, segment.size_bytes);
    skip -= skipped;
    if (segment.size_bytes > skipped)
      parts.push_back({static_cast<std::byte*>(segment.host_address) + skipped, segment.size_bytes - skipped});
  }
}

}  // namespace virtio_vsock
