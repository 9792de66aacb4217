// SPDX-License-Identifier: Apache-2.0
// The event loop: order, removal, timers, threads, and the table that plugins see.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <future>
#include <vector>

#include "loop/event_loop.hpp"
#include "loop/loop_service.hpp"
#include "plugin/host_context.hpp"

using namespace std::chrono_literals;
using vmm::EventLoop;
using vmm::Fd;
using vmm::LoopThread;

namespace {
Fd make_event(unsigned value = 0) { return Fd(::eventfd(value, EFD_CLOEXEC | EFD_NONBLOCK)); }
}  // namespace

TEST_CASE("loop: posted calls run in order, those before stop() included") {
  auto loop = *EventLoop::create();
  std::vector<int> order;
  for (int i = 0; i < 5; ++i) loop->post([&, i] { order.push_back(i); });
  loop->stop();
  loop->run();
  CHECK(order == std::vector{0, 1, 2, 3, 4});

  loop->post([&] {
    order.push_back(5);
    loop->post([&] {
      order.push_back(6);
      loop->stop();
    });
  });
  loop->run();
  CHECK(order.back() == 6);
  CHECK(order.size() == 7);
}

TEST_CASE("loop: descriptors are level-triggered, change_fd and hang-up are seen") {
  auto loop = *EventLoop::create();
  int ends[2];
  REQUIRE(::pipe2(ends, O_CLOEXEC) == 0);
  const Fd reader(ends[0]);
  Fd writer(ends[1]);
  REQUIRE(::write(writer.get(), "x", 1) == 1);

  int calls = 0;
  REQUIRE(loop->add_fd(reader.get(), CLONE_READABLE, [&](uint32_t events) {
    CHECK((events & CLONE_READABLE) != 0);
    if (++calls == 3) loop->stop();  // never read: it comes again
  }));
  CHECK_FALSE(loop->add_fd(reader.get(), CLONE_READABLE, [](uint32_t) {}));
  loop->run();
  CHECK(calls == 3);

  REQUIRE(loop->change_fd(reader.get(), 0));
  loop->add_timer(10ms, [&] { loop->stop(); });
  loop->run();
  CHECK(calls == 3);
  loop->remove_fd(reader.get());
  CHECK_FALSE(loop->change_fd(reader.get(), CLONE_READABLE));

  uint32_t seen = 0;
  REQUIRE(loop->add_fd(reader.get(), 0, [&](uint32_t events) {
    seen = events;
    loop->remove_fd(reader.get());
    loop->stop();
  }));
  writer.reset();
  loop->run();
  CHECK(seen == CLONE_HANGUP);
}

