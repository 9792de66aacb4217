// SPDX-License-Identifier: Apache-2.0
// Errors across the C border: into a clone_err on one side, out of it on the other; exceptions stop here.
#pragma once

#include <algorithm>
#include <cstring>
#include <exception>
#include <new>

#include "clone/abi/base.h"
#include "clone/sdk/result.hpp"

namespace clone_sdk {

inline clone_status report(clone_err* err, const Error& error) noexcept {
  if (err && err->size >= sizeof(clone_err)) {
    err->code = error.code;
    const size_t length = std::min(error.message.size(), sizeof err->message - 1);
    std::memcpy(err->message, error.message.data(), length);
    err->message[length] = '\0';
  }
  return error.status < 0 ? error.status : CLONE_ERR_INTERNAL;
}

// Runs a body that returns Result<void> and may throw; gives what crosses the border.
template <typename Body>
clone_status guarded(clone_err* err, Body&& body) noexcept {
  try {
    if (Result<void> result = body(); !result.ok()) return report(err, result.error());
    return CLONE_OK;
  } catch (const std::bad_alloc&) {
    return report(err, Error{"out of memory", ENOMEM, CLONE_ERR_MEMORY});
  } catch (const std::exception& exception) {
    return report(err, Error{std::string("exception: ") + exception.what(), 0, CLONE_ERR_INTERNAL});
  } catch (...) {
    return report(err, Error{"an exception of an unknown type", 0, CLONE_ERR_INTERNAL});
  }
}

// The clone_err of one call: `error.result(table->f(…, error))`.
class ErrorBuffer {
 public:
  operator clone_err*() { return &err_; }
  Result<void> result(clone_status status) const {
    if (status >= 0) return {};
    const size_t length = ::strnlen(err_.message, sizeof err_.message);
    return Error{length ? std::string(err_.message, length) : "failed with status " + std::to_string(status), err_.code,
                 status};
  }

 private:
  clone_err err_{sizeof(clone_err), 0, {}};
};

}  // namespace clone_sdk
