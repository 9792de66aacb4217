// SPDX-License-Identifier: Apache-2.0
// An exported snapshot is one zstd frame with a checksum: a header, sections, pieces of memory in ascending order, an
// end.
#include "snapshot/copies.hpp"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include <zstd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <utility>

#include "util/fd.hpp"

namespace vmm {
namespace {

// Integers are little endian, text ends in NUL.
constexpr char kMagic[8] = {'C', 'L', 'O', 'N', 'E', 'T', 'P', 'L'};
constexpr uint32_t kFormatVersion = 1;
struct Header {
  char magic[8];
  uint32_t format_version;
  uint32_t reserved;
  uint64_t memory_bytes;
  char name[72];
};
enum class Kind : uint32_t { section = 1, memory = 2, end = 3 };
struct Record {
  char owner[64];  // of a section
  char tag[64];
  Kind kind;
  uint32_t version;     // of a section
  uint64_t offset;      // of memory: whole pages
  uint64_t size_bytes;  // of what follows
};
static_assert(sizeof(Header) == 96 && sizeof(Record) == 152);

constexpr uint64_t kMostSectionBytes = 256 << 20;  // of all sections together
constexpr int kLevel = 3;
constexpr int kWindowLog = 21;  // what the reader allocates

Error corrupt(std::string message) { return {std::move(message), 0, CLONE_ERR_CORRUPT}; }

template <size_t size>
void put_text(char (&field)[size], std::string_view text) {
  std::copy_n(text.begin(), std::min(text.size(), size - 1), field);
}
template <size_t size>
std::string text_of(const char (&field)[size]) {
  return {field, ::strnlen(field, size)};
}

// Calls visit(offset, bytes) for what lies in the extents. Holes of their files are zeroes and passed over.
template <typename Visit>
Result<void> visit_extents(std::span<const MemoryExtent> extents, Visit&& visit) {
  std::vector<std::byte> buffer(kSnapshotPieceBytes);
  for (const MemoryExtent& extent : extents) {
    const uint64_t end = extent.fd_offset + extent.size_bytes;
    for (uint64_t at = extent.fd_offset; at < end;) {
      // Data may begin in the middle of a page. A file system without holes, or none that is known, is all data.
      const off_t data = ::lseek(extent.fd, static_cast<off_t>(at), SEEK_DATA);
      if (data < 0 && errno == ENXIO) break;
      if (data >= 0) at = std::max(at, static_cast<uint64_t>(data) / kPageSize * kPageSize);
      if (at >= end) break;
      const off_t hole = ::lseek(extent.fd, static_cast<off_t>(at), SEEK_HOLE);
      const uint64_t data_end = hole < 0 ? end : (static_cast<uint64_t>(hole) + kPageSize - 1) / kPageSize * kPageSize;
      const uint64_t stop = std::min({end, at + buffer.size(), std::max(data_end, at + kPageSize)});
      const std::span<std::byte> piece = std::span(buffer).first(stop - at);
      TRY(read_snapshot_memory(extent.fd, at, piece));
      TRY(visit(extent.memory_offset + (at - extent.fd_offset), std::span<const std::byte>(piece)));
      at = stop;
    }
  }
  return {};
}

// An opened snapshot without damage.
struct Original {
  SnapshotImage image;
  uint64_t memory_bytes;
};
Result<Original> open_whole(const SnapshotBackend& backend, const std::string& name) {
  Original original{TRY(backend.open(name)), 0};
  TRY(original.image.verify());
  for (const SnapshotBackend::Entry& entry : TRY(backend.list()))
    if (entry.name == name) original.memory_bytes = entry.memory_bytes;
  return original;
}

// A new file under a temporary name beside its own.
class NewFile {
 public:
  static Result<NewFile> create(const std::string& path) {
    NewFile file(path);
    if (std::error_code ignored; std::filesystem::exists(path, ignored)) return Error{path + ": is there already"};
    file.fd_ = Fd(::mkostemp(file.temporary_.data(), O_CLOEXEC));  // mode 0600
    if (!file.fd_) return errno_error(path);
    return file;
  }
  NewFile(NewFile&&) = default;
  ~NewFile() {
    if (fd_) ::unlink(temporary_.c_str());
  }
  Result<void> write(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      const ssize_t count = ::write(fd_.get(), bytes.data(), bytes.size());
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) return errno_error(path_);
      bytes = bytes.subspan(static_cast<size_t>(count));
    }
    return {};
  }
  Result<void> publish() {
    if (::fsync(fd_.get()) != 0 ||
        ::renameat2(AT_FDCWD, temporary_.c_str(), AT_FDCWD, path_.c_str(), RENAME_NOREPLACE) != 0)
      return errno_error(path_);
    fd_.reset();
    return {};
  }

