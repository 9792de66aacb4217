// SPDX-License-Identifier: Apache-2.0
// A machine stands still only while its state is saved; its memory is taken ahead (vm/capture.hpp), or lies in a file in
// memory that becomes the base of it and of its fork.
#include "vm/snapshots.hpp"

#include <fcntl.h>
#include <sys/random.h>
#include <sys/socket.h>

#include <utility>

#include "snapshot/handover.hpp"
#include "snapshot/parent_memory.hpp"
#include "snapshot/plan_sections.hpp"
#include "snapshot/stream.hpp"
#include "util/log.hpp"

namespace vmm {
namespace {

namespace json = boost::json;

int64_t microseconds(std::chrono::steady_clock::duration time) {
  return std::chrono::duration_cast<std::chrono::microseconds>(time).count();
}

// "name", "store", "backend": absent is empty.
Result<std::string> text_of(const json::object& given, const char* key) {
  const json::value* value = given.if_contains(key);
  if (!value) return std::string();
  if (!value->is_string()) return Error{std::string("\"") + key + "\" has to be a text"};
  return std::string(value->get_string());
}

// "stop", "incremental": absent is false.
Result<bool> flag_of(const json::object& given, const char* key) {
  const json::value* value = given.if_contains(key);
  if (!value) return false;
  if (!value->is_bool()) return Error{std::string("\"") + key + "\" is true or false"};
  return value->get_bool();
}

constexpr uint32_t kIdVersion = 1;

// Nobody writes to it any more, whoever has it: refused while another process has it mapped for that.
Result<void> seal(int file) {
  if (::fcntl(file, F_ADD_SEALS, F_SEAL_WRITE) == 0) return {};
  if (errno == EBUSY) return Error{"another process can write to this VM's memory", EBUSY, CLONE_ERR_BUSY};
  return errno_error("F_SEAL_WRITE");
}

}  // namespace

Result<void> Snapshots::offer(ControlServer& control) {
  const auto add = [&](const char* name, const char* help,
                       Result<void> (Snapshots::*call)(const json::object&, Reply&)) {
    return control.add_method("", name, help, [this, call](const json::object& given, Reply reply) {
      if (const auto begun = (this->*call)(given, reply); !begun.ok()) reply.fail(begun.error().message);
    });
  };
  TRY(add("vm.snapshot",
          "Keeps the VM as it stands as a template: {\"name\", \"store\": folder}. {\"incremental\": true} keeps what "
          "differs from its last one, or its template; {\"stop\": true} ends it afterwards.",
          &Snapshots::snapshot));
  return add("vm.fork", "Hands on the VM as it stands: state in the answer, memory as a descriptor beside it.",
             &Snapshots::fork);
}

void Snapshots::follow(Machine* machine, const SavedMachine* saved) {
  pending_.reset();
  machine_ = machine;
  tracks_ = false;
  cannot_track_.clear();
  parent_.reset();
  unsaved_.clear();
  if (!saved || saved->template_name.empty()) return;
  const auto id = saved->sections.get<Id>(kCoreSections, kSnapshotIdTag, kIdVersion);
  if (id.ok()) parent_ = Kept{saved->template_name, *id, true};
}

Snapshots::Pending::~Pending() {
  // A thread that waits for the writer ends.
  if (stream) ::shutdown(stream.get(), SHUT_RDWR);
}

bool Snapshots::track() {
  if (tracks_) return true;
  const auto begun = machine_->track_dirty_pages();
  tracks_ = begun.ok();
  if (!tracks_) cannot_track_ = begun.error().message;
  return tracks_;
}

Result<void> Snapshots::take_dirty_pages(PageSet& pages) {
  PageSet newer;
  auto taken = machine_->take_dirty_pages(newer);  // some of it even if it fails
  pages.add(newer);
  if (tracks_) unsaved_.add(newer);
  return taken;
}

Result<void> Snapshots::write_over_parent(const SnapshotBackend& backend, const std::string& name, int stream) const {
  const auto gone = [&](const std::string& why) {
    return Error{std::string("this VM's ") + (parent_->is_template ? "template" : "last snapshot") + " '" +
                     parent_->name + "' " + why + ": take a full one",
                 0, CLONE_ERR_NOT_FOUND};
  };
  // Begun first: from then on the backend sees to it that it is the same one.
  const uint64_t memory_bytes = machine_->memory().size_bytes();
  auto image = backend.begin(name, parent_->name, memory_bytes);
  if (!image.ok() && image.error().status == CLONE_ERR_NOT_FOUND)
    return gone(parent_->is_template ? "is not in this store" : "is not there any more");
  if (!image.ok()) return std::move(image).error();
  auto parent = TRY(backend.open(parent_->name));
  const auto id = TRY(parent.sections()).get<Id>(kCoreSections, kSnapshotIdTag, kIdVersion);
  if (!id.ok() || *id != parent_->id) return gone("was replaced by another one");
  ParentMemory parent_memory(TRY(parent.extents()), memory_bytes);
  return receive_snapshot(stream, *image, &parent_memory);
}

Result<void> Snapshots::check_idle() const {
  if (pending_) return Error{std::string("this VM is busy with a ") + pending_->what};
  return {};
}

Result<void> Snapshots::while_paused(Sections& sections, Afterwards afterwards, json::object& answer,
                                     const std::function<Result<void>()>& then) {
  TRY(describe_plan(plan_, sections));
  const Clock::time_point begun = Clock::now();
  const bool was_paused = owner_.is_paused();
  TRY(owner_.pause());
  const auto save = [&]() -> Result<void> {
    TRY(machine_->save(sections));
    return then();
  };
  const Result<void> saved = save();
  const bool stays = saved.ok() && afterwards == Afterwards::end;
  if (!was_paused && !stays) owner_.resume();
  if (pending_) pending_->is_to_resume = !was_paused && stays;
  answer["paused_us"] = microseconds(Clock::now() - begun);
  return saved;
}

void Snapshots::capture(std::optional<PageSet> pages, const Capture::Job& job) {
  auto begun = Capture::start(loop_, machine_->memory(), std::move(pages), job);
  if (!begun.ok()) return job.done(std::move(begun).error());
  pending_->capture = std::move(*begun);
}

Result<void> Snapshots::snapshot(const json::object& given, Reply& reply) {
  const std::string name = TRY(text_of(given, "name"));
  const std::string store = TRY(text_of(given, "store"));
  const std::string backend_name = TRY(text_of(given, "backend"));
  if (name.empty()) return Error{"vm.snapshot: \"name\" is missing"};
  const Afterwards afterwards = TRY(flag_of(given, "stop")) ? Afterwards::end : Afterwards::as_before;
  const bool incremental = TRY(flag_of(given, "incremental"));
  if (incremental && !parent_)
    return Error{cannot_track_.empty() ? "this VM has no snapshot yet: take a full one first"
                                       : "no incremental snapshots of this VM: " + cannot_track_};
  TRY(check_idle());
  KeyValues options;
  if (!store.empty()) options.emplace_back("store", store);
  const auto backend =
      TRY(SnapshotBackend::create(library_, backend_name.empty() ? kDefaultSnapshotBackend : backend_name, options));

  Kept kept{name, {}, false};
  if (::getrandom(kept.id.data(), kept.id.size(), 0) != static_cast<ssize_t>(kept.id.size()))
    return errno_error("getrandom");
  const GuestMemory& memory = machine_->memory();
  // A machine that ends needs no tracking, and may stand still.
  const bool ahead = afterwards == Afterwards::as_before && track();
  // Known without any marks; once there are some, what is written from now on is marked besides.
  const bool over_template = incremental && parent_->is_template;
  if (over_template) unsaved_ = TRY(memory.changed_pages());
  const auto answer =
      std::make_shared<json::object>(json::object{{"name", name}, {"memory_bytes", memory.size_bytes()}});
  if (incremental) (*answer)["parent"] = parent_->name;
  const Clock::time_point begun = Clock::now();

  // The writer has none of the guest's memory: all of it comes through the stream.
  auto [ours, theirs] = TRY(make_snapshot_stream());
  const auto write = [&]() -> Result<void> {
    if (incremental) return write_over_parent(*backend, name, theirs.get());
    auto image = TRY(backend->begin(name, "", memory.size_bytes()));
    return receive_snapshot(theirs.get(), image);
  };
  const auto written = [=, this](Result<void> result) {
    const auto ended = std::exchange(pending_, nullptr);
    ended->capture.reset();
    if (!result.ok()) {
      if (ended->is_to_resume) owner_.resume();
      // That the stream ended early is no reason by itself.
      const bool is_cut_off = result.error().message == kCutOffStream;
      return ended->reply.fail((ended->failure && is_cut_off ? *ended->failure : result.error()).message);
    }
    if (tracks_) parent_ = kept;
    unsaved_.clear();
    (*answer)["took_us"] = microseconds(Clock::now() - begun);
    ended->reply.succeed(std::move(*answer));
    if (afterwards == Afterwards::end) owner_.end();
  };
  memory.share_with_children(false);
  // Without its machine the writer finds the stream's end, and clears away what it began.
  auto writer =
      BackgroundWork::start(loop_, write, written, theirs.get(), BackgroundWork::Abandoned::awaited);
  memory.share_with_children(true);
  if (!writer.ok()) return std::move(writer).error();
  pending_.reset(new Pending{"snapshot", std::move(reply), std::move(*writer), std::move(ours)});

  Capture::Job job;
  const int stream = job.keep = pending_->stream.get();
  job.put_memory = [stream](uint64_t offset, std::span<const std::byte> bytes) {
    return send_memory(stream, offset, bytes);
  };
  job.put_state = [stream](const Sections& sections) { return send_state(stream, sections); };
  job.ahead = ahead;
  if (tracks_) {
    job.take_dirty_pages = [this](PageSet& pages) { return take_dirty_pages(pages); };
  } else if (over_template) {
    job.take_dirty_pages = [this](PageSet& pages) -> Result<void> {
      pages = unsaved_ = TRY(machine_->memory().changed_pages());
      return {};
    };
  }
  job.while_paused = [=, this](Sections& sections, const std::function<Result<void>()>& then) -> Result<void> {
    TRY(sections.put(kCoreSections, kSnapshotIdTag, kIdVersion, kept.id));
    return while_paused(sections, afterwards, *answer, [&]() -> Result<void> {
      TRY(then());
      if (incremental) (*answer)["changed_bytes"] = unsaved_.count() * kPageSize;
      return {};
    });
  };
  // The writer has the last word: without the rest of what it waits for it fails.
  job.done = [this](Result<void> result) {
    if (!result.ok() && result.error().code != EPIPE) pending_->failure = std::move(result).error();
    pending_->stream.reset();
  };
  capture(incremental ? std::optional(unsaved_) : std::nullopt, job);
  return {};
}

Result<void> Snapshots::fork(const json::object&, Reply& reply) {
  TRY(check_idle());
  return machine_->memory().memfd() >= 0 ? hand_on_memfd(reply) : hand_on_copy(reply);
}

Result<void> Snapshots::hand_on_memfd(Reply& reply) {
  GuestMemory& memory = machine_->memory();
  const auto file = std::make_shared<Fd>(::fcntl(memory.memfd(), F_DUPFD_CLOEXEC, 0));
  if (!*file) return errno_error("the memory's descriptor");
  const auto answer = std::make_shared<json::object>();
  const auto unused = std::make_shared<std::vector<Mapping>>();
  Sections sections;
  // From now on both write to copies of their own. The machine's old mapping is where nobody knows it.
  const auto part = [&]() -> Result<void> {
    *unused = TRY(memory.make_private());
    return {};
  };
  TRY(while_paused(sections, Afterwards::as_before, *answer, part));
  (*answer)["sections"] = sections_to_json(sections);
  const auto finish = [=](const std::atomic<bool>&) -> Result<void> {
    unused->clear();
    return seal(file->get());
  };
  const auto done = [=, this](Result<void> result) {
    const auto ended = std::exchange(pending_, nullptr);
    if (!result.ok()) return ended->reply.fail(result.error().message);
    ended->reply.succeed(std::move(*answer), std::move(*file));
  };
  pending_.reset(new Pending{"fork", std::move(reply)});
  auto finishing = ThreadWork::start(loop_, "clone-unmap", finish, done);
  if (finishing.ok()) pending_->finishing = std::move(*finishing);
  else done(finish(false));
  return {};
}

Result<void> Snapshots::hand_on_copy(Reply& reply) {
  const auto file = std::make_shared<Fd>(TRY(make_memory_file(machine_->memory())));
  const auto answer = std::make_shared<json::object>();
  Capture::Job job;
  job.keep = file->get();
  job.put_memory = [file](uint64_t offset, std::span<const std::byte> bytes) {
    return put_memory(file->get(), offset, bytes);
  };
  job.put_state = [](const Sections&) -> Result<void> { return {}; };
  // Without a snapshot before it nobody needs to know afterwards.
  const bool tracks_for_it = !tracks_ && machine_->track_dirty_pages().ok();
  job.ahead = tracks_ || tracks_for_it;
  if (job.ahead) job.take_dirty_pages = [this](PageSet& pages) { return take_dirty_pages(pages); };
  job.while_paused = [=, this](Sections& sections, const std::function<Result<void>()>& then) -> Result<void> {
    TRY(while_paused(sections, Afterwards::as_before, *answer, then));
    (*answer)["sections"] = sections_to_json(sections);
    return {};
  };
  job.done = [=, this](Result<void> result) {
    const auto ended = std::exchange(pending_, nullptr);
    if (result.ok()) result = seal(file->get());
    if (result.ok()) {
      ended->reply.succeed(std::move(*answer), std::move(*file));
    } else {
      ended->reply.fail(result.error().message);
    }
    if (!tracks_for_it) return;
    if (const auto stopped = machine_->stop_tracking_dirty_pages(); !stopped.ok()) log_warning(stopped.error().message);
  };
  pending_.reset(new Pending{"fork", std::move(reply)});
  capture({}, job);
  return {};
}

}  // namespace vmm
