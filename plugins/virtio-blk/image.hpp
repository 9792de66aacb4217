// SPDX-License-Identifier: Apache-2.0
// A disk image: what the guest's requests are served from. A format is a class derived from Image.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "storage.hpp"

namespace virtio_blk {

class Image;

// What a format needs to know of a request under way; kept for the next one.
struct RequestState {
  virtual ~RequestState() = default;
};

// A request of the guest, its ranges checked. It is a file operation as well: the step that the image is at.
class ImageRequest : public FileOperation {
 public:
  enum class Type : uint8_t { read, write, flush, discard, write_zeroes };

  Type type = Type::read;
  bool may_unmap = false;      // write_zeroes
  bool write_through = false;  // durable when done() is called
  uint64_t start = 0;          // bytes, as is length; multiples of 512, within the image
  uint64_t length = 0;
  std::span<iovec> data;  // read, write: `length` bytes. The image may change the entries

  // On the engine's thread; 0 or an errno value.
  virtual void done(int error) = 0;

  void finished(IoEngine& engine, int64_t result) final;

  // The image's own while the request is under way.
  Image* image = nullptr;
  std::vector<iovec> zeroes;  // to be written
  std::unique_ptr<RequestState> state;
};

class Image {
 public:
  virtual ~Image() = default;

  virtual uint64_t size_bytes() const = 0;                                   // a multiple of 512
  virtual uint32_t logical_block_bytes() const = 0;                          // what the guest should address
  virtual uint32_t physical_block_bytes() const = 0;                         // what it should align to
  virtual uint32_t discard_bytes() const { return physical_block_bytes(); }  // what is given back together
  // For the engines that requests are begun on.
  virtual std::span<const ImageFile> files() const = 0;
  // [control] A part of the content by ordinary system calls; false when it is not there or cannot be read.
  virtual bool read(uint64_t offset, std::span<std::byte> into) = 0;
  // [control] No request is under way: what is not written yet is written.
  virtual Result<void> settle() { return {}; }

  // [control] Makes the image larger, to a multiple of its logical block, while requests are under way. Refuses to cut
  // anything off.
  virtual Result<void> resize(uint64_t size_bytes);

  // On an engine's thread, by many at once. May finish before it returns; the request lasts until done().
  virtual void begin(IoEngine& engine, ImageRequest& request) = 0;
  virtual void step_finished(IoEngine& engine, ImageRequest& request, int64_t result) = 0;
};

inline Result<void> Image::resize(uint64_t) {
  return Error{"an image of this format cannot be resized", 0, CLONE_ERR_UNSUPPORTED};
}

inline void ImageRequest::finished(IoEngine& engine, int64_t result) { image->step_finished(engine, *this, result); }

enum class Format { automatic, raw, qcow2 };  // the order of the option's choices
enum class Backing { refused, allowed };

struct ImageConfig {
  std::string path;
  // automatic: qcow2 by the file's name. A header does not count: the guest writes that of a raw image.
  Format format = Format::automatic;
  Backing backing = Backing::refused;  // whether files that the image names are opened
  bool read_only = false;
  Cache cache = Cache::writeback;
};

// raw or qcow2, by the configuration alone.
Format format_of(const ImageConfig& config);

// Messages about the file begin with "path=…".
Result<std::unique_ptr<Image>> open_image(const ImageConfig& config, const clone_sdk::Host& host);

Result<std::unique_ptr<Image>> open_raw_image(Storage storage, const ImageConfig& config, const clone_sdk::Host& host);
Result<std::unique_ptr<Image>> open_qcow2_image(Storage storage, const ImageConfig& config,
                                                const clone_sdk::Host& host);

}  // namespace virtio_blk
