// SPDX-License-Identifier: Apache-2.0
// qcow2 images: the guest's requests, turned into operations on a file and its chain of backing files. Tables are read
// and changed under one lock, at the speed of the page cache; data, copies of older data and syncs go through the
// queue's engine and hold up nobody else.
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <filesystem>
#include <list>
#include <mutex>
#include <unordered_set>

#include "../image.hpp"
#include "decompress.hpp"
#include "qcow2_file.hpp"

namespace virtio_blk {

namespace {

using qcow2::Commit;
using qcow2::Content;
using qcow2::Place;
using qcow2::Qcow2File;
using qcow2::WritePlan;
using qcow2::Zeroing;
using qcow2::ZeroPlan;

constexpr uint64_t kPage = 4096;
constexpr size_t kLongestChain = 32;
constexpr size_t kMostKeptBytes = 256 << 10;
constexpr size_t kCachedClusterBytes = 4 << 20;

struct Layer {
  Storage storage;
  std::string path;
  std::unique_ptr<Qcow2File> file;  // none: raw
  uint64_t size_bytes = 0;          // of the disk that it holds
};

// What stands at a guest offset, in whichever layer.
struct Extent {
  Content content = Content::zero;  // or data, or compressed
  const Layer* layer = nullptr;
  uint64_t length_bytes = 0;
  uint64_t host_offset = 0;
  uint64_t compressed_bytes = 0;
  uint64_t offset_in_cluster = 0;
};

// Clusters that were read last from their compressed form: a guest reads on where it stopped. Nothing is ever
// compressed here, so what an entry once referred to stays what it is.
class CompressedClusters {
 public:
  using Cluster = std::shared_ptr<const std::vector<std::byte>>;

  Cluster find(const Layer* layer, uint64_t host_offset) {
    std::lock_guard lock(mutex_);
    for (auto entry = entries_.begin(); entry != entries_.end(); ++entry) {
      if (entry->layer != layer || entry->host_offset != host_offset) continue;
      entries_.splice(entries_.begin(), entries_, entry);
      return entry->cluster;
    }
    return nullptr;
  }
  void add(const Layer* layer, uint64_t host_offset, Cluster cluster) {
    std::lock_guard lock(mutex_);
    bytes_ += cluster->size();
    entries_.push_front({layer, host_offset, std::move(cluster)});
    while (bytes_ > kCachedClusterBytes && entries_.size() > 1) {
      bytes_ -= entries_.back().cluster->size();
      entries_.pop_back();
    }
  }

 private:
  struct Entry {
    const Layer* layer;
    uint64_t host_offset;
    Cluster cluster;
  };
  std::mutex mutex_;
  std::list<Entry> entries_;
  size_t bytes_ = 0;
};

// Memory that is not cleared, aligned for direct I/O; kept from one request to the next unless it is large.
class Buffer {
 public:
  void reserve(size_t size_bytes) {
    if (size_bytes <= capacity_) return;
    bytes_.reset(static_cast<std::byte*>(::operator new[](size_bytes, std::align_val_t{kPage})));
    capacity_ = size_bytes;
  }
  void trim() {
    if (capacity_ <= kMostKeptBytes) return;
    bytes_.reset();
    capacity_ = 0;
  }
  std::byte* data() const { return bytes_.get(); }

 private:
  struct Delete {
    void operator()(std::byte* bytes) const { ::operator delete[](bytes, std::align_val_t{kPage}); }
  };
  std::unique_ptr<std::byte[], Delete> bytes_;
  size_t capacity_ = 0;
};

// A write under way that replaces units; others that touch them wait.
struct Replacement {
  uint64_t start = 0, end = 0;
  std::vector<ImageRequest*> waiting;
};

struct Step : RequestState {
  enum class Phase : uint8_t {
    read,
    write,
    data,     // guest data moves to or from its place
    copy,     // what a replacement keeps is read
    replace,  // and written with the guest's data
    zeroes,
    host_range,   // of which zeroes are made in the file
    host_zeroes,  // by writing them
    flush,
    flushing,  // nothing but data
    commit_barrier,
    commit_l2,
    commit_l1,
  };

  IoEngine* engine = nullptr;
  Phase phase = Phase::read;
  bool driving = false;    // drive() is on the stack: an operation that finishes is seen there
  bool under_way = false;  // an operation was begun, or the request waits for another
  bool returned = false;   // and finished
  int64_t result = 0;

