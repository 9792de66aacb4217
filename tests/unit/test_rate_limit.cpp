// SPDX-License-Identifier: Apache-2.0
// The rate limit of virtio-blk, with time moved by hand.
#include <doctest/doctest.h>

#include <array>
#include <limits>

#include "virtio-blk/rate_limit.hpp"

using namespace virtio_blk;
using std::chrono::hours;
using std::chrono::milliseconds;
using std::chrono::nanoseconds;
using std::chrono::seconds;

namespace {

constexpr RateLimit kNone = {};

// A limiter, its clock, and customers that always have one more request.
struct Simulation {
  Simulation(const RateLimit& operations, const RateLimit& bytes) : limiter(operations, bytes, start) {}

  bool take(size_t customer = 0) { return wait(customer).count() == 0; }
  nanoseconds wait(size_t customer = 0) { return limiter.take(customers[customer], now); }
  void pass(nanoseconds time) { now += time; }
  // Requests of the first customer until `end`, each at the first moment it may begin; each pays `bytes`.
  uint64_t run_until(RateLimiter::Time end, uint64_t bytes = 0) {
    uint64_t count = 0;
    while (true) {
      const nanoseconds more = wait();
      if (more.count() == 0) {
        limiter.pay_bytes(customers[0], bytes);
        ++count;
        continue;
      }
      if (now + more > end) break;
      now += more;
    }
    now = end;
    return count;
  }

  RateLimiter::Time start = RateLimiter::Time() + hours(24 * 365);
  RateLimiter::Time now = start;
  RateLimiter limiter;
  std::array<RateLimiter::Customer, 4> customers;
};

}  // namespace

