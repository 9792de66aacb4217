// SPDX-License-Identifier: Apache-2.0
// Token buckets that may be overdrawn, and the line of those who wait for them.
#include "rate_limit.hpp"

#include <algorithm>

namespace virtio_blk {

TokenBucket::TokenBucket(const RateLimit& limit, Time now)
    : per_second_(limit.per_second),
      capacity_(kToken * (limit.burst ? limit.burst : std::max<uint64_t>(limit.per_second / 10, 1))),
      balance_(capacity_),
      refilled_at_(now) {}

void TokenBucket::refill(Time now) {
  const int64_t elapsed_ns = std::chrono::nanoseconds(now - refilled_at_).count();
  if (elapsed_ns <= 0) return;
  balance_ = std::min(balance_ + Amount{elapsed_ns} * per_second_, capacity_);
  refilled_at_ = now;
}

void TokenBucket::pay(uint64_t tokens) {
  if (per_second_) balance_ -= kToken * tokens;
}

void TokenBucket::give_back(uint64_t tokens) {
  if (per_second_) balance_ = std::min(balance_ + kToken * tokens, capacity_);
}

std::chrono::nanoseconds TokenBucket::wait_for(uint64_t tokens) const {
  const Amount missing = kToken * tokens - balance_;
  if (per_second_ == 0 || missing <= 0) return {};
  constexpr Amount kLongest = std::chrono::nanoseconds(std::chrono::hours(1)).count();
  return std::chrono::nanoseconds(static_cast<int64_t>(std::min((missing + per_second_ - 1) / per_second_, kLongest)));
}

std::chrono::nanoseconds RateLimiter::take(Customer& customer, Time now) {
  std::lock_guard lock(mutex_);
  operations_.refill(now);
  bytes_.refill(now);
  // What those before it are going to take is left for them; a byte's price is known only once a request has begun, so
  // that is what their last request cost.
  const auto place = std::find(line_.begin(), line_.end(), &customer);
  uint64_t operations = 1;
  uint64_t bytes = 1;
  for (auto before = line_.begin(); before != place; ++before) {
    ++operations;
    bytes += (*before)->last_bytes_;
  }
  const auto wait = std::max(operations_.wait_for(operations), bytes_.wait_for(bytes));
  const bool waiting = place != line_.end();
  if (wait.count() > 0) {
    if (!waiting) line_.push_back(&customer);
    return wait;
  }
  operations_.pay(1);
  if (waiting) line_.erase(place);
  return {};
}

void RateLimiter::give_back() {
  std::lock_guard lock(mutex_);
  operations_.give_back(1);
}

void RateLimiter::pay_bytes(Customer& customer, uint64_t size_bytes) {
  std::lock_guard lock(mutex_);
  bytes_.pay(size_bytes);
  customer.last_bytes_ = size_bytes;
}

void RateLimiter::leave(const Customer& customer) {
  std::lock_guard lock(mutex_);
  std::erase(line_, &customer);
}

}  // namespace virtio_blk
