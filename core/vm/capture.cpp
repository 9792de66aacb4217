// SPDX-License-Identifier: Apache-2.0
// Rounds over what was written since the round before, until little of it is left or a guest writes faster than that: a
// child process then has the rest as it stood, copied by the kernel page by page.
#include "vm/capture.hpp"

#include <string>
#include <utility>

#include "snapshot/backend.hpp"
#include "util/log.hpp"

namespace vmm {
namespace {

// With so little the pause begins. It is worth a round less than to copy it costs.
constexpr uint64_t kLittleBytes = 1 << 20;
// As much is copied in the pause, rather than have a child process made that gets all memory.
constexpr uint64_t kMostCopiedBytes = 8 << 20;
constexpr unsigned kMostRounds = 8;

using Copies = std::vector<std::pair<uint64_t, std::vector<std::byte>>>;  // by offset

Result<Copies> copy_pages(const GuestMemory& memory, const PageSet& pages) {
  Copies copies;
  const auto copy = [&](uint64_t offset, std::span<const std::byte> bytes) -> Result<void> {
    copies.emplace_back(offset, std::vector(bytes.begin(), bytes.end()));
    return {};
  };
  TRY(memory.visit_pages(pages, kSnapshotPieceBytes, copy));
  return copies;
}

// Unmaps them on a thread, as it takes the longer the more pages they have. Nothing is given when there is no thread to be
// had, and that is done already.
std::unique_ptr<ThreadWork> let_go(EventLoop& loop, std::vector<Mapping> mappings) {
  const auto kept = std::make_shared<std::vector<Mapping>>(std::move(mappings));
  const auto unmap = [kept](const std::atomic<bool>&) -> Result<void> {
    kept->clear();
    return {};
  };
  auto started = ThreadWork::start(loop, "clone-unmap", unmap, [](const Result<void>&) {});
  return started.ok() ? std::move(*started) : nullptr;
}

}  // namespace

Result<std::unique_ptr<Capture>> Capture::start(EventLoop& loop, GuestMemory& memory, std::optional<PageSet> pages,
                                                Job job) {
  std::unique_ptr<Capture> capture(new Capture(loop, memory, std::move(pages), std::move(job)));
  if (capture->job_.take_dirty_pages) TRY(capture->take_newer());
  TRY(capture->job_.ahead && !capture->is_little_left() ? capture->begin_round() : capture->take_the_rest());
  return capture;
}

bool Capture::is_little_left() const { return left_ && left_->count() * kPageSize <= kLittleBytes; }

Result<void> Capture::take_newer() {
  PageSet newer;
  TRY(job_.take_dirty_pages(newer));
  if (left_) left_->add(newer);
  return {};
}

Result<void> Capture::visit_left(const Visit& visit) const {
  if (left_) return memory_.visit_pages(*left_, kSnapshotPieceBytes, visit);
  return memory_.visit_pages(TRY(memory_.contents()), kSnapshotPieceBytes, visit);
}

Result<void> Capture::begin_round() {
  const auto put = [this](const std::atomic<bool>& cancelled) {
    return visit_left([&](uint64_t offset, std::span<const std::byte> bytes) -> Result<void> {
      if (cancelled) return Error{"cancelled"};
      return job_.put_memory(offset, bytes);
    });
  };
  thread_ = TRY(ThreadWork::start(loop_, "clone-capture", put, [this](Result<void> result) {
    if (result.ok()) result = end_round();
    if (result.ok()) return;
    const auto done = job_.done;  // this may go
    done(std::move(result));
  }));
  return {};
}

Result<void> Capture::end_round() {
  const uint64_t pages = left_ ? left_->count() : memory_.size_bytes() / kPageSize;
  ++rounds_;
  left_.emplace();
  TRY(take_newer());
  const bool is_slow = left_->count() > pages / 2;
  return is_little_left() || is_slow || rounds_ == kMostRounds ? take_the_rest() : begin_round();
}

Result<void> Capture::take_the_rest() {
  const auto sections = std::make_shared<Sections>();
  const auto copies = std::make_shared<Copies>();
  std::vector<Mapping> unused;
  const auto take = [&]() -> Result<void> {
    if (job_.take_dirty_pages) TRY(take_newer());
    if (left_ && left_->count() * kPageSize <= kMostCopiedBytes) {
      *copies = TRY(copy_pages(memory_, *left_));
      return {};
    }
    if (!left_) left_ = TRY(memory_.contents());  // a child has no descriptor to find that out
    unused = TRY(memory_.make_private());
    const auto put = [&]() -> Result<void> {
      TRY(visit_left(job_.put_memory));
      return job_.put_state(*sections);
    };
    child_ = TRY(BackgroundWork::start(loop_, put, job_.done, job_.keep));
    return {};
  };
  TRY(job_.while_paused(*sections, take));
  const std::string rest = left_ ? std::to_string(left_->count()) + " pages" : "all pages";
  log_debug("memory taken in " + std::to_string(rounds_) + " rounds ahead, then " + rest +
            (child_ ? " by a child process" : " in the pause"));
  if (child_) {
    if (!unused.empty()) thread_ = let_go(loop_, std::move(unused));
    return {};
  }
  const auto put = [this, sections, copies](const std::atomic<bool>&) -> Result<void> {
    for (const auto& [offset, bytes] : *copies) TRY(job_.put_memory(offset, bytes));
    return job_.put_state(*sections);
  };
  thread_ = TRY(ThreadWork::start(loop_, "clone-capture", put, job_.done));
  return {};
}

}  // namespace vmm
