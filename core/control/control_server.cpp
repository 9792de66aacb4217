// SPDX-License-Identifier: Apache-2.0
// The control socket's clients, methods and metrics. Each client may keep at most a bounded number of bytes here, each
// way.
#include "control/control_server.hpp"

#include <fcntl.h>
#include <sys/socket.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <deque>

#include "util/local_socket.hpp"
#include "util/log.hpp"
#include "util/utf8.hpp"

namespace vmm {
namespace {

namespace json = boost::json;

constexpr size_t kMaxClients = 128;
constexpr size_t kMaxLineBytes = 1 << 20;
constexpr size_t kMaxUnsentBytes = 4 << 20;  // more: the client does not read, and goes
constexpr unsigned kReadsPerRound = 16;
constexpr size_t kMaxDepth = 32;

// JSON-RPC 2.0 §5.1
constexpr int kParseError = -32700;
constexpr int kInvalidRequest = -32600;
constexpr int kMethodNotFound = -32601;
constexpr int kInvalidParameters = -32602;
constexpr int kFailed = -32000;

std::string error_line(int code, std::string_view message, const json::value& id) {
  const json::object line = {
      {"jsonrpc", "2.0"}, {"error", {{"code", code}, {"message", valid_utf8(message)}}}, {"id", id}};
  return json::serialize(line) + "\n";
}

std::string number_text(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value < 0 ? "-Inf" : "+Inf";
  char text[64];
  return std::string(text, std::to_chars(text, text + sizeof text, value).ptr);
}

}  // namespace

struct ControlServer::Client {
  using Clock = std::chrono::steady_clock;
  struct Piece {
    std::string bytes;
    Fd fd;
  };

