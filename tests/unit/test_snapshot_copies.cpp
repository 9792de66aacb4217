// SPDX-License-Identifier: Apache-2.0
// Copies of snapshots: a chain and its flat copy are the same bit for bit, here or elsewhere; damaged and hostile files
// are refused and leave nothing.
#include <doctest/doctest.h>
#include <unistd.h>
#include <zstd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>

#include "scratch_dir.hpp"
#include "snapshot/copies.hpp"

using namespace vmm;
namespace fs = std::filesystem;

namespace {

constexpr uint64_t kPages = 4096;
constexpr uint64_t kBytes = kPages * kPageSize;

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

struct Store {
  ScratchDir dir;
  std::unique_ptr<SnapshotBackend> backend;

  Store() {
    static const auto catalogue = Catalogue::scan({CLONE_TEST_PLUGIN_DIR}, PluginTrust::any);
    static PluginLibrary library(*catalogue);
    auto created = SnapshotBackend::create(library, "file", {{"store", dir.path() + "/store"}});
    REQUIRE(created.ok());
    backend = std::move(*created);
  }
  std::string path(const std::string& name) const { return dir.path() + "/" + name; }

  // Of pages that `seed` chooses, some of them zeroes; sections of its own.
  void make(const std::string& name, const std::string& parent, unsigned seed) const {
    auto image = backend->begin(name, parent, kBytes);
    REQUIRE(image.ok());
    std::mt19937 random(seed);
    std::vector<std::byte> page(kPageSize);
    for (unsigned i = 0; i < 300; ++i) {
      std::ranges::generate(page, [&, zero = random() % 4 == 0] { return zero ? std::byte{} : std::byte(random()); });
      REQUIRE(image->write_memory(random() % kPages * kPageSize, page).ok());
    }
    Sections sections;
    REQUIRE(sections.put("core", "name", 3, std::as_bytes(std::span(name))).ok());
    REQUIRE(sections.put("device.0", "empty", 1, std::span<const std::byte>()).ok());
    REQUIRE(image->write(sections).ok());
    REQUIRE(image->commit().ok());
  }
  void make_chain() const {
    make("base", "", 1);
    make("one", "base", 2);
    make("two", "one", 3);
  }
  SnapshotImage open(const std::string& name) const {
    auto image = backend->open(name);
    REQUIRE_MESSAGE(image.ok(), image.error().message);
    return std::move(*image);
  }
  // Memory as a fork would have it.
  std::string memory(const std::string& name) const {
    auto image = open(name);
    const auto extents = image.extents();
    REQUIRE(extents.ok());
    auto memory = GuestMemory::restore({.size_bytes = kBytes}, *extents);
    REQUIRE(memory.ok());
    return {reinterpret_cast<const char*>(memory->slice({0}, kBytes)), kBytes};
  }
  void check_same(const std::string& one, const std::string& other) const {
    CHECK((memory(one) == memory(other)));
    auto first = open(one), second = open(other);
    const auto wanted = first.sections(), got = second.sections();
    REQUIRE(wanted.ok());
    REQUIRE(got.ok());
    CHECK(wanted->all().size() == got->all().size());
    for (const auto& [key, section] : wanted->all()) {
      REQUIRE(got->all().contains(key));
      CHECK(got->all().at(key).version == section.version);
      CHECK((got->all().at(key).bytes == section.bytes));
    }
    CHECK(second.verify().ok());
  }
  std::string names() const {
    std::string all;
    const auto entries = backend->list();
    REQUIRE(entries.ok());
    for (const SnapshotBackend::Entry& entry : *entries)
      all += (all.empty() ? "" : " ") + entry.name + (entry.parent.empty() ? "" : "<" + entry.parent);
    return all;
  }
  // Why it cannot be imported; "" when it can.
  std::string refusal(const std::string& content) const {
    const auto imported = import_snapshot(*backend, dir.write("file", content), "imported");
    if (imported.ok()) return "";
    CHECK(!backend->open("imported").ok());
    // Of what was begun there is nothing either.
    if (fs::exists(path("store")))
      for (const auto& entry : fs::directory_iterator(path("store")))
        CHECK(!entry.path().filename().string().starts_with("."));
    return imported.error().message;
  }
};

// The plain content of an exported file: as in copies.cpp.
struct Header {
  char magic[8] = {'C', 'L', 'O', 'N', 'E', 'T', 'P', 'L'};
  uint32_t format_version = 1;
  uint32_t reserved = 0;
  uint64_t memory_bytes = kBytes;
  char name[72] = "crafted";
};
struct Record {
  char owner[64] = "core";
  char tag[64] = "name";
  uint32_t kind;
  uint32_t version = 1;
  uint64_t offset = 0;
  uint64_t size_bytes = 0;
};

template <typename T>
std::string bytes_of(const T& record) {
  return {reinterpret_cast<const char*>(&record), sizeof record};
}
std::string compressed(const std::string& plain, int window_log = 0) {
  std::string file(ZSTD_compressBound(plain.size()), '\0');
  const std::unique_ptr<ZSTD_CCtx, decltype(&ZSTD_freeCCtx)> context(ZSTD_createCCtx(), ZSTD_freeCCtx);
  ZSTD_CCtx_setParameter(context.get(), ZSTD_c_checksumFlag, 1);
  ZSTD_CCtx_setParameter(context.get(), ZSTD_c_contentSizeFlag, 0);
  if (window_log) ZSTD_CCtx_setParameter(context.get(), ZSTD_c_windowLog, window_log);
  ZSTD_inBuffer in{plain.data(), plain.size(), 0};
  ZSTD_outBuffer out{file.data(), file.size(), 0};
  // In two steps: the encoder does not know the size in advance, and the window is as it was asked for.
  ZSTD_inBuffer begin{plain.data(), std::min<size_t>(plain.size(), 1), 0};
  REQUIRE(!ZSTD_isError(ZSTD_compressStream2(context.get(), &out, &begin, ZSTD_e_continue)));
  in.pos = begin.pos;
  REQUIRE(ZSTD_compressStream2(context.get(), &out, &in, ZSTD_e_end) == 0);
  return file.substr(0, out.pos);
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("snapshot copies: a chain and its flat copy are the same bit for bit") {
  const Store store;
  store.make_chain();
  for (const char* name : {"base", "one", "two"}) {
    const std::string flat = std::string("flat-") + name;
    REQUIRE(flatten_snapshot(*store.backend, name, flat).ok());
    store.check_same(name, flat);
  }
  CHECK(store.names() == "base flat-base flat-one flat-two one<base two<one");
  CHECK((store.memory("one") != store.memory("two")));
  CHECK(contains(flatten_snapshot(*store.backend, "two", "one").error().message, "already"));
  CHECK(!flatten_snapshot(*store.backend, "nothing", "new").ok());
  // Damage is not copied.
  {
    std::fstream file(store.path("store/base/memory"), std::ios::in | std::ios::out | std::ios::binary);
    for (uint64_t page = 0; page < kPages; ++page) file.seekp(static_cast<std::streamoff>(page * kPageSize)).put('x');
  }
  CHECK(contains(flatten_snapshot(*store.backend, "two", "new").error().message, "is damaged"));
  CHECK(contains(export_snapshot(*store.backend, "two", store.path("file")).error().message, "is damaged"));
  CHECK(!fs::exists(store.path("file")));
  CHECK(!store.backend->open("new").ok());
}

TEST_CASE("snapshot copies: a chain goes elsewhere as one file") {
  const Store here, there;
  here.make_chain();
  const std::string file = here.path("exported");
  const auto exported = export_snapshot(*here.backend, "two", file);
  REQUIRE(exported.ok());
  CHECK(*exported == fs::file_size(file));
  CHECK(fs::status(file).permissions() == (fs::perms::owner_read | fs::perms::owner_write));
  CHECK(!export_snapshot(*here.backend, "two", file).ok());
  CHECK(!export_snapshot(*here.backend, "nothing", here.path("nothing")).ok());
  for (const auto& entry : fs::directory_iterator(here.dir.path())) CHECK(entry.path().filename().string()[0] != '.');

  CHECK(import_snapshot(*there.backend, file, "").value() == "two");
  CHECK(import_snapshot(*there.backend, file, "other").value() == "other");
  CHECK(contains(import_snapshot(*there.backend, file, "").error().message, "already"));
  CHECK(there.names() == "other two");
  REQUIRE(import_snapshot(*here.backend, file, "back").ok());
  here.check_same("two", "back");
}

TEST_CASE("snapshot copies: a damaged file is refused and leaves nothing") {
  const Store store;
  store.make_chain();
  REQUIRE(export_snapshot(*store.backend, "two", store.path("exported")).ok());
  const std::string whole = read_file(store.path("exported"));
  REQUIRE(store.refusal(whole) == "");
  REQUIRE(store.backend->remove("imported").ok());
  for (const size_t size : {size_t{0}, size_t{1}, size_t{50}, whole.size() / 3, whole.size() - 5, whole.size() - 1}) {
    CAPTURE(size);
    CHECK(contains(store.refusal(whole.substr(0, size)), "ends too early"));
  }
  CHECK(contains(store.refusal(whole + 'x'), "goes on behind its end"));
  CHECK(contains(store.refusal(whole + whole), "goes on behind its end"));
  std::mt19937 random(7);
  for (unsigned i = 0; i < 60; ++i) {
    // The first bytes say how the frame is to be read: another way may lead to the same content.
    const size_t place = i < 4 ? i : i == 4 ? whole.size() - 1 : 8 + random() % (whole.size() - 8);
    CAPTURE(place);
    std::string flipped = whole;
    flipped[place] = static_cast<char>(flipped[place] ^ 1 << random() % 8);
    CHECK(store.refusal(flipped) != "");
  }
  CHECK(store.names() == "base one<base two<one");
}

TEST_CASE("snapshot copies: a hostile file is refused and leaves nothing") {
  const Store store;
  const std::string page(kPageSize, 'p');
  const Record section{.kind = 1, .size_bytes = 4}, memory{.kind = 2, .size_bytes = kPageSize}, end{.kind = 3};
  const auto file = [&](const Header& header, const std::string& records) {
    return compressed(bytes_of(header) + records);
  };
  const std::string good = bytes_of(section) + "name" + bytes_of(memory) + page;
  CHECK(store.refusal(file({}, good + bytes_of(end))) == "");
  REQUIRE(store.backend->remove("imported").ok());
  const auto refused = [&](const std::string& content, const char* why) {
    const std::string refusal = store.refusal(content);
    CHECK_MESSAGE(contains(refusal, why), refusal);
  };
  const auto piece = [&](uint64_t offset, uint64_t size_bytes) {
    Record record = memory;
    record.offset = offset;
    record.size_bytes = size_bytes;
    return good + bytes_of(record) + std::string(std::min<uint64_t>(size_bytes, 8 << 20), 'q') + bytes_of(end);
  };

  refused("not zstd at all, but long enough to be looked at", "is damaged");
  refused(compressed("plain"), "ends too early");
  refused(compressed(std::string(1000, 'x')), "is not an exported template");
  Header header;
  header.format_version = 2;
  refused(file(header, good + bytes_of(end)), "format version 2; known is 1");
  for (const uint64_t memory_bytes : {uint64_t{0}, uint64_t{1}, kBytes + 1, ~uint64_t{0}, uint64_t{1} << 60}) {
    CAPTURE(memory_bytes);
    header = {};
    header.memory_bytes = memory_bytes;
    CHECK(store.refusal(file(header, good + bytes_of(end))) != "");
  }
  refused(file({}, good), "ends too early");
  refused(file({}, good + bytes_of(end) + "more"), "goes on behind its end");
  refused(file({}, good + bytes_of(Record{.kind = 4})), "neither section nor memory");
  for (const auto& [offset, size_bytes] : std::initializer_list<std::pair<uint64_t, uint64_t>>{
           {0, kPageSize},                         // a second time
           {kBytes, kPageSize},                    // behind the end
           {kBytes - kPageSize, 2 * kPageSize},    // over it
           {kPageSize, 8 << 20},                   // larger than pieces are
           {kPageSize, ~uint64_t{0} - kPageSize},  // and so that sums wrap around
           {~uint64_t{0} - 4095, kPageSize},
           {kPageSize, 0}}) {
    CAPTURE(offset);
    CAPTURE(size_bytes);
    refused(file({}, piece(offset, size_bytes)), "a piece of memory is too large, or not in its place");
  }
  refused(file({}, piece(kPageSize + 1, kPageSize)), "whole pages");
  refused(file({}, piece(kPageSize, 100)), "whole pages");
  for (const uint64_t size_bytes : {uint64_t{256 << 20} + 1, ~uint64_t{0}}) {
    Record large = section;
    large.size_bytes = size_bytes;
    std::strcpy(large.tag, "large");
    refused(file({}, good + bytes_of(large)), "its sections have more than");
  }
  refused(file({}, good + bytes_of(section) + "name" + bytes_of(end)), "a second time");
  Record unnamed = section;
  std::memset(unnamed.owner, 'A', sizeof unnamed.owner);  // without a NUL, too
  refused(file({}, bytes_of(unnamed) + "name" + bytes_of(end)), "allowed are 1 to 63 lower-case letters");
  refused(compressed(bytes_of(Header{}) + good + bytes_of(end), 27), "is damaged");  // a window of 128 MiB
  // A name that would lead elsewhere.
  header = {};
  std::strcpy(header.name, "../elsewhere");
  CHECK(!import_snapshot(*store.backend, store.dir.write("file", file(header, good + bytes_of(end))), "").ok());
  CHECK(!fs::exists(store.path("elsewhere")));
  CHECK(store.names() == "");
}
