// SPDX-License-Identifier: Apache-2.0
// Which files of /lib/modules/VERSION have to be loaded, in which order, to have a set of kernel modules.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "util/result.hpp"

namespace vmm {

struct KernelModule {
  std::string name;  // as the kernel spells it: with '_', never '-'
  std::string path;  // .ko, .ko.xz or .ko.zst
};

// The directory with the modules of one kernel. `modules_dir` is what the user gave: such a directory, or one that
// holds it under the kernel's version; empty means /lib/modules. Error code ENOENT, and only that: there is none, so
// the caller may take it that everything is built into this kernel.
Result<std::string> find_modules_directory(const std::string& modules_dir, const std::string& kernel_version);

// The files for the modules of these names ('-' and '_' are equal), what they depend on first, each once. Soft
// dependencies ("pre") are included where the kernel has them. A name that is built in needs no file; one that is
// neither a module nor built in is an error (code EINVAL). `directory` comes from find_modules_directory().
Result<std::vector<KernelModule>> resolve_modules(const std::string& directory, const std::string& kernel_version,
                                                  std::span<const std::string> names);

}  // namespace vmm
