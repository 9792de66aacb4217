// SPDX-License-Identifier: Apache-2.0
// A machine that is sent to who writes its snapshot: what was sent last counts, and what ends early is no snapshot.
#include <doctest/doctest.h>

#include <algorithm>
#include <filesystem>
#include <thread>

#include "scratch_dir.hpp"
#include "snapshot/backend.hpp"
#include "snapshot/stream.hpp"

using namespace vmm;

namespace {

constexpr uint64_t kPages = 2048;
constexpr uint64_t kBytes = kPages * kPageSize;

struct Store {
  ScratchDir dir;
  std::unique_ptr<SnapshotBackend> backend;
  Fd ours, theirs;

  Store() {
    static const auto catalogue = Catalogue::scan({CLONE_TEST_PLUGIN_DIR}, PluginTrust::any);
    static PluginLibrary library(*catalogue);
    auto created = SnapshotBackend::create(library, "file", {{"store", dir.path() + "/store"}});
    REQUIRE(created.ok());
    backend = std::move(*created);
    auto ends = make_snapshot_stream();
    REQUIRE(ends.ok());
    ours = std::move(ends->first);
    theirs = std::move(ends->second);
  }
  // On this thread.
  Result<void> write(const std::string& name) const {
    auto image = TRY(backend->begin(name, "", kBytes));
    return receive_snapshot(theirs.get(), image);
  }
};

std::vector<std::byte> pages_of(uint8_t with, uint64_t count) {
  return std::vector<std::byte>(count * kPageSize, std::byte{with});
}

}  // namespace

TEST_CASE("snapshot stream: what was sent is there, the last of a page") {
  const Store store;
  Sections sections;
  const std::vector<std::byte> large(3 << 20, std::byte{7});
  REQUIRE(sections.put("core", "large", 4, large).ok());
  REQUIRE(sections.put("device.0", "empty", 1, std::span<const std::byte>()).ok());
  std::thread sender([&] {
    const int stream = store.ours.get();
    CHECK(send_memory(stream, 0, pages_of(1, 1024)).ok());
    CHECK(send_memory(stream, 1024 * kPageSize, pages_of(2, 1024)).ok());
    CHECK(send_memory(stream, 5 * kPageSize, pages_of(0, 2)).ok());
    CHECK(send_memory(stream, 6 * kPageSize, pages_of(3, 1)).ok());
    CHECK(send_state(stream, sections).ok());
  });
  const auto written = store.write("base");
  sender.join();
  REQUIRE_MESSAGE(written.ok(), written.error().message);
  auto image = store.backend->open("base");
  REQUIRE(image.ok());
  CHECK(image->verify().ok());
  const auto extents = image->extents();
  REQUIRE(extents.ok());
  const auto memory = GuestMemory::restore({.size_bytes = kBytes}, *extents);
  REQUIRE(memory.ok());
  const auto holds = [&](uint64_t page, uint8_t value) {
    const std::byte* bytes = memory->regions()[0].host + page * kPageSize;
    return std::all_of(bytes, bytes + kPageSize, [&](std::byte b) { return b == std::byte{value}; });
  };
  for (uint64_t page = 0; page < kPages; ++page)
    CHECK(holds(page, page == 5 ? 0 : page == 6 ? 3 : page < 1024 ? 1 : 2));
  const auto loaded = image->sections();
  REQUIRE(loaded.ok());
  CHECK(loaded->all().size() == 2);
  CHECK(std::ranges::equal(*loaded->get("core", "large", 4), large));
}

TEST_CASE("snapshot stream: one that ends before its state leaves nothing") {
  Store store;
  REQUIRE(send_memory(store.ours.get(), 0, pages_of(1, 4)).ok());
  store.ours.reset();
  const auto written = store.write("base");
  REQUIRE(!written.ok());
  CHECK(written.error().message == "the machine went away before all of it was written");
  CHECK(store.backend->list()->empty());
  for (const auto& entry : std::filesystem::directory_iterator(store.dir.path() + "/store"))
    CHECK(!entry.is_directory());
}

TEST_CASE("snapshot stream: a reader that is gone is an error, not a signal") {
  Store store;
  store.theirs.reset();
  const auto sent = send_memory(store.ours.get(), 0, pages_of(1, 4));
  REQUIRE(!sent.ok());
  CHECK(sent.error().code == EPIPE);
}
