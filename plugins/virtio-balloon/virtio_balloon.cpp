// SPDX-License-Identifier: Apache-2.0
// virtio-balloon: memory that the guest can do without goes back to the host (virtio 1.2 §5.5).
#include <linux/virtio_balloon.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>
#include <chrono>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>

#include "clone/abi/balloon.h"
#include "clone/abi/control.h"
#include "clone/sdk/fd.hpp"
#include "clone/sdk/plugin.hpp"
#include "page_ranges.hpp"

namespace virtio_balloon {
namespace {

using clone_sdk::Activation;
using clone_sdk::Chain;
using clone_sdk::Error;
using clone_sdk::ErrorBuffer;
using clone_sdk::Fd;
using clone_sdk::Options;
using clone_sdk::Queue;
using clone_sdk::Result;
using clone_sdk::Watch;
using Clock = std::chrono::steady_clock;

constexpr uint32_t kDeviceType = 5;
constexpr uint32_t kQueueSize = 128;
constexpr uint64_t kUnknown = ~uint64_t{0};
// What one wake-up may do before other queues, and whoever waits for the loop, have their turn.
constexpr uint32_t kPagesPerRound = 4096;
constexpr uint64_t kReportedBytesPerRound = 256ull << 20;
constexpr uint32_t kChainsPerRound = kQueueSize;
constexpr size_t kMostStatistics = 64;
constexpr uint32_t kNotDeflating = ~uint32_t{0};

constexpr uint64_t bit(unsigned feature) { return 1ull << feature; }

enum Role : size_t { kInflate, kDeflate, kStatistics, kHints, kReports, kRoles };

// Virtio 1.2 §5.5.6.3. Little endian, as the host is.
struct [[gnu::packed]] Statistic {
  uint16_t tag;
  uint64_t value;
};
static_assert(sizeof(Statistic) == 10);

// What is saved. The queues' positions are the transport's.
struct SavedBalloon {
  uint64_t target_pages;
  uint64_t reported_bytes;
  uint32_t shown_pages;
  uint32_t actual_pages;
  uint32_t hint_command;
  uint32_t poison_value;
};

std::string json_number(uint64_t value) { return value == kUnknown ? "null" : std::to_string(value); }

// `{"target_bytes": N}`, and nothing else.
std::optional<uint64_t> parse_target(std::string_view json) {
  const auto take = [&](std::string_view token) {
    json.remove_prefix(std::min(json.find_first_not_of(" \t\r\n"), json.size()));
    if (!json.starts_with(token)) return false;
    json.remove_prefix(token.size());
    return true;
  };
  if (!take("{") || !take("\"target_bytes\"") || !take(":") || !take("")) return std::nullopt;
  uint64_t bytes = 0;
  const auto [end, error] = std::from_chars(json.data(), json.data() + json.size(), bytes);
  if (error != std::errc()) return std::nullopt;
  json.remove_prefix(static_cast<size_t>(end - json.data()));
  return take("}") && take("") && json.empty() ? std::optional(bytes) : std::nullopt;
}

class VirtioBalloon final : public clone_sdk::VirtioDeviceOf<kDeviceType> {
 public:
  using VirtioDeviceOf::VirtioDeviceOf;
  static const clone_descriptor descriptor;

  // The loop ends before anything that its callbacks use.
  ~VirtioBalloon() override {
    stop_lines();
    loop_.reset();
    for (Line& line : lines_) line.chain.abandon();
  }

