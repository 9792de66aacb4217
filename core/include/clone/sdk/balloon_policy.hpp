// SPDX-License-Identifier: Apache-2.0
// A balloon policy as a class: derive from BalloonPolicy, give it a `static const clone_descriptor descriptor`, list it
// in CLONE_SDK_BALLOON_POLICIES.
#pragma once

#include <algorithm>
#include <memory>
#include <string_view>

#include "clone/abi/balloon_policy.h"
#include "clone/sdk/host.hpp"
#include "clone/sdk/options.hpp"
#include "clone/sdk/state.hpp"

namespace clone_sdk {

// The functions are those of clone_balloon_policy_type, all [control]. A policy keeps no clock: time is in the input.
class BalloonPolicy {
 public:
  explicit BalloonPolicy(const clone_host* host) : host_(host) {}
  BalloonPolicy(const BalloonPolicy&) = delete;
  BalloonPolicy& operator=(const BalloonPolicy&) = delete;
  virtual ~BalloonPolicy() = default;

  virtual Result<void> configure(const Options&) { return {}; }
  // What an older host does not tell is ~0. More than the machine's memory is cut to it.
  virtual Result<clone_balloon_output> decide(const clone_balloon_input& input) = 0;
  virtual Result<void> save(const Writer&) { return {}; }
  virtual Result<void> load(const Reader&) { return {}; }
  virtual const void* extension(std::string_view) { return nullptr; }

  const Host& host() const { return host_; }

 private:
  Host host_;
};

namespace detail {

template <typename T>
struct PolicyThunks {
  static BalloonPolicy& self(void* policy) { return *static_cast<BalloonPolicy*>(policy); }

  static clone_status create(const clone_host* host, const clone_options* options, void** policy,
                             clone_err* err) noexcept {
    return guarded(err, [&]() -> Result<void> {
      std::unique_ptr<BalloonPolicy> created(new T(host));
      CLONE_TRY(created->configure(Options(*options)));
      *policy = created.release();
      return {};
    });
  }
  static clone_status decide(void* policy, const clone_balloon_input* given, clone_balloon_output* output,
                             clone_err* err) noexcept {
    return guarded(err, [&]() -> Result<void> {
      clone_balloon_input input;
      std::memset(&input, 0xff, sizeof input);
      std::memcpy(&input, given, std::min<size_t>(given->size, sizeof input));
      const clone_balloon_output decided = CLONE_TRY(self(policy).decide(input));
      output->wake_ms = decided.wake_ms;
      output->target_bytes = std::min(decided.target_bytes, input.memory_bytes);
      return {};
    });
  }

  static constexpr clone_balloon_policy_type type = {
      sizeof(clone_balloon_policy_type),
      0,
      &T::descriptor,
      create,
      [](void* policy) noexcept { delete &self(policy); },
      decide,
      [](void* policy, const clone_writer* writer, clone_err* err) noexcept {
        return guarded(err, [&] { return self(policy).save(Writer(*writer)); });
      },
      [](void* policy, const clone_reader* reader, clone_err* err) noexcept {
        return guarded(err, [&] { return self(policy).load(Reader(*reader)); });
      },
      [](void* policy, const char* id) noexcept { return self(policy).extension(id); }};
};

}  // namespace detail

template <typename... Policies>
const clone_balloon_policy_factory* balloon_policy_factory() {
  static constexpr const clone_balloon_policy_type* types[] = {&detail::PolicyThunks<Policies>::type...};
  static constexpr clone_balloon_policy_factory factory = {
      sizeof(clone_balloon_policy_factory), sizeof...(Policies),
      [](uint32_t index) noexcept -> const clone_balloon_policy_type* {
        return index < sizeof...(Policies) ? types[index] : nullptr;
      }};
  return &factory;
}

}  // namespace clone_sdk