 private:
  explicit NewFile(const std::string& path)
      : path_(path),
        temporary_((std::filesystem::path(path).parent_path() /
                    ("." + std::filesystem::path(path).filename().string() + ".XXXXXX"))
                       .string()) {}

  std::string path_, temporary_;
  Fd fd_;
};

class Compressor {
 public:
  explicit Compressor(NewFile& file) : file_(file), context_(ZSTD_createCCtx()), buffer_(ZSTD_CStreamOutSize()) {
    ZSTD_CCtx_setParameter(context_.get(), ZSTD_c_compressionLevel, kLevel);
    ZSTD_CCtx_setParameter(context_.get(), ZSTD_c_windowLog, kWindowLog);
    ZSTD_CCtx_setParameter(context_.get(), ZSTD_c_checksumFlag, 1);
  }
  Result<void> write(std::span<const std::byte> bytes) { return feed(bytes, ZSTD_e_continue); }
  template <typename T>
  Result<void> write_record(const T& record) {
    return write(std::as_bytes(std::span(&record, 1)));
  }
  Result<void> finish() { return feed({}, ZSTD_e_end); }
  uint64_t written_bytes() const { return written_bytes_; }

 private:
  Result<void> feed(std::span<const std::byte> bytes, ZSTD_EndDirective directive) {
    ZSTD_inBuffer in{bytes.data(), bytes.size(), 0};
    for (size_t left = 1; left || in.pos < in.size;) {
      ZSTD_outBuffer out{buffer_.data(), buffer_.size(), 0};
      left = ZSTD_compressStream2(context_.get(), &out, &in, directive);
      if (ZSTD_isError(left)) return Error{std::string("zstd: ") + ZSTD_getErrorName(left)};
      TRY(file_.write(std::span<const std::byte>(buffer_).first(out.pos)));
      written_bytes_ += out.pos;
      if (directive == ZSTD_e_continue) left = 0;
    }
    return {};
  }

  NewFile& file_;
  std::unique_ptr<ZSTD_CCtx, decltype([](ZSTD_CCtx* context) { ZSTD_freeCCtx(context); })> context_;
  std::vector<std::byte> buffer_;
  uint64_t written_bytes_ = 0;
};

// What is read may be anything.
class Decompressor {
 public:
  explicit Decompressor(Fd file) : file_(std::move(file)), context_(ZSTD_createDCtx()), buffer_(ZSTD_DStreamInSize()) {
    ZSTD_DCtx_setParameter(context_.get(), ZSTD_d_windowLogMax, kWindowLog);
  }
  Result<void> read(std::span<std::byte> into) {
    if (TRY(read_some(into)) < into.size()) return corrupt("ends too early");
    return {};
  }
  template <typename T>
  Result<T> read_record() {
    T record{};
    TRY(read(std::as_writable_bytes(std::span(&record, 1))));
    return record;
  }
  // Compares the checksum.
  Result<void> expect_end() {
    std::byte more{};
    if (TRY(read_some({&more, 1})) || in_.pos < in_.size || TRY(refill())) return corrupt("goes on behind its end");
    if (!frame_ended_) return corrupt("ends too early");
    return {};
  }

 private:
  // Less only at the end of the frame or of the file.
  Result<size_t> read_some(std::span<std::byte> into) {
    ZSTD_outBuffer out{into.data(), into.size(), 0};
    while (out.pos < out.size && !frame_ended_) {
      const size_t before = out.pos;
      const size_t left = ZSTD_decompressStream(context_.get(), &out, &in_);
      if (ZSTD_isError(left)) return corrupt(std::string("is damaged: ") + ZSTD_getErrorName(left));
      frame_ended_ = left == 0;
      if (out.pos == before && !frame_ended_ && in_.pos == in_.size && !TRY(refill())) break;
    }
    return out.pos;
  }
  // False at the end of the file.
  Result<bool> refill() {
    ssize_t count = 0;
    do count = ::read(file_.get(), buffer_.data(), buffer_.size());
    while (count < 0 && errno == EINTR);
    if (count < 0) return errno_error("read");
    in_ = {buffer_.data(), static_cast<size_t>(count), 0};
    return count > 0;
  }