  Result<void> configure(const Options& options) override {
    loops_ = CLONE_TRY(host().service<clone_host_loop>(CLONE_HOST_LOOP));
    memory_ = CLONE_TRY(host().service<clone_host_memory>(CLONE_HOST_MEMORY));
    deflate_on_oom_ = options.flag("deflate-on-oom");
    reporting_ = options.flag("reporting");
    hinting_ = options.flag("hinting");
    statistics_interval_ = std::chrono::milliseconds(options.number("stats-interval"));
    step_pages_ = static_cast<uint32_t>(options.number("step") / kPageBytes);
    const bool pages_can_go = look_at_memory();
    const uint64_t size_bytes = options.number("size");
    const std::string size(options.text("size").value_or(""));
    if (size_bytes > total_pages_ * kPageBytes)
      return Error{"size=" + size + " is more than the machine's memory (" +
                   std::to_string(total_pages_ * kPageBytes >> 20) + " MiB)"};
    if (!pages_can_go) {
      // A default device of every machine: without the user's wish for a balloon it is only of no use.
      const char* why = "this memory cannot be given back in pages of 4 KiB (reserved huge pages, or locked)";
      if (size_bytes) return Error{"size=" + size + ": " + why};
      host().log(CLONE_LOG_INFO, std::string(why) + ": the balloon stays empty");
      reporting_ = hinting_ = false;
      return {};
    }
    initial_pages_ = size_bytes / kPageBytes;
    target_pages_ = initial_pages_;

    statistics_wanted_ = Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!statistics_wanted_) return clone_sdk::errno_error("eventfd");
    clone_loop* loop = nullptr;
    ErrorBuffer error;
    CLONE_TRY(error.result(loops_->create(host().raw(), "balloon", &loop, error)));
    loop_ = {loop, loops_->destroy};
    for (Line& line : lines_) line.balloon = this;
    CLONE_TRY(publish());
    return add_commands();
  }

  uint64_t features() const override {
    if (!loop_) return 0;
    // Not MUST_TELL_HOST: a page that the guest takes back is simply there again when it is touched.
    return bit(VIRTIO_BALLOON_F_STATS_VQ) | (deflate_on_oom_ ? bit(VIRTIO_BALLOON_F_DEFLATE_ON_OOM) : 0) |
           (hinting_ ? bit(VIRTIO_BALLOON_F_FREE_PAGE_HINT) : 0) |
           (reporting_ ? bit(VIRTIO_BALLOON_F_REPORTING) | bit(VIRTIO_BALLOON_F_PAGE_POISON) : 0);
  }
  uint32_t queue_count() const override { return kRoles; }
  uint32_t queue_max_size(uint32_t) const override { return kQueueSize; }
  uint32_t config_size() const override { return sizeof(virtio_balloon_config); }

  void read_config(uint32_t offset, void* data, uint32_t size_bytes) override {
    const std::lock_guard lock(mutex_);
    clone_sdk::copy_config(config_, offset, data, size_bytes);
  }

  void write_config(uint32_t offset, const void* data, uint32_t size_bytes) override {
    const std::lock_guard lock(mutex_);
    virtio_balloon_config written = config_;
    if (offset > sizeof written || size_bytes > sizeof written - offset) return;
    std::memcpy(reinterpret_cast<std::byte*>(&written) + offset, data, size_bytes);
    // Only these two are the driver's (virtio 1.2 §5.5.4).
    config_.poison_val = written.poison_val;
    set_actual(std::min<uint32_t>(written.actual, static_cast<uint32_t>(total_pages_)));
  }

  Result<void> activate(Activation activation) override {
    if (!loop_) return {};
    const uint64_t features = activation.features;
    const auto places = places_of(features, activation);
    if (!activation.queues[places[kInflate]] || !activation.queues[places[kDeflate]])
      return Error{"the driver did not enable the queues that inflate and deflate"};
    for (size_t role = 0; role < kRoles; ++role)
      if (places[role] < kRoles) lines_[role].queue = activation.queues[places[role]];
    {
      const std::lock_guard lock(mutex_);
      features_ = features;
      port_ = activation.port;
      statistics_ = {};
      advance();
    }
    return watch();
  }

  void reset_queues() override {
    stop_lines();
    for (Line& line : lines_) {
      line.chain.abandon();
      line.open = line.broken = false;
      line.queue = {};
    }
    const std::lock_guard lock(mutex_);
    port_ = nullptr;
    features_ = 0;
    hint_round_ = HintRound::none;
    // A driver that starts anew has nothing in its balloon.
    config_ = {};
    deflating_to_ = kNotDeflating;
    statistics_ = {};
  }