  Fd socket;
  std::string received;  // of a line that is not whole
  Clock::time_point line_began{};
  std::deque<Piece> unsent;
  size_t unsent_bytes = 0;
  unsigned awaited = 0;  // answers that are still to come
  bool subscribed = false;
  bool http = false;
  bool closing = false;  // when everything is answered and sent
  bool gone = false;
};

// A request without an id wants no answer.
ControlServer::Reply::Reply(const std::shared_ptr<Client>& client, ControlServer* server, json::value id)
    : server_(server), id_(std::move(id)) {
  if (id_.is_null()) return;
  client_ = client;
  ++client->awaited;
}

ControlServer::Reply::~Reply() { fail("the machine ended before it answered"); }

std::shared_ptr<ControlServer::Client> ControlServer::Reply::take_client() {
  auto client = std::exchange(client_, {}).lock();
  if (client) --client->awaited;
  return client;
}

void ControlServer::Reply::succeed(json::value result, Fd fd) {
  const auto client = take_client();
  if (!client) return;
  const json::object line = {{"jsonrpc", "2.0"}, {"result", std::move(result)}, {"id", std::move(id_)}};
  server_->send(client, json::serialize(line) + "\n", std::move(fd));
}

void ControlServer::Reply::fail(std::string_view message) {
  if (const auto client = take_client()) server_->send(client, error_line(kFailed, message, id_));
}

ControlServer::~ControlServer() {
  loop_.cancel_timer(slow_timer_);
  if (socket_) loop_.remove_fd(socket_.get());
  while (!clients_.empty()) drop(clients_.front());
}

Result<void> ControlServer::start() {
  TRY(add_method("", "rpc.discover", "Lists the methods.",
                 [this](const json::object&, Reply reply) { reply.succeed(discover()); }));
  TRY(add_method("", "metrics.read", "The metrics as Prometheus text: {\"text\"}.",
                 [this](const json::object&, Reply reply) {
                   reply.succeed(json::object{{"text", metrics_text()}});
                 }));
  return loop_.add_fd(socket_.get(), CLONE_READABLE, [this](uint32_t) { accept_clients(); });
}

Result<void> ControlServer::add_method(const std::string& owner, const std::string& name, std::string help, Call call) {
  const auto [entry, added] = methods_.try_emplace(name, Method{owner, std::move(help), std::move(call)});
  if (!added) return Error{"the method " + name + " is there already", 0, CLONE_ERR_BUSY};
  return {};
}

void ControlServer::add_metric(const std::string& owner, Metric metric) {
  metrics_.emplace_back(owner, std::move(metric));
}

void ControlServer::remove_all_of(const std::string& owner) {
  std::erase_if(methods_, [&](const auto& entry) { return entry.second.owner == owner; });
  std::erase_if(metrics_, [&](const auto& entry) { return entry.first == owner; });
}

void ControlServer::notify(std::string_view method, json::object parameters) {
  const std::string line =
      json::serialize(json::object{{"jsonrpc", "2.0"}, {"method", method}, {"params", std::move(parameters)}}) + "\n";
  const auto clients = clients_;  // sending may drop one
  for (const auto& client : clients)
    if (client->subscribed) send(client, line);
}

std::string ControlServer::metrics_text() {
  // Prometheus wants the rows of one name together.
  std::vector<const Metric*> rows;
  for (const auto& [owner, metric] : metrics_) rows.push_back(&metric);
  std::stable_sort(rows.begin(), rows.end(), [](const Metric* a, const Metric* b) { return a->name < b->name; });
  std::string text;
  std::string_view last;
  for (const Metric* row : rows) {
    if (row->name != last) {
      text += "# HELP clone_" + row->name + " " + row->help + "\n# TYPE clone_" + row->name +
              (row->kind == CLONE_METRIC_COUNTER ? " counter\n" : " gauge\n");
      last = row->name;
    }
    text += "clone_" + row->name;
    if (!row->instance.empty()) text += "{instance=\"" + row->instance + "\"}";
    text += " " + number_text(row->read()) + "\n";
  }
  return text;
}

void ControlServer::flush() {
  const auto clients = clients_;
  for (const auto& client : clients) write_out(client);
}

void ControlServer::accept_clients() {
  for (unsigned i = 0; i < kReadsPerRound; ++i) {
    Fd socket = accept_client(socket_.get());
    if (!socket) return;
    if (!peer_of(socket.get()).trusted || clients_.size() >= kMaxClients) {
      const std::string line =
          error_line(kFailed, clients_.size() >= kMaxClients ? "too many clients" : "not allowed", nullptr);
      ::send(socket.get(), line.data(), line.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
      continue;
    }
    auto client = std::make_shared<Client>();
    client->socket = std::move(socket);
    auto added =
        loop_.add_fd(client->socket.get(), CLONE_READABLE, [this, weak = std::weak_ptr(client)](uint32_t events) {
          if (const auto owner = weak.lock()) serve(owner, events);
        });
    if (added) clients_.push_back(std::move(client));
  }
}

void ControlServer::serve(const std::shared_ptr<Client>& client, uint32_t events) {
  if (events & CLONE_WRITABLE) write_out(client);
  if (client->gone || !(events & (CLONE_READABLE | CLONE_HANGUP))) return;
  // A hangup is told whatever we watch for: nobody is there any more who would read the answers.
  if (client->closing && (events & CLONE_HANGUP)) return drop(client);
  char bytes[16 * 1024];
  for (unsigned i = 0; i < kReadsPerRound && !client->gone && !client->closing; ++i) {
    const ssize_t count = ::recv(client->socket.get(), bytes, sizeof bytes, MSG_DONTWAIT);
    if (count < 0 && (errno == EAGAIN || errno == EINTR)) break;
    if (count <= 0) {
      // A half-closed client still gets the answers that are on their way; nobody else can ask any more.
      if (count == 0 && !(events & CLONE_HANGUP)) {
        client->closing = true;
        return write_out(client);
      }
      return drop(client);
    }
    std::string_view rest(bytes, static_cast<size_t>(count));
    while (!rest.empty() && !client->gone && !client->closing) {
      const size_t newline = rest.find('\n');
      const std::string_view part = rest.substr(0, newline);
      if (client->received.size() + part.size() > kMaxLineBytes) {
        refuse(client, kInvalidRequest, "the request is longer than 1 MiB", nullptr);
        break;
      }
      if (client->received.empty()) client->line_began = Client::Clock::now();
      client->received += part;
      if (newline == std::string_view::npos) break;
      rest.remove_prefix(newline + 1);
      const std::string line = std::exchange(client->received, {});
      take_line(client, line);
    }
  }
  if (!client->gone && !client->received.empty() && slow_timer_ == 0)
    slow_timer_ = loop_.add_timer(line_limit_, [this] { drop_slow(); });
}

void ControlServer::drop_slow() {
  slow_timer_ = 0;
  const auto clients = clients_;
  bool left = false;
  for (const auto& client : clients) {
    if (client->received.empty()) continue;
    if (Client::Clock::now() - client->line_began >= line_limit_)
      refuse(client, kInvalidRequest, "the request did not end in its time", nullptr);
    else
      left = true;
  }
  if (left) slow_timer_ = loop_.add_timer(line_limit_, [this] { drop_slow(); });
}

// A request that breaks the protocol is the client's last.
void ControlServer::refuse(const std::shared_ptr<Client>& client, int code, std::string_view message,
                           const json::value& id) {
  client->received.clear();
  client->closing = true;
  send(client, error_line(code, message, id));
}

void ControlServer::take_line(const std::shared_ptr<Client>& client, std::string_view line) {
  if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
  if (client->http) {
    if (line.empty()) serve_http(client);
    return;
  }
  if (line.starts_with("GET /metrics HTTP/1.")) {
    client->http = true;
    return;
  }
  if (line.empty()) return;

  json::parse_options options;
  options.max_depth = kMaxDepth;
  boost::system::error_code error;
  const json::value request = json::parse(line, error, {}, options);
  if (error) return send(client, error_line(kParseError, "not JSON: " + error.message(), nullptr));
  const json::object* fields = request.if_object();
  const json::value* version = fields ? fields->if_contains("jsonrpc") : nullptr;
  const json::value* method = fields ? fields->if_contains("method") : nullptr;
  const json::value* id = fields ? fields->if_contains("id") : nullptr;
  const bool good_id = !id || id->is_string() || id->is_number();
  if (!version || !version->is_string() || version->get_string() != "2.0" || !method || !method->is_string() ||
      !good_id)
    return send(
        client,
        error_line(kInvalidRequest,
                   "not a request; allowed is {\"jsonrpc\": \"2.0\", \"id\": N, \"method\": NAME, \"params\": {}}",
                   nullptr));
  const json::value answer_id = id ? *id : json::value(nullptr);
  static const json::object none;
  const json::value* parameters = fields->if_contains("params");
  if (parameters && !parameters->is_object() && !(parameters->is_array() && parameters->get_array().empty())) {
    if (id) send(client, error_line(kInvalidParameters, "params: allowed is an object", answer_id));
    return;
  }
  const std::string name(method->get_string());
  if (name == "events.subscribe") {
    client->subscribed = true;
    return Reply(client, this, answer_id).succeed(json::object{});
  }
  const auto found = methods_.find(name);
  if (found == methods_.end()) {
    if (id) send(client, error_line(kMethodNotFound, "no method '" + name + "' (rpc.discover lists them)", answer_id));
    return;
  }
  const Call call = found->second.call;  // it may remove itself
  call(parameters && parameters->is_object() ? parameters->get_object() : none, Reply(client, this, answer_id));
}

void ControlServer::serve_http(const std::shared_ptr<Client>& client) {
  const std::string body = metrics_text();
  client->closing = true;
  send(client, "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: " +
                   std::to_string(body.size()) + "\r\nConnection: close\r\n\r\n" + body);
}

void ControlServer::send(const std::shared_ptr<Client>& client, std::string bytes, Fd fd) {
  if (client->gone) return;
  client->unsent_bytes += bytes.size();
  if (client->unsent_bytes > kMaxUnsentBytes) return drop(client);
  client->unsent.push_back({std::move(bytes), std::move(fd)});
  write_out(client);
}

void ControlServer::write_out(const std::shared_ptr<Client>& client) {
  while (!client->gone && !client->unsent.empty()) {
    Client::Piece& piece = client->unsent.front();
    iovec part{piece.bytes.data(), piece.bytes.size()};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    if (piece.fd) {
      message.msg_control = control;
      message.msg_controllen = sizeof control;
      cmsghdr* header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(sizeof(int));
      const int fd = piece.fd.get();
      std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
    }
    const ssize_t count = ::sendmsg(client->socket.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && errno == EAGAIN) break;
    if (count < 0) return drop(client);
    piece.fd.reset();  // it went with the first byte
    client->unsent_bytes -= static_cast<size_t>(count);
    piece.bytes.erase(0, static_cast<size_t>(count));
    if (piece.bytes.empty()) client->unsent.pop_front();
  }
  if (client->gone) return;
  if (client->closing && client->unsent.empty() && client->awaited == 0) return drop(client);
  const uint32_t reads = client->closing ? 0 : CLONE_READABLE;
  (void)loop_.change_fd(client->socket.get(), reads | (client->unsent.empty() ? 0 : CLONE_WRITABLE));
}

void ControlServer::drop(const std::shared_ptr<Client>& given) {
  const std::shared_ptr<Client> client = given;  // the caller's may be the list's own
  if (std::exchange(client->gone, true)) return;
  loop_.remove_fd(client->socket.get());
  client->socket.reset();
  client->unsent.clear();
  clients_.remove(client);
}

json::value ControlServer::discover() const {
  json::array methods;
  for (const auto& [name, method] : methods_) methods.push_back({{"name", name}, {"summary", method.help}});
  methods.push_back(
      {{"name", "events.subscribe"}, {"summary", "Sends notifications over this connection from now on."}});
  return json::object{{"version", CLONE_VERSION}, {"methods", std::move(methods)}};
}

}  // namespace vmm