TEST_CASE("rate limit: the burst, then the rate, exactly") {
  Simulation disk({500, 0}, kNone);  // the burst is a tenth of a second's worth
  int at_once = 0;
  while (disk.take()) ++at_once;
  CHECK(at_once == 50);
  CHECK(disk.wait() == milliseconds(2));
  disk.pass(milliseconds(2) - nanoseconds(1));
  CHECK(disk.wait() == nanoseconds(1));
  disk.pass(nanoseconds(1));
  CHECK(disk.take());
  CHECK_FALSE(disk.take());
  // No rounding error adds up, also where an operation takes no whole number of nanoseconds.
  for (const uint64_t rate : {1ull, 3ull, 7ull, 499ull, 1'000ull, 33'333ull}) {
    CAPTURE(rate);
    Simulation other({rate, 2}, kNone);
    CHECK(other.run_until(other.start + seconds(30)) == 2 + 30 * rate);
  }
  // Asked at odd moments, hundreds of thousands of times.
  Simulation odd({1'001, 5}, kNone);
  uint64_t taken = 0;
  while (odd.now < odd.start + seconds(20)) {
    taken += odd.take();
    odd.pass(std::min<nanoseconds>(nanoseconds(77'777), odd.start + seconds(20) - odd.now));
  }
  taken += odd.take();
  CHECK(taken >= 20 * 1'001);
  CHECK(taken <= 20 * 1'001 + 5);
}

TEST_CASE("rate limit: a pause earns the burst and no more") {
  Simulation disk({100, 20}, kNone);
  CHECK(disk.run_until(disk.start) == 20);
  disk.pass(milliseconds(50));
  CHECK(disk.run_until(disk.now) == 5);
  disk.pass(hours(10));
  CHECK(disk.run_until(disk.now) == 20);
  // A clock that another thread read a little earlier takes nothing away.
  disk.pass(milliseconds(10));
  CHECK(disk.take());
  disk.now -= milliseconds(5);
  CHECK(disk.wait() == milliseconds(10));
  disk.pass(milliseconds(15));
  CHECK(disk.take());
}

TEST_CASE("rate limit: a request larger than the bucket goes through and delays what follows") {
  Simulation disk(kNone, {1'000'000, 4'096});
  REQUIRE(disk.take());
  disk.limiter.pay_bytes(disk.customers[0], 2'000'000);
  // The debt and the next request's first byte.
  CHECK(disk.wait() == seconds(2) - nanoseconds(4'096'000) + nanoseconds(1'000));
  disk.pass(seconds(1));
  CHECK_FALSE(disk.take());
  disk.pass(seconds(1) - nanoseconds(4'096'000));
  CHECK_FALSE(disk.take());
  disk.pass(nanoseconds(1'000));
  CHECK(disk.take());

  // What passes in the long run is the rate, whatever the size of the requests.
  for (const uint64_t size : {512ull, 4'096ull, 131'072ull, 10'000'000ull}) {
    CAPTURE(size);
    Simulation other(kNone, {1'000'000, 100'000});
    const uint64_t bytes = size * other.run_until(other.start + seconds(100), size);
    CHECK(bytes >= 100'000'000 + 100'000);
    CHECK(bytes < 100'000'000 + 100'000 + size);
  }
}

TEST_CASE("rate limit: both limits hold") {
  Simulation small({100, 1}, {1'000'000, 1});
  CHECK(small.run_until(small.start + seconds(10), 512) == 1'001);
  Simulation large({100, 1}, {1'000'000, 1});
  CHECK(large.run_until(large.start + seconds(10), 100'000) == 101);
  // What was taken for nothing is given back, up to what the bucket holds.
  Simulation disk({10, 2}, kNone);
  CHECK(disk.take());
  CHECK(disk.take());
  CHECK_FALSE(disk.take());
  for (int i = 0; i < 3; ++i) disk.limiter.give_back();
  CHECK(disk.run_until(disk.now) == 2);
}

TEST_CASE("rate limit: absurd values neither overflow nor stop anything for good") {
  constexpr uint64_t kMost = std::numeric_limits<uint64_t>::max();
  Simulation fast({kMost, kMost}, {kMost, kMost});
  for (int i = 0; i < 100; ++i) {
    REQUIRE(fast.take());
    fast.limiter.pay_bytes(fast.customers[0], uint64_t{1} << 32);
    fast.pass(hours(24 * 365));
  }
  Simulation slow({1, 1}, {1, 1});
  REQUIRE(slow.take());
  for (int i = 0; i < 1'000; ++i) slow.limiter.pay_bytes(slow.customers[0], kMost);
  CHECK(slow.wait() == hours(1));
  slow.pass(hours(24 * 365 * 200));
  CHECK(slow.wait() == hours(1));
  slow.limiter.leave(slow.customers[0]);

  Simulation uneven({1, kMost}, kNone);
  for (int i = 0; i < 1'000; ++i) REQUIRE(uneven.take());
  uneven.pass(hours(24 * 365 * 100));
  REQUIRE(uneven.take());
  Simulation unlimited(kNone, kNone);
  for (int i = 0; i < 1'000; ++i) {
    REQUIRE(unlimited.take());
    unlimited.limiter.pay_bytes(unlimited.customers[0], kMost);
  }
}

TEST_CASE("rate limit: queues that wait are served in turn") {
  // Each queue asks when it was told to; the first one always a moment before the others.
  for (const uint64_t burst : {1ull, 2ull, 50ull}) {
    CAPTURE(burst);
    Simulation disk({1'000, burst}, kNone);
    std::array<RateLimiter::Time, 4> wake{};
    std::array<uint64_t, 4> served{};
    const auto end = disk.start + seconds(10);
    while (disk.now < end) {
      auto next = end;
      for (size_t i = 0; i < 4; ++i) {
        for (nanoseconds more; wake[i] <= disk.now;) {
          if ((more = disk.wait(i)).count() > 0)
            wake[i] = disk.now + more;
          else
            ++served[i];
        }
        next = std::min(next, wake[i]);
      }
      disk.now = next;
    }
    const uint64_t all = served[0] + served[1] + served[2] + served[3];
    CHECK(all >= 10'000 - 4);
    CHECK(all <= 10'000 + burst);
    for (const uint64_t of_one : served) {
      CHECK(of_one >= 2'500 - burst - 4);
      CHECK(of_one <= 2'500 + burst + 4);
    }
  }
}

TEST_CASE("rate limit: who leaves the line holds up nobody, who is slow keeps its place") {
  Simulation disk({10, 2}, kNone);
  REQUIRE(disk.run_until(disk.now) == 2);
  disk.limiter.leave(disk.customers[0]);
  CHECK(disk.wait(0) == milliseconds(100));
  CHECK(disk.wait(1) == milliseconds(200));
  CHECK(disk.wait(2) == milliseconds(300));
  disk.limiter.leave(disk.customers[0]);
  CHECK(disk.wait(1) == milliseconds(100));
  CHECK(disk.wait(2) == milliseconds(200));
  disk.pass(milliseconds(100));
  CHECK_FALSE(disk.take(2));  // the first one's
  CHECK_FALSE(disk.take(3));
  disk.pass(milliseconds(100));
  CHECK(disk.take(2));
  CHECK_FALSE(disk.take(3));
  CHECK(disk.take(1));
  CHECK(disk.wait(3) == milliseconds(100));

  // By bytes: the ones before are expected to take what they took last.
  Simulation bytes(kNone, {1'000, 1'000});
  REQUIRE(bytes.take(0));
  bytes.limiter.pay_bytes(bytes.customers[0], 1'000);
  CHECK(bytes.wait(0) == milliseconds(1));
  CHECK(bytes.wait(1) == milliseconds(1'001));
  bytes.pass(milliseconds(1));
  CHECK_FALSE(bytes.take(1));
  CHECK(bytes.take(0));
}
