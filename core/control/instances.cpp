// SPDX-License-Identifier: Apache-2.0
// Directories of VMs. The lock `.lock` of their parent is held while one is made or cleared; a VM holds the lock of its
// own directory for as long as it lives.
#include "control/instances.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <boost/json.hpp>
#include <chrono>
#include <filesystem>
#include <memory>

#include "util/log.hpp"

namespace vmm {
namespace {

constexpr const char* kDescription = "vm.json";
constexpr size_t kMaxDescriptionBytes = 64 * 1024;
constexpr size_t kMaxNameBytes = 63;

bool all_digits(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

bool is_id(std::string_view text) {
  return text.size() == 8 && text.find_first_not_of("0123456789abcdef") == std::string_view::npos && !all_digits(text);
}

// Eight hexadecimal digits of which one is a letter, so that no id looks like a process id.
Result<std::string> random_id() {
  static constexpr char digits[] = "0123456789abcdef";
  std::string id;
  do {
    uint32_t bits = 0;
    if (::getrandom(&bits, sizeof bits, 0) != sizeof bits) return errno_error("getrandom");
    id.clear();
    for (int i = 0; i < 8; ++i, bits >>= 4) id += digits[bits & 15];
  } while (all_digits(id));
  return id;
}

Result<void> check_name(const std::string& name) {
  auto allowed = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_' ||
           c == '.';
  };
  const bool good = !name.empty() && name.size() <= kMaxNameBytes && name[0] != '-' && name[0] != '.' &&
                    std::all_of(name.begin(), name.end(), allowed) && !all_digits(name);
  if (good) return {};
  return Error{
      "--name: '" + name +
      "' given; allowed are up to 63 letters, digits, '-', '_' and '.', not digits alone (those are process ids)"};
}

// Makes the folder and those above it, ours alone. One that is there must not be writable by others.
Result<Fd> open_root(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(std::filesystem::path(path).parent_path(), error);
  if (::mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) return errno_error(path);
  Fd root(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  struct stat status {};
  if (!root || ::fstat(root.get(), &status) != 0) return errno_error(path);
  if (status.st_uid != ::geteuid() && status.st_uid != 0)
    return Error{path + ": belongs to user " + std::to_string(status.st_uid) + "; allowed is a folder of your own"};
  if (status.st_mode & (S_IWGRP | S_IWOTH))
    return Error{path + ": others can write to it; allowed is a folder of your own (chmod go-w)"};
  return root;
}

Fd open_instance(int root, const std::string& id) {
  return Fd(::openat(root, id.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW));
}

// Others who ask at the same moment share the lock.
bool is_live(int directory) { return ::flock(directory, LOCK_SH | LOCK_NB) != 0 && errno == EWOULDBLOCK; }

std::vector<std::string> names_in(int directory) {
  std::vector<std::string> names;
  Fd again(::openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  std::unique_ptr<DIR, int (*)(DIR*)> stream(again ? ::fdopendir(again.get()) : nullptr, ::closedir);
  if (!stream) return names;
  again.release();
  while (const dirent* entry = ::readdir(stream.get()))
    if (std::string_view name = entry->d_name; name != "." && name != "..") names.emplace_back(name);
  return names;
}

// The files of a VM's directory, one level deep, and the directory itself.
void remove_instance(int root, int directory, const std::string& id) {
  for (const std::string& name : names_in(directory)) ::unlinkat(directory, name.c_str(), 0);
  ::unlinkat(root, id.c_str(), AT_REMOVEDIR);
}

std::string description_of(const InstanceRecord& record) {
  const boost::json::object json = {{"id", record.id},
                                    {"name", record.name},
                                    {"pid", record.pid},
                                    {"vcpus", record.vcpus},
                                    {"memory_bytes", record.memory_bytes},
                                    {"started_ms", record.started_ms}};
  return boost::json::serialize(json) + "\n";
}

Result<void> write_description(int directory, const std::string& text) {
  const Fd file(::openat(directory, "vm.json.new", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!file || ::write(file.get(), text.data(), text.size()) != static_cast<ssize_t>(text.size()) ||
      ::renameat(directory, "vm.json.new", directory, kDescription) != 0)
    return errno_error(kDescription);
  return {};
}

std::optional<InstanceRecord> read_description(int directory) {
  const Fd file(::openat(directory, kDescription, O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
  if (!file) return std::nullopt;
  std::string text(kMaxDescriptionBytes, '\0');
  const ssize_t size = ::read(file.get(), text.data(), text.size());
  if (size <= 0) return std::nullopt;
  text.resize(static_cast<size_t>(size));
  try {
    const boost::json::value json = boost::json::parse(text);
    InstanceRecord record;
    record.id = json.at("id").as_string();
    record.name = json.at("name").as_string();
    record.pid = json.at("pid").to_number<int>();
    record.vcpus = json.at("vcpus").to_number<uint32_t>();
    record.memory_bytes = json.at("memory_bytes").to_number<uint64_t>();
    record.started_ms = json.at("started_ms").to_number<int64_t>();
    return record;
  } catch (const std::exception&) {
    return std::nullopt;
  }
}

std::vector<InstanceRecord> live_in(const std::string& root_path, int root) {
  std::vector<InstanceRecord> records;
  for (const std::string& id : names_in(root)) {
    if (!is_id(id)) continue;
    const Fd directory = open_instance(root, id);
    if (!directory || !is_live(directory.get())) continue;
    auto record = read_description(directory.get());
    if (!record || record->id != id) continue;
    record->directory = root_path + "/" + id;
    records.push_back(std::move(*record));
  }
  std::sort(records.begin(), records.end(), [](const InstanceRecord& a, const InstanceRecord& b) {
    return std::pair(a.started_ms, a.id) < std::pair(b.started_ms, b.id);
  });
  return records;
}

void clear_stale(int root) {
  for (const std::string& id : names_in(root)) {
    if (!is_id(id)) continue;
    const Fd directory = open_instance(root, id);
    if (!directory || ::flock(directory.get(), LOCK_SH | LOCK_NB) != 0) continue;
    log_debug("clearing what VM " + id + " left behind");
    remove_instance(root, directory.get(), id);
  }
}

std::string candidates(const std::vector<InstanceRecord>& records) {
  std::string text;
  for (const InstanceRecord& record : records) {
    if (!text.empty()) text += ", ";
    text += record.name;
    text +=
        " (" + (record.name == record.id ? "" : "id " + record.id + ", ") + "pid " + std::to_string(record.pid) + ")";
  }
  return text;
}

}  // namespace

Result<std::string> runtime_root() {
  auto from = [](const char* variable) {
    const char* value = std::getenv(variable);
    return std::string(value ? value : "");
  };
  if (std::string given = from("CLONE_RUNTIME_DIR"); !given.empty()) {
    std::error_code error;
    const auto absolute = std::filesystem::absolute(given, error).lexically_normal();
    if (error) return Error{"CLONE_RUNTIME_DIR=" + given + ": " + error.message()};
    std::string path = absolute.string();
    while (path.size() > 1 && path.back() == '/') path.pop_back();
    return path;
  }
  if (::geteuid() == 0) return std::string("/run/clone");
  if (const std::string session = from("XDG_RUNTIME_DIR"); !session.empty() && session[0] == '/')
    return session + "/clone";
  if (const std::string home = from("HOME"); !home.empty() && home[0] == '/') return home + "/.clone/run";
  return Error{"no place for the VM's sockets: set XDG_RUNTIME_DIR, HOME or CLONE_RUNTIME_DIR"};
}

Result<Fd> open_runtime_root() { return open_root(TRY(runtime_root())).context("runtime directory"); }

Result<Fd> lock_in_runtime_root(int root, const char* name) {
  Fd lock(::openat(root, name, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!lock) return errno_error(name);
  while (::flock(lock.get(), LOCK_EX) != 0)
    if (errno != EINTR) return errno_error(name);
  return lock;
}

Result<InstanceDirectory> InstanceDirectory::create(std::string name, uint32_t vcpus, uint64_t memory_bytes) {
  if (!name.empty()) TRY(check_name(name));
  const std::string root_path = TRY(runtime_root());
  Fd root = TRY(open_runtime_root());
  const Fd lock = TRY(lock_in_runtime_root(root.get(), ".lock").context("runtime directory " + root_path));
  clear_stale(root.get());
  if (!name.empty())
    for (const InstanceRecord& other : live_in(root_path, root.get()))
      if (other.name == name || other.id == name)
        return Error{"--name: '" + name + "' is taken by the VM of process " + std::to_string(other.pid)};

  InstanceRecord record;
  do {
    record.id = TRY(random_id());
    if (::mkdirat(root.get(), record.id.c_str(), 0700) == 0) break;
    if (errno != EEXIST) return errno_error(root_path + "/" + record.id);
  } while (true);
  Fd directory = open_instance(root.get(), record.id);
  if (!directory || ::flock(directory.get(), LOCK_EX) != 0) return errno_error(root_path + "/" + record.id);
  record.name = name.empty() ? record.id : std::move(name);
  record.pid = ::getpid();
  record.directory = root_path + "/" + record.id;
  record.vcpus = vcpus;
  record.memory_bytes = memory_bytes;
  using namespace std::chrono;
  record.started_ms = duration_cast<milliseconds>(system_clock::now().time_since_epoch()).count();
  InstanceDirectory made(std::move(record), std::move(root), std::move(directory));  // goes if this fails
  TRY(write_description(made.fd(), description_of(made.record())).context(made.record().directory));
  return made;
}

InstanceDirectory::~InstanceDirectory() {
  if (directory_) remove_instance(root_.get(), directory_.get(), record_.id);
}

Result<std::vector<InstanceRecord>> list_instances() {
  const std::string path = TRY(runtime_root());
  const Fd root(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!root && errno == ENOENT) return std::vector<InstanceRecord>();
  if (!root) return errno_error(path);
  return live_in(path, root.get());
}

Result<InstanceRecord> find_instance(std::string_view what) {
  std::vector<InstanceRecord> live = TRY(list_instances());
  if (live.empty()) return Error{"no VM is running"};
  if (what.empty()) {
    if (live.size() == 1) return std::move(live.front());
    return Error{std::to_string(live.size()) + " VMs are running; say which by --vm-id: " + candidates(live)};
  }
  for (InstanceRecord& record : live)
    if (record.name == what || record.id == what || std::to_string(record.pid) == what) return std::move(record);
  return Error{"--vm-id: no VM is called '" + std::string(what) + "'; there are: " + candidates(live)};
}

}  // namespace vmm
