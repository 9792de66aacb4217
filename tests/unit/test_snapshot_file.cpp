// SPDX-License-Identifier: Apache-2.0
// The snapshot backend "file": what is written is read, chains, damage, trust, full disks and sudden deaths.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zstd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <thread>

#include "scratch_dir.hpp"
#include "snapshot-file/format.hpp"
#include "snapshot_backend_rig.hpp"
#include "tests/fuzz/snapshot_seal.hpp"

using namespace vmm;
using namespace vmm::test;
namespace fs = std::filesystem;
namespace format = snapshot_file;

namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kPages = 64;
constexpr uint64_t kMemory = kPages * kPage;
using Bytes = std::vector<std::byte>;
constexpr char kBackend[] = "file";

std::string text(const Bytes& bytes) { return {reinterpret_cast<const char*>(bytes.data()), bytes.size()}; }
Bytes bytes(std::string_view text) {
  const auto* data = reinterpret_cast<const std::byte*>(text.data());
  return {data, data + text.size()};
}

Bytes content(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return bytes(std::string(std::istreambuf_iterator<char>(file), {}));
}
void replace(const std::string& path, const Bytes& with) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << text(with);
}

// The backend's table over one store; each call keeps its error text in `error`.
class Backend : public SnapshotBackendRig<kBackend> {
 public:
  explicit Backend(const std::string& store) : Backend(KeyValues{{"store", store}}) {}
  explicit Backend(const KeyValues& options) : SnapshotBackendRig(options) {}

  // "NAME" or "NAME<PARENT" each.
  std::string list() {
    std::string found;
    const auto visit = [](void* context, const char* name, const char* parent, uint64_t memory_bytes, uint64_t) {
      CHECK(memory_bytes == kMemory);
      auto& all = *static_cast<std::string*>(context);
      all += (all.empty() ? "" : " ") + std::string(name) + (parent ? "<" + std::string(parent) : "");
    };
    const clone_status listed = call([&](clone_err* err) { return table().list(backend_, visit, &found, err); });
    return listed == CLONE_OK ? found : error;
  }
  // What a machine would map, by the extents; checked to be ascending and apart.
  Bytes memory(void* image, size_t* extents = nullptr) {
    Bytes memory(kMemory);
    uint64_t end = 0;
    for (uint32_t index = 0;; ++index) {
      clone_snapshot_extent extent{};
      extent.size = sizeof extent;
      const clone_status got = call([&](clone_err* err) { return table().memory_extent(image, index, &extent, err); });
      if (extents) *extents = index;
      if (got != CLONE_OK) {
        CHECK(got == CLONE_EMPTY);
        return memory;
      }
      REQUIRE(extent.memory_offset >= end);
      end = extent.memory_offset + extent.size_bytes;
      REQUIRE(end <= kMemory);
      REQUIRE(::pread(extent.fd, memory.data() + extent.memory_offset, extent.size_bytes,
                      static_cast<off_t>(extent.fd_offset)) == static_cast<ssize_t>(extent.size_bytes));
    }
  }
  // A whole snapshot of these pages, with a section of its name.
  void make(const char* name, const char* parent, const std::vector<std::pair<uint64_t, Bytes>>& pages) {
    void* image = begin(name, parent);
    REQUIRE_MESSAGE(image, error);
    for (const auto& [page, data] : pages) REQUIRE(write(image, page * kPage, data));
    REQUIRE(section(image, "core", "name", bytes(name)));
    REQUIRE_MESSAGE(commit(image), error);
    close(image);
  }
  bool set_compressed(const char* name, bool on) {
    const auto* compression =
        static_cast<const clone_snapshot_compression*>(table().get_extension(backend_, CLONE_SNAPSHOT_COMPRESSION));
    REQUIRE(compression);
    return call([&](clone_err* err) { return compression->set_compressed(backend_, name, on, err); }) == CLONE_OK;
  }
  // Why a snapshot cannot be opened, or is damaged; "" when it is sound.
  std::string fault(const char* name) {
    void* image = open(name);
    if (!image) return error;
    clone_snapshot_extent extent{};
    extent.size = sizeof extent;
    const clone_status mapped = call([&](clone_err* err) { return table().memory_extent(image, 0, &extent, err); });
    const bool sound = (mapped == CLONE_OK || mapped == CLONE_EMPTY) && verify(image);
    close(image);
    return sound ? "" : error;
  }
};

struct Store {
  ScratchDir scratch;
  std::string path = scratch.path() + "/a/store";
  Backend backend{path};

  std::string file(const std::string& name) const { return path + "/" + name; }
  // All names, hidden ones too; of a snapshot's files with its name.
  std::vector<std::string> names(const std::string& folder = {}) const {
    std::vector<std::string> found;
    for (const auto& entry : fs::directory_iterator(file(folder))) found.push_back(entry.path().filename().string());
    std::sort(found.begin(), found.end());
    return found;
  }
  // Changes the state of a snapshot by its records, and puts its checksums right.
  template <typename Change>
  void forge(const std::string& name, Change&& change) const {
    Bytes state = content(file(name + "/state"));
    format::HeaderRecord header;
    std::memcpy(&header, state.data(), sizeof header);
    change(header, state);
    std::memcpy(state.data(), &header, sizeof header);
    format::seal(state);
    replace(file(name + "/state"), state);
  }
};

Bytes page_of(uint8_t with, uint64_t count = 1) { return Bytes(count * kPage, std::byte{with}); }

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

mode_t mode_of(const std::string& path) {
  struct stat status {};
  REQUIRE(::lstat(path.c_str(), &status) == 0);
  return status.st_mode & 07777;
}

}  // namespace

