// SPDX-License-Identifier: Apache-2.0
// The requests of virtio 1.2 §5.2.6, taken in batches and answered in batches: a batch of new ones and the wait for the
// next event are one system call, a batch of answers is one interrupt.
#include "queue_worker.hpp"

#include <endian.h>

#include <cstring>

namespace virtio_blk {

namespace {

constexpr uint32_t kSectorBytes = 512;

// Appends the bytes [offset, offset + size) of the segments.
void append(std::vector<iovec>& vectors, std::span<const clone_segment> segments, uint64_t offset, uint64_t size) {
  for (const clone_segment& segment : segments) {
    if (size == 0) return;
    if (offset >= segment.size_bytes) {
      offset -= segment.size_bytes;
      continue;
    }
    const uint64_t count = std::min<uint64_t>(size, segment.size_bytes - offset);
    vectors.push_back({static_cast<std::byte*>(segment.host_address) + offset, count});
    offset = 0;
    size -= count;
  }
}

}  // namespace

struct QueueWorker::Request final : ImageRequest {
  explicit Request(QueueWorker& served_by) : worker(served_by) {}
  void done(int error) override {
    if (error) worker.failed(*this, error);
    worker.complete(*this, error ? VIRTIO_BLK_S_IOERR : VIRTIO_BLK_S_OK);
  }

