// SPDX-License-Identifier: Apache-2.0
// Instances on a bench: their calls, their options, the guest's accesses.
#include "plugin/check_subject.hpp"

#include <algorithm>

#include "virtqueue/virtqueue_service.hpp"

namespace vmm {

// --- saved state

clone_writer CheckState::writer() {
  return {
      sizeof(clone_writer), 0, this,
      [](void* self, const char* tag, uint32_t version, const void* data, uint64_t size_bytes, clone_err* err) {
        const auto* bytes = static_cast<const std::byte*>(data);
        const bool added =
            static_cast<CheckState*>(self)->sections.emplace(tag, Section{version, {bytes, bytes + size_bytes}}).second;
        if (added) return CLONE_OK;
        return clone_sdk::report(err, Error{std::string("section ") + tag + " is written twice"});
      }};
}

clone_reader CheckState::reader() {
  return {sizeof(clone_reader), 0, this,
          [](void* self, const char* tag, uint32_t* version, const void** data, uint64_t* size_bytes,
             clone_err* err) -> clone_status {
            const auto& all = static_cast<CheckState*>(self)->sections;
            const auto found = all.find(tag);
            if (found == all.end())
              return clone_sdk::report(err, Error{std::string("no section ") + tag, 0, CLONE_ERR_NOT_FOUND});
            *version = found->second.version;
            *data = found->second.bytes.data();
            *size_bytes = found->second.bytes.size();
            return CLONE_OK;
          }};
}

std::string CheckState::difference(const CheckState& other) const {
  for (const auto& [tag, section] : sections) {
    const auto found = other.sections.find(tag);
    if (found == other.sections.end()) return "section " + tag + " is missing the second time";
    const Section& second = found->second;
    if (second.version != section.version) return "section " + tag + " has another version the second time";
    const auto [first_byte, second_byte] =
        std::mismatch(section.bytes.begin(), section.bytes.end(), second.bytes.begin(), second.bytes.end());
    if (first_byte != section.bytes.end() || second_byte != second.bytes.end())
      return "section " + tag + " differs at byte " + std::to_string(first_byte - section.bytes.begin()) + " of " +
             std::to_string(section.bytes.size());
  }
  return sections.size() == other.sections.size() ? "" : "there are more sections the second time";
}

// --- instances

CheckInstance::CheckInstance(const CheckSubject& subject, BenchHost& bench, const std::string& name)
    : ops_(subject.type.ops), attach_(subject.type.attach), bench_(bench), host_(bench.handle(name)) {}

template <typename Call>
Outcome CheckInstance::call(Call&& body) {
  clone_err err{sizeof err, 0, {}};
  const clone_status status = body(&err);
  return {status, std::string(err.message, ::strnlen(err.message, sizeof err.message))};
}

Outcome CheckInstance::create() {
  Outcome outcome = call([&](clone_err* err) { return ops_.create(host_, &device_, err); });
  if (outcome.ok() && !device_) return {CLONE_ERR_INTERNAL, "create succeeded without a device"};
  if (!outcome.ok()) device_ = nullptr;
  return outcome;
}
Outcome CheckInstance::configure(const clone_options& options) {
  return call([&](clone_err* err) { return ops_.configure(device_, &options, err); });
}
Outcome CheckInstance::attach(const clone_virtio_attachment& attachment) {
  return call([&](clone_err* err) { return attach_(device_, &attachment, err); });
}
Outcome CheckInstance::start() {
  running_ = true;
  return ops_.start ? call([&](clone_err* err) { return ops_.start(device_, err); }) : Outcome{};
}
Outcome CheckInstance::quiesce() {
  running_ = false;
  return call([&](clone_err* err) { return ops_.quiesce(device_, err); });
}
Outcome CheckInstance::resume() {
  running_ = true;
  return call([&](clone_err* err) { return ops_.resume(device_, err); });
}
Outcome CheckInstance::reset() {
  return call([&](clone_err* err) { return ops_.reset(device_, err); });
}
Outcome CheckInstance::save(CheckState& state) {
  const clone_writer writer = state.writer();
  return call([&](clone_err* err) { return ops_.save(device_, &writer, err); });
}
Outcome CheckInstance::load(CheckState& state) {
  const clone_reader reader = state.reader();
  return call([&](clone_err* err) { return ops_.load(device_, &reader, err); });
}
void CheckInstance::destroy() {
  if (!device_) return;
  if (running_) quiesce();
  ops_.destroy(std::exchange(device_, nullptr));
}

// --- the device for transports

const clone_virtio_device* DummyVirtio::table() {
  static constexpr uint32_t kQueues = 2;
  static constexpr clone_virtio_device device = {
      sizeof(clone_virtio_device),
      4,
      [](void*) -> uint64_t { return 3; },
      [](void*) { return kQueues; },
      [](void*, uint32_t) -> uint32_t { return 64; },
      [](void*) -> uint32_t { return sizeof config_; },
      [](void* self, uint32_t offset, void* data, uint32_t size_bytes) {
        if (offset <= sizeof config_ && size_bytes <= sizeof config_ - offset)
          std::memcpy(data, of(self).config_ + offset, size_bytes);
      },
      [](void* self, uint32_t offset, const void* data, uint32_t size_bytes) {
        if (offset <= sizeof config_ && size_bytes <= sizeof config_ - offset)
          std::memcpy(of(self).config_ + offset, data, size_bytes);
      },
      [](void* self, const clone_virtio_activation* activation, clone_err*) -> clone_status {
        const std::lock_guard lock(of(self).mutex_);
        of(self).active_ = true;
        of(self).queues_.assign(activation->queues, activation->queues + activation->queue_count);
        return CLONE_OK;
      },
      [](void* self) {
        const std::lock_guard lock(of(self).mutex_);
        of(self).active_ = false;
        of(self).queues_.clear();
      },
      nullptr};
  return &device;
}

clone_virtio_attachment DummyVirtio::attachment(BenchHost& bench) {
  return {sizeof(clone_virtio_attachment), 0, name_.c_str(), this, table(), bench.handle(name_)};
}

void DummyVirtio::serve() {
  const clone_host_virtqueue& service = *virtqueue_service();
  const std::lock_guard lock(mutex_);
  for (clone_virtqueue* queue : queues_) {
    if (!queue) continue;
    std::vector<clone_segment> segments(service.queue_size(queue));
    for (int i = 0; i < 64; ++i) {
      clone_chain chain{};
      chain.size = sizeof chain;
      chain.capacity = static_cast<uint32_t>(segments.size());
      chain.segments = segments.data();
      if (service.pop(queue, &chain, nullptr) != CLONE_OK) break;
      service.push(queue, &chain, 0);
    }
    service.signal(queue);
  }
}

// --- stages

std::unique_ptr<BenchHost> make_bench() {
  auto bench = std::make_unique<BenchHost>();
  bench->offer(CLONE_VIRTQUEUE, virtqueue_service());
  return bench;
}

CheckStage::~CheckStage() {
  // The transport goes before the device that is attached to it.
  instance.reset();
}

namespace {

Outcome set_up_with(const CheckSubject& subject, CheckStage& stage, SamplePath path) {
  stage.instance.reset();
  stage.dummy.reset();
  stage.bench = make_bench();
  stage.instance = std::make_unique<CheckInstance>(subject, *stage.bench, subject.provided.name + ".0");
  const auto values = OptionValues::check(subject.type.descriptor, sample_options(subject, path));
  if (!values.ok()) return {CLONE_ERR_INVALID, values.error().message};
  Outcome outcome = stage.instance->create();
  if (outcome.ok()) outcome = stage.instance->configure(values->raw());
  if (!outcome.ok() || !subject.is_transport()) return outcome;
  stage.dummy = std::make_unique<DummyVirtio>();
  return stage.instance->attach(stage.dummy->attachment(*stage.bench));
}

}  // namespace

// Which kind of path it wants, a plugin only says by refusing the other.
Outcome CheckStage::set_up(const CheckSubject& subject, CheckStage& stage) {
  const Outcome outcome = set_up_with(subject, stage, SamplePath::file);
  if (outcome.ok() || sample_options(subject, SamplePath::file) == sample_options(subject, SamplePath::folder))
    return outcome;
  const Outcome second = set_up_with(subject, stage, SamplePath::folder);
  return second.ok() ? second : outcome;
}

KeyValues sample_options(const CheckSubject& subject, SamplePath path) {
  KeyValues values = subject.chosen;
  for (const clone_option* const* row = subject.type.descriptor.options; *row; ++row) {
    const clone_option& option = **row;
    const bool given =
        std::any_of(values.begin(), values.end(), [&](const auto& value) { return value.first == option.name; });
    if (given || option.default_value || !(option.flags & CLONE_OPTION_REQUIRED)) continue;
    std::string value;
    switch (option.type) {
      case CLONE_OPTION_PATH:
        value = path == SamplePath::file     ? subject.folder.file()
                : path == SamplePath::folder ? subject.folder.folder()
                                             : subject.folder.missing();
        break;
      case CLONE_OPTION_BOOL:
        value = "on";
        break;
      case CLONE_OPTION_NUMBER:
      case CLONE_OPTION_SIZE:
        value = std::to_string(option.minimum);
        break;
      case CLONE_OPTION_CHOICE:
        value = std::string(option.choices ? option.choices : "")
                    .substr(0, std::string(option.choices ? option.choices : "").find('|'));
        break;
      default:
        value = std::string("check").substr(0, option.maximum ? option.maximum : 5);
        break;
    }
    values.emplace_back(option.name, value);
  }
  return values;
}

void exercise_claims(BenchHost& bench, DummyVirtio* dummy, CheckRandom& random, unsigned accesses) {
  const auto ranges = bench.claimed_ranges();
  if (ranges.empty()) return;
  for (unsigned i = 0; i < accesses; ++i) {
    const auto& range = ranges[random.below(ranges.size())];
    uint32_t size_bytes = 1u << random.below(range.space == CLONE_BUS_PIO ? 3 : 4);
    while (size_bytes > range.size_bytes) size_bytes /= 2;
    uint64_t offset = random.below(range.size_bytes - size_bytes + 1);
    if (!random.one_in(4)) offset -= offset % size_bytes;
    uint64_t value = random.next();
    if (random.one_in(2)) value &= 0xf;
    if (random.one_in(2))
      bench.bus_read(range.space, range.start + offset, &value, size_bytes);
    else
      bench.bus_write(range.space, range.start + offset, &value, size_bytes);
    if (i % 64 == 0) {
      bench.run_main_loop();
      if (dummy) dummy->serve();
    }
  }
  bench.run_main_loop();
}

}  // namespace vmm