TEST_CASE("loop: a regular file is refused by errno") {
  auto loop = *EventLoop::create();
  const Fd file(::open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
  const auto added = loop->add_fd(file.get(), CLONE_READABLE, [](uint32_t) {});
  REQUIRE_FALSE(added);
  CHECK(added.error().code == EPERM);
}

TEST_CASE("loop: a descriptor removed by another callback of the same round stays silent") {
  auto loop = *EventLoop::create();
  const Fd first = make_event(1), second = make_event(1);
  int calls = 0;
  const auto remove_both = [&](uint32_t) {
    ++calls;
    loop->remove_fd(first.get());
    loop->remove_fd(second.get());
  };
  REQUIRE(loop->add_fd(first.get(), CLONE_READABLE, remove_both));
  REQUIRE(loop->add_fd(second.get(), CLONE_READABLE, remove_both));
  loop->add_timer(5ms, [&] { loop->stop(); });
  loop->run();
  CHECK(calls == 1);
}

TEST_CASE("loop: remove_fd from another thread waits for the callback") {
  auto loop = *LoopThread::create("test-loop");
  const Fd event = make_event(1);
  std::promise<void> entered;
  std::atomic<bool> finished{false}, removed{false};
  std::atomic<int> calls{0};
  REQUIRE(loop->add_fd(event.get(), CLONE_READABLE, [&](uint32_t) {
    if (calls++ == 0) entered.set_value();
    std::this_thread::sleep_for(20ms);
    CHECK_FALSE(removed.load());
    finished = true;
  }));
  entered.get_future().wait();
  loop->remove_fd(event.get());
  removed = true;
  CHECK(finished.load());
  const int calls_at_removal = calls;
  std::this_thread::sleep_for(30ms);
  CHECK(calls == calls_at_removal);
}

TEST_CASE("loop: timers expire in order, once, and can be cancelled") {
  auto loop = *EventLoop::create();
  std::vector<int> order;
  const auto start = std::chrono::steady_clock::now();
  loop->add_timer(20ms, [&] {
    order.push_back(2);
    loop->stop();
  });
  loop->add_timer(5ms, [&] { order.push_back(1); });
  const auto cancelled = loop->add_timer(1ms, [&] { order.push_back(99); });
  loop->cancel_timer(cancelled);
  loop->run();
  CHECK(order == std::vector{1, 2});
  CHECK(std::chrono::steady_clock::now() - start >= 20ms);
  loop->cancel_timer(cancelled);
  loop->cancel_timer(0);

  // From another thread, while the loop sleeps.
  auto other = *LoopThread::create("timers");
  std::promise<void> expired;
  std::this_thread::sleep_for(2ms);
  other->add_timer(1ms, [&] { expired.set_value(); });
  CHECK(expired.get_future().wait_for(5s) == std::future_status::ready);
}

TEST_CASE("loop: threads have their name and block all signals but faults and those asked for") {
  char name[16] = {};
  sigset_t mask, outside;
  {
    auto thread = vmm::spawn_thread("a-rather-long-thread-name",
                                    [&] {
                                      ::pthread_getname_np(::pthread_self(), name, sizeof name);
                                      ::pthread_sigmask(SIG_SETMASK, nullptr, &mask);
                                    },
                                    {SIGUSR1});
    REQUIRE(thread);
  }
  CHECK(std::string(name) == "a-rather-long-t");
  CHECK(sigismember(&mask, SIGTERM) == 1);
  CHECK(sigismember(&mask, SIGUSR1) == 0);
  CHECK(sigismember(&mask, SIGSEGV) == 0);
  ::pthread_sigmask(SIG_SETMASK, nullptr, &outside);
  CHECK(sigismember(&outside, SIGTERM) == 0);
}

TEST_CASE("loop: the table of plugins") {
  auto main_loop = *EventLoop::create();
  vmm::HostContext context;
  context.main_loop = main_loop.get();
  clone_host host{};
  host.context = &context;
  const clone_host_loop* table = vmm::loop_service();
  REQUIRE(table->size == sizeof(clone_host_loop));

  clone_err err{sizeof(clone_err), 0, {}};
  clone_loop* loop = nullptr;
  REQUIRE(table->create(&host, "plugin", &loop, &err) == CLONE_OK);
  struct Shared {
    const clone_host_loop* table;
    clone_loop* main;
    EventLoop* to_stop;
    Fd event;
    std::atomic<int> hits{0};
  } shared{table, table->main_loop(&host), main_loop.get(), make_event(1), {}};
  REQUIRE(table->add_fd(
              loop, shared.event.get(), CLONE_READABLE,
              [](void* data, uint32_t) {
                auto& self = *static_cast<Shared*>(data);
                eventfd_t value;
                ::eventfd_read(self.event.get(), &value);
                ++self.hits;
                self.table->post(
                    self.main, [](void* inner) { static_cast<Shared*>(inner)->to_stop->stop(); }, data);
              },
              &shared, &err) == CLONE_OK);
  CHECK(table->add_fd(
            loop, -1, CLONE_READABLE, [](void*, uint32_t) {}, nullptr, &err) == CLONE_ERR_SYSTEM);
  CHECK(err.code == EBADF);
  main_loop->run();
  CHECK(shared.hits == 1);
  table->remove_fd(loop, shared.event.get());
  table->destroy(loop);

  std::atomic<int> ran{0};
  clone_thread* thread = nullptr;
  REQUIRE(table->spawn(
              &host, "worker", [](void* data) { ++*static_cast<std::atomic<int>*>(data); }, &ran, &thread, &err) ==
          CLONE_OK);
  table->join(thread);
  CHECK(ran == 1);
}
