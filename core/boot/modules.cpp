// SPDX-License-Identifier: Apache-2.0
// Reads what depmod(8) wrote: modules.dep, modules.builtin, modules.softdep, modules.alias.
#include "boot/modules.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <string_view>

#include "util/mapping.hpp"

namespace vmm {
namespace {

constexpr size_t most_modules = 1024;
constexpr uint32_t longest_index_bytes = 64 << 20;

char spelled(char c) { return c == '-' ? '_' : c; }

bool same_name(std::string_view a, std::string_view b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](char x, char y) { return spelled(x) == spelled(y); });
}

std::string kernel_spelling(std::string_view name) {
  std::string result(name);
  std::transform(result.begin(), result.end(), result.begin(), spelled);
  return result;
}

// "kernel/fs/ext4/ext4.ko.xz" -> "ext4"
std::string_view module_name(std::string_view path) {
  path.remove_prefix(path.rfind('/') + 1);
  return path.substr(0, path.rfind(".ko"));
}

// Cuts the text up to `separator` off the front of `text`, without the separator.
std::string_view cut(std::string_view& text, char separator) {
  const size_t end = text.find(separator);
  const std::string_view front = text.substr(0, end);
  text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
  return front;
}

// The next word of a line, empty at its end.
std::string_view cut_word(std::string_view& line) {
  line.remove_prefix(std::min(line.find_first_not_of(" \t\r"), line.size()));
  const size_t end = std::min(line.find_first_of(" \t\r"), line.size());
  const std::string_view word = line.substr(0, end);
  line.remove_prefix(end);
  return word;
}

// A text file, mapped. One that is missing or empty has no text: depmod leaves out or empties what has no entries.
class TextFile {
 public:
  static Result<TextFile> open(const std::string& path) {
    TextFile file;
    struct stat status {};
    if (::stat(path.c_str(), &status) != 0) {
      if (errno == ENOENT) return file;
      return errno_error(path);
    }
    if (S_ISREG(status.st_mode) && status.st_size == 0) return file;
    file.mapping_ = TRY(map_file(path));
    if (file.mapping_.size_bytes() > longest_index_bytes) return Error{path + ": too large for a module index", EFBIG};
    return file;
  }
  std::string_view text() const { return {reinterpret_cast<const char*>(mapping_.data()), mapping_.size_bytes()}; }

 private:
  Mapping mapping_;
};

// modules.dep: "PATH: PATH PATH…", relative to its directory. Depmod writes the whole closure, the nearest first, so
// that one line, read backwards, is the order to load in.
class DependencyIndex {
 public:
  static Result<DependencyIndex> open(const std::string& path) {
    DependencyIndex index;
    index.file_ = TRY(TextFile::open(path));
    const std::string_view text = index.file_.text();
    index.lines_.reserve(text.size() / 100);
    std::string_view rest = text;
    for (size_t number = 1; !rest.empty(); ++number) {
      const auto offset = static_cast<uint32_t>(text.size() - rest.size());
      const std::string_view line = cut(rest, '\n');
      if (line.empty() || line.front() == '#') continue;
      const size_t colon = line.find(':');
      if (colon == std::string_view::npos || colon == 0)
        return Error{path + ": line " + std::to_string(number) + ": not \"MODULE: DEPENDENCIES\"", EINVAL};
      index.lines_.push_back({key(module_name(line.substr(0, colon))), offset});
    }
    return index;
  }

  // The line of a module, empty if there is none.
  std::string_view find(std::string_view name) const {
    const uint32_t wanted = key(name);
    for (const Line& line : lines_) {
      if (line.key != wanted) continue;
      std::string_view rest = file_.text().substr(line.offset);
      const std::string_view text = cut(rest, '\n');
      if (same_name(module_name(text.substr(0, text.find(':'))), name)) return text;
    }
    return {};
  }

 private:
  struct Line {
    uint32_t key;
    uint32_t offset;
  };
  // FNV-1a of the kernel's spelling.
  static uint32_t key(std::string_view name) {
    uint32_t hash = 2166136261;
    for (const char c : name) hash = (hash ^ static_cast<uint8_t>(spelled(c))) * 16777619;
    return hash;
  }

  TextFile file_;
  std::vector<Line> lines_;
};

class Resolver {
 public:
  static Result<Resolver> open(const std::string& directory, const std::string& kernel_version) {
    Resolver resolver;
    resolver.directory_ = directory;
    resolver.kernel_version_ = kernel_version;
    resolver.dependencies_ = TRY(DependencyIndex::open(directory + "/modules.dep"));
    resolver.built_in_ = TRY(TextFile::open(directory + "/modules.builtin"));
    resolver.soft_dependencies_ = TRY(TextFile::open(directory + "/modules.softdep"));
    return resolver;
  }

  Result<void> add(std::string_view name) {
    if (is_built_in(name)) return {};
    const std::string_view line = dependencies_.find(name);
    if (line.empty()) {
      return Error{"no module " + std::string(name) + " of kernel " + kernel_version_ + " in " + directory_ +
                       " (neither in modules.dep nor in modules.builtin)",
                   EINVAL};
    }
    return add_line(line);
  }

  std::vector<KernelModule> take() && { return std::move(modules_); }

 private:
  bool is_built_in(std::string_view name) const {
    for (std::string_view rest = built_in_.text(); !rest.empty();)
      if (same_name(module_name(cut(rest, '\n')), name)) return true;
    return false;
  }

