// SPDX-License-Identifier: Apache-2.0
// The pages that a template's forks touch first: kept, believed as far as they make sense, mapped ahead.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>

#include "scratch_dir.hpp"
#include "vm/prefault.hpp"

using namespace vmm;

namespace {

constexpr uint64_t kPages = 1024;

bool same(const std::vector<PageRun>& a, const std::vector<PageRun>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const PageRun& x, const PageRun& y) { return x.first == y.first && x.count == y.count; });
}
uint64_t count(const std::vector<PageRun>& runs) {
  uint64_t pages = 0;
  for (const PageRun& run : runs) pages += run.count;
  return pages;
}

// A template of kPages pages, each with its number in it, and machines' memories of it.
struct Template {
  ScratchDir dir;
  Catalogue catalogue = std::move(*Catalogue::scan({CLONE_TEST_PLUGIN_DIR}, PluginTrust::any));
  PluginLibrary library{catalogue};
  std::string store = dir.path() + "/store";
  std::unique_ptr<SnapshotBackend> backend = std::move(*SnapshotBackend::create(library, "file", {{"store", store}}));

  Template() {
    auto image = backend->begin("base", "", kPages * kPageSize);
    REQUIRE(image.ok());
    std::vector<std::byte> page(kPageSize);
    for (uint64_t number = 1; number < kPages; ++number) {
      std::memcpy(page.data(), &number, sizeof number);
      REQUIRE(image->write_memory(number * kPageSize, page).ok());
    }
    REQUIRE(image->commit().ok());
  }
  std::string note() const { return store + "/base/note-touched-pages"; }
  SnapshotImage open() const {
    auto image = backend->open("base");
    REQUIRE(image.ok());
    return std::move(*image);
  }
  static GuestMemory restore(const std::vector<MemoryExtent>& extents) {
    auto memory = GuestMemory::restore({.size_bytes = kPages * kPageSize, .mergeable = false}, extents);
    REQUIRE(memory.ok());
    return std::move(*memory);
  }
};

template <typename Condition>
bool soon(Condition condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    ::usleep(2000);
  }
  return true;
}

}  // namespace

