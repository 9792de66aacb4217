// SPDX-License-Identifier: Apache-2.0
// A machine stands still only while its state is saved; its memory is taken by a child process, or lies in a file in memory
// that becomes the base of it and of its fork.
#include "vm/snapshots.hpp"

#include <fcntl.h>

#include "snapshot/handover.hpp"
#include "snapshot/plan_sections.hpp"

namespace vmm {
namespace {

namespace json = boost::json;

int64_t microseconds(std::chrono::steady_clock::duration time) {
  return std::chrono::duration_cast<std::chrono::microseconds>(time).count();
}

// "name", "store": absent is empty.
Result<std::string> text_of(const json::object& given, const char* key) {
  const json::value* value = given.if_contains(key);
  if (!value) return std::string();
  if (!value->is_string()) return Error{std::string("\"") + key + "\" has to be a text"};
  return std::string(value->get_string());
}

// Nobody writes to it any more, whoever has it.
void seal(int file) { ::fcntl(file, F_ADD_SEALS, F_SEAL_WRITE); }

}  // namespace

Result<void> Snapshots::offer(ControlServer& control) {
  const auto add = [&](const char* name, const char* help, Result<void> (Snapshots::*call)(const json::object&, Reply&)) {
    return control.add_method("", name, help, [this, call](const json::object& given, Reply reply) {
      if (const auto begun = (this->*call)(given, reply); !begun.ok()) reply.fail(begun.error().message);
    });
  };
  TRY(add("vm.snapshot",
          "Keeps the VM as it stands as a template: {\"name\", \"store\": folder}. {\"stop\": true} ends it afterwards.",
          &Snapshots::snapshot));
  return add("vm.fork", "Hands on the VM as it stands: state in the answer, memory as a descriptor beside it.",
             &Snapshots::fork);
}

void Snapshots::follow(Machine* machine) {
  pending_.reset();
  machine_ = machine;
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
                              std::function<void(Result<void>)> done) {
  auto begun = TRY(BackgroundWork::start(loop_, work, [this](Result<void> result) {
    const Pending pending = std::move(*pending_);
    pending_.reset();
    pending.done(std::move(result));
  }));
  pending_.emplace(Pending{std::move(begun), what, std::move(done)});
  return {};
}

Result<void> Snapshots::snapshot(const json::object& given, Reply& reply) {
  const std::string name = TRY(text_of(given, "name"));
  const std::string store = TRY(text_of(given, "store"));
  if (name.empty()) return Error{"vm.snapshot: \"name\" is missing"};
  const json::value* stop = given.if_contains("stop");
  if (stop && !stop->is_bool()) return Error{"vm.snapshot: \"stop\" is true or false"};
  const Afterwards afterwards = stop && stop->get_bool() ? Afterwards::end : Afterwards::as_before;
  KeyValues options;
  if (!store.empty()) options.emplace_back("store", store);
  const std::shared_ptr<SnapshotBackend> backend =
      TRY(SnapshotBackend::create(library_, kDefaultSnapshotBackend, options));

  Sections sections;
  const bool was_paused = owner_.is_paused();
  auto answer = std::make_shared<json::object>(
      json::object{{"name", name}, {"memory_bytes", machine_->memory().size_bytes()}});
  const auto shared_reply = std::make_shared<std::optional<Reply>>();
  const Clock::time_point begun = Clock::now();
  const auto begin = [&]() -> Result<void> {
    TRY(machine_->memory().make_private());
    const auto write = [&]() -> Result<void> {
      auto image = TRY(backend->begin(name, "", machine_->memory().size_bytes()));
      TRY(image.write_memory(machine_->memory()));
      TRY(image.write(sections));
      return image.commit();
    };
    return start("snapshot", write, [=, this](Result<void> written) {
      if (!written.ok()) {
        if (afterwards == Afterwards::end && !was_paused) owner_.resume();
        return (*shared_reply)->fail(written.error().message);
      }
      (*answer)["took_us"] = microseconds(Clock::now() - begun);
      (*shared_reply)->succeed(std::move(*answer));
      if (afterwards == Afterwards::end) owner_.end();
    });
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
      seal(memory.get());
      return {};
    }
    copied = true;
    const std::shared_ptr<Fd> file = std::make_shared<Fd>(TRY(make_memory_file(own)));
    return start(
        "fork", [&own, &file] { return copy_memory(own, file->get()); },
        [file, shared_reply, answer](Result<void> done) {
          if (!done.ok()) return (*shared_reply)->fail(done.error().message);
          seal(file->get());
          (*shared_reply)->succeed(std::move(*answer), std::move(*file));
        });
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