  uint64_t at = 0, end = 0;  // guest offsets: what is left
  uint64_t write_end = 0;    // of the write that is part of the request
  std::span<iovec> guest;    // data for [at, write_end)
  const Storage* storage = nullptr;
  std::optional<uint32_t> access;
  std::vector<iovec> pieces;

  WritePlan plan;
  uint64_t write_start = 0;  // of the replacement; before it the file has the right zeroes
  uint64_t copy_at = 0;
  Buffer kept;  // for [write_start, plan.end), without what the guest gives
  std::list<Replacement>::iterator replacement;

  std::optional<Commit> commit;
};

class Qcow2Image final : public Image {
 public:
  Qcow2Image(const clone_sdk::Host& host, Cache cache) : host_(host), flushes_(cache != Cache::unsafe) {}
  ~Qcow2Image() override {
    if (Result<void> settled = settle(); !settled.ok())
      host_.log(CLONE_LOG_ERROR, "path=" + layers_.front()->path + ": " + settled.error().message);
  }

  Result<void> add_layers(Storage storage, const ImageConfig& config);
  Result<void> begin_writing();

  uint64_t size_bytes() const override { return layers_.front()->size_bytes; }
  uint32_t logical_block_bytes() const override { return 512; }
  uint32_t physical_block_bytes() const override { return 4096; }
  uint32_t discard_bytes() const override { return static_cast<uint32_t>(top().header().unit_bytes()); }
  std::span<const ImageFile> files() const override { return files_; }
  bool read(uint64_t offset, std::span<std::byte> into) override;
  Result<void> settle() override;
  Result<void> resize(uint64_t size_bytes) override;

  void begin(IoEngine& engine, ImageRequest& request) override;
  void step_finished(IoEngine& engine, ImageRequest& request, int64_t result) override;

 private:
  enum class Next { again, under_way, ended };

  Qcow2File& top() const { return *layers_.front()->file; }
  bool read_only() const { return layers_.front()->storage.access() == Access::read_only; }
  bool has_backing() const { return layers_.size() > 1; }

  // Under the lock.
  Result<Extent> resolve(uint64_t offset, uint64_t length_bytes);
  Result<bool> is_zero(uint64_t offset, uint64_t length_bytes);
  Replacement* conflict(uint64_t start, uint64_t end);
  void end_replacement(Step& step, Result<void>& outcome, bool written);

  Result<CompressedClusters::Cluster> compressed_cluster(const Extent& extent);
  Result<void> copy_compressed(const Extent& extent, std::span<const iovec> into);

  void drive(ImageRequest& request, Step& step);
  Next advance(ImageRequest& request, Step& step);
  Next after(ImageRequest& request, Step& step, int64_t result);
  Next finish(ImageRequest& request, Step& step, int error);
  Next fail(ImageRequest& request, Step& step, const Error& error);
  Next begin_transfer(ImageRequest& request, Step& step, const Storage& storage, FileOperation::Kind kind,
                      uint64_t offset, uint64_t size_bytes);
  Next begin_operation(ImageRequest& request, Step& step, FileOperation::Kind kind);
  Next wait_for(Replacement& replacement, ImageRequest& request);
  Next read_on(ImageRequest& request, Step& step);
  Next write_on(ImageRequest& request, Step& step);
  Next copy_on(ImageRequest& request, Step& step);
  Next zero_on(ImageRequest& request, Step& step);
  Next write_host_zeroes(ImageRequest& request, Step& step);
  Next flush_on(ImageRequest& request, Step& step);
  Next commit_on(ImageRequest& request, Step& step);
  Next end_commit(ImageRequest& request, Step& step, Result<void> outcome);

  const clone_sdk::Host& host_;
  const bool flushes_;
  std::vector<std::unique_ptr<Layer>> layers_;  // the guest's own first
  std::vector<ImageFile> files_;
  CompressedClusters compressed_;

