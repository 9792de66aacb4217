// SPDX-License-Identifier: Apache-2.0
// The virtio block device (virtio 1.2 §5.2): its options, its configuration space, its life.
#include <linux/virtio_blk.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <mutex>
#include <optional>

#include "clone/abi/boot_root.h"
#include "clone/abi/control.h"
#include "clone/sdk/plugin.hpp"
#include "file_system_probe.hpp"
#include "overlay.hpp"
#include "queue_worker.hpp"
#include "system_error.hpp"

namespace virtio_blk {
namespace {

using clone_sdk::Activation;
using clone_sdk::Host;
using clone_sdk::Options;

constexpr uint32_t kMostQueues = 32;
constexpr uint32_t kPoolThreads = 8;
constexpr uint32_t kMostDiscardSectors = (1u << 30) / 512;
constexpr uint64_t kMostOperations = 1'000'000'000;  // a second
constexpr uint64_t kFewestBytes = 4096;              // a second: fewer would be a mistaken unit
constexpr uint64_t kMostBytes = uint64_t{1} << 50;
// What a file system without FALLOC_FL_ZERO_RANGE is written by hand in reasonable time.
constexpr uint32_t kMostZeroSectors = (64u << 20) / 512;

constexpr uint64_t feature(uint32_t bit) { return uint64_t{1} << bit; }

enum class Aio { automatic, io_uring, threads };  // the order of the option's choices

constexpr clone_option kPath =
    clone_sdk::required(clone_sdk::path_option("path", nullptr, "The image: a regular file or a block device."));
constexpr clone_option kFormat = clone_sdk::choice_option(
    "format", "auto", "Of the image; auto takes a file named *.qcow2 as that and all others as raw.", "auto|raw|qcow2");
constexpr clone_option kBacking = clone_sdk::bool_option(
    "backing", "off", "The files that the image names as what it lies over may be opened, read-only.");
constexpr clone_option kReadOnly = clone_sdk::bool_option("readonly", "off", "The guest may not write.");
constexpr clone_option kRoot = clone_sdk::bool_option("root", "off", "The guest's root file system is on this disk.");
constexpr clone_option kOverlay = clone_sdk::path_or_word_option(
    "overlay", "off",
    "Where what the guest writes to its root disk goes, so that the image stays as it is: tmpfs or on, the guest's "
    "memory; auto, a file that goes with the machine; or this file, made when it is missing.",
    kOverlayWords);
constexpr clone_option kSerial = clone_sdk::text_option(
    "serial", nullptr, "Serial number that the guest sees; by default clone-root for the root disk, else disk-N.",
    VIRTIO_BLK_ID_BYTES);
constexpr clone_option kCache = clone_sdk::choice_option(
    "cache", "writeback",
    "writeback uses the host's page cache, none goes around it, unsafe also ignores the guest's flushes.",
    "writeback|none|unsafe");
constexpr clone_option kQueues = clone_sdk::number_option(
    "queues", nullptr, "Request queues, each with a thread; by default one for each vCPU, up to 32.", 1, kMostQueues);
constexpr clone_option kQueueSize =
    clone_sdk::number_option("queue-size", "256", "Requests that a queue holds; a power of two.", 16, 1024);
constexpr clone_option kAio = clone_sdk::choice_option(
    "aio", "auto", "How I/O is done; auto falls back to threads where io_uring is not allowed.",
    "auto|io_uring|threads");
constexpr clone_option kDiscard =
    clone_sdk::bool_option("discard", "on", "What the guest discards is given back to the host.");
constexpr clone_option kIops = clone_sdk::number_option(
    "iops", nullptr, "Requests a second that the disk serves at most, all queues together.", 1, kMostOperations);
constexpr clone_option kIopsBurst = clone_sdk::number_option(
    "iops-burst", nullptr, "Requests served at once after a pause; by default what iops allows in 0.1 s.", 1,
    kMostOperations);
constexpr clone_option kBps = clone_sdk::size_option(
    "bps", nullptr, "Bytes a second that the disk transfers at most, all queues together.", kFewestBytes, kMostBytes);
constexpr clone_option kBpsBurst = clone_sdk::size_option(
    "bps-burst", nullptr, "Bytes transferred at once after a pause; by default what bps allows in 0.1 s.", 1,
    kMostBytes);
constexpr const clone_option* kOptions[] = {&kPath,   &kFormat,    &kBacking, &kReadOnly,  &kRoot, &kOverlay,
                                            &kSerial, &kCache,     &kQueues,  &kQueueSize, &kAio,  &kDiscard,
                                            &kIops,   &kIopsBurst, &kBps,     &kBpsBurst,  nullptr};

// The device as the guest knows it; a machine that is restored has to have the same.
struct SavedDisk {
  uint64_t capacity_sectors;
  uint32_t block_bytes;
  uint32_t read_only;
  uint32_t discards;
  uint32_t queue_count;
  uint32_t queue_size;
  char serial[VIRTIO_BLK_ID_BYTES];
};

// Image and overlay as they were when the snapshot was taken: the guest's memory fits no others.
struct SavedFile {
  uint64_t size_bytes;
  int64_t modified_ns;
  bool operator==(const SavedFile&) const = default;
};
using SavedFiles = std::array<SavedFile, 2>;
constexpr const char* kFilesTag = "files";

constexpr const char* kSavedTag = "virtio-blk";
constexpr uint32_t kSavedVersion = 1;

// The parameters {"size_bytes": N} and nothing else. By hand: for this one number Boost.JSON would make the plugin six
// times as large, and a start 0.1 ms slower.
std::optional<uint64_t> parse_size_bytes(std::string_view json) {
  const auto take = [&json](std::string_view token) {
    json.remove_prefix(std::min(json.find_first_not_of(" \t\r\n"), json.size()));
    if (!json.starts_with(token)) return false;
    json.remove_prefix(token.size());
    return true;
  };
  if (!take("{") || !take("\"size_bytes\"") || !take(":") || !take("")) return std::nullopt;
  uint64_t number = 0;
  const auto [end, error] = std::from_chars(json.data(), json.data() + json.size(), number);
  if (error != std::errc()) return std::nullopt;
  json.remove_prefix(static_cast<size_t>(end - json.data()));
  if (!take("}") || !take("") || !json.empty()) return std::nullopt;
  return number;
}

// "virtio-blk.3": "3".
std::string instance_number(std::string_view name) {
  const size_t dot = name.rfind('.');
  return std::string(dot == std::string_view::npos ? "0" : name.substr(dot + 1));
}

class VirtioBlk final : public clone_sdk::VirtioDeviceOf<VIRTIO_ID_BLOCK> {
 public:
  static const clone_descriptor descriptor;