TEST_CASE("snapshot file: a full snapshot is read as it was written") {
  Store store;
  Backend& backend = store.backend;
  CHECK(backend.list().empty());
  CHECK(!fs::exists(store.path));  // nothing is made before there is something to keep
  void* image = backend.begin("base-1.0_X");
  REQUIRE_MESSAGE(image, backend.error);
  CHECK(backend.list().empty());
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
  write(40, page_of(0, 10));
  REQUIRE(backend.section(image, "virtio-blk.0", "queue", bytes("rings"), 3));
  REQUIRE(backend.section(image, "core", "empty", {}));
  REQUIRE(backend.section(image, "core", "name", bytes("base")));
  CHECK(store.names().size() == 1);
  CHECK(store.names()[0].starts_with(".base-1.0_X."));
  CHECK_MESSAGE(backend.commit(image), backend.error);
  CHECK(!backend.commit(image));
  CHECK(contains(backend.error, "is complete already"));
  Backend::close(image);
  CHECK(store.names() == std::vector<std::string>{"base-1.0_X"});
  for (const char* folder : {"", "/base-1.0_X", "/.."}) CHECK(mode_of(store.path + folder) == 0700);
  for (const char* file : {"/memory", "/state"}) CHECK(mode_of(store.path + "/base-1.0_X" + file) == 0600);

  image = backend.open("base-1.0_X");
  REQUIRE_MESSAGE(image, backend.error);
  size_t extents = 0;
  CHECK(backend.memory(image, &extents) == model);
  CHECK(extents == 1);
  CHECK_MESSAGE(backend.verify(image), backend.error);
  const auto read = [&](const char* owner, const char* tag) -> std::string {
    uint32_t version = 0;
    const void* data = nullptr;
    uint64_t size_bytes = 0;
    const clone_status status = backend.call([&](clone_err* err) {
      return Backend::table().read_section(image, owner, tag, &version, &data, &size_bytes, err);
    });
    if (status != CLONE_OK) return std::to_string(status) + " " + backend.error;
    return std::to_string(version) + " " + std::string(static_cast<const char*>(data), size_bytes);
  };
  CHECK(read("virtio-blk.0", "queue") == "3 rings");
  CHECK(read("core", "empty") == "1 ");
  CHECK(read("core", "queue") == "-8 " + store.file("base-1.0_X") + ": has no section core/queue");
  std::string sections;
  const auto visit = [](void* context, const char* owner, const char* tag, uint32_t version, uint64_t size_bytes) {
    *static_cast<std::string*>(context) +=
        std::string(owner) + "/" + tag + " " + std::to_string(version) + " " + std::to_string(size_bytes) + "\n";
  };
  CHECK(Backend::table().list_sections(image, visit, &sections, nullptr) == CLONE_OK);
  CHECK(sections == "core/empty 1 0\ncore/name 1 4\nvirtio-blk.0/queue 3 5\n");
  // Each kind of image has its own functions.
  CHECK(!backend.write(image, 0, page_of(1)));
  CHECK(backend.error == "the snapshot is open for reading and cannot be written");
  CHECK(!backend.section(image, "core", "x", {}));
  CHECK(!backend.commit(image));
  Backend::close(image);
  image = backend.begin("other");
  CHECK(!backend.verify(image));
  CHECK(backend.error == "the snapshot is being made and cannot be read");
  Backend::close(image);
  CHECK(backend.list() == "base-1.0_X");
}

TEST_CASE("snapshot file: memory is sparse") {
  Store store;
  constexpr uint64_t kLarge = 1 << 30;
  void* image = store.backend.begin("large", nullptr, kLarge);
  REQUIRE(image);
  REQUIRE(store.backend.write(image, 0, page_of(0, 4096)));
  REQUIRE(store.backend.write(image, kLarge - kPage, page_of(1)));
  REQUIRE(store.backend.write(image, 512 << 20, page_of(1)));
  REQUIRE(store.backend.commit(image));
  Backend::close(image);
  struct stat status {};
  REQUIRE(::stat(store.file("large/memory").c_str(), &status) == 0);
  CHECK(status.st_size == kLarge);
  CHECK(status.st_blocks * 512 <= 16 * kPage);
  CHECK(store.backend.fault("large").empty());
  // Two pages of a child: no more.
  image = store.backend.begin("child", "large", kLarge);
  REQUIRE(image);
  REQUIRE(store.backend.write(image, 7 * kPage, page_of(2, 2)));
  REQUIRE(store.backend.commit(image));
  Backend::close(image);
  REQUIRE(::stat(store.file("child/memory").c_str(), &status) == 0);
  CHECK(status.st_blocks * 512 <= 16 * kPage);
}

TEST_CASE("snapshot file: chains of five are what a plain memory would be") {
  for (unsigned seed = 1; seed <= 20; ++seed) {
    CAPTURE(seed);
    std::mt19937 random(seed);
    const auto below = [&](uint64_t limit) { return random() % limit; };
    Store store;
    Bytes model(kMemory);
    std::vector<Bytes> memories;
    for (int member = 0; member < 5; ++member) {
      const std::string name = "m" + std::to_string(member), parent = "m" + std::to_string(member - 1);
      void* image = store.backend.begin(name.c_str(), member ? parent.c_str() : nullptr);
      REQUIRE_MESSAGE(image, store.backend.error);
      for (uint64_t writes = below(12); writes; --writes) {
        const uint64_t first = below(kPages), count = 1 + below(std::min<uint64_t>(kPages - first, 8));
        Bytes data(count * kPage);
        for (uint64_t page = 0; page < count; ++page)
          if (below(4)) std::fill_n(data.begin() + static_cast<ptrdiff_t>(page * kPage), kPage, std::byte(random()));
        REQUIRE(store.backend.write(image, first * kPage, data));
        std::copy(data.begin(), data.end(), model.begin() + static_cast<ptrdiff_t>(first * kPage));
      }
      REQUIRE_MESSAGE(store.backend.commit(image), store.backend.error);
      Backend::close(image);
      memories.push_back(model);
    }
    for (int member = 0; member < 5; ++member) {
      const std::string name = "m" + std::to_string(member);
      void* image = store.backend.open(name.c_str());
      REQUIRE_MESSAGE(image, store.backend.error);
      CHECK(store.backend.memory(image) == memories[static_cast<size_t>(member)]);
      CHECK_MESSAGE(store.backend.verify(image), store.backend.error);
      Backend::close(image);
    }
    CHECK(store.backend.list() == "m0 m1<m0 m2<m1 m3<m2 m4<m3");
  }
}

TEST_CASE("snapshot file: a page that is written again is what it was last, in a full one and over a parent") {
  const std::vector<std::vector<uint8_t>> histories = {{1, 0, 2}, {1, 0}, {0, 1}, {0}, {1, 2}, {1, 0, 0}, {0, 0, 3}};
  Store store;
  Backend& backend = store.backend;
  Bytes model(kMemory);
  for (const char* parent : {static_cast<const char*>(nullptr), "full"}) {
    const char* const name = parent ? "over-a-parent" : "full";
    void* image = backend.begin(name, parent);
    REQUIRE_MESSAGE(image, backend.error);
    // Over the parent the pages stand the other way round.
    for (uint64_t i = 0; i < histories.size(); ++i) {
      const uint64_t page = 2 * (parent ? histories.size() - 1 - i : i);
      for (const uint8_t with : histories[i]) REQUIRE(backend.write(image, page * kPage, page_of(with)));
      std::fill_n(model.begin() + static_cast<ptrdiff_t>(page * kPage), kPage, std::byte{histories[i].back()});
    }
    REQUIRE_MESSAGE(backend.commit(image), backend.error);
    Backend::close(image);
    image = backend.open(name);
    REQUIRE_MESSAGE(image, backend.error);
    CHECK(backend.memory(image) == model);
    CHECK_MESSAGE(backend.verify(image), backend.error);
    Backend::close(image);
  }
}

