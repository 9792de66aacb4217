// SPDX-License-Identifier: Apache-2.0
// Packs clone-init (guest-agent/init.cpp, which reads /clone/init.conf) and kernel modules into a cpio archive.
#include "boot/initrd.hpp"

#include "boot/modules.hpp"

namespace vmm {
namespace {

constexpr size_t largest_file_bytes = 64 << 20;
// What clone-init has room for.
constexpr size_t longest_configuration_bytes = 65535;
constexpr size_t most_init_arguments = 128;
// mount(2) takes one page of options.
constexpr size_t longest_options_bytes = 4095;

// "key=value" lines. The first value that cannot stand in one is kept as the error.
class Configuration {
 public:
  void add(std::string_view key, std::string_view value) {
    if (value.find_first_of(std::string_view("\n\0", 2)) != std::string_view::npos) {
      if (error_.empty()) error_ = std::string(key) + ": may not hold a newline or a NUL";
      return;
    }
    text_.append(key).append("=").append(value).append("\n");
  }
  Result<std::string> take() && {
    if (!error_.empty()) return Error{"initrd: " + error_, EINVAL};
    if (text_.size() > longest_configuration_bytes)
      return Error{"initrd: arguments and modules take " + std::to_string(text_.size()) + " bytes, at most " +
                       std::to_string(longest_configuration_bytes) + " are allowed",
                   E2BIG};
    return std::move(text_);
  }

 private:
  std::string text_;
  std::string error_;
};

Result<void> check(const InitrdSpec& spec) {
  const auto has_value = [&spec](std::string_view prefix) {
    return spec.root.starts_with(prefix) && spec.root.size() > prefix.size();
  };
  if (!has_value("serial:") && !has_value("/dev/") && !has_value("tag:") && spec.root != "none")
    return Error{"root " + spec.root + ": allowed are serial:TEXT, /dev/NAME, tag:TAG and none", EINVAL};
  if (!spec.init.starts_with('/')) return Error{"init " + spec.init + ": has to be an absolute path", EINVAL};
  for (const std::string& type : spec.filesystem_types)
    if (type.empty()) return Error{"an empty file system type", EINVAL};
  if (spec.init_arguments.size() > most_init_arguments)
    return Error{std::to_string(spec.init_arguments.size()) + " arguments to init, at most " +
                     std::to_string(most_init_arguments) + " are allowed",
                 E2BIG};
  if (spec.options.size() > longest_options_bytes)
    return Error{"root mount options of " + std::to_string(spec.options.size()) + " bytes, at most " +
                     std::to_string(longest_options_bytes) + " are allowed",
                 E2BIG};
  return {};
}

}  // namespace

Result<Initrd> Initrd::prepare(const InitrdSpec& spec) {
  TRY(check(spec));
  Initrd initrd;
  initrd.init_ = TRY(FileContent::load(spec.init_path, largest_file_bytes));
  auto& entries = initrd.entries_;
  for (const char* name : {"dev", "proc", "sys", "root", "clone", "clone/modules"})
    entries.push_back(CpioEntry::directory(name));
  // The kernel opens it for process 1 before that has mounted anything.
  entries.push_back(CpioEntry::character_device("dev/console", 5, 1));
  entries.push_back(CpioEntry::file("init", initrd.init_.bytes(), 0755));

  Configuration configuration;
  if (!spec.modules.empty()) {
    const std::string directory = TRY(find_modules_directory(spec.modules_dir, spec.kernel_version));
    const auto modules = TRY(resolve_modules(directory, spec.kernel_version, spec.modules));
    initrd.modules_.reserve(modules.size());
    for (const KernelModule& module : modules) {
      initrd.modules_.push_back(TRY(FileContent::load(module.path, largest_file_bytes)));
      const std::string name = "clone/modules/" + module.name + ".ko";
      entries.push_back(CpioEntry::file(name, initrd.modules_.back().bytes()));
      configuration.add("module", "/" + name);
    }
  }
  configuration.add("root", spec.root);
  for (const std::string& type : spec.filesystem_types) configuration.add("fstype", type);
  configuration.add("mode", spec.root_access == RootAccess::read_only ? "ro" : "rw");
  if (spec.overlay == RootOverlay::guest_memory) configuration.add("overlay", "tmpfs");
  if (!spec.options.empty()) configuration.add("options", spec.options);
  configuration.add("init", spec.init);
  for (const std::string& argument : spec.init_arguments) configuration.add("init-arg", argument);
  configuration.add("wait_ms", std::to_string(spec.wait_ms));

  initrd.configuration_ = std::make_unique<const std::string>(TRY(std::move(configuration).take()));
  entries.push_back(CpioEntry::file("clone/init.conf", std::as_bytes(std::span(*initrd.configuration_))));
  initrd.size_bytes_ = TRY(cpio_size_bytes(entries));
  return initrd;
}

Result<std::vector<std::byte>> build_initrd(const InitrdSpec& spec) {
  const Initrd initrd = TRY(Initrd::prepare(spec));
  std::vector<std::byte> bytes(initrd.size_bytes());
  initrd.write_to(bytes);
  return bytes;
}

}  // namespace vmm
