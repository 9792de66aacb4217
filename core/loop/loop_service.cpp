// SPDX-License-Identifier: Apache-2.0
// clone.host-loop/1: event loops and threads for plugins.
#include "loop/loop_service.hpp"

#include <memory>

#include "clone/sdk/error.hpp"
#include "loop/event_loop.hpp"
#include "plugin/host_context.hpp"

// A clone_loop is an EventLoop under another name; those that create() gave are LoopThreads.
struct clone_thread {
  vmm::Thread thread;
};

namespace vmm {
namespace {

using clone_sdk::guarded;

EventLoop* loop_of(clone_loop* loop) { return reinterpret_cast<EventLoop*>(loop); }
clone_loop* handle_of(EventLoop* loop) { return reinterpret_cast<clone_loop*>(loop); }

clone_loop* main_loop(const clone_host* host) noexcept {
  return handle_of(static_cast<HostContext*>(host->context)->main_loop);
}

clone_status create(const clone_host*, const char* name, clone_loop** loop, clone_err* err) noexcept {
  return guarded(err, [&]() -> Result<void> {
    *loop = handle_of(TRY(LoopThread::create(name)).release());
    return {};
  });
}

void destroy(clone_loop* loop) noexcept {
  if (loop) delete static_cast<LoopThread*>(loop_of(loop));
}

clone_status add_fd(clone_loop* loop, int32_t fd, uint32_t events, void (*ready)(void*, uint32_t), void* context,
                    clone_err* err) noexcept {
  return guarded(
      err, [&] { return loop_of(loop)->add_fd(fd, events, [=](uint32_t happened) { ready(context, happened); }); });
}

clone_status change_fd(clone_loop* loop, int32_t fd, uint32_t events) noexcept {
  return guarded(nullptr, [&] { return loop_of(loop)->change_fd(fd, events); });
}

void remove_fd(clone_loop* loop, int32_t fd) noexcept { loop_of(loop)->remove_fd(fd); }

clone_status post(clone_loop* loop, void (*call)(void*), void* context) noexcept {
  return guarded(nullptr, [&]() -> Result<void> {
    loop_of(loop)->post([=] { call(context); });
    return {};
  });
}

clone_status spawn(const clone_host*, const char* name, void (*run)(void*), void* context, clone_thread** thread,
                   clone_err* err) noexcept {
  return guarded(err, [&]() -> Result<void> {
    auto owned = std::make_unique<clone_thread>();
    owned->thread = TRY(spawn_thread(name, [=] { run(context); }));
    *thread = owned.release();
    return {};
  });
}

void join(clone_thread* thread) noexcept { delete thread; }

}  // namespace

const clone_host_loop* loop_service() {
  static constexpr clone_host_loop table = {
      sizeof(clone_host_loop), 0, main_loop, create, destroy, add_fd, change_fd, remove_fd, post, spawn, join};
  return &table;
}

}  // namespace vmm
