// SPDX-License-Identifier: Apache-2.0
// Errors as values: Result<T> holds a T or an Error that says what went wrong, in words meant for the user.
#pragma once

#include <cerrno>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

#include "clone/abi/base.h"

namespace clone_sdk {

// One line for a person. `code` is an errno value, 0 where none applies; `status` crosses the plugin interface.
struct [[nodiscard]] Error {
  std::string message;
  int code = 0;
  clone_status status = CLONE_ERR_INVALID;

  // Puts the thing that was being done in front: "disk.img: No such file or directory".
  Error context(std::string_view what) && {
    message = std::string(what) + ": " + message;
    return std::move(*this);
  }
};

inline Error errno_error(std::string_view what, int code = errno) {
  return Error{std::string(what) + ": " + std::strerror(code), code, CLONE_ERR_SYSTEM};
}

template <typename T>
class [[nodiscard]] Result {
 public:
  using value_type = T;

  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}
  Result(Error error) : state_(std::in_place_index<1>, std::move(error)) {}

  bool ok() const { return state_.index() == 0; }
  explicit operator bool() const { return ok(); }
  T& value() & { return std::get<0>(state_); }
  const T& value() const& { return std::get<0>(state_); }
  T&& value() && { return std::get<0>(std::move(state_)); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T&& operator*() && { return std::move(*this).value(); }
  Error& error() & { return std::get<1>(state_); }
  const Error& error() const& { return std::get<1>(state_); }
  Error&& error() && { return std::get<1>(std::move(state_)); }

  Result context(std::string_view what) && {
    if (!ok()) return std::move(*this).error().context(what);
    return std::move(*this);
  }

 private:
  std::variant<T, Error> state_;
};

template <>
class [[nodiscard]] Result<void> {
 public:
  using value_type = void;

  Result() = default;
  Result(Error error) : error_(std::move(error)) {}

  bool ok() const { return !error_; }
  explicit operator bool() const { return ok(); }
  void value() const {}
  Error& error() & { return *error_; }
  const Error& error() const& { return *error_; }
  Error&& error() && { return *std::move(error_); }

  Result context(std::string_view what) && {
    if (!ok()) return std::move(*error_).context(what);
    return {};
  }

 private:
  std::optional<Error> error_;
};

}  // namespace clone_sdk

// `auto file = CLONE_TRY(open(path));` leaves the function with the error, or goes on with the value.
#define CLONE_TRY(expression)                                     \
  __extension__({                                                 \
    auto&& try_result_ = (expression);                            \
    if (!try_result_.ok()) return std::move(try_result_).error(); \
    std::move(try_result_).value();                               \
  })
