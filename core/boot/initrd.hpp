// SPDX-License-Identifier: Apache-2.0
// The initrd that `clone run --rootfs` generates: clone-init, its configuration and the kernel modules it loads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "boot/cpio.hpp"
#include "util/decompress.hpp"
#include "util/result.hpp"

namespace vmm {

enum class RootAccess { read_write, read_only };
enum class RootOverlay {
  none,
  guest_memory,  // the root stays read-only below, what the guest writes is kept in a tmpfs
};

struct InitrdSpec {
  std::string init_path;                      // the clone-init binary
  std::string modules_dir;                    // --modules; empty: /lib/modules
  std::string kernel_version;                 // of the kernel that boots, from its header
  std::vector<std::string> modules;           // by name, in the order to load them in
  std::string root;                           // "serial:TEXT", "/dev/NAME", "tag:TAG" or "none"
  std::vector<std::string> filesystem_types;  // tried in order; empty: each that the kernel knows
  RootAccess root_access = RootAccess::read_write;
  RootOverlay overlay = RootOverlay::none;
  std::string options;  // as mount(8) takes them with -o
  std::string init = "/sbin/init";
  std::vector<std::string> init_arguments;
  uint32_t wait_ms = 10000;  // for the root device to appear
};

// An initrd whose files are open and whose size is known, to be written once, straight to where it is needed.
class Initrd {
 public:
  // Everything is checked here. Error code ENOENT with modules wanted may mean that this kernel has no modules
  // directory; find_modules_directory() tells.
  static Result<Initrd> prepare(const InitrdSpec& spec);

  size_t size_bytes() const { return size_bytes_; }
  // `output` has size_bytes().
  void write_to(std::span<std::byte> output) const { write_cpio(entries_, output); }

 private:
  // The entries show these; a move keeps the bytes where they are.
  FileContent init_;
  std::vector<FileContent> modules_;
  std::unique_ptr<const std::string> configuration_;
  std::vector<CpioEntry> entries_;
  size_t size_bytes_ = 0;
};

Result<std::vector<std::byte>> build_initrd(const InitrdSpec& spec);

}  // namespace vmm
