// SPDX-License-Identifier: Apache-2.0
// The snapshot backend "memory": what is written is read, keepers that live on, end or are killed, and hostile ones.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <thread>

#include "scratch_dir.hpp"
#include "snapshot-file/format.hpp"
#include "snapshot_backend_rig.hpp"
#include "tests/fuzz/snapshot_seal.hpp"
#include "util/fd.hpp"

using namespace vmm;
using namespace vmm::test;
namespace fs = std::filesystem;
namespace format = snapshot_file;

namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kMemory = 64 * kPage;
using Bytes = std::vector<std::byte>;
constexpr char kBackend[] = "memory";

Bytes bytes(std::string_view text) {
  const auto* data = reinterpret_cast<const std::byte*>(text.data());
  return {data, data + text.size()};
}
Bytes page_of(uint8_t with, uint64_t count = 1) { return Bytes(count * kPage, std::byte{with}); }
bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// The backend's table over one store; each call keeps its error text in `error`.
class Backend : public SnapshotBackendRig<kBackend> {
 public:
  explicit Backend(const KeyValues& options) : SnapshotBackendRig(options) {}

  std::vector<std::string> list(uint64_t* stored_bytes = nullptr) {
    struct Found {
      std::vector<std::string> names;
      uint64_t stored_bytes = 0;
    } found;
    const auto visit = [](void* context, const char* name, const char* parent, uint64_t, uint64_t bytes) {
      CHECK(!parent);
      auto& all = *static_cast<Found*>(context);
      all.names.emplace_back(name);
      all.stored_bytes += bytes;
    };
    CHECK(call([&](clone_err* err) { return table().list(backend_, visit, &found, err); }) == CLONE_OK);
    if (stored_bytes) *stored_bytes = found.stored_bytes;
    return found.names;
  }
  std::vector<clone_snapshot_extent> extents(void* image) {
    std::vector<clone_snapshot_extent> extents;
    for (;;) {
      clone_snapshot_extent extent{};
      extent.size = sizeof extent;
      const auto index = static_cast<uint32_t>(extents.size());
      const clone_status got = call([&](clone_err* err) { return table().memory_extent(image, index, &extent, err); });
      if (got == CLONE_EMPTY) return extents;
      REQUIRE(got == CLONE_OK);
      extents.push_back(extent);
    }
  }
  Bytes memory(void* image) {
    Bytes memory(kMemory);
    uint64_t end = 0;
    for (const auto& extent : extents(image)) {
      REQUIRE(extent.memory_offset >= end);
      end = extent.memory_offset + extent.size_bytes;
      REQUIRE(end <= kMemory);
      REQUIRE(::pread(extent.fd, memory.data() + extent.memory_offset, extent.size_bytes,
                      static_cast<off_t>(extent.fd_offset)) == static_cast<ssize_t>(extent.size_bytes));
    }
    return memory;
  }
  std::string section_of(void* image, const char* owner, const char* tag) {
    uint32_t version = 0;
    const void* data = nullptr;
    uint64_t size_bytes = 0;
    if (call([&](clone_err* err) {
          return table().read_section(image, owner, tag, &version, &data, &size_bytes, err);
        }) != CLONE_OK)
      return error;
    return std::to_string(version) + " " + std::string(static_cast<const char*>(data), size_bytes);
  }
  // A whole snapshot of one page, with a section of its name.
  void make(const char* name, uint8_t with = 1) {
    void* image = begin(name);
    REQUIRE_MESSAGE(image, error);
    REQUIRE(write(image, kPage, page_of(with)));
    REQUIRE(section(image, "core", "name", bytes(name)));
    REQUIRE_MESSAGE(commit(image), error);
    close(image);
  }
  // Why a snapshot cannot be opened; "" when it is sound.
  std::string fault(const char* name) {
    void* image = open(name);
    if (!image) return error;
    const bool sound = verify(image);
    close(image);
    return sound ? "" : error;
  }
};

sockaddr_un address_of(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  REQUIRE(path.size() < sizeof address.sun_path);
  std::strcpy(address.sun_path, path.c_str());
  return address;
}

Fd connect_to(const std::string& path) {
  const sockaddr_un address = address_of(path);
  Fd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) socket.reset();
  return socket;
}