  using VirtioDeviceOf::VirtioDeviceOf;
  ~VirtioBlk() override { workers_.clear(); }

  Result<void> configure(const Options& options) override;
  Result<void> start() override { return resume(); }
  Result<void> quiesce() override;
  Result<void> resume() override;
  Result<void> save(const clone_sdk::Writer& writer) override;
  Result<void> load(const clone_sdk::Reader& reader) override;
  const void* extension(std::string_view id) override;

  uint64_t features() const override;
  uint32_t queue_count() const override { return queue_count_; }
  uint32_t queue_max_size(uint32_t) const override { return queue_size_; }
  uint32_t config_size() const override { return sizeof config_; }
  void read_config(uint32_t offset, void* data, uint32_t size_bytes) override {
    std::lock_guard lock(config_mutex_);
    clone_sdk::copy_config(config_, offset, data, size_bytes);
  }
  Result<void> activate(Activation activation) override;
  void reset_queues() override;

 private:
  Result<void> set_serial(const Options& options);
  Result<void> set_aio(Aio aio);
  Result<void> set_limits(const Options& options);
  Result<void> offer_resize();
  Result<uint64_t> resize(std::string_view json);
  void fill_config();
  Result<std::unique_ptr<IoEngine>> create_engine(const clone_sdk::Queue& queue);
  SavedDisk saved() const;
  Result<SavedFiles> saved_files() const;
  bool is_fork() const;
  void write_elsewhere(ImageConfig& config);
  clone_status describe_root(clone_boot_root_info* info) const;

  Disk disk_;
  bool root_ = false;
  Overlay overlay_;
  bool unsafe_ = false;
  uint32_t queue_count_ = 1;
  uint32_t queue_size_ = 256;
  std::string path_;
  std::string overlay_path_;  // as it was given, if it was
  std::mutex config_mutex_;  // guards the capacity in config_
  virtio_blk_config config_{};
  std::string root_source_;
  FileSystem root_file_system_;
  bool use_uring_ = true;
  ThreadPoolPointer pool_;

