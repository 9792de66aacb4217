// SPDX-License-Identifier: Apache-2.0
// A client of a VM's control socket (docs/control.md): one call at a time, each with a time limit.
#pragma once

#include <boost/json.hpp>
#include <chrono>
#include <string>
#include <string_view>

#include "control/instances.hpp"
#include "util/fd.hpp"
#include "util/result.hpp"

namespace vmm {

class ControlClient {
 public:
  using Milliseconds = std::chrono::milliseconds;
  struct Reply {
    boost::json::value result;
    Fd fd;  // that came with the answer, if one did
  };

  // The limit holds for the sending of each call, too.
  static Result<ControlClient> connect(const InstanceRecord& instance, Milliseconds limit = Milliseconds(10'000));

  // The error of a method that failed is the VM's own message.
  Result<Reply> call(std::string_view method, boost::json::object parameters = {},
                     Milliseconds limit = Milliseconds(10'000));
  // Waits for the next notification: {"method": …, "params": …}.
  Result<boost::json::value> next_notification(Milliseconds limit);

 private:
  ControlClient(Fd socket, std::string name) : socket_(std::move(socket)), name_(std::move(name)) {}

  Result<boost::json::value> next_line(std::chrono::steady_clock::time_point end);

  Fd socket_;
  std::string name_;  // of the VM, for messages
  std::string received_;
  Fd received_fd_;
  int64_t next_id_ = 1;
};

}  // namespace vmm
