// SPDX-License-Identifier: Apache-2.0
// A limit on what a disk's queues may do each second: token buckets for operations and bytes, shared by the queues.
#pragma once

#include <chrono>
#include <cstdint>
#include <mutex>
#include <vector>

namespace virtio_blk {

struct RateLimit {
  uint64_t per_second = 0;  // 0: no limit
  uint64_t burst = 0;       // what the bucket holds; 0: a tenth of a second's worth
};

// Tokens that come in at a steady rate, exactly, until the bucket is full. It may owe some: the price of a request is
// paid in full, however large, and what comes in settles the debt first.
class TokenBucket {
 public:
  using Time = std::chrono::steady_clock::time_point;

  // Full.
  TokenBucket(const RateLimit& limit, Time now);

  void refill(Time now);  // a time that lies behind that of the last call counts as the same
  void pay(uint64_t tokens);
  void give_back(uint64_t tokens);
  // From the last refill until this many are there; an hour at most.
  std::chrono::nanoseconds wait_for(uint64_t tokens) const;

 private:
  // In billionths of a token, so that a nanosecond brings a whole number of them. 64 bits of tokens and of nanoseconds
  // leave room in it.
  __extension__ typedef __int128 Amount;
  static constexpr Amount kToken = 1'000'000'000;

  uint64_t per_second_;
  Amount capacity_;
  Amount balance_;
  Time refilled_at_;
};

// A request costs one operation, and the bytes that it transfers or fills with zeroes. A queue may begin one when a
// whole token is in both buckets. Queues that have to wait stand in line, so that each gets as many requests as the
// others. All functions may be called by any thread; time is the caller's to give.
class RateLimiter {
 public:
  using Time = TokenBucket::Time;

  // A queue as the limiter knows it.
  class Customer {
    friend class RateLimiter;
    uint64_t last_bytes_ = 0;
  };

  RateLimiter(const RateLimit& operations, const RateLimit& bytes, Time now)
      : operations_(operations, now), bytes_(bytes, now) {}

  // Zero: one operation is paid for, a request may begin. Else the time to wait before asking again; the customer is in
  // line then, until it is served or leaves.
  std::chrono::nanoseconds take(Customer& customer, Time now);
  // There was no request to begin.
  void give_back();
  void pay_bytes(Customer& customer, uint64_t size_bytes);
  void leave(const Customer& customer);

 private:
  std::mutex mutex_;
  TokenBucket operations_;
  TokenBucket bytes_;
  std::vector<const Customer*> line_;
};

}  // namespace virtio_blk