  std::mutex mutex_;      // a vCPU activates and resets, the main thread quiesces
  bool running_ = false;  // between start() or resume() and quiesce()
  std::vector<std::unique_ptr<QueueWorker>> workers_;
  const clone_virtio_port* port_ = nullptr;  // while active
};

const clone_descriptor VirtioBlk::descriptor = {sizeof(clone_descriptor),
                                                CLONE_CAN_SAVE | CLONE_CAN_MIGRATE,
                                                "virtio-blk",
                                                "A disk of the guest's, kept in an image file or on a block device.",
                                                kOptions,
                                                "virtio_blk"};

Result<void> VirtioBlk::configure(const Options& options) {
  ImageConfig config;
  path_ = options.text("path").value_or("");
  config.path = path_;
  config.format = static_cast<Format>(options.number("format"));
  config.backing = options.flag("backing") ? Backing::allowed : Backing::refused;
  config.read_only = options.flag("readonly");
  config.cache = static_cast<Cache>(options.number("cache"));
  queue_size_ = static_cast<uint32_t>(options.number("queue-size", queue_size_));
  if (!std::has_single_bit(queue_size_))
    return Error{"queue-size=" + std::to_string(queue_size_) + ": allowed are the powers of two from 16 to 1024"};
  root_ = options.flag("root");
  overlay_ = CLONE_TRY(choose_overlay(options.text("overlay").value_or("off"), root_, config.read_only));
  if (overlay_.kind == OverlayKind::guest_memory) config.read_only = true;
  if (overlay_.kind == OverlayKind::file) overlay_path_ = overlay_.path;
  CLONE_TRY(set_serial(options));
  CLONE_TRY(set_aio(static_cast<Aio>(options.number("aio"))));
  CLONE_TRY(set_limits(options));

  uint32_t vcpu_count = 1;
  if (auto machine = host().service<clone_host_machine>(CLONE_HOST_MACHINE); machine.ok())
    vcpu_count = std::max(1u, (*machine)->vcpu_count(host().raw()));
  if (is_fork()) write_elsewhere(config);
  queue_count_ = static_cast<uint32_t>(options.number("queues", std::min(vcpu_count, kMostQueues)));

  disk_.image = CLONE_TRY(overlay_.in_file() ? open_overlay(overlay_, config, host()) : open_image(config, host()));
  disk_.read_only = config.read_only;
  disk_.discards = options.flag("discard") && !config.read_only;
  unsafe_ = config.cache == Cache::unsafe;
  fill_config();
  if (root_) {
    root_source_ = "serial:" + std::string(disk_.serial.data(), strnlen(disk_.serial.data(), disk_.serial.size()));
    root_file_system_ = probe_file_system(*disk_.image);
  }
  return offer_resize();
}

bool VirtioBlk::is_fork() const {
  const auto machine = host().service<clone_host_machine>(CLONE_HOST_MACHINE);
  return machine.ok() && (*machine)->origin && (*machine)->origin(host().raw()) == CLONE_ORIGIN_SAVED;
}

// Of an image that was written to, every fork has a layer of its own, and none writes to what the others read.
void VirtioBlk::write_elsewhere(ImageConfig& config) {
  if (config.read_only || overlay_.kind == OverlayKind::temporary) return;
  if (overlay_.kind == OverlayKind::file) {
    config.path = overlay_path_;
    config.format = Format::qcow2;
    config.backing = Backing::allowed;  // the one that it was made over: the user named it
  }
  overlay_ = {OverlayKind::temporary, {}};
}

// Block devices tell no time of change.
Result<SavedFiles> VirtioBlk::saved_files() const {
  SavedFiles files{};
  for (auto& [path, file] : {std::pair(&path_, &files[0]), {&overlay_path_, &files[1]}}) {
    struct stat status {};
    if (path->empty()) continue;
    if (::stat(path->c_str(), &status) != 0) return system_error().context(*path);
    if (S_ISREG(status.st_mode))
      *file = {static_cast<uint64_t>(status.st_size), status.st_mtim.tv_sec * 1'000'000'000 + status.st_mtim.tv_nsec};
  }
  return files;
}

Result<void> VirtioBlk::set_serial(const Options& options) {
  const std::string serial(
      options.text("serial").value_or(root_ ? "clone-root" : "disk-" + instance_number(host().name())));
  const bool printable = std::all_of(serial.begin(), serial.end(), [](char c) { return c > ' ' && c <= '~'; });
  if (serial.empty() || serial.size() > disk_.serial.size() || !printable)
    return Error{"serial=" + serial + ": allowed are 1 to 20 printable ASCII characters without blanks"};
  std::copy(serial.begin(), serial.end(), disk_.serial.begin());
  return {};
}

Result<void> VirtioBlk::set_aio(Aio aio) {
  use_uring_ = aio != Aio::threads;
  if (!use_uring_) return {};
  Result<void> possible = check_uring();
  if (possible.ok()) return {};
  if (aio == Aio::io_uring) {
    possible.error().message.insert(0, "aio=");
    return possible;
  }
  host().log(CLONE_LOG_INFO, "aio=threads, because of " + possible.error().message);
  use_uring_ = false;
  return {};
}

Result<void> VirtioBlk::set_limits(const Options& options) {
  const RateLimit operations = {options.number("iops"), options.number("iops-burst")};
  const RateLimit bytes = {options.number("bps"), options.number("bps-burst")};
  if (operations.burst && !operations.per_second)
    return Error{"iops-burst=" + std::to_string(operations.burst) + ": needs iops, the limit that it may exceed"};
  if (bytes.burst && !bytes.per_second)
    return Error{"bps-burst=" + std::to_string(bytes.burst) + ": needs bps, the limit that it may exceed"};
  if (operations.per_second || bytes.per_second)
    disk_.limiter = std::make_unique<RateLimiter>(operations, bytes, std::chrono::steady_clock::now());
  return {};
}

Result<void> VirtioBlk::offer_resize() {
  const auto control = host().service<clone_host_control>(CLONE_HOST_CONTROL);
  if (!control.ok()) return {};  // a machine without a control socket
  clone_sdk::ErrorBuffer error;
  return error.result((*control)->add_command(
      host().raw(), "resize", "Makes the disk larger while the guest runs. {\"size_bytes\": N}",
      [](void* self, const char* json, const clone_reply* reply) noexcept {
        const Result<uint64_t> size_bytes = static_cast<VirtioBlk*>(self)->resize(json);
        if (size_bytes.ok())
          reply->succeed(reply->context, ("{\"size_bytes\": " + std::to_string(*size_bytes) + "}").c_str());
        else
          reply->fail(reply->context, size_bytes.error().message.c_str());
      },
      this, error));
}

Result<uint64_t> VirtioBlk::resize(std::string_view json) {
  const auto size_bytes = parse_size_bytes(json);
  if (!size_bytes) return Error{"resize: allowed is {\"size_bytes\": N}, N being the new size of the disk"};
  const std::string given = "size_bytes=" + std::to_string(*size_bytes);
  if (disk_.read_only) return Error{given + ": the disk is read-only (readonly=on)"};
  const uint64_t block_bytes = disk_.image->logical_block_bytes();
  if (*size_bytes % block_bytes)
    return Error{given + ": allowed is a multiple of the disk's block size, " + std::to_string(block_bytes)};

  std::lock_guard lock(mutex_);
  const uint64_t before_bytes = disk_.capacity_sectors * 512;
  if (*size_bytes < before_bytes)
    return Error{given + ": the disk has " + std::to_string(before_bytes) + " bytes and can only grow"};
  if (*size_bytes == before_bytes) return *size_bytes;
  CLONE_TRY(disk_.image->resize(*size_bytes).context("path=" + path_));
  disk_.capacity_sectors = *size_bytes / 512;
  {
    std::lock_guard config_lock(config_mutex_);
    config_.capacity = htole64(disk_.capacity_sectors);
  }
  // The driver reads the capacity again (virtio 1.2 §5.2.5).
  if (port_) port_->config_changed(port_->context);
  return *size_bytes;
}

void VirtioBlk::fill_config() {
  const Image& image = *disk_.image;
  // Whole blocks only.
  disk_.capacity_sectors = (image.size_bytes() - image.size_bytes() % image.logical_block_bytes()) / 512;
  if (disk_.discards) disk_.max_discard_sectors = kMostDiscardSectors;
  if (!disk_.read_only) disk_.max_write_zeroes_sectors = kMostZeroSectors;

  config_.capacity = htole64(disk_.capacity_sectors);
  config_.seg_max = htole32(queue_size_ - 2);  // besides header and status
  config_.blk_size = htole32(image.logical_block_bytes());
  const uint32_t blocks = image.physical_block_bytes() / image.logical_block_bytes();
  config_.physical_block_exp = static_cast<uint8_t>(std::bit_width(std::max(blocks, 1u)) - 1);
  config_.min_io_size = htole16(static_cast<uint16_t>(blocks));
  config_.num_queues = htole16(static_cast<uint16_t>(queue_count_));
  config_.max_discard_sectors = htole32(disk_.max_discard_sectors);
  config_.max_discard_seg = htole32(disk_.discards ? 1 : 0);
  config_.discard_sector_alignment = htole32(disk_.discards ? image.discard_bytes() / 512 : 0);
  config_.max_write_zeroes_sectors = htole32(disk_.max_write_zeroes_sectors);
  config_.max_write_zeroes_seg = htole32(disk_.read_only ? 0 : 1);
  config_.write_zeroes_may_unmap = disk_.discards;
}

uint64_t VirtioBlk::features() const {
  uint64_t features = feature(VIRTIO_BLK_F_SEG_MAX) | feature(VIRTIO_BLK_F_BLK_SIZE) | feature(VIRTIO_BLK_F_TOPOLOGY) |
                      feature(VIRTIO_BLK_F_FLUSH);
  if (disk_.read_only)
    features |= feature(VIRTIO_BLK_F_RO);
  else
    features |= feature(VIRTIO_BLK_F_WRITE_ZEROES);
  if (disk_.discards) features |= feature(VIRTIO_BLK_F_DISCARD);
  if (queue_count_ > 1) features |= feature(VIRTIO_BLK_F_MQ);
  return features;
}

Result<std::unique_ptr<IoEngine>> VirtioBlk::create_engine(const clone_sdk::Queue& queue) {
  if (use_uring_) return create_uring_engine(disk_.image->files(), queue.kick_fd(), queue.size());
  if (!pool_) pool_ = CLONE_TRY(create_thread_pool(host(), kPoolThreads));
  return create_thread_engine(*pool_, disk_.image->files(), queue.kick_fd());
}

Result<void> VirtioBlk::activate(Activation activation) {
  std::lock_guard lock(mutex_);
  // Without the feature the driver does not know of a cache, so there must be none (virtio 1.2 §5.2.6.2).
  const bool write_through = !(activation.features & feature(VIRTIO_BLK_F_FLUSH)) && !unsafe_;
  const auto mode = running_ ? QueueWorker::Mode::running : QueueWorker::Mode::parked;
  std::vector<std::unique_ptr<QueueWorker>> workers;
  for (size_t i = 0; i < activation.queues.size(); ++i) {
    const clone_sdk::Queue& queue = activation.queues[i];
    if (!queue) continue;
    auto worker = std::make_unique<QueueWorker>(host(), disk_, queue, activation.port, write_through,
                                                CLONE_TRY(create_engine(queue)));
    const std::string name = "blk" + instance_number(host().name()) + "-q" + std::to_string(i);
    CLONE_TRY(worker->start(name.c_str(), mode));
    workers.push_back(std::move(worker));
  }
  workers_ = std::move(workers);
  port_ = activation.port;
  return {};
}

// Waits for the I/O that was begun, as long as the disk takes for it: a request may still write to the guest's memory.
void VirtioBlk::reset_queues() {
  std::lock_guard lock(mutex_);
  for (auto& worker : workers_) worker->set_mode(QueueWorker::Mode::stopping);
  workers_.clear();
  port_ = nullptr;
}

Result<void> VirtioBlk::quiesce() {
  std::lock_guard lock(mutex_);
  running_ = false;
  for (auto& worker : workers_) worker->set_mode(QueueWorker::Mode::parked);
  for (auto& worker : workers_) worker->wait_parked();
  return disk_.image->settle();
}

Result<void> VirtioBlk::resume() {
  std::lock_guard lock(mutex_);
  running_ = true;
  for (auto& worker : workers_) worker->set_mode(QueueWorker::Mode::running);
  return {};
}

SavedDisk VirtioBlk::saved() const {
  SavedDisk disk{disk_.capacity_sectors,
                 disk_.image->logical_block_bytes(),
                 disk_.read_only,
                 disk_.discards,
                 queue_count_,
                 queue_size_,
                 {}};
  std::copy(disk_.serial.begin(), disk_.serial.end(), disk.serial);
  return disk;
}

Result<void> VirtioBlk::save(const clone_sdk::Writer& writer) {
  if (overlay_.kind == OverlayKind::temporary)
    return Error{"path=" + path_ + ": what the guest wrote lies in a file that goes with this machine; a machine with overlay=tmpfs " +
                     "or overlay=FILE can be kept",
                 0, CLONE_ERR_STATE};
  CLONE_TRY(writer.put(kSavedTag, kSavedVersion, saved()));
  const auto files = CLONE_TRY(saved_files());
  return writer.put_bytes(kFilesTag, kSavedVersion, std::as_bytes(std::span(files)));
}

Result<void> VirtioBlk::load(const clone_sdk::Reader& reader) {
  const auto before = CLONE_TRY(reader.get<SavedDisk>(kSavedTag, kSavedVersion));
  const SavedDisk now = saved();
  const auto same = [](const char* what, uint64_t here, uint64_t there) -> Result<void> {
    if (here == there) return {};
    return Error{std::string(what) + " is " + std::to_string(here) + ", of the saved disk " + std::to_string(there)};
  };
  CLONE_TRY(same("the number of 512-byte sectors", now.capacity_sectors, before.capacity_sectors));
  CLONE_TRY(same("the block size", now.block_bytes, before.block_bytes));
  CLONE_TRY(same("readonly", now.read_only, before.read_only));
  CLONE_TRY(same("discard", now.discards, before.discards));
  CLONE_TRY(same("queues", now.queue_count, before.queue_count));
  CLONE_TRY(same("queue-size", now.queue_size, before.queue_size));
  const auto then = CLONE_TRY(reader.get<SavedFiles>(kFilesTag, kSavedVersion));
  const auto files = CLONE_TRY(saved_files());
  for (size_t i = 0; i < files.size(); ++i)
    if (files[i] != then[i])
      return Error{"path=" + (i == 0 ? path_ : overlay_path_) +
                       ": is not as it was when the snapshot was taken; the guest would mix old and new",
                   0, CLONE_ERR_STATE};
  if (!std::equal(std::begin(now.serial), std::end(now.serial), std::begin(before.serial)))
    return Error{"serial differs from that of the saved disk"};
  return {};
}

clone_status VirtioBlk::describe_root(clone_boot_root_info* info) const {
  if (!root_) return CLONE_EMPTY;
  const clone_boot_root_info known = {sizeof(clone_boot_root_info),
                                      disk_.read_only ? 1u : 0u,
                                      root_source_.c_str(),
                                      root_file_system_.name,
                                      root_file_system_.guest_modules,
                                      overlay_.kind == OverlayKind::guest_memory ? "tmpfs" : ""};
  std::memcpy(info, &known, std::min<size_t>(info->size, sizeof known));
  return CLONE_OK;
}

const void* VirtioBlk::extension(std::string_view id) {
  static constexpr clone_boot_root boot_root = {
      sizeof(clone_boot_root), 0, [](void* device, clone_boot_root_info* info, clone_err*) noexcept {
        return static_cast<const VirtioBlk*>(static_cast<Device*>(device))->describe_root(info);
      }};
  if (id == CLONE_BOOT_ROOT) return &boot_root;
  return VirtioDeviceOf::extension(id);
}

}  // namespace
}  // namespace virtio_blk

CLONE_SDK_PLUGIN("virtio-blk", "1.0.0", "clone", "Apache-2.0",
                 "Disks of the guest: virtio block device over raw and qcow2 images.",
                 CLONE_PROVIDES("device", "virtio-blk", "")
                     CLONE_PROVIDES_FLAG("--rootfs", "virtio-blk", "FILE", "path=%,root=on",
                                         "Boot from this disk image.")
                         CLONE_PROVIDES_FLAG_OPTION("--overlay", "virtio-blk", "root=on", "[WHERE]", "overlay", "tmpfs",
                                                    "Leave the image of --rootfs as it is; writes go to the guest's "
                                                    "memory (tmpfs), a temporary file (auto) or this file.")
                             CLONE_PROVIDES_FLAG("--block", "virtio-blk", "FILE", "path=%", "Attach a disk image."))
CLONE_SDK_DEVICES(virtio_blk::VirtioBlk)