  QueueWorker& worker;
  clone_sdk::Chain chain;
  std::vector<iovec> vectors_storage;
  Request* next_free = nullptr;
};

QueueWorker::QueueWorker(const clone_sdk::Host& host, const Disk& disk, clone_sdk::Queue queue,
                         const clone_virtio_port* port, bool write_through, std::unique_ptr<IoEngine> engine)
    : host_(host), disk_(disk), queue_(queue), port_(port), write_through_(write_through), engine_(std::move(engine)) {}

QueueWorker::~QueueWorker() {
  set_mode(Mode::stopping);
  thread_.join();
}

clone_sdk::Result<void> QueueWorker::start(const char* thread_name, Mode mode) {
  mode_ = mode;
  thread_ = CLONE_TRY(clone_sdk::Thread::start<&QueueWorker::run>(host_, thread_name, this));
  return {};
}

void QueueWorker::set_mode(Mode mode) {
  {
    std::lock_guard lock(mutex_);
    mode_.store(mode, std::memory_order_release);
    parked_ = false;
  }
  engine_->wake();
}

void QueueWorker::wait_parked() {
  std::unique_lock lock(mutex_);
  parked_changed_.wait(lock, [this] { return parked_ || ended_; });
}

void QueueWorker::run() {
  if (auto attached = engine_->attach(); !attached.ok()) {
    host_.log(CLONE_LOG_ERROR, attached.error().message);
    port_->needs_reset(port_->context);
    std::lock_guard lock(mutex_);
    ended_ = true;
    parked_changed_.notify_all();
    return;
  }
  while (true) {
    const Mode mode = mode_.load(std::memory_order_acquire);
    if (mode == Mode::running) {
      if (!broken_) queue_.disable_kick();
      const bool began = take_requests();
      engine_->poll(false);
      // Whoever was answered may ask again soon: look for more before sleeping.
      if (tell_driver() || began) continue;
      const bool more = !broken_ && queue_.enable_kick();
      if (more && throttled_for_.count() == 0) continue;
      if (more)
        queue_.disable_kick();
      else
        take_no_more();
    } else {
      take_no_more();
      if (in_flight_ == 0) {
        // A driver that resets the device waits for no interrupt.
        if (mode == Mode::stopping) return;
        tell_driver();
        std::lock_guard lock(mutex_);
        parked_ = mode_ == Mode::parked;
        parked_changed_.notify_all();
      }
    }
    // The first poll() may have taken the signal that announced another mode.
    if (mode_.load(std::memory_order_acquire) != mode) continue;
    engine_->poll(true, throttled_for_.count() ? throttled_for_ : IoEngine::kForever);
    if (mode == Mode::running) tell_driver();
  }
}

// One interrupt for all that was given back since the last; false when that was nothing.
bool QueueWorker::tell_driver() {
  if (!unsignalled_) return false;
  unsignalled_ = false;
  queue_.signal();
  return true;
}

// Begins everything that the driver made available and the limit allows; false when that was nothing.
bool QueueWorker::take_requests() {
  bool any = false;
  while (!broken_) {
    Request* request = free_request();
    if (!request || !may_take()) break;
    const auto popped = queue_.pop(popped_);
    if (popped != clone_sdk::Queue::Pop::chain && disk_.limiter) disk_.limiter->give_back();
    if (popped == clone_sdk::Queue::Pop::empty) break;
    if (popped == clone_sdk::Queue::Pop::broken) {
      host_.log(CLONE_LOG_DEBUG, "the driver broke a rule of its queue");
      broken_ = true;
      port_->needs_reset(port_->context);
      break;
    }
    free_ = request->next_free;
    ++in_flight_;
    any = true;
    request->chain.take(popped_);
    begin(*request);
  }
  return any;
}

// Requests stay in the ring until the limit allows them, so that a machine paused meanwhile is saved with them.
bool QueueWorker::may_take() {
  if (!disk_.limiter) return true;
  throttled_for_ = disk_.limiter->take(customer_, std::chrono::steady_clock::now());
  return throttled_for_.count() == 0;
}

void QueueWorker::take_no_more() {
  if (throttled_for_.count() == 0) return;
  throttled_for_ = {};
  disk_.limiter->leave(customer_);
}

QueueWorker::Request* QueueWorker::free_request() {
  if (!free_ && requests_.size() < queue_.size()) {
    requests_.push_back(std::make_unique<Request>(*this));
    free_ = requests_.back().get();
  }
  return free_;
}

void QueueWorker::begin(Request& request) {
  const clone_sdk::Chain& chain = request.chain;
  virtio_blk_outhdr header;
  if (chain.writable_bytes() == 0 || !chain.read(0, &header, sizeof header))
    return complete(request, VIRTIO_BLK_S_IOERR);
  request.write_through = write_through_;
  switch (le32toh(header.type)) {
    case VIRTIO_BLK_T_IN:
      return transfer(request, header, ImageRequest::Type::read);
    case VIRTIO_BLK_T_OUT:
      return transfer(request, header, ImageRequest::Type::write);
    case VIRTIO_BLK_T_FLUSH:
      request.type = ImageRequest::Type::flush;
      request.start = request.length = 0;
      request.data = {};
      return disk_.image->begin(*engine_, request);
    case VIRTIO_BLK_T_GET_ID:
      return identify(request);
    case VIRTIO_BLK_T_DISCARD:
      return change_range(request, ImageRequest::Type::discard, disk_.max_discard_sectors);
    case VIRTIO_BLK_T_WRITE_ZEROES:
      return change_range(request, ImageRequest::Type::write_zeroes, disk_.max_write_zeroes_sectors);
    default:
      return complete(request, VIRTIO_BLK_S_UNSUPP);
  }
}

void QueueWorker::transfer(Request& request, const virtio_blk_outhdr& header, ImageRequest::Type type) {
  const clone_sdk::Chain& chain = request.chain;
  const bool write = type == ImageRequest::Type::write;
  const uint64_t length = write ? chain.readable_bytes() - sizeof header : chain.writable_bytes() - 1;
  const uint64_t sector = le64toh(header.sector);
  if (length % kSectorBytes || !within_disk(sector, length / kSectorBytes) || (write && disk_.read_only))
    return complete(request, VIRTIO_BLK_S_IOERR);
  if (length == 0) return complete(request, VIRTIO_BLK_S_OK);

  request.vectors_storage.clear();
  if (write)
    append(request.vectors_storage, chain.readable(), sizeof header, length);
  else
    append(request.vectors_storage, chain.writable(), 0, length);
  if (disk_.limiter) disk_.limiter->pay_bytes(customer_, length);
  request.type = type;
  request.start = sector * kSectorBytes;
  request.length = length;
  request.data = request.vectors_storage;
  disk_.image->begin(*engine_, request);
}

// Discard and write zeroes: one range, as the configuration space says (virtio 1.2 §5.2.6.2).
void QueueWorker::change_range(Request& request, ImageRequest::Type type, uint32_t max_sectors) {
  virtio_blk_discard_write_zeroes range;
  if (!disk_.discards && type == ImageRequest::Type::discard) return complete(request, VIRTIO_BLK_S_UNSUPP);
  if (disk_.read_only || request.chain.readable_bytes() != sizeof(virtio_blk_outhdr) + sizeof range ||
      !request.chain.read(sizeof(virtio_blk_outhdr), &range, sizeof range))
    return complete(request, VIRTIO_BLK_S_IOERR);
  const uint64_t sector = le64toh(range.sector);
  const uint32_t sectors = le32toh(range.num_sectors);
  const uint32_t flags = le32toh(range.flags);
  const bool discard = type == ImageRequest::Type::discard;
  if (flags & ~(discard ? 0 : VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)) return complete(request, VIRTIO_BLK_S_UNSUPP);
  if (sectors > max_sectors || !within_disk(sector, sectors)) return complete(request, VIRTIO_BLK_S_IOERR);
  if (sectors == 0) return complete(request, VIRTIO_BLK_S_OK);

  request.type = type;
  request.may_unmap = (flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) != 0 && disk_.discards;
  request.start = sector * kSectorBytes;
  request.length = uint64_t{sectors} * kSectorBytes;
  request.data = {};
  // Zeroes are written where the host cannot make them otherwise.
  if (disk_.limiter && !discard) disk_.limiter->pay_bytes(customer_, request.length);
  disk_.image->begin(*engine_, request);
}

void QueueWorker::identify(Request& request) {
  const uint32_t size = std::min<uint32_t>(request.chain.writable_bytes() - 1, VIRTIO_BLK_ID_BYTES);
  const bool written = request.chain.write(0, disk_.serial.data(), size);
  complete(request, written ? VIRTIO_BLK_S_OK : VIRTIO_BLK_S_IOERR);
}

// The status is the last writable byte (virtio 1.2 §5.2.6), so that everything before it counts as written. A chain
// without a writable byte is given back as it is.
void QueueWorker::complete(Request& request, uint8_t status) {
  clone_sdk::Chain& chain = request.chain;
  const uint32_t writable_bytes = chain.writable_bytes();
  if (writable_bytes > 0) static_cast<void>(chain.write(writable_bytes - 1, &status, sizeof status));
  queue_.push(chain, writable_bytes);
  unsignalled_ = true;
  --in_flight_;
  request.next_free = free_;
  free_ = &request;
}

void QueueWorker::failed(const Request& request, int error) const {
  constexpr uint32_t kReported = 8;
  static constexpr const char* kNames[] = {"read", "write", "flush", "discard", "write of zeroes"};
  const uint32_t count = disk_.error_count.fetch_add(1, std::memory_order_relaxed);
  host_.log(count < kReported ? CLONE_LOG_WARNING : CLONE_LOG_DEBUG,
            std::string(kNames[static_cast<size_t>(request.type)]) + " of " + std::to_string(request.length) +
                " bytes at " + std::to_string(request.start) + " failed: " + std::strerror(error) +
                (count + 1 == kReported ? " (further ones are not reported)" : ""));
}

}  // namespace virtio_blk
