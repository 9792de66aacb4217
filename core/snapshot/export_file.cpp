// SPDX-License-Identifier: Apache-2.0
// A header, sections, pieces of memory in ascending order, an end; compressed with buffers of fixed sizes.
#include "snapshot/export_file.hpp"

#include <unistd.h>
#include <zstd.h>

#include <algorithm>
#include <cstring>
#include <utility>

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

}  // namespace

class ExportWriter::Compressor {
 public:
  explicit Compressor(Write to) : to_(std::move(to)), context_(ZSTD_createCCtx()), buffer_(ZSTD_CStreamOutSize()) {
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

 private:
  Result<void> feed(std::span<const std::byte> bytes, ZSTD_EndDirective directive) {
    ZSTD_inBuffer in{bytes.data(), bytes.size(), 0};
    for (size_t left = 1; left || in.pos < in.size;) {
      ZSTD_outBuffer out{buffer_.data(), buffer_.size(), 0};
      left = ZSTD_compressStream2(context_.get(), &out, &in, directive);
      if (ZSTD_isError(left)) return Error{std::string("zstd: ") + ZSTD_getErrorName(left)};
      TRY(to_(std::span<const std::byte>(buffer_).first(out.pos)));
      if (directive == ZSTD_e_continue) left = 0;
    }
    return {};
  }

  const Write to_;
  std::unique_ptr<ZSTD_CCtx, decltype([](ZSTD_CCtx* context) { ZSTD_freeCCtx(context); })> context_;
  std::vector<std::byte> buffer_;
};

ExportWriter::ExportWriter(Write write) : to_(std::make_unique<Compressor>(std::move(write))) {}
ExportWriter::~ExportWriter() = default;

Result<void> ExportWriter::write_header(const ExportHeader& header) {
  Header record{};
  std::copy_n(kMagic, sizeof kMagic, record.magic);
  record.format_version = kFormatVersion;
  record.memory_bytes = header.memory_bytes;
  put_text(record.name, header.name);
  return to_->write_record(record);
}

Result<void> ExportWriter::write_section(std::string_view owner, std::string_view tag, uint32_t version,
                                         std::span<const std::byte> bytes) {
  Record record{{}, {}, Kind::section, version, 0, bytes.size()};
  put_text(record.owner, owner);
  put_text(record.tag, tag);
  TRY(to_->write_record(record));
  return to_->write(bytes);
}

Result<void> ExportWriter::write_memory(uint64_t offset, std::span<const std::byte> bytes) {
  TRY(to_->write_record(Record{{}, {}, Kind::memory, 0, offset, bytes.size()}));
  return to_->write(bytes);
}

Result<void> ExportWriter::write_end() {
  TRY(to_->write_record(Record{{}, {}, Kind::end, 0, 0, 0}));
  return to_->finish();
}

class ExportReader::Decompressor {
 public:
  explicit Decompressor(Fd file) : file_(std::move(file)), context_(ZSTD_createDCtx()), buffer_(ZSTD_DStreamInSize()) {
    ZSTD_DCtx_setParameter(context_.get(), ZSTD_d_windowLogMax, kWindowLog);
  }
  Result<void> read(std::span<std::byte> into) {
    if (TRY(read_some(into)) < into.size()) return corrupt("ends too early");
    return {};
  }
  // A size that is a lie takes no more memory than there is content.
  Result<void> read(std::vector<std::byte>& into, uint64_t size_bytes) {
    for (into.clear(); into.size() < size_bytes;) {
      const uint64_t more_bytes = std::min(size_bytes - into.size(), kMostExportedPieceBytes);
      into.resize(into.size() + more_bytes);
      TRY(read(std::span(into).last(more_bytes)));
    }
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

ExportReader::ExportReader(Fd file) : from_(std::make_unique<Decompressor>(std::move(file))) {}
ExportReader::~ExportReader() = default;

Result<ExportHeader> ExportReader::read_header() {
  const auto header = TRY(from_->read_record<Header>());
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0) return corrupt("is not an exported template");
  if (header.format_version != kFormatVersion)
    return corrupt("has format version " + std::to_string(header.format_version) + "; known is " +
                   std::to_string(kFormatVersion));
  return ExportHeader{header.memory_bytes, text_of(header.name)};
}

Result<void> ExportReader::read_contents(const ExportHeader& header, const Visitor& visitor) {
  std::vector<std::byte> buffer;
  uint64_t section_bytes = 0, memory_end = 0;
  for (;;) {
    const auto record = TRY(from_->read_record<Record>());
    switch (record.kind) {
      case Kind::section:
        if (record.size_bytes > kMostSectionBytes - section_bytes)
          return corrupt("its sections have more than " + std::to_string(kMostSectionBytes) + " bytes");
        section_bytes += record.size_bytes;
        TRY(from_->read(buffer, record.size_bytes));
        TRY(visitor.section(text_of(record.owner), text_of(record.tag), record.version, buffer));
        break;
      case Kind::memory:
        if (record.offset < memory_end || record.offset > header.memory_bytes ||
            record.size_bytes > std::min(header.memory_bytes - record.offset, kMostExportedPieceBytes) ||
            !record.size_bytes)
          return corrupt("a piece of memory is too large, or not in its place");
        memory_end = record.offset + record.size_bytes;
        TRY(from_->read(buffer, record.size_bytes));
        TRY(visitor.memory(record.offset, buffer));
        break;
      case Kind::end:
        return from_->expect_end();
      default:
        return corrupt("holds what is neither section nor memory");
    }
  }
}

}  // namespace vmm
