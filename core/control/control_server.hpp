// SPDX-License-Identifier: Apache-2.0
// A VM's control socket (docs/control.md): JSON-RPC 2.0, one request a line, on the main loop; and its metrics.
#pragma once

#include <boost/json.hpp>
#include <chrono>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "clone/abi/control.h"
#include "loop/event_loop.hpp"
#include "util/fd.hpp"
#include "util/result.hpp"

namespace vmm {

// Everything is [control] unless it says otherwise.
class ControlServer {
  struct Client;

 public:
  // The way back of one answer. Dropped unanswered, it tells the client so. A client that has left is no error.
  class Reply {
   public:
    Reply(const std::shared_ptr<Client>& client, ControlServer* server, boost::json::value id);
    Reply(Reply&&) = default;
    Reply& operator=(Reply&&) = delete;
    ~Reply();

    void succeed(boost::json::value result, Fd fd = {});
    void fail(std::string_view message);

   private:
    // The client that waits, once.
    std::shared_ptr<Client> take_client();

    std::weak_ptr<Client> client_;
    ControlServer* server_;  // lasts as long as its clients
    boost::json::value id_;
  };
  using Call = std::function<void(const boost::json::object& parameters, Reply reply)>;

  struct Metric {
    std::string name;  // without "clone_"
    std::string help;
    uint32_t kind = CLONE_METRIC_GAUGE;
    std::string instance;  // label; empty: none
    std::function<double()> read;
  };

  // `socket` listens. The loop lasts longer. `line_limit`: for the rest of a line that has begun.
  ControlServer(EventLoop& loop, Fd socket, std::chrono::milliseconds line_limit = std::chrono::seconds(30))
      : loop_(loop), socket_(std::move(socket)), line_limit_(line_limit) {}
  ControlServer(const ControlServer&) = delete;
  ControlServer& operator=(const ControlServer&) = delete;
  ~ControlServer();

  Result<void> start();

  // `owner`: whose it is, so that it goes with its owner. CLONE_ERR_BUSY when the name is taken.
  Result<void> add_method(const std::string& owner, const std::string& name, std::string help, Call call);
  void add_metric(const std::string& owner, Metric metric);
  void remove_all_of(const std::string& owner);

  // To those who called events.subscribe.
  void notify(std::string_view method, boost::json::object parameters);
  // Prometheus text format 0.0.4.
  std::string metrics_text();
  // What is still buffered, without waiting for slow clients.
  void flush();

 private:
  struct Method {
    std::string owner;
    std::string help;
    Call call;
  };

  void accept_clients();
  void serve(const std::shared_ptr<Client>& client, uint32_t events);
  void take_line(const std::shared_ptr<Client>& client, std::string_view line);
  void serve_http(const std::shared_ptr<Client>& client);
  void send(const std::shared_ptr<Client>& client, std::string bytes, Fd fd = {});
  void refuse(const std::shared_ptr<Client>& client, int code, std::string_view message, const boost::json::value& id);
  void write_out(const std::shared_ptr<Client>& client);
  void drop(const std::shared_ptr<Client>& client);
  void drop_slow();
  boost::json::value discover() const;

  EventLoop& loop_;
  Fd socket_;
  const std::chrono::milliseconds line_limit_;
  std::list<std::shared_ptr<Client>> clients_;
  std::map<std::string, Method, std::less<>> methods_;
  std::vector<std::pair<std::string, Metric>> metrics_;  // with their owners
  EventLoop::TimerId slow_timer_ = 0;
};

// clone.host-control/1: the server is that of the HostContext behind the host.
const clone_host_control* control_service();
// clone.host-instances/1, of a VM that has a control socket.
const clone_host_instances* instances_service();

}  // namespace vmm