TEST_CASE("snapshot file: memory is written by many threads") {
  Store store;
  void* image = store.backend.begin("threads");
  REQUIRE(image);
  std::vector<std::thread> threads;
  std::atomic<int> failures = 0;
  for (uint64_t thread = 0; thread < 4; ++thread)
    threads.emplace_back([&, thread] {
      const Bytes data = page_of(static_cast<uint8_t>(thread + 1));
      for (uint64_t page = thread; page < kPages; page += 4)
        if (Backend::table().write_memory(image, page * kPage, data.data(), kPage, nullptr) != CLONE_OK) ++failures;
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(failures == 0);
  REQUIRE(store.backend.commit(image));
  Backend::close(image);
  image = store.backend.open("threads");
  REQUIRE(image);
  const Bytes memory = store.backend.memory(image);
  for (uint64_t page = 0; page < kPages; ++page) CHECK(memory[page * kPage + 5] == std::byte(page % 4 + 1));
  CHECK(store.backend.verify(image));
  Backend::close(image);
}

TEST_CASE("snapshot file: names, and what is not written") {
  Store store;
  Backend& backend = store.backend;
  for (const std::string& name :
       {std::string(), std::string("."), std::string(".."), std::string(".x"), std::string("-x"), std::string("a/b"),
        std::string("a b"), std::string("\xc3\xa4"), std::string("a\n"), std::string(65, 'n')}) {
    CHECK(!backend.begin(name.c_str()));
    CHECK(contains(backend.error, "allowed are 1 to 64 letters, digits, '.', '_' and '-'"));
    CHECK(!backend.open(name.c_str()));
    CHECK(contains(backend.error, "allowed are 1 to 64"));
    CHECK(!backend.remove(name.c_str()));
    CHECK(!backend.begin("child", name.c_str()));
    CHECK(contains(backend.error, name.empty() ? "the parent's name is empty" : "the parent's name: "));
  }
  CHECK(!fs::exists(store.path));
  const std::string longest(64, 'n');
  backend.make(longest.c_str(), nullptr, {});
  CHECK(backend.list() == longest);

  for (const uint64_t size : {uint64_t{0}, kPage + 1, uint64_t{1} << 43}) {
    CHECK(!backend.begin("size", nullptr, size));
    CHECK(contains(backend.error, "a memory of " + std::to_string(size) + " bytes; allowed are whole pages"));
  }
  void* image = backend.begin("image");
  REQUIRE(image);
  for (const auto& [offset, size] : {std::pair(uint64_t{1}, kPage),
                                     {0, kPage - 1},
                                     {kMemory, kPage},
                                     {kMemory - kPage, 2 * kPage},
                                     {~uint64_t{0} - kPage + 1, kPage}}) {
    CHECK(!backend.write(image, offset, Bytes(size)));
    CHECK(contains(backend.error, std::to_string(size) + " bytes at " + std::to_string(offset)));
  }
  CHECK(backend.write(image, kMemory, {}));
  for (const std::string& word :
       {std::string(), std::string("Core"), std::string("a/b"), std::string("a b"), std::string(64, 'w')}) {
    CHECK(!backend.section(image, word.c_str(), "tag", {}));
    CHECK(contains(backend.error, "a section's owner: '"));
    CHECK(!backend.section(image, "owner", word.c_str(), {}));
    CHECK(contains(backend.error, "a section's tag: '"));
  }
  CHECK(backend.section(image, std::string(63, 'o').c_str(), std::string(63, 't').c_str(), {}));
  CHECK(backend.section(image, "core", "plan", {}));
  CHECK(!backend.section(image, "core", "plan", bytes("again")));
  CHECK(backend.error == "section core/plan is written a second time; allowed is once");
  CHECK(backend.commit(image));
  Backend::close(image);
  CHECK(backend.fault("image").empty());

  // A name is given once: at the beginning, and at the end.
  CHECK(!backend.begin("image"));
  CHECK(backend.status == CLONE_ERR_BUSY);
  CHECK(contains(backend.error, "there is a snapshot 'image' in " + store.path + " already"));
  void* first = backend.begin("same");
  void* second = backend.begin("same");
  REQUIRE(first);
  REQUIRE(second);
  CHECK(backend.write(second, 0, page_of(2)));
  CHECK(backend.commit(first));
  CHECK(!backend.commit(second));
  CHECK(contains(backend.error, "there is a snapshot 'same' in "));
  CHECK(!backend.write(second, 0, page_of(2)));
  CHECK(contains(backend.error, "it can only be closed"));
  Backend::close(first);
  Backend::close(second);
  CHECK(backend.fault("same").empty());
  CHECK(store.names() == std::vector<std::string>{"image", longest, "same"});

  CHECK(!backend.open("nobody"));
  CHECK(backend.status == CLONE_ERR_NOT_FOUND);
  CHECK(backend.error == "there is no snapshot 'nobody' in " + store.path);
  Backend elsewhere(store.path + "/not/there");
  CHECK(!elsewhere.open("nobody"));
  CHECK(elsewhere.status == CLONE_ERR_NOT_FOUND);
  CHECK(contains(elsewhere.error, store.path + "/not/there"));
}

TEST_CASE("snapshot file: too many sections are refused") {
  Store store;
  void* image = store.backend.begin("sections");
  REQUIRE(image);
  for (uint32_t i = 0; i < format::kMostSections; ++i)
    REQUIRE(store.backend.section(image, "owner", std::to_string(i).c_str(), {}));
  CHECK(!store.backend.section(image, "owner", "more", {}));
  CHECK(store.backend.error == "section owner/more would be number 65537; allowed are 65536");
  REQUIRE(store.backend.commit(image));
  Backend::close(image);
  CHECK(store.backend.fault("sections").empty());
}

TEST_CASE("snapshot file: an unknown backend is answered with those there are") {
  const auto catalogue = Catalogue::scan({CLONE_TEST_PLUGIN_DIR}, PluginTrust::any);
  REQUIRE(catalogue.ok());
  PluginLibrary library(*catalogue);
  CHECK(contains(library.snapshot_backend("flie").error().message, "unknown snapshot-backend 'flie'; there are: "));
  CHECK(std::string(library.snapshot_backend("file")->descriptor.name) == "file");
}

TEST_CASE("snapshot file: the store's default is in HOME, but for root") {
  if (::geteuid() == 0) return;
  const ScratchDir home;
  const std::string old_home = ::getenv("HOME") ? ::getenv("HOME") : "";
  ::setenv("HOME", home.path().c_str(), 1);
  {
    Backend backend(KeyValues{});
    backend.make("one", nullptr, {});
  }
  CHECK(fs::exists(home.path() + "/.clone/templates/one/state"));
  ::setenv("HOME", old_home.c_str(), 1);
}

TEST_CASE("snapshot file: every byte of a state is checked when it is opened, of a memory when it is verified") {
  Store store;
  store.backend.make("base", nullptr, {{1, page_of(1)}, {8, page_of(2, 3)}});
  store.backend.make("child", "base", {{2, page_of(3)}});
  for (const char* name : {"base", "child"}) {
    const std::string path = store.file(name) + "/state";
    const Bytes whole = content(path);
    for (size_t size = 0; size < whole.size(); ++size) {
      replace(path, {whole.begin(), whole.begin() + static_cast<ptrdiff_t>(size)});
      CHECK(!store.backend.open(name));
      CHECK(store.backend.status == CLONE_ERR_CORRUPT);
      CHECK(store.backend.error.starts_with(path + ": "));
    }
    for (size_t at = 0; at < whole.size(); ++at) {
      CAPTURE(at);
      Bytes flipped = whole;
      flipped[at] ^= std::byte{1} << at % 8;
      replace(path, flipped);
      CHECK(!store.backend.open(name));
      CHECK(store.backend.status == CLONE_ERR_CORRUPT);
      CHECK(store.backend.error.starts_with(path + ": "));
      CHECK(!store.backend.open("child"));
    }
    Bytes longer = whole;
    longer.push_back({});
    replace(path, longer);
    CHECK(!store.backend.open(name));
    replace(path, whole);
    CHECK(store.backend.fault(name).empty());
  }

  const std::string memory = store.file("base/memory");
  const auto flip = [&](const std::string& path, uint64_t offset) {
    std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
    file.seekg(static_cast<std::streamoff>(offset));
    const int byte = file.get();
    file.seekp(static_cast<std::streamoff>(offset));
    file.put(static_cast<char>(byte ^ 1));
  };
  for (const uint64_t offset : {kPage, 8 * kPage, 11 * kPage - 1}) {
    flip(memory, offset);
    CHECK(store.backend.fault("base") == memory + ": is damaged: its checksum is another");
    CHECK(store.backend.fault("child") == memory + ": is damaged: its checksum is another");
    flip(memory, offset);
  }
  for (const uint64_t offset : {uint64_t{0}, 2 * kPage, kMemory - 1}) {
    flip(memory, offset);
    CHECK(store.backend.fault("base") ==
          memory + ": is damaged: there is data at " + std::to_string(offset) + " where zeroes were saved");
    flip(memory, offset);
  }
  CHECK(store.backend.fault("base").empty());
  flip(store.file("child/memory"), 2 * kPage);
  CHECK(store.backend.fault("child") == store.file("child/memory") + ": is damaged: its checksum is another");
  flip(store.file("child/memory"), 2 * kPage);
  flip(store.file("child/memory"), 3 * kPage);  // in no extent: nobody looks there
  CHECK(store.backend.fault("child").empty());

  for (const uint64_t size : {uint64_t{0}, kMemory - kPage, kMemory - 1, kMemory + 1}) {
    fs::resize_file(memory, size);
    CHECK(store.backend.fault("base") ==
          memory + ": has " + std::to_string(size) + " bytes; the guest's memory has " + std::to_string(kMemory));
    CHECK(!store.backend.open("child"));
  }
  fs::remove(memory);
  CHECK(contains(store.backend.fault("base"), memory + ": No such file"));
  fs::remove(store.file("child/state"));
  CHECK(contains(store.backend.fault("child"), store.file("child/state") + ": No such file"));
  fs::remove_all(store.file("child/memory"));
  REQUIRE(::mkfifo(store.file("child/state").c_str(), 0600) == 0);
  CHECK(store.backend.fault("child") == store.file("child/state") + ": is not a regular file");
}

TEST_CASE("snapshot file: a state with good checksums is not believed either") {
  using format::Extent;
  using format::HeaderRecord;
  using format::SectionRecord;
  Store store;
  const auto make = [&] {
    void* image = store.backend.begin("x");
    REQUIRE_MESSAGE(image, store.backend.error);
    REQUIRE(store.backend.write(image, kPage, page_of(1)));
    REQUIRE(store.backend.write(image, 3 * kPage, page_of(1)));
    REQUIRE(store.backend.section(image, "a", "one", bytes("1")));
    REQUIRE(store.backend.section(image, "b", "two", bytes("22")));
    REQUIRE(store.backend.commit(image));
    Backend::close(image);
  };
  const auto fault_of = [&](auto&& change) {
    make();
    store.forge("x", change);
    const std::string fault = store.backend.fault("x");
    CHECK(store.backend.status == CLONE_ERR_CORRUPT);
    fs::remove_all(store.file("x"));
    const std::string path = store.file("x") + "/state: ";
    return fault.starts_with(path) ? fault.substr(path.size()) : "?" + fault;
  };
  const auto with_section = [&](uint32_t index, auto&& change) {
    return fault_of([&](HeaderRecord&, Bytes& state) {
      auto* at = state.data() + sizeof(HeaderRecord) + index * sizeof(SectionRecord);
      SectionRecord record;
      std::memcpy(&record, at, sizeof record);
      change(record);
      std::memcpy(at, &record, sizeof record);
    });
  };
  const auto with_extent = [&](uint32_t index, Extent extent) {
    return fault_of([&](HeaderRecord&, Bytes& state) {
      std::memcpy(state.data() + sizeof(HeaderRecord) + 2 * sizeof(SectionRecord) + index * sizeof extent, &extent,
                  sizeof extent);
    });
  };
  CHECK(fault_of([](HeaderRecord& header, Bytes&) { header.magic[0] = 'X'; }) == "is not the state of a snapshot");
  CHECK(fault_of([](HeaderRecord& header, Bytes&) { header.format_version = 2; }) ==
        "has format version 2; known is 1");
  CHECK(contains(fault_of([](HeaderRecord& header, Bytes&) { header.section_count = ~0u; }), "allowed are 65536"));
  CHECK(contains(fault_of([](HeaderRecord& header, Bytes&) { header.extent_count = ~uint64_t{0}; }), "and 1048576"));
  CHECK(contains(fault_of([](HeaderRecord& header, Bytes&) { header.section_count = 65536; }), "its tables alone"));
  CHECK(contains(fault_of([](HeaderRecord& header, Bytes&) { header.extent_count = 1 << 20; }), "its tables alone"));
  CHECK(contains(fault_of([](HeaderRecord& header, Bytes&) { header.memory_bytes = 1; }), "a memory of 1 bytes"));
  CHECK(contains(fault_of([](HeaderRecord& header, Bytes&) { header.memory_bytes = ~uint64_t{0}; }), "a memory of"));
  CHECK(contains(fault_of([](HeaderRecord& header, Bytes&) { header.memory_bytes = kPage; }),
                 "extent 0 reaches beyond the memory of 4096 bytes"));
  CHECK(contains(fault_of([](HeaderRecord& header, Bytes&) { std::strcpy(header.parent, "../x"); }),
                 "its parent: '../x' given"));
  CHECK(contains(fault_of([](HeaderRecord& header, Bytes&) { std::memset(header.parent, 'p', sizeof header.parent); }),
                 "its parent: 'ppp"));
  CHECK(contains(fault_of([](HeaderRecord& header, Bytes&) { header.section_count = 0; }), "extent 0"));
  CHECK(fault_of([](HeaderRecord&, Bytes& state) { state.resize(state.size() + 3); }) ==
        "has 3 bytes that belong to no section");
  CHECK(contains(with_section(0, [](SectionRecord& record) { record.owner[0] = 'A'; }), "section 0: its owner: 'A'"));
  CHECK(contains(with_section(1, [](SectionRecord& record) { record.tag[1] = '/'; }), "section 1: its tag: 't/o'"));
  CHECK(contains(with_section(1, [](SectionRecord& record) { std::memset(record.tag, 't', sizeof record.tag); }),
                 "section 1: its tag"));
  CHECK(contains(with_section(1, [](SectionRecord& record) { record.owner[0] = 'a', record.tag[0] = 'a'; }),
                 "section a/awo is not in its place"));
  CHECK(contains(with_section(1, [](SectionRecord& record) { record = {"a", "one", 1, 0, 2, {}}; }),
                 "section a/one is not in its place"));
  CHECK(with_section(1, [](SectionRecord& record) { record.size_bytes = 3; }) ==
        "section b/two has 3 bytes; the file holds 2 of them");
  CHECK(contains(with_section(0, [](SectionRecord& record) { record.size_bytes = ~uint64_t{0}; }), "the file holds 3"));
  CHECK(with_section(1, [](SectionRecord& record) { record.size_bytes = 0; }) ==
        "has 2 bytes that belong to no section");
  CHECK(with_extent(0, {1, kPage}) == "extent 0 is not made of whole pages");
  CHECK(with_extent(1, {3 * kPage, 0}) == "extent 1 is not made of whole pages");
  CHECK(with_extent(1, {3 * kPage, 7}) == "extent 1 is not made of whole pages");
  CHECK(with_extent(1, {0, kPage}) == "extent 1 begins before the end of the one before it");
  CHECK(with_extent(0, {kPage, 3 * kPage}) == "extent 1 begins before the end of the one before it");
  CHECK(contains(with_extent(1, {kMemory, kPage}), "extent 1 reaches beyond"));
  CHECK(contains(with_extent(1, {3 * kPage, ~kPage + 1}), "extent 1 reaches beyond"));
  CHECK(contains(with_extent(1, {~kPage + 1, kPage}), "extent 1 reaches beyond"));
  // Some gigabytes of state are not read.
  make();
  fs::resize_file(store.file("x/state"), uint64_t{3} << 30);
  CHECK(contains(store.backend.fault("x"), "/state: has 3221225472 bytes; allowed are "));
}

TEST_CASE("snapshot file: parents that are missing, others, of another size, in a loop, too many") {
  using format::HeaderRecord;
  Store store;
  Backend& backend = store.backend;
  backend.make("base", nullptr, {{0, page_of(1)}});
  backend.make("child", "base", {{1, page_of(2)}});
  backend.make("grandchild", "child", {{2, page_of(3)}});
  CHECK(!backend.begin("x", "nobody"));
  CHECK(backend.error == "there is no snapshot 'nobody' in " + store.path);
  CHECK(!backend.begin("x", "base", 2 * kMemory));
  CHECK(backend.error == "snapshot 'x': a memory of 524288 bytes; its parent 'base' has 262144");

  fs::rename(store.file("base"), store.file("away"));
  for (const char* name : {"child", "grandchild"})
    CHECK(backend.fault(name) == store.file("child") + ": its parent 'base' is missing in " + store.path);
  CHECK(!backend.begin("x", "child"));
  backend.make("base", nullptr, {{0, page_of(1)}});
  CHECK(backend.fault("grandchild") ==
        store.file("child") + ": its parent 'base' is another snapshot than the one that it was made over");
  fs::remove_all(store.file("base"));
  fs::rename(store.file("away"), store.file("base"));
  CHECK(backend.fault("grandchild").empty());

  // Its own parent; then two that have each other.
  const Bytes child = content(store.file("child/state"));
  store.forge("child", [](HeaderRecord& header, Bytes&) {
    std::strcpy(header.parent, "child");
    header.parent_identity = header.identity;
  });
  CHECK(backend.fault("child") == store.file("child") + ": its parent 'child' has it as a parent in turn");
  CHECK(contains(backend.fault("grandchild"), "its parent 'child' has it as a parent in turn"));
  format::Identity other{};
  store.forge("grandchild", [&](HeaderRecord& header, Bytes&) { other = header.identity; });
  store.forge("child", [&](HeaderRecord& header, Bytes&) {
    std::strcpy(header.parent, "grandchild");
    header.parent_identity = other;
  });
  CHECK(backend.fault("child") == store.file("grandchild") + ": its parent 'child' has it as a parent in turn");
  replace(store.file("child/state"), child);
  CHECK(backend.fault("grandchild").empty());

  // Another size of memory that the whole chain's names and identities hide.
  const Bytes base = content(store.file("base/state"));
  store.forge("base", [](HeaderRecord& header, Bytes&) { header.memory_bytes *= 2; });
  fs::resize_file(store.file("base/memory"), 2 * kMemory);
  CHECK(backend.fault("child") ==
        store.file("child") + ": its parent 'base' has a memory of 524288 bytes, it has 262144");
  replace(store.file("base/state"), base);
  fs::resize_file(store.file("base/memory"), kMemory);

  std::string last = "grandchild";
  for (int member = 4; member <= 64; ++member) {
    const std::string name = "c" + std::to_string(member);
    backend.make(name.c_str(), last.c_str(), {{static_cast<uint64_t>(member) % kPages, page_of(5)}});
    last = name;
  }
  CHECK(backend.fault("c64").empty());
  CHECK(!backend.begin("c65", "c64"));
  CHECK(contains(backend.error, "its parent 'c64' is the last of a chain of 64"));
  // Longer by a forged one.
  fs::copy(store.file("c64"), store.file("c65"), fs::copy_options::recursive);
  store.forge("c64", [&](HeaderRecord& header, Bytes&) { other = header.identity; });
  store.forge("c65", [&](HeaderRecord& header, Bytes&) {
    std::strcpy(header.parent, "c64");
    header.parent_identity = other;
  });
  for (const char* file : {"c65", "c65/state", "c65/memory"}) ::chmod(store.file(file).c_str(), 0700);
  CHECK(contains(backend.fault("c65"), "would be number 65 of the chain; allowed are 64"));
}

TEST_CASE("snapshot file: removed, listed, and its parents kept") {
  Store store;
  Backend& backend = store.backend;
  backend.make("base", nullptr, {{0, page_of(1)}});
  backend.make("child", "base", {{1, page_of(2)}});
  void* fork = backend.open("child");
  REQUIRE(fork);
  const Bytes memory = backend.memory(fork);
  CHECK(!backend.remove("base"));
  CHECK(backend.error == "snapshot 'base' is the parent of 'child'; allowed is to remove that one first");
  CHECK(!backend.remove("nobody"));
  CHECK(backend.error == "there is no snapshot 'nobody' in " + store.path);
  fs::create_directory(store.file("mine"));
  ::chmod(store.file("mine").c_str(), 0700);
  store.scratch.write("a/store/mine/letter", std::string_view("dear"));
  CHECK(!backend.remove("mine"));
  CHECK(contains(backend.error, "holds letter, which is not a snapshot's"));
  CHECK(backend.list() == "base child<base");
  CHECK(contains(backend.host().log_lines().back(), store.file("mine/state")));
  CHECK(backend.remove("child"));
  CHECK(backend.list() == "base");
  // A child that is begun keeps its parent only once it is there.
  void* late = backend.begin("late", "base");
  REQUIRE(late);
  CHECK(backend.remove("base"));
  CHECK(!backend.commit(late));
  CHECK(contains(backend.error, "snapshot 'late': its parent: there is no snapshot 'base'"));
  Backend::close(late);
  CHECK(store.names() == std::vector<std::string>{"mine"});
  // Who has it open keeps it.
  CHECK(backend.memory(fork) == memory);
  CHECK(backend.verify(fork));
  Backend::close(fork);
  // A damaged one can be removed.
  backend.make("damaged", nullptr, {});
  fs::resize_file(store.file("damaged/state"), 3);
  CHECK(backend.list().empty());
  CHECK(backend.remove("damaged"));
  CHECK(!fs::exists(store.file("damaged")));
}

TEST_CASE("snapshot file: what others could have written is refused by its path") {
  Store store;
  Backend& backend = store.backend;
  backend.make("base", nullptr, {{0, page_of(1)}});
  for (const std::string& name :
       {std::string(), std::string("/base"), std::string("/base/state"), std::string("/base/memory")}) {
    const std::string path = store.path + name;
    const mode_t mode = mode_of(path);
    for (const mode_t others : {0020, 0002}) {
      REQUIRE(::chmod(path.c_str(), mode | others) == 0);
      CHECK(backend.fault("base") ==
            path + ": refused: others than its owner can write to it; chmod go-w it if you " + "trust what it holds");
      CHECK(!backend.begin("child", "base"));
    }
    REQUIRE(::chmod(path.c_str(), mode) == 0);
    if (::geteuid() != 0) continue;
    REQUIRE(::chown(path.c_str(), 1234, 0) == 0);
    CHECK(backend.fault("base") == path + ": refused: belongs to user 1234; allowed is root");
    REQUIRE(::chown(path.c_str(), 0, 0) == 0);
  }
  CHECK(backend.fault("base").empty());
  // Links could lead anywhere.
  fs::rename(store.file("base/memory"), store.file("base/other"));
  fs::create_symlink("other", store.file("base/memory"));
  CHECK(contains(backend.fault("base"), store.file("base/memory") + ": "));
  fs::create_directory_symlink("base", store.file("link"));
  CHECK(contains(backend.fault("link"), store.file("link") + ": "));
  // The store itself may be one.
  fs::remove(store.file("base/memory"));
  fs::rename(store.file("base/other"), store.file("base/memory"));
  fs::create_directory_symlink(store.path, store.scratch.path() + "/store-link");
  Backend linked(store.scratch.path() + "/store-link/");
  CHECK(linked.fault("base").empty());
}

TEST_CASE("snapshot file: a full disk is an error, and leaves nothing") {
  if (::geteuid() != 0) {
    MESSAGE("only root can mount a small disk: not tested");
    return;
  }
  const ScratchDir scratch;
  REQUIRE(::mount("tmpfs", scratch.path().c_str(), "tmpfs", 0, "size=256K,mode=0700") == 0);
  {
    Backend backend(scratch.path() + "/store");
    backend.make("base", nullptr, {{0, page_of(1)}});
    void* image = backend.begin("full", "base");
    REQUIRE(image);
    CHECK(!backend.write(image, 0, page_of(2, kPages)));
    CHECK(backend.code == ENOSPC);
    CHECK(contains(backend.error, "/memory: No space left on device"));
    CHECK(!backend.commit(image));
    CHECK(contains(backend.error, "an earlier write failed"));
    Backend::close(image);
    // At the end only.
    image = backend.begin("state", "base");
    REQUIRE(image);
    REQUIRE(backend.write(image, 0, page_of(2, 8)));
    REQUIRE(backend.section(image, "core", "large", Bytes(512 << 10, std::byte{1})));
    CHECK(!backend.commit(image));
    CHECK(contains(backend.error, "/state: No space left on device"));
    Backend::close(image);
    CHECK(backend.list() == "base");
    CHECK(backend.fault("base").empty());
    CHECK(std::distance(fs::directory_iterator(scratch.path() + "/store"), {}) == 1);
    backend.make("fits", "base", {{0, page_of(2, 8)}});
    CHECK(backend.fault("fits").empty());
  }
  ::umount2(scratch.path().c_str(), MNT_DETACH);
}

TEST_CASE("snapshot file: a process that is killed leaves the whole snapshot or nothing, and what it left is cleared") {
  Store store;
  store.backend.make("base", nullptr, {{0, page_of(1)}});
  void* living = store.backend.begin("living");
  REQUIRE(living);
  REQUIRE(store.backend.write(living, 0, page_of(3)));
  int whole = 0, none = 0;
  for (unsigned round = 0; round < 60; ++round) {
    CAPTURE(round);
    int ready[2];
    REQUIRE(::pipe2(ready, O_CLOEXEC) == 0);
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      Backend other(store.path);
      void* image = other.begin("victim", "base");
      if (!image || ::write(ready[1], "r", 1) != 1) ::_exit(1);
      for (uint64_t page = 0; page < kPages; ++page)
        Backend::table().write_memory(image, page * kPage, page_of(static_cast<uint8_t>(page + 1)).data(), kPage,
                                      nullptr);
      Backend::table().commit(image, nullptr);
      Backend::table().close(image);
      ::_exit(0);
    }
    char byte = 0;
    ::close(ready[1]);
    CHECK(::read(ready[0], &byte, 1) == 1);
    ::close(ready[0]);
    std::this_thread::sleep_for(std::chrono::microseconds(round * 200));
    ::kill(child, SIGKILL);
    REQUIRE(::waitpid(child, nullptr, 0) == child);
    const std::string list = store.backend.list();
    if (contains(list, "victim")) {
      CHECK(store.backend.fault("victim").empty());
      CHECK(store.backend.remove("victim"));
      ++whole;
    } else {
      ++none;
    }
    CHECK(store.backend.list() == "base");
  }
  MESSAGE("killed: " << whole << " whole, " << none << " without a trace");
  CHECK(none > 0);
  // Those who live are left alone, also by others' clearing.
  Backend::close(store.backend.begin("next"));
  CHECK(store.names().size() == 2);
  CHECK(store.backend.commit(living));
  Backend::close(living);
  CHECK(store.names() == std::vector<std::string>{"base", "living"});
  CHECK(store.backend.fault("living").empty());
}

namespace {

using Names = std::vector<std::string>;
const Names kPlain{"memory", "state"}, kCompressed{"memory.zst", "state"};

std::string zstd_of(const Bytes& plain, int window_log = 0) {
  const std::unique_ptr<ZSTD_CCtx, decltype(&ZSTD_freeCCtx)> context(ZSTD_createCCtx(), ZSTD_freeCCtx);
  ZSTD_CCtx_setParameter(context.get(), ZSTD_c_checksumFlag, 1);
  ZSTD_CCtx_setParameter(context.get(), ZSTD_c_contentSizeFlag, 0);
  if (window_log) ZSTD_CCtx_setParameter(context.get(), ZSTD_c_windowLog, window_log);
  std::string file(ZSTD_compressBound(plain.size()), '\0');
  ZSTD_outBuffer out{file.data(), file.size(), 0};
  // In two steps: the encoder does not know the size in advance, and the window is as it was asked for.
  ZSTD_inBuffer in{plain.data(), std::min<size_t>(plain.size(), 1), 0};
  REQUIRE(!ZSTD_isError(ZSTD_compressStream2(context.get(), &out, &in, ZSTD_e_continue)));
  in.size = plain.size();
  REQUIRE(ZSTD_compressStream2(context.get(), &out, &in, ZSTD_e_end) == 0);
  return file.substr(0, out.pos);
}

// Pages that cannot be compressed, some zeroes between them.
std::vector<std::pair<uint64_t, Bytes>> noise(unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::pair<uint64_t, Bytes>> pages;
  for (uint64_t page = 0; page < kPages; page += 1 + random() % 3) {
    Bytes data = page_of(0);
    if (random() % 4) std::ranges::generate(data, [&] { return std::byte(random()); });
    pages.emplace_back(page, data);
  }
  return pages;
}

}  // namespace

TEST_CASE("snapshot file: compressed where it lies, it is the same snapshot") {
  Store store;
  Backend& backend = store.backend;
  backend.make("base", nullptr, {{0, page_of(1, 20)}, {40, page_of(2)}, {50, page_of(0)}});
  backend.make("child", "base", {{1, page_of(3)}, {40, page_of(0)}});
  const auto memory_of = [&](const char* name) {
    void* image = backend.open(name);
    REQUIRE_MESSAGE(image, backend.error);
    const Bytes memory = backend.memory(image);
    Backend::close(image);
    return memory;
  };
  const Bytes base = memory_of("base"), child = memory_of("child");
  void* const open_before = backend.open("child");
  for (const bool on : {true, true, false, false, true}) {
    CAPTURE(on);
    for (const char* name : {"base", "child"}) {
      REQUIRE_MESSAGE(backend.set_compressed(name, on), backend.error);
      CHECK(store.names(name) == (on ? kCompressed : kPlain));
      CHECK(mode_of(store.file(std::string(name) + (on ? "/memory.zst" : "/memory"))) == 0600);
      CHECK(memory_of("base") == base);
      CHECK(memory_of("child") == child);
      CHECK(backend.fault("child") == "");
    }
    CHECK(backend.list() == "base child<base");
  }
  CHECK(fs::file_size(store.file("base/memory.zst")) < 1000);
  CHECK(backend.memory(open_before) == child);
  Backend::close(open_before);
  // A parent as any other; of an empty one there is nothing to compress.
  backend.make("grandchild", "child", {{2, page_of(4)}});
  CHECK(backend.fault("grandchild") == "");
  backend.make("empty", nullptr, {});
  CHECK(backend.set_compressed("empty", true));
  CHECK(memory_of("empty") == Bytes(kMemory));
  CHECK(backend.set_compressed("empty", false));
  CHECK(memory_of("empty") == Bytes(kMemory));
  // Of both files, which a kill may leave, the plain one counts, and the other goes.
  replace(store.file("empty/memory.zst"), bytes("left"));
  CHECK(backend.fault("empty") == "");
  CHECK(backend.set_compressed("empty", false));
  CHECK(store.names("empty") == kPlain);
  // One at a time.
  const int folder = ::open(store.file("empty").c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  REQUIRE(::flock(folder, LOCK_EX) == 0);
  CHECK(!backend.set_compressed("empty", true));
  CHECK(backend.error == "snapshot 'empty' is being compressed, decompressed or removed by another process");
  CHECK(!backend.remove("empty"));
  CHECK(backend.status == CLONE_ERR_BUSY);
  ::close(folder);
  CHECK(backend.set_compressed("empty", true));
  for (const char* name : {"empty", "grandchild", "child", "base"}) CHECK(backend.remove(name));
  CHECK(store.names().empty());
  CHECK(!backend.set_compressed("base", true));
  CHECK(backend.error == "there is no snapshot 'base' in " + store.path);
  CHECK(!backend.set_compressed("../base", true));
}

TEST_CASE("snapshot file: damage is not compressed, and compressed memory is not believed") {
  Store store;
  Backend& backend = store.backend;
  backend.make("base", nullptr, {{1, page_of(1)}, {4, page_of(2, 3)}});
  const std::string plain = store.file("base/memory"), compressed = store.file("base/memory.zst");
  const Bytes whole = content(plain);
  Bytes damaged = whole;
  damaged[5 * kPage] = std::byte{9};
  replace(plain, damaged);
  CHECK(!backend.set_compressed("base", true));
  CHECK(backend.error == plain + ": is damaged: its checksum is another");
  CHECK(store.names("base") == kPlain);
  replace(plain, whole);
  REQUIRE(backend.set_compressed("base", true));
  const Bytes good = content(compressed);
  const auto refused = [&](const std::string& with, const std::string& why) {
    CAPTURE(why);
    replace(compressed, bytes(with));
    const std::string fault = backend.fault("base");
    CHECK_MESSAGE(contains(fault, compressed + ": " + why), fault);
    CHECK(backend.status == CLONE_ERR_CORRUPT);
    CHECK(!backend.set_compressed("base", false));
    CHECK(backend.status == CLONE_ERR_CORRUPT);
    CHECK(store.names("base") == kCompressed);
    CHECK(store.names() == Names{"base"});
  };
  for (const size_t size : {size_t{0}, size_t{1}, size_t{5}, good.size() / 2, good.size() - 1})
    refused(text(good).substr(0, size), "ends too early");
  refused(text(good) + "x", "goes on behind its end");
  refused(text(good) + text(good), "goes on behind its end");
  refused("not zstd at all, but long enough to be looked at", "is damaged");
  const Bytes exact = [&] {
    Bytes all = page_of(1);
    const Bytes more = page_of(2, 3);
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }();
  // A bomb: as much as the extents have comes out of it, and no more.
  refused(zstd_of(Bytes(64 << 20)), "goes on behind its end");
  refused(zstd_of(Bytes(exact.begin(), exact.end() - 1)), "ends too early");
  refused(zstd_of(exact, 27), "is damaged");  // a window of 128 MiB
  Bytes other = exact;
  other[0] = std::byte{7};
  refused(zstd_of(other), "is damaged: its checksum is another");
  // The first bytes say how the frame is to be read: another way may lead to the same content.
  for (size_t place = 6; place < good.size(); ++place) {
    Bytes flipped = good;
    flipped[place] ^= std::byte{0x10};
    replace(compressed, flipped);
    CHECK(backend.fault("base") != "");
  }
  replace(compressed, bytes(zstd_of(exact)));
  CHECK(backend.fault("base") == "");
  REQUIRE(::chmod(compressed.c_str(), 0602) == 0);
  CHECK(backend.fault("base") == compressed + ": refused: others than its owner can write to it; chmod go-w it if you "
                                              "trust what it holds");
  REQUIRE(::chmod(compressed.c_str(), 0600) == 0);
  CHECK(backend.set_compressed("base", false));
  CHECK(content(plain) == whole);
}

TEST_CASE("snapshot file: who is killed while it compresses leaves the snapshot, and who opens it meanwhile has it") {
  Store store;
  store.backend.make("base", nullptr, noise(1));
  store.backend.make("child", "base", noise(2));
  void* image = store.backend.open("child");
  const Bytes memory = store.backend.memory(image);
  Backend::close(image);
  bool on = true;
  unsigned plain = 0, compressed = 0;
  for (unsigned round = 0; round < 60; ++round) {
    CAPTURE(round);
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      Backend other(store.path);
      for (;; on = !on)
        for (const char* name : {"base", "child"}) other.set_compressed(name, on);
    }
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(500 + round * 150);
    do {
      CHECK(store.backend.fault("child") == "");
    } while (std::chrono::steady_clock::now() < end);
    ::kill(child, SIGKILL);
    REQUIRE(::waitpid(child, nullptr, 0) == child);
    image = store.backend.open("child");
    REQUIRE_MESSAGE(image, store.backend.error);
    CHECK(store.backend.memory(image) == memory);
    Backend::close(image);
    (fs::exists(store.file("base/memory")) ? plain : compressed) += 1;
    on = !on;
  }
  MESSAGE("killed: " << plain << " plain, " << compressed << " compressed");
  // The next one clears what they left.
  for (const char* name : {"base", "child"}) {
    CHECK(store.backend.set_compressed(name, !fs::exists(store.file(std::string(name) + "/memory.zst"))));
    CHECK(store.names(name).size() == 2);
  }
  CHECK(store.names() == Names{"base", "child"});
}

TEST_CASE("snapshot file: without room to compress it stays as it is") {
  if (::geteuid() != 0) {
    MESSAGE("only root can mount a small disk: not tested");
    return;
  }
  const ScratchDir scratch;
  REQUIRE(::mount("tmpfs", scratch.path().c_str(), "tmpfs", 0, "size=200K,mode=0700") == 0);
  {
    Backend backend(scratch.path() + "/store");
    std::mt19937 random(3);
    Bytes data = page_of(0, 32);
    std::ranges::generate(data, [&] { return std::byte(random()); });
    backend.make("base", nullptr, {{0, data}});
    CHECK(!backend.set_compressed("base", true));
    CHECK(backend.code == ENOSPC);
    CHECK(contains(backend.error, "/memory.zst: No space left on device"));
    CHECK(backend.fault("base") == "");
    CHECK(std::distance(fs::directory_iterator(scratch.path() + "/store"), {}) == 1);
  }
  ::umount2(scratch.path().c_str(), MNT_DETACH);
}
