// SPDX-License-Identifier: Apache-2.0
// Chooses the format of an image.
#include <array>

#include "image.hpp"
#include "qcow2/format.hpp"

namespace virtio_blk {

namespace {

Result<std::unique_ptr<Image>> open_format(const ImageConfig& config, const clone_sdk::Host& host) {
  const Access access = config.read_only ? Access::read_only : Access::read_write;
  Storage storage = CLONE_TRY(Storage::open(config.path, access, config.cache, host));
  if (format_of(config) == Format::qcow2) return open_qcow2_image(std::move(storage), config, host);

  std::array<std::byte, 4> head{};
  const bool looks_like_qcow2 =
      ::pread(storage.fd(), head.data(), head.size(), 0) == ssize_t{4} && qcow2::has_magic(head);
  if (config.format == Format::automatic && looks_like_qcow2)
    return Error{
        "begins like a qcow2 file, which the guest of a raw image can bring about: say format=qcow2 or format=raw"};
  return open_raw_image(std::move(storage), config, host);
}

}  // namespace

Format format_of(const ImageConfig& config) {
  if (config.format != Format::automatic) return config.format;
  return config.path.ends_with(".qcow2") ? Format::qcow2 : Format::raw;
}

Result<std::unique_ptr<Image>> open_image(const ImageConfig& config, const clone_sdk::Host& host) {
  return open_format(config, host).context("path=" + config.path);
}

}  // namespace virtio_blk