  std::mutex mutex_;  // the layers' tables, and what follows
  std::list<Replacement> replacements_;
  bool committing_ = false;
  std::condition_variable commit_ended_;
  std::vector<ImageRequest*> flushes_waiting_;
  std::atomic<uint32_t> damage_reports_{0};
};

// Names of QEMU's that are no paths: "nbd://…", "json:…".
bool is_path(const std::string& name) {
  const size_t colon = name.find(':');
  return colon == std::string::npos || name.find('/') < colon;
}

Result<void> Qcow2Image::add_layers(Storage storage, const ImageConfig& config) {
  auto layer = std::make_unique<Layer>(Layer{std::move(storage), config.path, nullptr, 0});
  while (true) {
    const std::string where = layers_.empty() ? "" : "backing file " + qcow2::printable(layer->path) + ": ";
    auto file = Qcow2File::open(layer->storage.fd());
    if (!file.ok()) {
      file.error().message.insert(0, where);
      return std::move(file).error();
    }
    const bool marked = ((*file)->header().incompatible & qcow2::kCorrupt) != 0;
    if (marked && (config.read_only || !layers_.empty()))
      host_.log(CLONE_LOG_WARNING, "path=" + config.path + ": " + where + "is marked as damaged");
    layer->file = std::move(*file);
    const qcow2::Header& header = layer->file->header();
    layer->size_bytes = header.size_bytes - header.size_bytes % 512;
    if (layers_.empty() && layer->size_bytes == 0) return Error{"holds an empty disk; it has at least 512 bytes"};
    // Tables go through the page cache, and no page may go both ways.
    if (header.cluster_bytes() < kPage) layer->storage.stay_in_page_cache();
    layers_.push_back(std::move(layer));
    layers_.back()->storage.add_to(files_);
    if (header.backing_name.empty()) return {};

    const std::string& name = header.backing_name;
    const std::string shown = "'" + qcow2::printable(name) + "'";
    if (config.backing == Backing::refused && layers_.size() == 1)
      return Error{"has the backing file " + shown + "; backing=on lets it be opened"};
    if (!is_path(name)) return Error{where + "has the backing file " + shown + ", which is no path"};
    const bool raw = header.backing_format == "raw";
    if (header.backing_format.empty())
      return Error{where + "does not say of which format its backing file " + shown +
                   " is; `qemu-img rebase -u -F FORMAT -b FILE` does"};
    if (!raw && header.backing_format != "qcow2")
      return Error{where + "has a backing file of the format '" + header.backing_format +
                   "'; supported are raw and qcow2"};
    if (layers_.size() == kLongestChain)
      return Error{"has a chain of more than " + std::to_string(kLongestChain) + " files"};
    const std::string path = (std::filesystem::path(layers_.back()->path).parent_path() / name).string();
    const std::string next = "backing file " + qcow2::printable(path);
    // Told before the lock would: that of a file open for writing keeps all others off it.
    for (const auto& above : layers_)
      if (above->storage.is_at(path)) return Error{next + ": the chain of backing files contains itself"};
    auto opened = Storage::open(path, Access::read_only, config.cache, host_);
    if (!opened.ok()) return std::move(opened).error().context(next);
    const uint64_t size = opened->size_bytes();
    layer = std::make_unique<Layer>(Layer{std::move(*opened), path, nullptr, size});
    if (!raw) continue;
    layers_.push_back(std::move(layer));
    layers_.back()->storage.add_to(files_);
    return {};
  }
}

// After everything that may refuse the image: one that is refused is not touched.
Result<void> Qcow2Image::begin_writing() {
  const Layer& layer = *layers_.front();
  if (CLONE_TRY(
          top().begin_writing(!layer.storage.block_device(), flushes_ ? qcow2::Syncs::wanted : qcow2::Syncs::none)))
    host_.log(CLONE_LOG_WARNING, "path=" + layer.path + ": was not closed: its reference counts were rebuilt");
  return {};
}

Result<Extent> Qcow2Image::resolve(uint64_t offset, uint64_t length_bytes) {
  Extent extent;
  extent.length_bytes = length_bytes;
  for (const auto& layer : layers_) {
    if (offset >= layer->size_bytes) return extent;
    extent.length_bytes = std::min(extent.length_bytes, layer->size_bytes - offset);
    extent.layer = layer.get();
    if (!layer->file) {
      extent.content = Content::data;
      extent.host_offset = offset;
      return extent;
    }
    const Place place = CLONE_TRY(layer->file->find(offset, extent.length_bytes));
    extent.length_bytes = place.length_bytes;
    if (place.content == Content::unallocated) continue;
    extent.content = place.content;
    extent.host_offset = place.host_offset;
    extent.compressed_bytes = place.compressed_bytes;
    extent.offset_in_cluster = place.offset_in_cluster;
    if (place.content == Content::data) {
      // The last cluster of a file may be cut off: the rest reads as zeroes.
      const uint64_t file_bytes = layer->file->file_bytes();
      if (place.host_offset >= file_bytes)
        extent.content = Content::zero;
      else
        extent.length_bytes = std::min(extent.length_bytes, file_bytes - place.host_offset);
    }
    return extent;
  }
  return extent;
}

// Whether a part of the disk is known to read as zeroes, without reading it.
Result<bool> Qcow2Image::is_zero(uint64_t offset, uint64_t length_bytes) {
  while (length_bytes) {
    const Extent extent = CLONE_TRY(resolve(offset, length_bytes));
    if (extent.content == Content::compressed) return false;
    if (extent.content == Content::data) {
      if (extent.layer->file) return false;
      const off_t data = ::lseek(extent.layer->storage.fd(), static_cast<off_t>(extent.host_offset), SEEK_DATA);
      if (data < 0 ? errno != ENXIO : static_cast<uint64_t>(data) < extent.host_offset + extent.length_bytes)
        return false;
    }
    offset += extent.length_bytes;
    length_bytes -= extent.length_bytes;
  }
  return true;
}

Replacement* Qcow2Image::conflict(uint64_t start, uint64_t end) {
  for (Replacement& other : replacements_)
    if (other.start < end && start < other.end) return &other;
  return nullptr;
}

Result<CompressedClusters::Cluster> Qcow2Image::compressed_cluster(const Extent& extent) {
  if (auto cached = compressed_.find(extent.layer, extent.host_offset)) return cached;
  std::vector<std::byte> raw(extent.compressed_bytes);
  // Its last sector may lie beyond the end of the file.
  const ssize_t count =
      ::pread(extent.layer->storage.fd(), raw.data(), raw.size(), static_cast<off_t>(extent.host_offset));
  if (count < 0) return qcow2::system_error(errno);
  const qcow2::Header& header = extent.layer->file->header();
  auto cluster = std::make_shared<std::vector<std::byte>>(header.cluster_bytes());
  if (!qcow2::decompress(header.compression, std::span(raw).first(static_cast<size_t>(count)), *cluster))
    return Error{"the image is damaged: a compressed cluster cannot be read", EIO};
  compressed_.add(extent.layer, extent.host_offset, cluster);
  return CompressedClusters::Cluster(std::move(cluster));
}

Result<void> Qcow2Image::copy_compressed(const Extent& extent, std::span<const iovec> into) {
  const auto cluster = CLONE_TRY(compressed_cluster(extent));
  const std::byte* from = cluster->data() + extent.offset_in_cluster;
  for (const iovec& piece : into) {
    std::memcpy(piece.iov_base, from, piece.iov_len);
    from += piece.iov_len;
  }
  return {};
}

bool Qcow2Image::read(uint64_t offset, std::span<std::byte> into) {
  if (offset > size_bytes() || into.size() > size_bytes() - offset) return false;
  while (!into.empty()) {
    std::unique_lock lock(mutex_);
    const auto extent = resolve(offset, into.size());
    lock.unlock();
    if (!extent.ok()) return false;
    const auto part = into.first(extent->length_bytes);
    const iovec piece{part.data(), part.size()};
    if (extent->content == Content::zero)
      std::memset(part.data(), 0, part.size());
    else if (extent->content == Content::data
                 ? !qcow2::read_at(extent->layer->storage.fd(), extent->host_offset, part).ok()
                 : !copy_compressed(*extent, {&piece, 1}).ok())
      return false;
    into = into.subspan(part.size());
    offset += part.size();
  }
  return true;
}

Result<void> Qcow2Image::settle() {
  if (layers_.empty() || !layers_.front()->file || read_only()) return {};
  std::lock_guard lock(mutex_);
  return top().commit_now();
}

Result<void> Qcow2Image::resize(uint64_t size_bytes) {
  if (size_bytes < this->size_bytes())
    return Error{"has " + std::to_string(this->size_bytes()) + " bytes already; a disk does not shrink"};
  // What was cut off from a longer backing file would appear.
  if (has_backing() && size_bytes > this->size_bytes() && layers_[1]->size_bytes > this->size_bytes())
    return Error{"size_bytes=" + std::to_string(size_bytes) + ": the backing file is longer than the disk, with " +
                 std::to_string(layers_[1]->size_bytes) + " bytes, which would show; allowed over one that is not"};
  std::unique_lock lock(mutex_);
  commit_ended_.wait(lock, [this] { return !committing_; });
  CLONE_TRY(top().grow(size_bytes));
  layers_.front()->size_bytes = size_bytes;
  return {};
}

void Qcow2Image::begin(IoEngine& engine, ImageRequest& request) {
  if (!request.state) request.state = std::make_unique<Step>();
  auto& step = static_cast<Step&>(*request.state);
  request.image = this;
  request.durable = false;
  step.engine = &engine;
  step.driving = step.under_way = step.returned = false;
  step.at = request.start;
  step.end = step.write_end = request.start + request.length;
  step.guest = request.data;
  step.access.reset();
  switch (request.type) {
    case ImageRequest::Type::read:
      step.phase = Step::Phase::read;
      break;
    case ImageRequest::Type::write:
      step.phase = Step::Phase::write;
      break;
    case ImageRequest::Type::flush:
      step.phase = Step::Phase::flush;
      break;
    case ImageRequest::Type::discard:
    case ImageRequest::Type::write_zeroes:
      step.phase = Step::Phase::zeroes;
      break;
  }
  drive(request, step);
}

void Qcow2Image::step_finished(IoEngine&, ImageRequest& request, int64_t result) {
  auto& step = static_cast<Step&>(*request.state);
  step.returned = true;
  step.result = result;
  if (!step.driving) drive(request, step);
}

// A loop, not a recursion: a request may have very many steps, and all of them may finish at once.
void Qcow2Image::drive(ImageRequest& request, Step& step) {
  step.driving = true;
  while (true) {
    Next next = Next::again;
    if (step.under_way) {
      if (!step.returned) break;
      step.under_way = step.returned = false;
      next = after(request, step, step.result);
    } else {
      next = advance(request, step);
    }
    if (next == Next::ended) return;
    if (next == Next::under_way) step.under_way = true;
  }
  step.driving = false;
}

Qcow2Image::Next Qcow2Image::advance(ImageRequest& request, Step& step) {
  switch (step.phase) {
    case Step::Phase::read:
      return read_on(request, step);
    case Step::Phase::write:
      return write_on(request, step);
    case Step::Phase::copy:
      return copy_on(request, step);
    case Step::Phase::zeroes:
      return zero_on(request, step);
    case Step::Phase::host_zeroes:
      return write_host_zeroes(request, step);
    case Step::Phase::flush:
      return flush_on(request, step);
    default:
      return commit_on(request, step);
  }
}

// `request` may be gone, or be another one's, when this returns Next::ended.
Qcow2Image::Next Qcow2Image::finish(ImageRequest& request, Step& step, int error) {
  if (error == 0 && request.write_through && request.type != ImageRequest::Type::read &&
      request.type != ImageRequest::Type::flush && step.phase != Step::Phase::flush) {
    step.phase = Step::Phase::flush;
    return Next::again;
  }
  step.driving = false;
  request.done(error);
  return Next::ended;
}

Qcow2Image::Next Qcow2Image::fail(ImageRequest& request, Step& step, const Error& error) {
  // Damage is told a few times; what the kernel answers, the queue tells.
  if (error.status != CLONE_ERR_SYSTEM && damage_reports_.fetch_add(1) < 3)
    host_.log(CLONE_LOG_ERROR, "path=" + layers_.front()->path + ": " + error.message);
  return finish(request, step, error.code ? error.code : EIO);
}

Qcow2Image::Next Qcow2Image::begin_transfer(ImageRequest& request, Step& step, const Storage& storage,
                                            FileOperation::Kind kind, uint64_t offset, uint64_t size_bytes) {
  request.kind = kind;
  request.offset = offset;
  request.size_bytes = size_bytes;
  request.vectors = step.pieces;
  request.retries = 0;
  step.storage = &storage;
  storage.transfer(*step.engine, request);
  return Next::under_way;
}

Qcow2Image::Next Qcow2Image::begin_operation(ImageRequest& request, Step& step, FileOperation::Kind kind) {
  request.kind = kind;
  request.file = layers_.front()->storage.file();
  request.vectors = {};
  request.retries = 0;
  step.engine->begin(request);
  return Next::under_way;
}

// Posted to its engine when the other is done.
Qcow2Image::Next Qcow2Image::wait_for(Replacement& replacement, ImageRequest& request) {
  replacement.waiting.push_back(&request);
  return Next::under_way;
}

Qcow2Image::Next Qcow2Image::read_on(ImageRequest& request, Step& step) {
  while (step.at < step.end) {
    std::unique_lock lock(mutex_);
    const auto extent = resolve(step.at, step.end - step.at);
    if (extent.ok() && extent->content != Content::zero && extent->layer == layers_.front().get())
      step.access = top().begin_access();
    lock.unlock();
    if (!extent.ok()) return fail(request, step, extent.error());
    take(step.guest, extent->length_bytes, step.pieces);
    step.at += extent->length_bytes;
    if (extent->content == Content::data) {
      step.phase = Step::Phase::data;
      return begin_transfer(request, step, extent->layer->storage, FileOperation::Kind::read, extent->host_offset,
                            extent->length_bytes);
    }
    Result<void> copied;
    if (extent->content == Content::zero)
      for (const iovec& piece : step.pieces) std::memset(piece.iov_base, 0, piece.iov_len);
    else
      copied = copy_compressed(*extent, step.pieces);
    if (step.access) top().end_access(*std::exchange(step.access, std::nullopt));
    if (!copied.ok()) return fail(request, step, copied.error());
  }
  return finish(request, step, 0);
}

Qcow2Image::Next Qcow2Image::write_on(ImageRequest& request, Step& step) {
  if (step.at == step.write_end) {
    if (request.type != ImageRequest::Type::write) {
      step.phase = Step::Phase::zeroes;
      return Next::again;
    }
    return finish(request, step, 0);
  }
  const Layer& layer = *layers_.front();
  const uint64_t unit = top().header().unit_bytes();
  const uint64_t cluster = top().header().cluster_bytes();
  std::unique_lock lock(mutex_);
  uint64_t length = step.write_end - step.at;
  if (!replacements_.empty()) {
    const uint64_t first = step.at - step.at % unit;
    if (Replacement* other = conflict(first, first + unit)) return wait_for(*other, request);
    for (const Replacement& other : replacements_)
      if (other.start > step.at) length = std::min(length, other.start - step.at);
  }
  auto planned = top().plan_write(step.at, length);
  if (!planned.ok()) return fail(request, step, planned.error());
  WritePlan& plan = *planned;
  uint64_t host_offset = plan.host_offset;
  if (!plan.in_place) {
    // What is asked for last may replace tables in memory that the plan was made from, never what they say.
    const auto zero = is_zero(plan.start, plan.end - plan.start);
    if (!zero.ok()) {
      top().abandon(plan);
      return fail(request, step, zero.error());
    }
    if (!*zero || !plan.fresh) {
      step.plan = plan;
      step.write_start = plan.start;
      if (plan.fresh && step.at > plan.start) {
        const auto zero_before = is_zero(plan.start, step.at - plan.start);
        if (zero_before.ok() && *zero_before) step.write_start = step.at;
      }
      const bool new_clusters = plan.clusters.count > 0;
      const uint64_t start = new_clusters ? plan.start - plan.start % cluster : plan.start;
      const uint64_t end = new_clusters ? plan.end + (cluster - plan.end % cluster) % cluster : plan.end;
      step.replacement = replacements_.insert(replacements_.end(), Replacement{start, end, {}});
      lock.unlock();
      step.kept.reserve(plan.end - step.write_start);
      step.copy_at = step.write_start;
      step.phase = Step::Phase::copy;
      return Next::again;
    }
    if (auto mapped = top().map(plan); !mapped.ok()) {
      top().abandon(plan);
      return fail(request, step, mapped.error());
    }
    host_offset += step.at - plan.start;
  }
  step.access = top().begin_access();
  lock.unlock();
  take(step.guest, plan.length_bytes, step.pieces);
  step.at += plan.length_bytes;
  step.phase = Step::Phase::data;
  return begin_transfer(request, step, layer.storage, FileOperation::Kind::write, host_offset, plan.length_bytes);
}

// Reads what the replaced units keep, then writes all of it.
Qcow2Image::Next Qcow2Image::copy_on(ImageRequest& request, Step& step) {
  const WritePlan& plan = step.plan;
  const uint64_t data_end = step.at + plan.length_bytes;
  const uint64_t head = step.at - step.write_start;
  while (true) {
    if (step.copy_at == step.at) step.copy_at = data_end;
    if (step.copy_at >= plan.end) break;
    const uint64_t stop = step.copy_at < step.at ? step.at : plan.end;
    std::byte* into = step.kept.data() + (step.copy_at - step.write_start);
    std::unique_lock lock(mutex_);
    const auto extent = resolve(step.copy_at, stop - step.copy_at);
    lock.unlock();
    if (!extent.ok()) return after(request, step, -(extent.error().code ? extent.error().code : EIO));
    step.pieces.assign(1, iovec{into, extent->length_bytes});
    step.copy_at += extent->length_bytes;
    if (extent->content == Content::data)
      return begin_transfer(request, step, extent->layer->storage, FileOperation::Kind::read, extent->host_offset,
                            extent->length_bytes);
    if (extent->content == Content::zero)
      std::memset(into, 0, extent->length_bytes);
    else if (!copy_compressed(*extent, step.pieces).ok())
      return after(request, step, -EIO);
  }
  take(step.guest, plan.length_bytes, step.pieces);
  if (head) step.pieces.insert(step.pieces.begin(), iovec{step.kept.data(), head});
  if (data_end < plan.end)
    step.pieces.push_back({step.kept.data() + (data_end - step.write_start), plan.end - data_end});
  step.phase = Step::Phase::replace;
  return begin_transfer(request, step, layers_.front()->storage, FileOperation::Kind::write,
                        plan.host_offset + (step.write_start - plan.start), plan.end - step.write_start);
}

// `outcome` becomes that of mapping what was written.
void Qcow2Image::end_replacement(Step& step, Result<void>& outcome, bool written) {
  std::vector<ImageRequest*> waiting;
  {
    std::lock_guard lock(mutex_);
    if (written) {
      top().require_barrier();
      outcome = top().map(step.plan);
    }
    if (!written || !outcome.ok()) top().abandon(step.plan);
    waiting = std::move(step.replacement->waiting);
    replacements_.erase(step.replacement);
  }
  for (ImageRequest* other : waiting) static_cast<Step&>(*other->state).engine->post(*other);
  step.kept.trim();
}

Qcow2Image::Next Qcow2Image::zero_on(ImageRequest& request, Step& step) {
  const bool discard = request.type == ImageRequest::Type::discard;
  const Zeroing how = discard ? Zeroing::discard : request.may_unmap ? Zeroing::deallocate : Zeroing::keep;
  const uint64_t cluster = top().header().cluster_bytes();
  while (step.at < step.end) {
    std::unique_lock lock(mutex_);
    uint64_t length = step.end - step.at;
    if (!replacements_.empty()) {
      const uint64_t first = step.at - step.at % cluster;
      if (Replacement* other = conflict(first, first + cluster)) return wait_for(*other, request);
      for (const Replacement& other : replacements_)
        if (other.start > step.at) length = std::min(length, other.start - other.start % cluster - step.at);
    }
    const auto plan = top().plan_zeroes(step.at, length, how, has_backing());
    if (!plan.ok()) return fail(request, step, plan.error());
    switch (plan->kind) {
      case ZeroPlan::Kind::done:
      case ZeroPlan::Kind::skip:
        step.at += plan->length_bytes;
        break;
      case ZeroPlan::Kind::host_range:
        step.access = top().begin_access();
        lock.unlock();
        request.offset = plan->host_offset;
        request.size_bytes = plan->length_bytes;
        step.at += plan->length_bytes;
        step.phase = Step::Phase::host_range;
        return begin_operation(
            request, step, how == Zeroing::keep ? FileOperation::Kind::zero_range : FileOperation::Kind::punch_hole);
      case ZeroPlan::Kind::write: {
        const auto zero = is_zero(step.at, plan->length_bytes);
        lock.unlock();
        if (!zero.ok()) return fail(request, step, zero.error());
        if (*zero) {
          step.at += plan->length_bytes;
          break;
        }
        step.write_end = step.at + zero_vectors(request.zeroes, plan->length_bytes);
        step.guest = request.zeroes;
        step.phase = Step::Phase::write;
        return Next::again;
      }
    }
  }
  return finish(request, step, 0);
}

// Where the host's file system makes no holes.
Qcow2Image::Next Qcow2Image::write_host_zeroes(ImageRequest& request, Step& step) {
  const uint64_t count = zero_vectors(step.pieces, step.write_end);  // what is left of the range
  step.write_end -= count;
  return begin_transfer(request, step, layers_.front()->storage, FileOperation::Kind::write, request.offset, count);
}

Qcow2Image::Next Qcow2Image::flush_on(ImageRequest& request, Step& step) {
  if (read_only()) return finish(request, step, 0);
  {
    std::lock_guard lock(mutex_);
    if (committing_) {
      flushes_waiting_.push_back(&request);
      return Next::under_way;
    }
    Commit commit = top().begin_commit();
    if (commit.empty()) {
      // Data alone. Its sync has not ended when another commit begins.
      if (commit.barrier_first) top().require_barrier();
      static_cast<void>(top().end_commit(std::move(commit)));
      if (!flushes_) return finish(request, step, 0);
      step.phase = Step::Phase::flushing;
    } else {
      committing_ = true;
      step.commit = std::move(commit);
      step.phase = Step::Phase::commit_barrier;
      if (!flushes_ || !step.commit->barrier_first || (step.commit->l2.empty() && step.commit->l1.empty()))
        return Next::again;
    }
  }
  return begin_operation(request, step, FileOperation::Kind::sync);
}

// What comes after the sync that the phase names.
Qcow2Image::Next Qcow2Image::commit_on(ImageRequest& request, Step& step) {
  switch (step.phase) {
    case Step::Phase::commit_barrier:
      if (Result<void> written = top().write_l2(*step.commit); !written.ok())
        return end_commit(request, step, std::move(written));
      step.phase = Step::Phase::commit_l2;
      break;
    case Step::Phase::commit_l2:
      if (step.commit->l1.empty()) return end_commit(request, step, {});
      if (Result<void> written = top().write_l1(*step.commit); !written.ok())
        return end_commit(request, step, std::move(written));
      step.phase = Step::Phase::commit_l1;
      break;
    default:
      return end_commit(request, step, {});
  }
  if (!flushes_) return Next::again;
  return begin_operation(request, step, FileOperation::Kind::sync);
}

Qcow2Image::Next Qcow2Image::end_commit(ImageRequest& request, Step& step, Result<void> outcome) {
  std::vector<ImageRequest*> waiting;
  {
    std::lock_guard lock(mutex_);
    if (outcome.ok()) {
      outcome = top().end_commit(std::move(*step.commit));
    } else {
      top().fail_commit(std::move(*step.commit));
    }
    step.commit.reset();
    committing_ = false;
    commit_ended_.notify_all();
    waiting = std::exchange(flushes_waiting_, {});
  }
  for (ImageRequest* other : waiting) static_cast<Step&>(*other->state).engine->post(*other);
  step.phase = Step::Phase::flush;
  if (!outcome.ok()) return fail(request, step, outcome.error());
  return finish(request, step, 0);
}

// An operation of the phase finished, or what it waited for.
Qcow2Image::Next Qcow2Image::after(ImageRequest& request, Step& step, int64_t result) {
  using Phase = Step::Phase;
  switch (step.phase) {
    case Phase::data:
    case Phase::replace:
    case Phase::host_zeroes:
    case Phase::copy: {
      std::optional<int> outcome;
      if (step.phase == Phase::copy && result < 0 && result != -EINTR && result != -EAGAIN)
        outcome = static_cast<int>(-result);
      else
        outcome = step.storage->continue_transfer(*step.engine, request, result);
      if (!outcome) return Next::under_way;
      if (step.phase == Phase::host_zeroes && *outcome == 0 && step.write_end) return Next::again;
      if (step.access) top().end_access(*std::exchange(step.access, std::nullopt));
      if (step.phase == Phase::copy && *outcome == 0) return Next::again;
      if (step.phase == Phase::copy || step.phase == Phase::replace) {
        Result<void> mapped;
        end_replacement(step, mapped, *outcome == 0);
        if (!mapped.ok()) return fail(request, step, mapped.error());
        step.at += step.plan.length_bytes;
        step.phase = Phase::write;
      } else if (step.phase == Phase::host_zeroes) {
        step.phase = Phase::zeroes;
      } else {
        step.phase = request.kind == FileOperation::Kind::read ? Phase::read : Phase::write;
      }
      return *outcome ? finish(request, step, *outcome) : Next::again;
    }
    case Phase::host_range: {
      if ((result == -EINTR || result == -EAGAIN) && request.retries++ < kMostRetries) {
        step.engine->begin(request);
        return Next::under_way;
      }
      const bool unsupported = result == -EOPNOTSUPP || result == -ENOSYS;
      if (unsupported && request.type == ImageRequest::Type::write_zeroes) {
        step.write_end = request.size_bytes;
        step.phase = Phase::host_zeroes;
        return Next::again;
      }
      if (step.access) top().end_access(*std::exchange(step.access, std::nullopt));
      step.phase = Phase::zeroes;
      return result < 0 && !unsupported ? finish(request, step, static_cast<int>(-result)) : Next::again;
    }
    case Phase::flushing:
    case Phase::commit_barrier:
    case Phase::commit_l2:
    case Phase::commit_l1:
      if (result < 0) {
        if (step.commit) return end_commit(request, step, qcow2::system_error(static_cast<int>(-result)));
        return finish(request, step, static_cast<int>(-result));
      }
      if (step.phase == Phase::flushing) {
        step.phase = Phase::flush;
        return finish(request, step, 0);
      }
      return Next::again;
    default:
      return Next::again;  // it waited for another request
  }
}

}  // namespace

Result<std::unique_ptr<Image>> open_qcow2_image(Storage storage, const ImageConfig& config,
                                                const clone_sdk::Host& host) {
  auto image = std::make_unique<Qcow2Image>(host, config.cache);
  CLONE_TRY(image->add_layers(std::move(storage), config));
  if (!config.read_only) CLONE_TRY(image->begin_writing());
  return std::unique_ptr<Image>(std::move(image));
}

}  // namespace virtio_blk
