// SPDX-License-Identifier: Apache-2.0
// A machine stands still only while its state is saved; its memory is taken by a child process, or lies in a file in
// memory that becomes the base of it and of its fork.
#include "vm/snapshots.hpp"

#include <fcntl.h>
#include <sys/random.h>

#include "snapshot/handover.hpp"
#include "snapshot/plan_sections.hpp"

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

// As much is copied in the pause, rather than have a child process made that gets all memory.
constexpr uint64_t kMostCopiedBytes = 8 << 20;
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

constexpr const char* kIdTag = "snapshot-id";
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
  const auto id = saved->sections.get<Id>(kCoreSections, kIdTag, kIdVersion);
  if (id.ok()) parent_ = Kept{saved->template_name, *id, true};
}

Result<void> Snapshots::note_dirty_pages() {
  if (tracks_) return machine_->take_dirty_pages(unsaved_);
  const auto begun = machine_->track_dirty_pages();
  tracks_ = begun.ok();
  if (!tracks_) cannot_track_ = begun.error().message;
  return {};
}

Result<SnapshotImage> Snapshots::begin_over_parent(const SnapshotBackend& backend, const std::string& name) const {
  const auto gone = [&](const std::string& why) {
    return Error{std::string("this VM's ") + (parent_->is_template ? "template" : "last snapshot") + " '" +
                     parent_->name + "' " + why + ": take a full one",
                 0, CLONE_ERR_NOT_FOUND};
  };
  // Begun first: from then on the backend sees to it that it is the same one.
  auto image = backend.begin(name, parent_->name, machine_->memory().size_bytes());
  if (!image.ok() && image.error().status == CLONE_ERR_NOT_FOUND)
    return gone(parent_->is_template ? "is not in this store" : "is not there any more");
  if (!image.ok()) return std::move(image).error();
  auto parent = TRY(backend.open(parent_->name));
  const auto id = TRY(parent.sections()).get<Id>(kCoreSections, kIdTag, kIdVersion);
  if (!id.ok() || *id != parent_->id) return gone("was replaced by another one");
  return image;
}

Result<Snapshots::Pause> Snapshots::while_paused(Sections& sections, Afterwards afterwards,
                                                 const std::function<Result<void>()>& then) {
  if (pending_) return Error{"this VM is busy with a " + pending_->what};
  Pause pause{Clock::now()};
  const bool was_paused = owner_.is_paused();
  TRY(owner_.pause());
  const auto save = [&]() -> Result<void> {
    TRY(describe_plan(plan_, sections));
    TRY(machine_->save(sections));
    return then();
  };
  const Result<void> saved = save();
  if (!was_paused && !(saved.ok() && afterwards == Afterwards::end)) owner_.resume();
  pause.took = Clock::now() - pause.begun;
  if (!saved.ok()) return saved.error();
  return pause;
}

Result<void> Snapshots::start(const char* what, const std::function<Result<void>()>& work,
                              std::function<void(Result<void>)> done, int keep) {
  const auto ended = [this](Result<void> result) {
    const Pending pending = std::move(*pending_);
    pending_.reset();
    pending.done(std::move(result));
  };
  auto begun = TRY(BackgroundWork::start(loop_, work, ended, keep));
  pending_.emplace(Pending{std::move(begun), what, std::move(done)});
  return {};
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
  KeyValues options;
  if (!store.empty()) options.emplace_back("store", store);
  const std::shared_ptr<SnapshotBackend> backend =
      TRY(SnapshotBackend::create(library_, backend_name.empty() ? kDefaultSnapshotBackend : backend_name, options));

  Kept kept{name, {}, false};
  if (::getrandom(kept.id.data(), kept.id.size(), 0) != static_cast<ssize_t>(kept.id.size()))
    return errno_error("getrandom");
  Sections sections;
  TRY(sections.put(kCoreSections, kIdTag, kIdVersion, kept.id));
  const bool was_paused = owner_.is_paused();
  auto answer =
      std::make_shared<json::object>(json::object{{"name", name}, {"memory_bytes", machine_->memory().size_bytes()}});
  const auto shared_reply = std::make_shared<std::optional<Reply>>();
  const Clock::time_point begun = Clock::now();
  const auto begin = [&]() -> Result<void> {
    const GuestMemory& memory = machine_->memory();
    TRY(machine_->memory().make_private());
    // A machine that ends needs no tracking any more.
    if (tracks_ || afterwards == Afterwards::as_before) TRY(note_dirty_pages());
    std::optional<Copies> copies;
    if (incremental) {
      if (parent_->is_template) unsaved_ = TRY(memory.changed_pages());
      const uint64_t changed_bytes = unsaved_.count() * kPageSize;
      (*answer)["parent"] = parent_->name;
      (*answer)["changed_bytes"] = changed_bytes;
      if (changed_bytes <= kMostCopiedBytes) copies = TRY(copy_pages(memory, unsaved_));
    }
    const auto write = [&]() -> Result<void> {
      auto image = TRY(incremental ? begin_over_parent(*backend, name) : backend->begin(name, "", memory.size_bytes()));
      if (copies)
        for (const auto& [offset, bytes] : *copies) TRY(image.write_memory(offset, bytes));
      else
        TRY(incremental ? image.write_memory(memory, unsaved_) : image.write_memory(memory));
      TRY(image.write(sections));
      return image.commit();
    };
    memory.share_with_children(!copies);
    auto started = start("snapshot", write, [=, this](Result<void> written) {
      if (!written.ok()) {
        if (afterwards == Afterwards::end && !was_paused) owner_.resume();
        return (*shared_reply)->fail(written.error().message);
      }
      if (tracks_) parent_ = kept;
      unsaved_.clear();
      (*answer)["took_us"] = microseconds(Clock::now() - begun);
      (*shared_reply)->succeed(std::move(*answer));
      if (afterwards == Afterwards::end) owner_.end();
    });
    memory.share_with_children(true);
    return started;
  };
  const Pause pause = TRY(while_paused(sections, afterwards, begin));
  (*answer)["paused_us"] = microseconds(pause.took);
  shared_reply->emplace(std::move(reply));
  return {};
}

Result<void> Snapshots::fork(const json::object&, Reply& reply) {
  Sections sections;
  Fd memory;
  bool copied = false;
  const auto shared_reply = std::make_shared<std::optional<Reply>>();
  auto answer = std::make_shared<json::object>();
  const auto hand_over = [&]() -> Result<void> {
    GuestMemory& own = machine_->memory();
    if (own.memfd() >= 0) {
      // From now on both write to copies of their own.
      memory = Fd(::fcntl(own.memfd(), F_DUPFD_CLOEXEC, 0));
      if (!memory) return errno_error("the memory's descriptor");
      TRY(own.make_private());
      return seal(memory.get());
    }
    copied = true;
    const std::shared_ptr<Fd> file = std::make_shared<Fd>(TRY(make_memory_file(own)));
    return start(
        "fork", [&own, &file] { return copy_memory(own, file->get()); },
        [file, shared_reply, answer](Result<void> done) {
          if (done.ok()) done = seal(file->get());
          if (!done.ok()) return (*shared_reply)->fail(done.error().message);
          (*shared_reply)->succeed(std::move(*answer), std::move(*file));
        },
        file->get());
  };
  const Pause pause = TRY(while_paused(sections, Afterwards::as_before, hand_over));
  (*answer)["paused_us"] = microseconds(pause.took);
  (*answer)["sections"] = sections_to_json(sections);
  if (copied)
    shared_reply->emplace(std::move(reply));
  else
    reply.succeed(std::move(*answer), std::move(memory));
  return {};
}

}  // namespace vmm