TEST_CASE("prefault: touched pages are read as they were written, within their bounds") {
  const TouchedPages pages{{{0, 1}, {7, 3}, {kPages - 1, 1}}, {{2, 2}, {900, 100}}};
  const auto note = encode_touched(pages, kPages);
  const auto read = decode_touched(note, kPages);
  REQUIRE(read.ok());
  CHECK(same(read->read, pages.read));
  CHECK(same(read->written, pages.written));
  CHECK(!decode_touched(note, kPages - 1).ok());

  // What is too much is left out.
  TouchedPages many;
  for (uint64_t i = 0; i < 200'000; ++i) many.read.push_back({2 * i, 1});
  many.written = {{0, kMostWrittenPages - 1}, {kMostWrittenPages, 2}, {kMostWrittenPages + 10, 1}};
  const auto cut = encode_touched(many, 400'000);
  CHECK(cut.size() <= CLONE_SNAPSHOT_NOTE_MAX_BYTES);
  const auto kept = decode_touched(cut, 400'000);
  REQUIRE(kept.ok());
  CHECK(kept->read.size() > 60'000);
  CHECK(count(kept->written) == kMostWrittenPages);
}

TEST_CASE("prefault: hostile notes are refused, or name pages of this memory only") {
  const TouchedPages pages{{{1, 2}, {10, 5}}, {{3, 4}}};
  const auto note = encode_touched(pages, kPages);
  const auto with = [&](size_t offset, uint32_t value) {
    auto changed = note;
    std::memcpy(changed.data() + offset, &value, sizeof value);
    return decode_touched(changed, kPages).ok();
  };
  constexpr size_t runs = 24;  // behind the header
  CHECK(with(runs, 1));
  CHECK(!with(0, 0));   // magic
  CHECK(!with(16, 3));  // more runs than there are
  CHECK(!with(16, ~0u));
  CHECK(!with(20, ~0u));
  CHECK(!with(runs, kPages));      // outside
  CHECK(!with(runs + 4, kPages));  // over the end
  CHECK(!with(runs + 4, ~0u));
  CHECK(!with(runs + 4, 0));  // empty
  CHECK(!with(runs + 8, 2));  // into the run before
  CHECK(!decode_touched(std::span(note).first(note.size() - 1), kPages).ok());
  CHECK(!decode_touched({}, kPages).ok());
  const TouchedPages much{{}, {{0, kMostWrittenPages}}};
  auto too_much = encode_touched(much, 2 * kMostWrittenPages);
  const uint32_t count_of_run = kMostWrittenPages + 1;
  std::memcpy(too_much.data() + runs + 4, &count_of_run, sizeof count_of_run);
  CHECK(!decode_touched(too_much, 2 * kMostWrittenPages).ok());

  std::mt19937 random(1);
  for (int i = 0; i < 20'000; ++i) {
    auto changed = note;
    for (unsigned flips = 1 + random() % 4; flips > 0; --flips)
      changed[random() % changed.size()] = static_cast<std::byte>(random());
    const auto read = decode_touched(changed, kPages);
    if (!read.ok()) continue;
    for (const auto* list : {&read->read, &read->written})
      for (const PageRun& run : *list)
        REQUIRE((run.count > 0 && run.first < kPages && run.count <= kPages - run.first));
  }
}

TEST_CASE("prefault: the first machine of a template records, the next has its pages before it touches them") {
  const Template base;
  SnapshotImage image = base.open();
  const auto extents = *image.extents();
  {
    GuestMemory memory = base.restore(extents);
    const auto prefault = Prefault::start(memory, PrefaultMode::recorded, &image);
    REQUIRE(prefault.ok());
    CHECK(*memory.load<uint64_t>({30 * kPageSize}) == 30);
    REQUIRE(memory.store<uint64_t>({500 * kPageSize + 8}, 1));
    REQUIRE(memory.store<uint64_t>({800 * kPageSize + 8}, 1));
    REQUIRE(soon([&] { return ::access(base.note().c_str(), F_OK) == 0; }));
  }
  struct stat status {};
  REQUIRE(::stat(base.note().c_str(), &status) == 0);
  CHECK((status.st_mode & 0777) == 0600);
  GuestMemory memory = base.restore(extents);
  const auto prefault = Prefault::start(memory, PrefaultMode::recorded, &image);
  REQUIRE(prefault.ok());
  REQUIRE(soon([&] { return count(memory.touched()->read) >= 1 && count(memory.touched()->written) == 2; }));
  CHECK(memory.touched()->written.front().first == 500);
  for (uint64_t page : {30, 500, 800}) CHECK(*memory.load<uint64_t>({page * kPageSize}) == page);

  // It goes with the template, and is no part of it.
  CHECK(image.verify().ok());
  REQUIRE(base.backend->remove("base").ok());
  CHECK(::access(base.note().c_str(), F_OK) != 0);
  CHECK(!image.write_note(kTouchedNote, {}).ok());
}

TEST_CASE("prefault: none does nothing, all maps what is no hole, and a machine that ends waits for neither") {
  const Template base;
  SnapshotImage image = base.open();
  const auto extents = *image.extents();
  GuestMemory memory = base.restore(extents);
  REQUIRE(Prefault::start(memory, PrefaultMode::none, &image).ok());
  CHECK(memory.touched()->read.empty());
  const auto all = Prefault::start(memory, PrefaultMode::all, nullptr);
  REQUIRE(all.ok());
  CHECK(soon([&] { return count(memory.touched()->read) >= kPages - 1; }));
  CHECK(memory.touched()->written.empty());
  // It would record after 2 s.
  const auto begin = std::chrono::steady_clock::now();
  REQUIRE(Prefault::start(memory, PrefaultMode::recorded, &image).ok());  // and ended
  CHECK(std::chrono::steady_clock::now() - begin < std::chrono::milliseconds(1800));
  CHECK(::access(base.note().c_str(), F_OK) != 0);
}

TEST_CASE("prefault: notes have names, bounds and an owner, and replace each other whole") {
  const Template base;
  SnapshotImage image = base.open();
  const auto bytes = [](size_t size, int value) { return std::vector<std::byte>(size, static_cast<std::byte>(value)); };
  CHECK(!image.read_note("hint").value());
  REQUIRE(image.write_note("hint", bytes(3, 1)).ok());
  REQUIRE(image.write_note("hint", bytes(5, 2)).ok());
  CHECK(*image.read_note("hint").value() == bytes(5, 2));
  for (const char* name : {"", "../state", "a/b", "Hint", "abcdefghijklmnopqrstuvwxyzabcdefg"})
    CHECK(image.write_note(name, bytes(1, 1)).error().message.find("a note's name") != std::string::npos);
  CHECK(!image.write_note("hint", bytes(CLONE_SNAPSHOT_NOTE_MAX_BYTES + 1, 0)).ok());
  CHECK(*image.read_note("hint").value() == bytes(5, 2));
  const std::string path = base.store + "/base/note-hint";
  REQUIRE(::chmod(path.c_str(), 0622) == 0);
  CHECK(image.read_note("hint").error().message.find("others than its owner can write to it") != std::string::npos);
  REQUIRE(::unlink(path.c_str()) == 0);
  REQUIRE(::symlink("state", path.c_str()) == 0);
  CHECK(!image.read_note("hint").ok());
  REQUIRE(image.write_note("hint", bytes(1, 3)).ok());  // in the link's place
  CHECK(*image.read_note("hint").value() == bytes(1, 3));
  CHECK(image.verify().ok());
  // Killed at any moment, a writer leaves the old note, the new one or none, and nothing else.
  const auto entries = [&] {
    return std::distance(std::filesystem::directory_iterator(base.store + "/base"), std::filesystem::directory_iterator());
  };
  const auto before = entries();
  for (int round = 0; round < 40; ++round) {
    const pid_t writer = ::fork();
    REQUIRE(writer >= 0);
    for (uint8_t value = 0; writer == 0; ++value) (void)image.write_note("hint", bytes(70'000, value));
    std::this_thread::sleep_for(std::chrono::microseconds(500 + 130 * round));
    REQUIRE(::kill(writer, SIGKILL) == 0);
    REQUIRE(::waitpid(writer, nullptr, 0) == writer);
    const auto note = image.read_note("hint").value();
    CHECK(entries() == before - !note);
    if (!note || note->size() == 1) continue;
    CHECK(*note == bytes(70'000, static_cast<int>(note->front())));
  }
  REQUIRE(image.write_note("hint", bytes(1, 3)).ok());

  if (::geteuid() != 0) {
    MESSAGE("only root can be another user: the rest is not tested");
    return;
  }
  // Whoever may read a template but not write to it does without.
  const std::string folder = base.store + "/base";
  for (const std::string& file : {base.dir.path(), base.store, folder}) REQUIRE(::chmod(file.c_str(), 0755) == 0);
  REQUIRE(::seteuid(65534) == 0);
  const auto refused = image.write_note("hint", bytes(1, 4));
  REQUIRE(::seteuid(0) == 0);
  CHECK(!refused.ok());
  CHECK(*image.read_note("hint").value() == bytes(1, 3));
}