  Result<void> reset_device() override {
    const std::lock_guard lock(mutex_);
    target_pages_ = initial_pages_;
    return {};
  }

  // A chain that is kept, or not done with, would be lost to the driver: what is left of it is not freed, which costs
  // memory and nothing else. Statistics are asked for anew.
  Result<void> quiesce() override {
    stop_lines();
    for (Line& line : lines_)
      if (line.open) {
        give_back(line);
        line.queue.signal();
      }
    return {};
  }
  Result<void> resume() override {
    if (!is_active()) return {};
    CLONE_TRY(watch());
    for (Line& line : lines_)
      if (line.queue) line.queue.kick();
    return {};
  }

  Result<void> save(const clone_sdk::Writer& writer) override {
    const std::lock_guard lock(mutex_);
    return writer.put("balloon", 1,
                      SavedBalloon{target_pages_, reported_bytes_, config_.num_pages, config_.actual,
                                   config_.free_page_hint_cmd_id, config_.poison_val});
  }
  Result<void> load(const clone_sdk::Reader& reader) override {
    const auto saved = CLONE_TRY(reader.get<SavedBalloon>("balloon", 1));
    for (const uint64_t pages : {saved.target_pages, uint64_t{saved.shown_pages}, uint64_t{saved.actual_pages}})
      if (pages > total_pages_)
        return Error{"section balloon: " + std::to_string(pages) + " pages of " + std::to_string(total_pages_), 0,
                     CLONE_ERR_CORRUPT};
    const std::lock_guard lock(mutex_);
    target_pages_ = saved.target_pages;
    reported_bytes_ = saved.reported_bytes;
    config_.num_pages = saved.shown_pages;
    config_.actual = saved.actual_pages;
    config_.free_page_hint_cmd_id = saved.hint_command;
    config_.poison_val = saved.poison_value;
    // A round of hints that was under way is not taken up again: the next one has a new number.
    if (saved.hint_command > VIRTIO_BALLOON_CMD_ID_DONE) config_.free_page_hint_cmd_id = VIRTIO_BALLOON_CMD_ID_DONE;
    return {};
  }

 private:
  // One queue. Its callbacks run on the balloon's loop.
  struct Line {
    VirtioBalloon* balloon = nullptr;
    Queue queue;
    Watch watch;
    Chain chain;
    bool open = false;        // `chain` is out
    bool broken = false;      // the driver broke a rule
    uint64_t done_bytes = 0;  // of an open chain's page numbers, or of the segment that follows
    size_t done_segments = 0;
    void ready() { balloon->serve(*this); }
  };
  struct Statistics {
    uint64_t free_bytes = kUnknown;
    uint64_t available_bytes = kUnknown;
    uint64_t total_bytes = kUnknown;
    Clock::time_point told_at{};

    uint64_t age_ms() const {
      return static_cast<uint64_t>(
          std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - told_at).count());
    }
  };
  enum class HintRound { none, asked, running };

  bool is_active() const { return static_cast<bool>(lines_[kInflate].queue); }

  // --- the target and the way there, with mutex_ held

  // The driver is asked for a step, and for the next one when that is there: a guest that cannot follow is not driven
  // on. Less is asked for at once.
  void advance() {
    const uint32_t actual = config_.actual, shown = config_.num_pages;
    const auto target = static_cast<uint32_t>(target_pages_);
    uint32_t next = shown;
    if (target < shown)
      next = target;
    else if (actual >= shown)
      next = static_cast<uint32_t>(std::min<uint64_t>(target, uint64_t{actual} + step_pages_));
    if (!port_ || (next == shown && actual == shown)) return;
    if (next > shown && actual > shown) deflating_to_ = std::min(deflating_to_, shown);
    config_.num_pages = next;
    port_->config_changed(port_->context);
  }

