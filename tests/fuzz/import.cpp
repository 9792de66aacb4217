// SPDX-License-Identifier: Apache-2.0
// Fuzzes the import of a template, into the backend "file". The first byte says what the input is: an exported file, its
// plain content, or the compressed memory of a snapshot, plain or not. Beside what the sanitizers see: what is accepted
// is whole, exported again it is the same, and compressed and decompressed it stays so; what is refused leaves nothing.
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zstd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>

#include "core/snapshot/export_file.hpp"
#include "snapshot-file/compression.hpp"
#include "snapshot-file/new_snapshot.hpp"
#include "snapshot-file/stored_snapshot.hpp"
#include "snapshot-file/zstd_file.hpp"

using namespace snapshot_file;
using vmm::ExportHeader;
using vmm::ExportReader;
using vmm::ExportWriter;

namespace {

constexpr uint64_t kMostFuzzedBytes = 64 << 20;  // of a memory; more takes time, and is the same

void require(bool holds, int line = __builtin_LINE()) {
  if (holds) return;
  std::fprintf(stderr, "%s:%d does not hold\n", __FILE__, line);
  std::abort();
}

template <typename T>
T expect(Result<T> result, int line = __builtin_LINE()) {
  if (!result.ok()) std::fprintf(stderr, "%s\n", result.error().message.c_str());
  require(result.ok(), line);
  return std::move(result).value();
}
void expect(const Result<void>& result, int line = __builtin_LINE()) {
  if (!result.ok()) std::fprintf(stderr, "%s\n", result.error().message.c_str());
  require(result.ok(), line);
}

// In memory where that is, and gone with the process.
class Scratch {
 public:
  Scratch() {
    std::error_code ignored;
    path_ = (std::filesystem::is_directory("/dev/shm", ignored) ? "/dev/shm" : "/tmp") + std::string("/clone-fuzz.XXXXXX");
    require(::mkdtemp(path_.data()));
  }
  ~Scratch() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

Fd file_of(std::span<const std::byte> content) {
  Fd file(::memfd_create("input", MFD_CLOEXEC));
  require(static_cast<bool>(file));
  expect(write_at(file.get(), 0, content));
  return file;
}

std::vector<std::byte> compressed(std::span<const std::byte> plain) {
  std::vector<std::byte> file(ZSTD_compressBound(plain.size()));
  const size_t size_bytes = ZSTD_compress(file.data(), file.size(), plain.data(), plain.size(), 1);
  require(!ZSTD_isError(size_bytes));
  file.resize(size_bytes);
  return file;
}

// All that a snapshot holds, page by page but zeroes.
struct Content {
  uint64_t memory_bytes = 0;
  std::map<uint64_t, std::vector<std::byte>> pages;
  std::map<SectionKey, std::pair<uint32_t, std::vector<std::byte>>> sections;
  bool operator==(const Content&) const = default;