// Who listens there; 0: nobody.
pid_t keeper_at(const std::string& path) {
  const Fd socket = connect_to(path);
  ucred peer{};
  socklen_t size = sizeof peer;
  return socket && ::getsockopt(socket.get(), SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 ? peer.pid : 0;
}

std::string content(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// Keepers of that name, whether they can be reached or not.
size_t count_keepers(const std::string& name) {
  const std::string words = std::string("clone-keeper") + '\0' + name + '\0';
  size_t found = 0;
  for (const auto& entry : fs::directory_iterator("/proc"))
    if (std::isdigit(entry.path().filename().string()[0])) try {
        found += content(entry.path() / "cmdline") == words;
      } catch (const std::ios_base::failure&) {  // it has ended meanwhile
      }
  return found;
}

bool within_seconds(const std::function<bool()>& condition) {
  for (int i = 0; i < 500; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return false;
}

struct Store {
  ScratchDir scratch;
  std::string path = scratch.path() + "/a/store";
  Backend backend{KeyValues{{"store", path}}};

  ~Store() {
    for (const std::string& name : backend.list()) CHECK_MESSAGE(backend.remove(name.c_str()), backend.error);
  }
  std::string socket(const std::string& name) const { return path + "/" + name + ".sock"; }
  // All names, hidden ones too.
  std::vector<std::string> names() const {
    std::vector<std::string> found;
    for (const auto& entry : fs::directory_iterator(path)) found.push_back(entry.path().filename().string());
    std::sort(found.begin(), found.end());
    return found;
  }
  void kill(const std::string& name, int signal) const {
    const pid_t keeper = keeper_at(socket(name));
    REQUIRE(keeper > 1);
    REQUIRE(::kill(keeper, signal) == 0);
    REQUIRE(within_seconds([&] { return keeper_at(socket(name)) == 0; }));
  }
};

// No other test process has such a name: keepers are counted by it.
std::string own_name(const std::string& name) { return name + "-" + std::to_string(::getpid()); }

using Names = std::vector<std::string>;

mode_t mode_of(const std::string& path) {
  struct stat status {};
  REQUIRE(::lstat(path.c_str(), &status) == 0);
  return status.st_mode & 07777;
}

size_t open_descriptors() {
  return static_cast<size_t>(std::distance(fs::directory_iterator("/proc/self/fd"), fs::directory_iterator()));
}

}  // namespace

TEST_CASE("snapshot memory: a snapshot is read as it was written") {
  Store store;
  Backend& backend = store.backend;
  CHECK(backend.list().empty());
  CHECK(!fs::exists(store.path));  // nothing is made before there is something to keep
  void* image = backend.begin("base-1.0_X");
  REQUIRE_MESSAGE(image, backend.error);
  Bytes model(kMemory);
  const auto write = [&](uint64_t page, const Bytes& data) {
    REQUIRE(backend.write(image, page * kPage, data));
    std::copy(data.begin(), data.end(), model.begin() + static_cast<ptrdiff_t>(page * kPage));
  };
  Bytes mixed = page_of(7, 5);
  std::fill_n(mixed.begin() + kPage, 2 * kPage, std::byte{0});
  write(3, mixed);
  write(20, page_of(9, 2));
  write(21, page_of(0));  // zeroes over something
  write(63, page_of(1));
  const std::pair<uint64_t, uint64_t> outside[] = {
      {kPage / 2, kPage}, {0, kPage / 2}, {kMemory, kPage}, {~kPage + 1, kPage}};
  for (const auto& [offset, size_bytes] : outside) {
    CHECK(!backend.write(image, offset, Bytes(size_bytes)));
    CHECK(contains(backend.error, "allowed are whole pages of 4096 inside the memory of 262144 bytes"));
  }
  REQUIRE(backend.section(image, "virtio-blk.0", "queue", bytes("rings"), 3));
  REQUIRE(backend.section(image, "core", "empty", {}));
  CHECK(!backend.section(image, "core", "empty", {}));
  CHECK(backend.error == "section core/empty is written a second time; allowed is once");
  CHECK(!backend.section(image, "core", "../x", {}));
  CHECK(backend.list().empty());
  CHECK(store.names().empty());
  CHECK_MESSAGE(backend.commit(image), backend.error);
  CHECK(!backend.commit(image));
  CHECK(backend.error == "snapshot 'base-1.0_X': is complete already");
  CHECK(!backend.write(image, 0, page_of(1)));
  Backend::close(image);
  CHECK(store.names() == Names{"base-1.0_X.sock"});
  CHECK(mode_of(store.path) == 0700);
  CHECK(mode_of(store.socket("base-1.0_X")) == 0600);

  image = backend.open("base-1.0_X");
  REQUIRE_MESSAGE(image, backend.error);
  CHECK(backend.memory(image) == model);
  CHECK_MESSAGE(backend.verify(image), backend.error);
  CHECK(backend.section_of(image, "virtio-blk.0", "queue") == "3 rings");
  CHECK(backend.section_of(image, "core", "empty") == "1 ");
  CHECK(backend.section_of(image, "core", "queue") == store.socket("base-1.0_X") + ": has no section core/queue");
  CHECK(backend.status == CLONE_ERR_NOT_FOUND);
  std::string sections;
  const auto visit = [](void* context, const char* owner, const char* tag, uint32_t version, uint64_t size_bytes) {
    *static_cast<std::string*>(context) +=
        std::string(owner) + "/" + tag + " " + std::to_string(version) + " " + std::to_string(size_bytes) + "\n";
  };
  CHECK(Backend::table().list_sections(image, visit, &sections, nullptr) == CLONE_OK);
  CHECK(sections == "core/empty 1 0\nvirtio-blk.0/queue 3 5\n");
  Backend::close(image);
  CHECK(!backend.begin("child", "base-1.0_X"));
  CHECK(backend.error == "snapshot 'child', a difference to 'base-1.0_X': the backend memory keeps full snapshots");
  CHECK(!backend.begin("../x"));
  CHECK(!backend.begin("odd", nullptr, kPage + 1));
  CHECK(!backend.open("../x"));
  CHECK(!backend.open("nobody"));
  CHECK(backend.error == "there is no snapshot 'nobody' in " + store.path);
  CHECK(backend.status == CLONE_ERR_NOT_FOUND);
  CHECK(backend.list() == Names{"base-1.0_X"});
}

TEST_CASE("snapshot memory: a page that is written again is what it was last") {
  const std::vector<std::vector<uint8_t>> histories = {{1, 0, 2}, {1, 0}, {0, 1}, {0}, {1, 2}, {1, 0, 0}, {0, 0, 3}};
  Store store;
  Backend& backend = store.backend;
  Bytes model(kMemory);
  void* image = backend.begin("again");
  REQUIRE_MESSAGE(image, backend.error);
  for (uint64_t page = 0; page < histories.size(); ++page) {
    for (const uint8_t with : histories[page]) REQUIRE(backend.write(image, page * kPage, page_of(with)));
    std::fill_n(model.begin() + static_cast<ptrdiff_t>(page * kPage), kPage, std::byte{histories[page].back()});
  }
  REQUIRE_MESSAGE(backend.commit(image), backend.error);
  Backend::close(image);
  image = backend.open("again");
  REQUIRE_MESSAGE(image, backend.error);
  CHECK(backend.memory(image) == model);
  Backend::close(image);
}

TEST_CASE("snapshot memory: memory is sparse, and nobody can change it") {
  Store store;
  constexpr uint64_t kLarge = 1 << 30;
  void* image = store.backend.begin("large", nullptr, kLarge);
  REQUIRE(image);
  REQUIRE(store.backend.write(image, 0, page_of(0, 4096)));
  REQUIRE(store.backend.write(image, 512 << 20, page_of(1)));
  REQUIRE(store.backend.write(image, (512 << 20) + 16 * kPage, page_of(1)));
  REQUIRE(store.backend.write(image, kLarge - kPage, page_of(1)));
  REQUIRE(store.backend.commit(image));
  Backend::close(image);
  uint64_t stored_bytes = 0;
  CHECK(store.backend.list(&stored_bytes) == Names{"large"});
  CHECK(stored_bytes >= 4 * kPage);
  CHECK(stored_bytes <= 8 * kPage);
  image = store.backend.open("large");
  REQUIRE(image);
  const auto extents = store.backend.extents(image);
  REQUIRE(extents.size() == 2);
  CHECK(extents[0].memory_offset == 512 << 20);
  CHECK(extents[0].size_bytes == 17 * kPage);
  CHECK(extents[1].memory_offset == kLarge - kPage);
  for (const off_t offset : {off_t{0}, off_t{512 << 20}, off_t{kLarge}})
    CHECK(::pwrite(extents[0].fd, "x", 1, offset) == -1);
  CHECK(::ftruncate(extents[0].fd, 0) != 0);
  CHECK(::ftruncate(extents[0].fd, 2 * kLarge) != 0);
  Backend::close(image);
  // Full of changes between data and holes: still few mappings.
  image = store.backend.begin("scattered", nullptr, 8 * kLarge);
  REQUIRE(image);
  for (uint64_t at = 0; at < 8 * kLarge; at += 8 << 20) REQUIRE(store.backend.write(image, at, page_of(1)));
  REQUIRE(store.backend.commit(image));
  Backend::close(image);
  image = store.backend.open("scattered");
  REQUIRE(image);
  CHECK(store.backend.extents(image).size() <= 512);
  Backend::close(image);
}

TEST_CASE("snapshot memory: two have it open as forks do, also after it was removed") {
  Store store;
  store.backend.make("base", 5);
  Backend other(KeyValues{{"store", store.path}});
  void* images[] = {store.backend.open("base"), other.open("base")};
  std::byte* memories[2];
  for (int i = 0; i < 2; ++i) {
    REQUIRE(images[i]);
    const auto extent = store.backend.extents(images[i]).at(0);
    void* mapped =
        ::mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE, extent.fd, static_cast<off_t>(extent.fd_offset));
    REQUIRE(mapped != MAP_FAILED);
    memories[i] = static_cast<std::byte*>(mapped);
    memories[i][0] = std::byte(10 + i);
  }
  CHECK(store.backend.remove("base"));
  CHECK(memories[0][0] == std::byte{10});
  CHECK(memories[1][0] == std::byte{11});
  for (int i = 0; i < 2; ++i) {
    CHECK(memories[i][1] == std::byte{5});
    CHECK(store.backend.memory(images[i])[kPage] == std::byte{5});
    CHECK(store.backend.verify(images[i]));
    CHECK(store.backend.section_of(images[i], "core", "name") == "1 base");
    ::munmap(memories[i], kPage);
    Backend::close(images[i]);
  }
}

TEST_CASE("snapshot memory: a keeper outlives who started it, and has nothing of it") {
  Store store;
  // As in a VM: signals blocked and ignored, threads, much memory, descriptors that stay open over an exec.
  const Fd stray(::open("/dev/null", O_RDONLY));
  const Bytes ballast(64 << 20, std::byte{1});
  std::atomic<bool> stop = false;
  std::thread thread([&] {
    while (!stop) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
  const pid_t child = ::fork();
  if (child == 0) {
    sigset_t all;
    sigfillset(&all);
    ::sigprocmask(SIG_SETMASK, &all, nullptr);
    ::signal(SIGTERM, SIG_IGN);
    void* image = store.backend.begin("base");
    const bool done = image && store.backend.write(image, kPage, page_of(3)) && store.backend.commit(image);
    ::kill(::getpid(), done ? SIGKILL : SIGABRT);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  stop = true;
  thread.join();
  REQUIRE(WIFSIGNALED(status));
  REQUIRE(WTERMSIG(status) == SIGKILL);
  CHECK(store.backend.fault("base").empty());
  const pid_t keeper = keeper_at(store.socket("base"));
  REQUIRE(keeper > 1);
  const std::string proc = "/proc/" + std::to_string(keeper);
  CHECK(content(proc + "/comm") == "clone-keeper\n");
  CHECK(content(proc + "/cmdline") == std::string("clone-keeper\0base\0", 18));
  CHECK(content(proc + "/environ").empty());
  CHECK(::getsid(keeper) == keeper);
  // Clients come and go; three stay.
  CHECK(within_seconds(
      [&] { return std::distance(fs::directory_iterator(proc + "/fd"), fs::directory_iterator()) == 3; }));
  const std::string text = content(proc + "/status");
  MESSAGE(text.substr(text.find("VmRSS"), 64));
  CHECK(std::stoul(text.substr(text.find("VmRSS:") + 6)) < 1024);
  CHECK(std::stoul(text.substr(text.find("VmSize:") + 7)) < 4096);
  store.kill("base", SIGTERM);
  CHECK(store.backend.list().empty());
}

TEST_CASE("snapshot memory: a name that is taken is refused, before and after") {
  Store store;
  Backend& backend = store.backend;
  const std::string name = own_name("twice");
  void* late = backend.begin(name.c_str());
  REQUIRE(late);
  backend.make(name.c_str(), 4);
  const std::string taken =
      "there is a snapshot '" + name + "' in " + store.path + " already; allowed is another name, or to remove it";
  CHECK(!backend.begin(name.c_str()));
  CHECK(backend.error == taken);
  CHECK(backend.status == CLONE_ERR_BUSY);
  CHECK(!backend.commit(late));
  CHECK(backend.error == "snapshot '" + name + "': " + taken);
  CHECK(!backend.commit(late));
  CHECK(contains(backend.error, "an earlier write failed"));
  Backend::close(late);
  CHECK(store.names() == Names{name + ".sock"});
  CHECK(within_seconds([&] { return count_keepers(name) == 1; }));
  void* image = backend.open(name.c_str());
  REQUIRE(image);
  CHECK(backend.memory(image)[kPage] == std::byte{4});
  Backend::close(image);
}

TEST_CASE("snapshot memory: removed, killed, cleared") {
  Store store;
  Backend& backend = store.backend;
  const std::string name = own_name("base");
  CHECK(!backend.remove("nobody"));
  CHECK(contains(backend.error, "there is no snapshot 'nobody'"));
  CHECK(backend.status == CLONE_ERR_NOT_FOUND);
  backend.make(name.c_str());
  CHECK(count_keepers(name) == 1);
  CHECK(backend.remove(name.c_str()));
  CHECK(within_seconds([&] { return count_keepers(name) == 0; }));
  CHECK(store.names().empty());
  CHECK(!backend.remove(name.c_str()));
  CHECK(backend.error == "there is no snapshot '" + name + "' in " + store.path);

  for (const int signal : {SIGKILL, SIGTERM}) {
    CAPTURE(signal);
    backend.make(name.c_str(), 6);
    backend.make("other");
    void* fork = backend.open(name.c_str());
    REQUIRE(fork);
    store.kill(name, signal);
    CHECK(store.names() == Names{name + ".sock", "other.sock"});
    CHECK(backend.list() == Names{"other"});
    CHECK(backend.fault(name.c_str()) ==
          "there is no snapshot '" + name + "' in " + store.path + ": its keeper has ended");
    CHECK(backend.status == CLONE_ERR_NOT_FOUND);
    CHECK(!backend.remove(name.c_str()));
    CHECK(backend.status == CLONE_ERR_NOT_FOUND);
    // Files are none of ours, whatever they are called.
    store.scratch.write("a/store/letter.sock", std::string_view("dear"));
    Backend::close(backend.begin("next"));
    CHECK(store.names() == Names{"letter.sock", "other.sock"});
    fs::remove(store.socket("letter"));
    CHECK(backend.memory(fork)[kPage] == std::byte{6});
    Backend::close(fork);
    // The name is free again.
    backend.make(name.c_str());
    store.kill(name, SIGKILL);
    backend.make(name.c_str());
    CHECK(backend.fault(name.c_str()).empty());
    CHECK(backend.remove(name.c_str()));
    CHECK(backend.remove("other"));
  }
}

TEST_CASE("snapshot memory: who is killed while it commits leaves the whole snapshot or nothing") {
  Store store;
  const std::string name = own_name("victim");
  int whole = 0, none = 0;
  for (unsigned round = 0; round < 80; ++round) {
    CAPTURE(round);
    int ready[2];
    REQUIRE(::pipe2(ready, O_CLOEXEC) == 0);
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      void* image = store.backend.begin(name.c_str());
      if (!image || !store.backend.write(image, kPage, page_of(1)) || ::write(ready[1], "r", 1) != 1) ::_exit(1);
      Backend::table().commit(image, nullptr);
      ::_exit(0);
    }
    char byte = 0;
    ::close(ready[1]);
    CHECK(::read(ready[0], &byte, 1) == 1);
    ::close(ready[0]);
    std::this_thread::sleep_for(std::chrono::microseconds(round < 75 ? round * 50 : 200'000));
    ::kill(child, SIGKILL);
    REQUIRE(::waitpid(child, nullptr, 0) == child);
    // A keeper that was not told that it is published goes; it may have been about to start only.
    CHECK(within_seconds([&] { return count_keepers(name) == store.backend.list().size(); }));
    if (!store.backend.list().empty()) {
      CHECK(store.backend.fault(name.c_str()).empty());
      CHECK(store.backend.remove(name.c_str()));
      ++whole;
    } else {
      ++none;
    }
    CHECK(within_seconds([&] {
      void* next = store.backend.begin("next");
      if (!next) return false;
      Backend::close(next);
      return store.names().empty() && count_keepers(name) == 0;
    }));
  }
  MESSAGE("killed: " << whole << " whole, " << none << " without a trace");
  CHECK(whole > 0);
  CHECK(none > 0);
}

TEST_CASE("snapshot memory: another user is not served") {
  if (::geteuid() != 0) return;  // the socket's mode keeps others out already; root can be another user
  Store store;
  store.backend.make("base");
  for (const std::string& folder : {store.scratch.path(), store.scratch.path() + "/a", store.path})
    REQUIRE(::chmod(folder.c_str(), 0755) == 0);
  REQUIRE(::chmod(store.socket("base").c_str(), 0777) == 0);
  for (const char request : {'g', 'e'}) {
    const pid_t child = ::fork();
    if (child == 0) {
      if (::setresgid(65534, 65534, 65534) != 0 || ::setresuid(65534, 65534, 65534) != 0) ::_exit(2);
      const Fd socket = connect_to(store.socket("base"));
      char byte = 0;
      if (!socket) ::_exit(3);
      ::send(socket.get(), &request, 1, MSG_NOSIGNAL);
      ::_exit(::recv(socket.get(), &byte, 1, 0) <= 0 ? 0 : 4);
    }
    int status = -1;
    REQUIRE(::waitpid(child, &status, 0) == child);
    CHECK(WEXITSTATUS(status) == 0);
  }
  CHECK(store.backend.fault("base").empty());
  // Its own backend says who does not want it.
  const pid_t child = ::fork();
  if (child == 0) {
    if (::setresgid(65534, 65534, 65534) != 0 || ::setresuid(65534, 65534, 65534) != 0) ::_exit(2);
    const std::string fault = store.backend.fault("base");
    ::_exit(fault == store.socket("base") + ": its keeper hung up" ? 0 : 3);
  }
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(WEXITSTATUS(status) == 0);
}

TEST_CASE("snapshot memory: a folder that others could have written is refused by its path") {
  Store store;
  Backend& backend = store.backend;
  backend.make("base");
  const auto refused = [&](const std::string& why) {
    CHECK(backend.fault("base") == store.path + ": refused: " + why);
    CHECK(!backend.begin("next"));
    CHECK(contains(backend.error, ": refused: "));
    CHECK(!backend.remove("base"));
    CHECK(contains(backend.error, ": refused: "));
  };
  for (const mode_t others : {0020, 0002}) {
    REQUIRE(::chmod(store.path.c_str(), 0700 | others) == 0);
    refused("others than its owner can write to it; chmod go-w it if you trust what it holds");
  }
  REQUIRE(::chmod(store.path.c_str(), 0700) == 0);
  if (::geteuid() == 0) {
    REQUIRE(::chown(store.path.c_str(), 1234, 0) == 0);
    refused("belongs to user 1234; allowed is root");
    REQUIRE(::chown(store.path.c_str(), 0, 0) == 0);
  }
  CHECK(backend.fault("base").empty());
}

TEST_CASE("snapshot memory: without a folder given, it is in that of the VMs") {
  const ScratchDir scratch;
  REQUIRE(::setenv("CLONE_RUNTIME_DIR", scratch.path().c_str(), 1) == 0);
  Backend backend(KeyValues{});
  backend.make("base");
  CHECK(fs::exists(scratch.path() + "/templates/base.sock"));
  CHECK(backend.list() == Names{"base"});
  CHECK(backend.remove("base"));
  ::unsetenv("CLONE_RUNTIME_DIR");
}

namespace {

// Files in memory, as a keeper hands them out or should not.
constexpr int kAllSeals = F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW;
Fd file_of(const Bytes& content, uint64_t size_bytes, int seals = kAllSeals) {
  Fd file(::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  REQUIRE(::ftruncate(file.get(), static_cast<off_t>(size_bytes)) == 0);
  REQUIRE(::pwrite(file.get(), content.data(), content.size(), 0) == static_cast<ssize_t>(content.size()));
  REQUIRE(::fcntl(file.get(), F_ADD_SEALS, seals) == 0);
  return file;
}
Fd file_of(const Bytes& content) { return file_of(content, content.size()); }

Bytes good_state(const std::string& parent = "") {
  static const Bytes one = bytes("one");
  format::State state;
  state.memory_bytes = kMemory;
  state.parent = parent;
  state.sections[{"a", "one"}] = {1, format::sha256(one), one};
  state.extents = {{kPage, kPage}};
  Bytes file = format::encode_tables(state);
  file.insert(file.end(), one.begin(), one.end());
  return file;
}

// Answers each request at NAME.sock with the same text and files.
class FakeKeeper {
 public:
  FakeKeeper(const std::string& path, std::string text, std::vector<int> files)
      : path_(path), text_(std::move(text)), files_(std::move(files)) {
    const sockaddr_un address = address_of(path_);
    listener_ = Fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    REQUIRE(::bind(listener_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
    REQUIRE(::listen(listener_.get(), 8) == 0);
    thread_ = std::thread([this] { serve(); });
  }
  FakeKeeper(const FakeKeeper&) = delete;
  ~FakeKeeper() {
    ::shutdown(listener_.get(), SHUT_RDWR);
    thread_.join();
    ::unlink(path_.c_str());
  }

 private:
  void serve() const {
    for (;;) {
      const Fd client(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
      if (!client) return;
      char request = 0;
      if (::recv(client.get(), &request, 1, 0) != 1 || text_.empty()) continue;
      alignas(cmsghdr) char control[CMSG_SPACE(8 * sizeof(int))]{};
      iovec text{const_cast<char*>(text_.data()), text_.size()};
      msghdr message{};
      message.msg_iov = &text;
      message.msg_iovlen = 1;
      if (!files_.empty()) {
        const size_t size_bytes = files_.size() * sizeof(int);
        message.msg_control = control;
        message.msg_controllen = CMSG_SPACE(size_bytes);
        cmsghdr* const header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(size_bytes);
        std::memcpy(CMSG_DATA(header), files_.data(), size_bytes);
      }
      ::sendmsg(client.get(), &message, MSG_NOSIGNAL);
    }
  }

  const std::string path_, text_;
  const std::vector<int> files_;
  Fd listener_;
  std::thread thread_;
};

}  // namespace

TEST_CASE("snapshot memory: hostile answers are refused with the socket's path") {
  Store store;
  Backend& backend = store.backend;
  Backend::close(backend.begin("x"));  // makes the folder
  const Bytes state_bytes = good_state();
  const Fd memory = file_of({}, kMemory), state = file_of(state_bytes);
  const std::string greeting = "CLONEKP1", path = store.socket("x");
  const size_t descriptors = open_descriptors();
  const auto fault_of = [&](const std::string& text, const std::vector<int>& files) {
    const FakeKeeper keeper(path, text, files);
    const std::string fault = backend.fault("x");
    if (fault.empty()) return fault;
    CHECK_MESSAGE(fault.starts_with(path + ": "), fault);
    CHECK((backend.status == CLONE_ERR_CORRUPT || contains(fault, "hung up")));
    return fault.substr(std::min(fault.size(), path.size() + 2));
  };
  const auto fault_with = [&](const Fd& other_memory, const Fd& other_state) {
    const std::string fault = fault_of(greeting, {other_memory.get(), other_state.get()});
    const FakeKeeper keeper(path, greeting, {other_memory.get(), other_state.get()});
    backend.list();
    return fault;
  };
  CHECK(fault_with(memory, state).empty());

  const std::string no_answer = "its answer is not a keeper's";
  CHECK(fault_of("", {}) == "its keeper hung up");
  CHECK(fault_of(greeting, {}) == no_answer);
  CHECK(fault_of(greeting, {memory.get()}) == no_answer);
  CHECK(fault_of(greeting, {memory.get(), state.get(), state.get()}) == no_answer);
  CHECK(fault_of(greeting, std::vector<int>(5, memory.get())) == no_answer);
  CHECK(fault_of("CLONEKP2", {memory.get(), state.get()}) == no_answer);
  CHECK(fault_of("CLONE", {memory.get(), state.get()}) == no_answer);
  CHECK(fault_of(greeting + "x", {memory.get(), state.get()}) == no_answer);
  CHECK(fault_of(greeting + std::string(5000, 'x'), {memory.get(), state.get()}) == no_answer);

  for (const int seals : {0, F_SEAL_WRITE, F_SEAL_WRITE | F_SEAL_SHRINK, F_SEAL_SHRINK | F_SEAL_GROW}) {
    CHECK(fault_with(file_of({}, kMemory, seals), state) == "its memory is not a file in memory that is sealed");
    CHECK(fault_with(memory, file_of(state_bytes, state_bytes.size(), seals)) ==
          "its state is not a file in memory that is sealed");
  }
  const Fd file(::open(store.scratch.write("file", std::string_view("x")).c_str(), O_RDWR | O_CLOEXEC));
  const Fd device(::open("/dev/zero", O_RDWR | O_CLOEXEC));
  for (const Fd* other : {&file, &device}) {
    CHECK(fault_with(*other, state) == "its memory is not a file in memory that is sealed");
    CHECK(fault_with(memory, *other) == "its state is not a file in memory that is sealed");
  }

  CHECK(fault_with(file_of({}, kMemory - kPage), state) == "its memory has 258048 bytes; the guest's has 262144");
  CHECK(fault_with(file_of({}, 0), state) == "its memory has 0 bytes; the guest's has 262144");
  CHECK(fault_with(memory, file_of(good_state("base"))) == "is a difference to 'base'; kept are full snapshots");
  CHECK(fault_with(state, memory) == "is not the state of a snapshot");
  CHECK(contains(fault_with(memory, file_of({}, uint64_t{3} << 30)), "its state has 3221225472 bytes; allowed are "));
  for (size_t size_bytes = 0; size_bytes < state_bytes.size(); size_bytes += size_bytes < 208 ? 104 : 1) {
    CAPTURE(size_bytes);
    CHECK(!fault_with(memory,
                      file_of(Bytes(state_bytes.begin(), state_bytes.begin() + static_cast<ptrdiff_t>(size_bytes))))
               .empty());
  }
  Bytes damaged = state_bytes;
  damaged.back() ^= std::byte{1};
  CHECK(fault_with(memory, file_of(damaged)) == "section a/one is damaged: its checksum is another");
  Bytes beyond = state_bytes;
  const format::Extent extent{kMemory, kPage};
  std::memcpy(beyond.data() + sizeof(format::HeaderRecord) + sizeof(format::SectionRecord), &extent, sizeof extent);
  format::seal(beyond);
  CHECK(fault_with(memory, file_of(beyond)) == "extent 0 reaches beyond the memory of 262144 bytes");

  // What is wrong is passed over by a list, with a word; what does not end is not removed.
  {
    const FakeKeeper keeper(path, greeting, {});
    CHECK(backend.list().empty());
    CHECK(contains(backend.host().log_lines().back(), "passed over: " + path + ": " + no_answer));
    CHECK(!backend.remove("x"));
    CHECK(backend.error == path + ": " + no_answer);
  }
  {
    const FakeKeeper keeper(path, "", {});
    CHECK(!backend.remove("x"));
    CHECK(backend.error == path + ": its keeper goes on");
    CHECK(fs::exists(path));
  }
  CHECK(open_descriptors() == descriptors + 2);  // file, device
}

TEST_CASE("snapshot memory: a keeper that does not answer is not waited for for ever") {
  Store store;
  store.backend.make("stopped");
  const pid_t keeper = keeper_at(store.socket("stopped"));
  REQUIRE(keeper > 1);
  REQUIRE(::kill(keeper, SIGSTOP) == 0);
  const auto begun = std::chrono::steady_clock::now();
  CHECK(store.backend.fault("stopped") == store.socket("stopped") + ": its keeper does not answer");
  CHECK(std::chrono::steady_clock::now() - begun < std::chrono::seconds(10));
  CHECK(!store.backend.begin("stopped"));  // it lives
  CHECK(store.backend.status == CLONE_ERR_BUSY);
  REQUIRE(::kill(keeper, SIGCONT) == 0);
  CHECK(store.backend.fault("stopped").empty());
}
