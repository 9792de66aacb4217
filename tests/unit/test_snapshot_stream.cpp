// SPDX-License-Identifier: Apache-2.0
// A machine that is sent to who writes its snapshot: what was sent last counts, and what ends early is no snapshot.
#include <doctest/doctest.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <thread>

#include "scratch_dir.hpp"
#include "snapshot/backend.hpp"
#include "snapshot/parent_memory.hpp"
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

TEST_CASE("snapshot stream: over a parent only what differs is kept, and the last of a page") {
  Store store;
  Sections sections;
  const auto send = [&](const std::function<void(int)>& memory) {
    std::thread sender([&store, &sections, memory] {
      memory(store.ours.get());
      (void)send_state(store.ours.get(), sections);
    });
    return sender;
  };
  std::thread base = send([](int stream) { CHECK(send_memory(stream, 16 * kPageSize, pages_of(1, 16)).ok()); });
  REQUIRE(store.write("base").ok());
  base.join();

  auto parent = store.backend->open("base");
  REQUIRE(parent.ok());
  ParentMemory memory_of_parent(*parent->extents(), kBytes);
  std::thread changes = send([](int stream) {
    CHECK(send_memory(stream, 8 * kPageSize, pages_of(0, 8)).ok());    // zeroes as before
    CHECK(send_memory(stream, 16 * kPageSize, pages_of(1, 4)).ok());   // ones as before
    CHECK(send_memory(stream, 20 * kPageSize, pages_of(2, 2)).ok());   // other ones, of which
    CHECK(send_memory(stream, 21 * kPageSize, pages_of(1, 1)).ok());   // one is as it was after all
    CHECK(send_memory(stream, 31 * kPageSize, pages_of(3, 2)).ok());   // both sides of an extent's end
    CHECK(send_memory(stream, 24 * kPageSize, pages_of(0, 1)).ok());   // zeroes where there were none
  });
  {
    auto image = store.backend->begin("next", "base", kBytes);
    REQUIRE(image.ok());
    const auto written = receive_snapshot(store.theirs.get(), *image, &memory_of_parent);
    changes.join();
    REQUIRE_MESSAGE(written.ok(), written.error().message);
  }
  auto next = store.backend->open("next");
  REQUIRE(next.ok());
  CHECK(next->verify().ok());
  const auto memory = GuestMemory::restore({.size_bytes = kBytes}, *next->extents());
  REQUIRE(memory.ok());
  for (uint64_t page = 0; page < kPages; ++page) {
    CAPTURE(page);
    const unsigned expected = page == 20 ? 2 : page == 31 || page == 32 ? 3 : page == 24 ? 0 : page >= 16 && page < 32;
    const std::byte* bytes = memory->regions()[0].host + page * kPageSize;
    CHECK(std::all_of(bytes, bytes + kPageSize, [&](std::byte b) { return b == std::byte(expected); }));
  }
  const auto entries = store.backend->list();
  REQUIRE(entries.ok());
  for (const auto& entry : *entries)
    if (entry.name == "next") CHECK(entry.stored_bytes <= 8 * kPageSize);  // five pages and the state

  std::thread beyond = send([](int stream) { (void)send_memory(stream, kBytes, pages_of(2, 1)); });
  auto image = store.backend->begin("beyond", "base", kBytes);
  REQUIRE(image.ok());
  CHECK_FALSE(receive_snapshot(store.theirs.get(), *image, &memory_of_parent).ok());
  store.theirs.reset();
  beyond.join();
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