  void set_actual(uint32_t pages) {
    const uint32_t before = std::exchange(config_.actual, pages);
    if (pages == before) return;
    const bool asked = before > config_.num_pages || (deflating_to_ != kNotDeflating && pages >= deflating_to_);
    if (pages > before || pages <= deflating_to_) deflating_to_ = kNotDeflating;
    // Out of memory, the driver took pages back that nobody asked it to (DEFLATE_ON_OOM): they stay the guest's until
    // somebody sets a target again.
    if (pages < before && !asked && (features_ & bit(VIRTIO_BALLOON_F_DEFLATE_ON_OOM)))
      config_.num_pages = static_cast<uint32_t>(target_pages_ = pages);
    else if (pages >= config_.num_pages)
      advance();
  }

  void set_target(uint64_t bytes) {
    const std::lock_guard lock(mutex_);
    target_pages_ = std::min(bytes / kPageBytes, total_pages_);
    advance();
  }

  clone_balloon_state state() {
    const std::lock_guard lock(mutex_);
    ask_for_statistics();
    return {sizeof(clone_balloon_state), port_ ? 1u : 0u,        target_pages_ * kPageBytes,
            config_.actual * kPageBytes, reported_bytes_,        statistics_.free_bytes,
            statistics_.available_bytes, statistics_.total_bytes, statistics_.age_ms()};
  }

  // With mutex_ held. The answer is there the next time that somebody asks: an idle guest is not woken for nobody.
  void ask_for_statistics() {
    const auto now = Clock::now();
    if (!port_ || statistics_interval_.count() == 0 || now < next_statistics_) return;
    next_statistics_ = now + statistics_interval_;
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t size = ::write(statistics_wanted_.get(), &one, sizeof one);
  }

  // --- setting up

  // The memory's regions; false when the host takes no single pages of it back.
  bool look_at_memory() {
    for (uint32_t index = 0; index < memory_->region_count(host().raw()); ++index) {
      clone_memory_region region{};
      region.size = sizeof region;
      if (memory_->region(host().raw(), index, &region) != CLONE_OK) break;
      regions_.push_back({region.guest_address, region.size_bytes});
      total_pages_ += region.size_bytes / kPageBytes;
      // Refused for the same mappings as MADV_DONTNEED (hugetlb, locked), and changes nothing.
      if (::madvise(region.host_address, kPageBytes, MADV_COLD) != 0) return false;
    }
    return !regions_.empty();
  }

  Result<void> publish() {
    balloon_table_ = {sizeof balloon_table_, 0, this,
                      [](void* self, uint64_t bytes) { static_cast<VirtioBalloon*>(self)->set_target(bytes); },
                      [](void* self, clone_balloon_state* into) {
                        const clone_balloon_state now = static_cast<VirtioBalloon*>(self)->state();
                        const uint32_t size = into->size;
                        std::memcpy(into, &now, std::min<size_t>(size, sizeof now));
                        into->size = size;
                      }};
    const auto publisher = host().service<clone_host_publish>(CLONE_HOST_PUBLISH);
    if (!publisher.ok()) return {};
    ErrorBuffer error;
    return error.result((*publisher)->publish(host().raw(), CLONE_BALLOON, &balloon_table_, error));
  }