  Fd file_;
  std::unique_ptr<ZSTD_DCtx, decltype([](ZSTD_DCtx* context) { ZSTD_freeDCtx(context); })> context_;
  std::vector<std::byte> buffer_;
  ZSTD_inBuffer in_{nullptr, 0, 0};
  bool frame_ended_ = false;
};

Result<void> read_into(Decompressor& from, SnapshotImage& image, uint64_t memory_bytes) {
  std::vector<std::byte> buffer;
  uint64_t section_bytes = 0, memory_end = 0;
  for (;;) {
    const auto record = TRY(from.read_record<Record>());
    switch (record.kind) {
      case Kind::section:
        if (record.size_bytes > kMostSectionBytes - section_bytes)
          return corrupt("its sections have more than " + std::to_string(kMostSectionBytes) + " bytes");
        section_bytes += record.size_bytes;
        buffer.resize(record.size_bytes);
        TRY(from.read(buffer));
        TRY(image.write_section(text_of(record.owner), text_of(record.tag), record.version, buffer));
        break;
      case Kind::memory:
        if (record.offset < memory_end || record.offset > memory_bytes ||
            record.size_bytes > std::min(memory_bytes - record.offset, kSnapshotPieceBytes) || !record.size_bytes)
          return corrupt("a piece of memory is too large, or not in its place");
        memory_end = record.offset + record.size_bytes;
        buffer.resize(record.size_bytes);
        TRY(from.read(buffer));
        TRY(image.write_memory(record.offset, buffer));
        break;
      case Kind::end:
        return from.expect_end();
      default:
        return corrupt("holds what is neither section nor memory");
    }
  }
}

}  // namespace

Result<void> flatten_snapshot(const SnapshotBackend& backend, const std::string& name, const std::string& copy) {
  Original original = TRY(open_whole(backend, name));
  SnapshotImage image = TRY(backend.begin(copy, "", original.memory_bytes));
  const Sections sections = TRY(original.image.sections());
  const auto extents = TRY(original.image.extents());
  TRY(image.write(sections));
  TRY(visit_extents(
      extents, [&](uint64_t offset, std::span<const std::byte> bytes) { return image.write_memory(offset, bytes); }));
  return image.commit();
}

Result<uint64_t> export_snapshot(const SnapshotBackend& backend, const std::string& name, const std::string& path) {
  NewFile file = TRY(NewFile::create(path));
  Original original = TRY(open_whole(backend, name));
  Compressor to(file);
  Header header{};
  std::copy_n(kMagic, sizeof kMagic, header.magic);
  header.format_version = kFormatVersion;
  header.memory_bytes = original.memory_bytes;
  put_text(header.name, name);
  TRY(to.write_record(header));
  const Sections sections = TRY(original.image.sections());
  const auto extents = TRY(original.image.extents());
  for (const auto& [key, section] : sections.all()) {
    Record record{{}, {}, Kind::section, section.version, 0, section.bytes.size()};
    put_text(record.owner, key.first);
    put_text(record.tag, key.second);
    TRY(to.write_record(record));
    TRY(to.write(section.bytes));
  }
  const auto write_piece = [&](uint64_t offset, std::span<const std::byte> bytes) -> Result<void> {
    TRY(to.write_record(Record{{}, {}, Kind::memory, 0, offset, bytes.size()}));
    return to.write(bytes);
  };
  TRY(visit_extents(extents, write_piece));
  TRY(to.write_record(Record{{}, {}, Kind::end, 0, 0, 0}));
  TRY(to.finish());
  TRY(file.publish());
  return to.written_bytes();
}

Result<std::string> import_snapshot(const SnapshotBackend& backend, const std::string& path, std::string name) {
  Fd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file) return errno_error(path);
  Decompressor from(std::move(file));
  const auto header = TRY(from.read_record<Header>().context(path));
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0) return corrupt(path + ": is not an exported template");
  if (header.format_version != kFormatVersion)
    return corrupt(path + ": has format version " + std::to_string(header.format_version) + "; known is " +
                   std::to_string(kFormatVersion));
  if (name.empty()) name = text_of(header.name);
  SnapshotImage image = TRY(backend.begin(name, "", header.memory_bytes));
  TRY(read_into(from, image, header.memory_bytes).context(path));
  TRY(image.commit());
  return name;
}

}  // namespace vmm
