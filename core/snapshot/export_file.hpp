// SPDX-License-Identifier: Apache-2.0
// A snapshot as one file that goes elsewhere: one zstd frame with a checksum.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "util/fd.hpp"
#include "util/result.hpp"

namespace vmm {

constexpr uint64_t kMostExportedPieceBytes = 4 << 20;

struct ExportHeader {
  uint64_t memory_bytes = 0;
  std::string name;
};

// Header, sections, memory in ascending order, end: each goes on to `write` in bits.
class ExportWriter {
 public:
  using Write = std::function<Result<void>(std::span<const std::byte>)>;

  explicit ExportWriter(Write write);
  ExportWriter(const ExportWriter&) = delete;
  ExportWriter& operator=(const ExportWriter&) = delete;
  ~ExportWriter();

  Result<void> write_header(const ExportHeader& header);
  Result<void> write_section(std::string_view owner, std::string_view tag, uint32_t version,
                             std::span<const std::byte> bytes);
  // At most kMostExportedPieceBytes.
  Result<void> write_memory(uint64_t offset, std::span<const std::byte> bytes);
  Result<void> write_end();

 private:
  class Compressor;
  std::unique_ptr<Compressor> to_;
};

// The file may be anything.
class ExportReader {
 public:
  struct Visitor {
    std::function<Result<void>(const std::string& owner, const std::string& tag, uint32_t version,
                               std::span<const std::byte> bytes)>
        section;
    std::function<Result<void>(uint64_t offset, std::span<const std::byte> bytes)> memory;
  };

  explicit ExportReader(Fd file);
  ExportReader(const ExportReader&) = delete;
  ExportReader& operator=(const ExportReader&) = delete;
  ~ExportReader();

  Result<ExportHeader> read_header();
  // Then: hands out all that there is, memory ascending and within that of the header. It is good when this succeeds.
  Result<void> read_contents(const ExportHeader& header, const Visitor& visitor);

 private:
  class Decompressor;
  std::unique_ptr<Decompressor> from_;
};

}  // namespace vmm