  Result<void> add_commands() {
    const auto found = host().service<clone_host_control>(CLONE_HOST_CONTROL);
    if (!found.ok()) return {};
    const clone_host_control& control = **found;
    using Balloon = VirtioBalloon;
    const auto command = [&](const char* name, const char* help, auto call) {
      ErrorBuffer error;
      return error.result(control.add_command(host().raw(), name, help, call, this, error));
    };
    CLONE_TRY(command("set", "Set how much memory the guest gives back: {\"target_bytes\": N}.",
                      [](void* self, const char* json, const clone_reply* reply) {
                        const auto bytes = parse_target(json);
                        if (!bytes)
                          return reply->fail(reply->context,
                                             "allowed is {\"target_bytes\": N}, a number of bytes from 0");
                        static_cast<Balloon*>(self)->set_target(*bytes);
                        reply->succeed(reply->context, static_cast<Balloon*>(self)->status().c_str());
                      }));
    CLONE_TRY(command("status", "Tell target, size and the guest's statistics.",
                      [](void* self, const char*, const clone_reply* reply) {
                        reply->succeed(reply->context, static_cast<Balloon*>(self)->status().c_str());
                      }));
    if (hinting_)
      CLONE_TRY(command("hint", "Ask the guest which pages are free at the moment.",
                        [](void* self, const char*, const clone_reply* reply) {
                          if (static_cast<Balloon*>(self)->begin_hints())
                            reply->succeed(reply->context, "{}");
                          else
                            reply->fail(reply->context, "the guest's driver does not give hints");
                        }));

    const auto metric = [&](const char* name, const char* help, uint32_t kind, auto read) {
      ErrorBuffer error;
      return error.result(control.add_metric(host().raw(), name, help, kind, read, this, error));
    };
    CLONE_TRY(metric("balloon_bytes", "Memory in the guest's balloon.", CLONE_METRIC_GAUGE,
                     [](void* self) { return as_metric(static_cast<Balloon*>(self)->state().balloon_bytes); }));
    CLONE_TRY(metric("balloon_target_bytes", "Memory that the balloon should hold.", CLONE_METRIC_GAUGE,
                     [](void* self) { return as_metric(static_cast<Balloon*>(self)->state().target_bytes); }));
    CLONE_TRY(metric("balloon_reported_bytes_total", "Memory given back by free page reporting.", CLONE_METRIC_COUNTER,
                     [](void* self) { return as_metric(static_cast<Balloon*>(self)->state().reported_bytes); }));
    CLONE_TRY(metric("guest_free_bytes", "Free memory of the guest, as its driver tells.", CLONE_METRIC_GAUGE,
                     [](void* self) { return as_metric(static_cast<Balloon*>(self)->state().guest_free_bytes); }));
    return metric("guest_available_bytes", "Available memory of the guest, as its driver tells.", CLONE_METRIC_GAUGE,
                  [](void* self) { return as_metric(static_cast<Balloon*>(self)->state().guest_available_bytes); });
  }

  static double as_metric(uint64_t value) {
    return value == kUnknown ? std::numeric_limits<double>::quiet_NaN() : static_cast<double>(value);
  }

  std::string status() {
    const clone_balloon_state now = state();
    return std::string("{\"ready\": ") + (now.ready ? "true" : "false") +
           ", \"target_bytes\": " + std::to_string(now.target_bytes) +
           ", \"balloon_bytes\": " + std::to_string(now.balloon_bytes) +
           ", \"reported_bytes\": " + std::to_string(now.reported_bytes) +
           ", \"hinted_bytes\": " + std::to_string(hinted_bytes_) +
           ", \"ignored_pages\": " + std::to_string(ignored_pages_) +
           ", \"guest_free_bytes\": " + json_number(now.guest_free_bytes) +
           ", \"guest_available_bytes\": " + json_number(now.guest_available_bytes) +
           ", \"guest_total_bytes\": " + json_number(now.guest_total_bytes) + "}";
  }

  // Which queue has which role: kRoles for none. The specification numbers all five; drivers (Linux up to 6.10 among
  // them) count only those whose feature was negotiated. What is enabled tells which driver it is.
  static std::array<size_t, kRoles> places_of(uint64_t features, const Activation& activation) {
    const std::array<bool, kRoles> wanted = {true, true, (features & bit(VIRTIO_BALLOON_F_STATS_VQ)) != 0,
                                             (features & bit(VIRTIO_BALLOON_F_FREE_PAGE_HINT)) != 0,
                                             (features & bit(VIRTIO_BALLOON_F_REPORTING)) != 0};
    bool by_number = true;
    for (size_t role = 0; role < kRoles; ++role)
      if (wanted[role] && !activation.queues[role]) by_number = false;
    std::array<size_t, kRoles> places;
    size_t next = 0;
    for (size_t role = 0; role < kRoles; ++role)
      places[role] = !wanted[role] ? size_t{kRoles} : by_number ? role : next++;
    return places;
  }