  void add(uint64_t offset, std::span<const std::byte> bytes) {
    for (uint64_t at = 0; at < bytes.size(); at += kPageBytes)
      if (const auto page = bytes.subspan(at, kPageBytes); !is_zero_page(page.data()))
        pages.emplace(offset + at, std::vector(page.begin(), page.end()));
  }
};

Content content_of(const Store& store, const std::string& name) {
  const auto snapshot = expect(StoredSnapshot::open(store, name));
  Content content;
  content.memory_bytes = snapshot->header().memory_bytes;
  std::vector<std::byte> buffer;
  for (uint32_t index = 0;; ++index) {
    const auto extent = expect(snapshot->memory_extent(index));
    if (!extent) break;
    buffer.resize(extent->size_bytes);
    expect(read_at(extent->fd, extent->fd_offset, buffer));
    content.add(extent->memory_offset, buffer);
  }
  for (const auto& section : expect(snapshot->list_sections())) {
    const auto found = expect(snapshot->read_section(section.owner, section.tag));
    content.sections[{section.owner, section.tag}] = {found.version, {found.bytes.begin(), found.bytes.end()}};
  }
  expect(snapshot->verify());
  return content;
}

Result<Content> import_into(const std::string& store_path, Fd file) {
  ExportReader from(std::move(file));
  const ExportHeader header = CLONE_TRY(from.read_header());
  if (header.memory_bytes > kMostFuzzedBytes) return Error{"too large to be fuzzed"};
  CLONE_TRY(check_name("", header.name));
  Store store = CLONE_TRY(Store::make(store_path));
  const auto image = CLONE_TRY(NewSnapshot::begin(std::move(store), header.name, "", header.memory_bytes));
  Content content;
  content.memory_bytes = header.memory_bytes;
  const ExportReader::Visitor into{
      [&](const std::string& owner, const std::string& tag, uint32_t version, std::span<const std::byte> bytes) {
        content.sections[{owner, tag}] = {version, {bytes.begin(), bytes.end()}};
        return image->write_section(owner, tag, version, bytes);
      },
      [&](uint64_t offset, std::span<const std::byte> bytes) -> Result<void> {
        require(offset + bytes.size() <= header.memory_bytes && bytes.size() <= vmm::kMostExportedPieceBytes);
        CLONE_TRY(image->write_memory(offset, bytes));
        content.add(offset, bytes);
        return {};
      }};
  CLONE_TRY(from.read_contents(header, into));
  CLONE_TRY(image->commit());
  return content;
}

Fd exported(const Content& content) {
  std::vector<std::byte> file;
  ExportWriter to([&](std::span<const std::byte> bytes) -> Result<void> {
    file.insert(file.end(), bytes.begin(), bytes.end());
    return {};
  });
  expect(to.write_header({content.memory_bytes, "again"}));
  for (const auto& [key, section] : content.sections)
    expect(to.write_section(key.first, key.second, section.first, section.second));
  for (const auto& [offset, page] : content.pages) expect(to.write_memory(offset, page));
  expect(to.write_end());
  return file_of(file);
}

void import(std::span<const std::byte> file) {
  static const Scratch scratch;
  const std::string path = scratch.path() + "/store";
  const auto content = import_into(path, file_of(file));
  if (content.ok()) {
    const Store store = expect(Store::open(path));
    const std::vector<std::string> names = expect(store.names());
    require(names.size() == 1);
    require(content_of(store, names.front()) == *content);
    require(expect(import_into(scratch.path() + "/other", exported(*content))) == *content);
    for (const bool on : {true, false}) {
      expect(set_compressed(store, names.front(), on));
      require(content_of(store, names.front()) == *content);
    }
  }
  std::error_code error;
  for (const char* store : {"/store", "/other"}) {
    if (!std::filesystem::exists(scratch.path() + store)) continue;
    for (const auto& entry : std::filesystem::directory_iterator(scratch.path() + store)) {
      require(content.ok() && !entry.path().filename().string().starts_with("."));
      require(std::filesystem::remove_all(entry.path(), error) == 3 && !error);
    }
  }
}

// The memory of a snapshot that lies compressed, with a state that is sound.
void decompress_memory(std::span<const std::byte> file) {
  constexpr Extent extents[] = {{kPageBytes, kPageBytes}, {4 * kPageBytes, 3 * kPageBytes}};
  Fd memory(::memfd_create("memory", MFD_CLOEXEC));
  require(::ftruncate(memory.get(), 8 * kPageBytes) == 0);
  const auto done = decompress(file_of(file).get(), extents, memory.get());
  struct stat status {};
  require(::fstat(memory.get(), &status) == 0 && status.st_size == 8 * kPageBytes);
  require(expect(find_data_outside(memory.get(), extents, 8 * kPageBytes)) == 8 * kPageBytes);
  if (!done.ok()) return;
  Fd again(::memfd_create("again", MFD_CLOEXEC)), twice(::memfd_create("twice", MFD_CLOEXEC));
  require(::ftruncate(twice.get(), 8 * kPageBytes) == 0);
  expect(compress(memory.get(), extents, again.get()));
  expect(decompress(again.get(), extents, twice.get()));
  require(expect(digest_of(memory.get(), extents)) == expect(digest_of(twice.get(), extents)));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const auto input = std::as_bytes(std::span<const uint8_t>(data, size)).subspan(1);
  switch (data[0] % 4) {
    case 0:
      import(input);
      break;
    case 1:
      import(compressed(input));
      break;
    case 2:
      decompress_memory(input);
      break;
    default:
      decompress_memory(compressed(input));
  }
  return 0;
}