  Result<void> add_line(std::string_view line) {
    std::vector<std::string_view> paths{cut(line, ':')};
    while (!line.empty() && paths.size() <= most_modules)
      if (const std::string_view path = cut_word(line); !path.empty()) paths.push_back(path);
    for (auto path = paths.rbegin(); path != paths.rend(); ++path) TRY(add_file(*path));
    return {};
  }

  // A path of modules.dep whose dependencies are there; its soft dependencies come before it.
  Result<void> add_file(std::string_view path) {
    const std::string_view name = module_name(path);
    if (std::any_of(seen_.begin(), seen_.end(), [name](std::string_view seen) { return same_name(seen, name); }))
      return {};
    if (seen_.size() >= most_modules)
      return Error{directory_ + "/modules.dep: more than " + std::to_string(most_modules) + " modules are needed",
                   E2BIG};
    // Marked before its soft dependencies are followed: these may go round in circles.
    seen_.push_back(name);
    if (path.empty() || path.front() == '/' || name.empty() ||
        ("/" + std::string(path) + "/").find("/../") != std::string::npos || path.find('\0') != std::string_view::npos)
      return Error{directory_ + "/modules.dep: \"" + std::string(path) + "\" is not a path below that directory",
                   EINVAL};
    TRY(add_soft_dependencies(name));
    modules_.push_back({kernel_spelling(name), directory_ + "/" + std::string(path)});
    return {};
  }

  // modules.softdep: "softdep NAME pre: NAME… post: NAME…"
  Result<void> add_soft_dependencies(std::string_view name) {
    for (std::string_view rest = soft_dependencies_.text(); !rest.empty();) {
      std::string_view line = cut(rest, '\n');
      if (cut_word(line) != "softdep" || !same_name(cut_word(line), name)) continue;
      bool before = false;
      for (std::string_view word = cut_word(line); !word.empty(); word = cut_word(line)) {
        if (word.back() == ':') {
          before = word == "pre:";
        } else if (before) {
          TRY(add_soft(word));
        }
      }
    }
    return {};
  }

  // A module's name or an alias of several ("crypto-crc32c"). What this kernel does not have is left out.
  Result<void> add_soft(std::string_view name) {
    if (std::find(soft_seen_.begin(), soft_seen_.end(), name) != soft_seen_.end()) return {};
    soft_seen_.push_back(name);
    if (is_built_in(name)) return {};
    if (const std::string_view line = dependencies_.find(name); !line.empty()) return add_line(line);
    if (aliases_.text().empty()) aliases_ = TRY(TextFile::open(directory_ + "/modules.alias"));
    const std::string wanted = "alias " + std::string(name) + " ";
    const std::string_view text = aliases_.text();
    for (size_t at = 0; (at = find_text(text, wanted, at)) != std::string_view::npos;) {
      const bool line_start = at == 0 || text[at - 1] == '\n';
      at += wanted.size();
      std::string_view rest = text.substr(at);
      const std::string_view target = cut(rest, '\n');
      if (line_start && !is_built_in(target))
        if (const std::string_view line = dependencies_.find(target); !line.empty()) TRY(add_line(line));
    }
    return {};
  }

  // memmem(3) is some times faster than string_view::find on the megabyte of modules.alias.
  static size_t find_text(std::string_view text, std::string_view wanted, size_t from) {
    const void* found = ::memmem(text.data() + from, text.size() - from, wanted.data(), wanted.size());
    return found ? static_cast<size_t>(static_cast<const char*>(found) - text.data()) : std::string_view::npos;
  }

  std::string directory_;
  std::string kernel_version_;
  DependencyIndex dependencies_;
  TextFile built_in_;
  TextFile soft_dependencies_;
  TextFile aliases_;
  std::vector<std::string_view> seen_;       // module names, in the mapped files
  std::vector<std::string_view> soft_seen_;  // names of soft dependencies, in the mapped files
  std::vector<KernelModule> modules_;
};

}  // namespace

Result<std::string> find_modules_directory(const std::string& modules_dir, const std::string& kernel_version) {
  if (kernel_version.find('/') != std::string::npos || kernel_version.find('\0') != std::string::npos ||
      kernel_version == "." || kernel_version == "..")
    return Error{"\"" + kernel_version + "\" is not a kernel version", EINVAL};
  const std::string parent = modules_dir.empty() ? "/lib/modules" : modules_dir;
  std::vector<std::string> candidates;
  if (!kernel_version.empty()) candidates.push_back(parent + "/" + kernel_version);
  if (!modules_dir.empty()) candidates.push_back(modules_dir);
  for (const std::string& candidate : candidates) {
    const std::string index = candidate + "/modules.dep";
    if (::access(index.c_str(), R_OK) == 0) return candidate;
    if (errno == EACCES) return errno_error(index);
  }
  return Error{"no modules of kernel " + (kernel_version.empty() ? "(version unknown)" : kernel_version) + " in " +
                   parent +
                   (modules_dir.empty() ? "; give --modules DIR"
                                        : " (a directory with modules.dep, or with VERSION/modules.dep)"),
               ENOENT};
}

Result<std::vector<KernelModule>> resolve_modules(const std::string& directory, const std::string& kernel_version,
                                                  std::span<const std::string> names) {
  Resolver resolver = TRY(Resolver::open(directory, kernel_version));
  for (const std::string& name : names) TRY(resolver.add(name));
  return std::move(resolver).take();
}

}  // namespace vmm