  Result<void> watch() {
    for (Line& line : lines_)
      if (line.queue)
        line.watch =
            CLONE_TRY(Watch::start<&Line::ready>(loops_, loop_.get(), line.queue.kick_fd(), CLONE_READABLE, &line));
    if (lines_[kStatistics].queue)
      statistics_watch_ = CLONE_TRY(Watch::start<&VirtioBalloon::refresh_statistics>(
          loops_, loop_.get(), statistics_wanted_.get(), CLONE_READABLE, this));
    return {};
  }
  void stop_lines() {
    statistics_watch_.stop();
    for (Line& line : lines_) line.watch.stop();
  }

  // --- the queues, on the balloon's loop

  void serve(Line& line) {
    line.queue.clear_kick();
    const auto role = static_cast<size_t>(&line - lines_.data());
    if (role == kStatistics) return take_statistics(line);
    bool more = true;
    uint64_t budget = role == kReports ? kReportedBytesPerRound : kPagesPerRound;
    for (uint32_t chains = 0; chains < kChainsPerRound && budget && more; ++chains) {
      if (!line.open && !next_chain(line))
        more = false;
      else if (role == kInflate)
        inflate(line, budget);
      else if (role == kReports)
        report(line, budget);
      else if (role == kHints)
        hint(line);
      else
        give_back(line);  // deflate: the pages come back by themselves
    }
    line.queue.signal();
    if (more) line.queue.kick();
  }

  bool next_chain(Line& line) {
    if (line.broken) return false;
    const Queue::Pop popped = line.queue.pop(line.chain);
    if (popped == Queue::Pop::broken) {
      line.broken = true;
      const std::lock_guard lock(mutex_);
      if (port_) port_->needs_reset(port_->context);
    }
    line.open = popped == Queue::Pop::chain;
    line.done_bytes = line.done_segments = 0;
    return line.open;
  }
  void give_back(Line& line) {
    line.queue.push(line.chain, 0);
    line.open = false;
  }

  // Some of the chain's page numbers, 32 bits each. A rest of less than that is no number.
  void inflate(Line& line, uint64_t& budget) {
    const uint64_t left = (line.chain.readable_bytes() - line.done_bytes) / sizeof(uint32_t);
    pages_.resize(std::min(left, budget));
    const uint64_t bytes = pages_.size() * sizeof(uint32_t);
    if (line.chain.read(line.done_bytes, pages_.data(), bytes)) {
      const uint64_t outside = visit_ranges(pages_, regions_, [&](const Range& range) { discard(range); });
      if (outside) {
        ignored_pages_ += outside;
        host().log(CLONE_LOG_DEBUG, std::to_string(outside) + " page numbers of the guest are no memory: ignored");
      }
    }
    budget -= pages_.size();
    line.done_bytes += bytes;
    if (pages_.size() == left) give_back(line);
  }

  // Free pages, which the driver keeps from being used until the chain comes back (virtio 1.2 §5.5.6.8).
  void report(Line& line, uint64_t& budget) {
    // With another poison than 0, pages may only be given back if they read as that afterwards: they do not.
    bool poisoned;
    {
      const std::lock_guard lock(mutex_);
      poisoned = (features_ & bit(VIRTIO_BALLOON_F_PAGE_POISON)) && config_.poison_val != 0;
    }
    const auto segments = line.chain.writable();
    Range run;  // adjacent segments, or parts of them
    const auto discard_run = [&] {
      if (run.size_bytes && !poisoned && discard(run)) reported_bytes_ += run.size_bytes;
    };
    while (line.done_segments < segments.size() && budget) {
      const Range segment = whole_pages(segments[line.done_segments]);
      const Range next = {segment.start + line.done_bytes, std::min(segment.size_bytes - line.done_bytes, budget)};
      if (next.start != run.start + run.size_bytes || !is_memory(run.start, run.size_bytes + next.size_bytes)) {
        discard_run();
        run = {next.start, 0};
      }
      run.size_bytes += next.size_bytes;
      budget -= next.size_bytes;
      line.done_bytes += next.size_bytes;
      if (line.done_bytes < segment.size_bytes) break;  // the budget is spent
      line.done_bytes = 0;
      ++line.done_segments;
    }
    discard_run();
    if (line.done_segments == segments.size()) give_back(line);
  }

