// SPDX-License-Identifier: Apache-2.0
// A machine on its way to the child process that writes its snapshot: pieces of memory, then the state.
#pragma once

#include <cstdint>
#include <span>
#include <utility>

#include "snapshot/sections.hpp"
#include "util/fd.hpp"
#include "util/result.hpp"

namespace vmm {

class ParentMemory;
class SnapshotImage;

// Two ends of a stream, which one writes to and the other reads from.
Result<std::pair<Fd, Fd>> make_snapshot_stream();

// Waits for the reader as long as it takes; an error of EPIPE when there is none any more. What was sent is a copy: the
// memory may change from then on. A page that is sent again replaces the one before. One caller at a time. [any]
Result<void> send_memory(int stream, uint64_t offset, std::span<const std::byte> bytes);
// The last of all.
Result<void> send_state(int stream, const Sections& sections);

inline constexpr const char* kCutOffStream = "the machine went away before all of it was written";
// Writes all that comes, or with a parent what differs from it, and commits. A stream that ends before its state is an
// error, kCutOffStream.
Result<void> receive_snapshot(int stream, SnapshotImage& image, ParentMemory* parent = nullptr);

}  // namespace vmm