  // Pages that were free a moment ago and may be in use again by now (virtio 1.2 §5.5.6.7): whoever copies memory may
  // leave them out, but they must not be thrown away. They are counted.
  void hint(Line& line) {
    uint32_t command = 0;
    const bool has_command = line.chain.read(0, &command, sizeof command);
    {
      const std::lock_guard lock(mutex_);
      if (hint_round_ == HintRound::running)
        for (const clone_segment& segment : line.chain.writable()) hinted_bytes_ += whole_pages(segment).size_bytes;
      if (has_command && hint_round_ == HintRound::asked && command == config_.free_page_hint_cmd_id)
        hint_round_ = HintRound::running;
      else if (has_command && hint_round_ == HintRound::running && command == VIRTIO_BALLOON_CMD_ID_STOP)
        end_hints();
    }
    give_back(line);
  }

  // With mutex_ held. The driver may use the hinted pages again.
  void end_hints() {
    hint_round_ = HintRound::none;
    config_.free_page_hint_cmd_id = VIRTIO_BALLOON_CMD_ID_DONE;
    port_->config_changed(port_->context);
  }

  bool begin_hints() {
    const std::lock_guard lock(mutex_);
    if (!port_ || !(features_ & bit(VIRTIO_BALLOON_F_FREE_PAGE_HINT))) return false;
    hint_command_ = hint_command_ == ~0u ? VIRTIO_BALLOON_CMD_ID_DONE + 1 : hint_command_ + 1;
    config_.free_page_hint_cmd_id = hint_command_;
    hint_round_ = HintRound::asked;
    hinted_bytes_ = 0;
    port_->config_changed(port_->context);
    return true;
  }

  // The driver has one buffer out, which is kept; giving it back asks for fresh numbers (virtio 1.2 §5.5.6.3).
  void take_statistics(Line& line) {
    if (line.open || !next_chain(line)) return;
    std::array<Statistic, kMostStatistics> rows;
    const size_t count = std::min<size_t>(line.chain.readable_bytes() / sizeof(Statistic), rows.size());
    if (!line.chain.read(0, rows.data(), count * sizeof(Statistic))) return;
    Statistics told;
    for (size_t i = 0; i < count; ++i) {
      if (rows[i].tag == VIRTIO_BALLOON_S_MEMFREE) told.free_bytes = rows[i].value;
      if (rows[i].tag == VIRTIO_BALLOON_S_MEMTOT) told.total_bytes = rows[i].value;
      if (rows[i].tag == VIRTIO_BALLOON_S_AVAIL) told.available_bytes = rows[i].value;
    }
    told.told_at = Clock::now();
    const std::lock_guard lock(mutex_);
    statistics_ = told;
  }

  void refresh_statistics() {
    uint64_t count;
    [[maybe_unused]] const ssize_t size = ::read(statistics_wanted_.get(), &count, sizeof count);
    Line& line = lines_[kStatistics];
    if (!line.open) return;
    give_back(line);
    line.queue.signal();
    line.queue.kick();
  }

  // --- memory

  bool is_memory(uint64_t start, uint64_t size_bytes) const {
    return memory_->slice(host().raw(), start, size_bytes) != nullptr;
  }

  static Range whole_pages(const clone_segment& segment) {
    const uint64_t end = (segment.guest_address + segment.size_bytes) / kPageBytes * kPageBytes;
    const uint64_t start = (segment.guest_address + kPageBytes - 1) / kPageBytes * kPageBytes;
    return {start, end > start ? end - start : 0};
  }

  bool discard(const Range& range) {
    if (memory_->discard(host().raw(), range.start, range.size_bytes) == CLONE_OK) return true;
    if (!refused_.exchange(true))
      host().log(CLONE_LOG_WARNING, "the host does not take back memory of the guest: it stays in use");
    return false;
  }

  const clone_host_loop* loops_ = nullptr;
  const clone_host_memory* memory_ = nullptr;
  std::vector<Range> regions_;
  uint64_t total_pages_ = 0;
  bool deflate_on_oom_ = true, reporting_ = true, hinting_ = false;
  std::chrono::milliseconds statistics_interval_{0};
  uint32_t step_pages_ = 1;
  uint64_t initial_pages_ = 0;
  clone_balloon balloon_table_{};

  // Guards what follows; never held while waiting.
  std::mutex mutex_;
  virtio_balloon_config config_{};
  uint64_t features_ = 0;
  const clone_virtio_port* port_ = nullptr;  // while a driver is there
  uint64_t target_pages_ = 0;
  // Where the driver was on its way down to when more was asked for again: it may not have seen that yet.
  uint32_t deflating_to_ = kNotDeflating;
  Statistics statistics_;
  Clock::time_point next_statistics_;
  HintRound hint_round_ = HintRound::none;
  uint32_t hint_command_ = VIRTIO_BALLOON_CMD_ID_DONE;

  std::atomic<uint64_t> reported_bytes_{0}, hinted_bytes_{0}, ignored_pages_{0};
  std::atomic<bool> refused_{false};
  std::vector<uint32_t> pages_;  // the loop's
  std::array<Line, kRoles> lines_;
  Fd statistics_wanted_;
  Watch statistics_watch_;
  std::unique_ptr<clone_loop, void (*)(clone_loop*)> loop_{nullptr, nullptr};
};

constexpr clone_option size = clone_sdk::size_option(
    "size", nullptr, "Memory that the guest gives back from the start, and at least as long as it runs.", 0, 0);
constexpr clone_option deflate_on_oom = clone_sdk::bool_option(
    "deflate-on-oom", "on", "Let a guest that is out of memory take back from the balloon what it needs.");
constexpr clone_option reporting =
    clone_sdk::bool_option("reporting", "on", "Take pages that the guest reports as free, without being asked.");
constexpr clone_option hinting =
    clone_sdk::bool_option("hinting", "off", "Let the guest be asked which pages are free at a moment.");
constexpr clone_option stats_interval = clone_sdk::number_option(
    "stats-interval", "1000",
    "Milliseconds before the guest is asked for its statistics again, if anybody wants them; 0 for never.", 0,
    3'600'000);
constexpr clone_option step =
    clone_sdk::size_option("step", "32M", "How much more the guest is asked for at a time.", 1 << 20, 1ull << 32);
constexpr const clone_option* options[] = {&size,           &deflate_on_oom, &reporting, &hinting,
                                           &stats_interval, &step,           nullptr};

constexpr clone_descriptor VirtioBalloon::descriptor = {sizeof(clone_descriptor),
                                                        CLONE_CAN_SAVE | CLONE_CAN_MIGRATE,
                                                        "virtio-balloon",
                                                        "Gives memory that the guest does not need back to the host.",
                                                        options,
                                                        "virtio_balloon"};

}  // namespace
}  // namespace virtio_balloon

CLONE_SDK_PLUGIN("virtio-balloon", "1.0.0", "clone", "Apache-2.0", "Memory back from the guest.",
                 CLONE_PROVIDES("device", "virtio-balloon", "default")
                     CLONE_PROVIDES_FLAG("--balloon", "virtio-balloon", "SIZE", "size=%",
                                         "Take this much memory back from the guest, e.g. 256M."))
CLONE_SDK_DEVICES(virtio_balloon::VirtioBalloon)
