// SPDX-License-Identifier: Apache-2.0
// Alpine from its repositories. No tool of Debian's does this, so packages are fetched, verified and unpacked here;
// their scripts run in the guest, at its first boot, not on the host.
#include <archive.h>
#include <archive_entry.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <set>

#include "apk.hpp"
#include "archive.hpp"
#include "process.hpp"
#include "sources.hpp"
#include "util/mapping.hpp"

namespace rootfs {
namespace {

constexpr const char* kMirror = "https://dl-cdn.alpinelinux.org/alpine";
constexpr const char* kArchitecture = "x86_64";
constexpr size_t kLargestIndex = 256 << 20;
constexpr size_t kLargestPackage = size_t{2} << 30;
constexpr const char* kScripts = "lib/apk/db/scripts.tar";
constexpr const char* kFirstBootList = "lib/apk/db/clone-first-boot";

// Runs as process 1, once: what apk would have done after unpacking. Lines of the list: SCRIPT ARGUMENT…
constexpr const char* kFirstBoot = R"(#!/bin/busybox sh
# Finishes the installation of this image's packages at the first boot, then becomes the real init.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
b=/bin/busybox
$b rm -f /sbin/init
if [ -e /sbin/init.packaged ]; then $b mv /sbin/init.packaged /sbin/init; fi
$b --install -s
if [ -s /lib/apk/db/clone-first-boot ]; then
  scripts=$($b mktemp -d /run/first-boot.XXXXXX) && $b tar -xf /lib/apk/db/scripts.tar -C "$scripts"
  while read -r script arguments; do
    (cd / && "$scripts/$script" $arguments </dev/null) || echo "first boot: $script failed"
  done </lib/apk/db/clone-first-boot
  $b rm -rf "$scripts" /lib/apk/db/clone-first-boot
fi
exec /sbin/init "$@"
)";

std::string keys_folder(const std::string& given) {
  if (!given.empty()) return given;
  for (const std::string& folder : {program_folder() + "/../../share/clone/keys/apk",
                                    std::string("/usr/share/apk/keys/x86_64"), std::string("/etc/apk/keys")})
    if (::access(folder.c_str(), R_OK) == 0) return folder;
  return {};
}

// Files of what a package installs, as the data base lists them: by folder.
struct Installed {
  struct File {
    mode_t mode;
    uid_t uid;
    gid_t gid;
    std::string checksum;
  };
  struct Folder {
    mode_t mode = 0755;
    uid_t uid = 0;
    gid_t gid = 0;
    std::map<std::string, File> files;
  };
  std::map<std::string, Folder> folders;

  std::string text() const {
    std::string result;
    const auto access = [](uid_t uid, gid_t gid, mode_t mode) {
      char text[64];
      std::snprintf(text, sizeof text, "%u:%u:%o", uid, gid, mode & 07777u);
      return std::string(text);
    };
    for (const auto& [name, folder] : folders) {
      result += "F:" + name + "\n";
      if (folder.mode != 0755 || folder.uid != 0 || folder.gid != 0)
        result += "M:" + access(folder.uid, folder.gid, folder.mode) + "\n";
      for (const auto& [file_name, file] : folder.files) {
        result += "R:" + file_name + "\n";
        if ((file.mode & 07777) != 0644 || file.uid != 0 || file.gid != 0)
          result += "a:" + access(file.uid, file.gid, file.mode) + "\n";
        result += "Z:" + file.checksum + "\n";
      }
    }
    return result;
  }
};

class Alpine {
 public:
  Alpine(const Context& context, const DistributionRequest& request) : context_(context), request_(request) {}

  Result<void> run() {
    const std::string folder = keys_folder(request_.keys);
    if (folder.empty())
      return Error{
          "Alpine's public keys are not installed (share/clone/keys/apk, /etc/apk/keys); name a folder of them with "
          "--keys"};
    keys_ = TRY(apk::Keys::load(folder));
    std::string release = request_.release.empty() ? "latest-stable" : request_.release;
    if (release[0] >= '0' && release[0] <= '9') release.insert(0, "v");
    std::string mirror = request_.mirror.empty() ? kMirror : request_.mirror;
    while (mirror.ends_with('/')) mirror.pop_back();

    context_.progress.stage("index of " + mirror + "/" + release);
    for (const char* part : {"main", "community"}) TRY(read_index(mirror + "/" + release + "/" + part, part));
    std::vector<std::string> wanted = {"alpine-base"};
    if (request_.ssh_server) wanted.push_back("openssh-server");
    wanted.insert(wanted.end(), request_.packages.begin(), request_.packages.end());
    const auto chosen = TRY(apk::resolve(packages_, wanted));

    uint64_t total = 0, done = 0;
    for (const apk::Package* package : chosen) total += package->size_bytes;
    context_.progress.stage(std::to_string(chosen.size()) + " packages, " + human_size(total));
    for (const apk::Package* package : chosen) {
      context_.progress.detail(package->name);
      context_.progress.bytes(done, total);
      TRY(install(*package).context(package->name + "-" + package->version));
      done += package->size_bytes;
    }
    return write_data_base(wanted);
  }

 private:
  // An error with code ENOENT if there is no such file.
  Result<std::string> fetch(const std::string& url, size_t limit_bytes) {
    const std::string file = context_.work + "/download";
    ::unlink(file.c_str());
    std::vector<std::string> command = {"curl",
                                        "--silent",
                                        "--show-error",
                                        "--fail",
                                        "--location",
                                        "--globoff",
                                        "--retry",
                                        "2",
                                        "--proto",
                                        "=http,https,file",
                                        "--proto-redir",
                                        "=http,https",
                                        "--connect-timeout",
                                        "20",
                                        "--speed-limit",
                                        "100",
                                        "--speed-time",
                                        "60",
                                        "--max-filesize",
                                        std::to_string(limit_bytes),
                                        "--output",
                                        file,
                                        "--url",
                                        url};
    if (auto fetched = Process::run(command); !fetched.ok()) {
      const std::string& message = fetched.error().message;
      // curl(1): 22 is an HTTP error, 37 a file that cannot be read.
      const bool missing = message.find("status 22\n") != message.npos || message.find("status 37\n") != message.npos;
      return Error{url + ": " + message, missing ? ENOENT : fetched.error().code};
    }
    struct stat status {};
    if (::stat(file.c_str(), &status) != 0) return errno_error(file);
    if (static_cast<uint64_t>(status.st_size) > limit_bytes)
      return Error{url + ": larger than " + human_size(limit_bytes)};
    return file;
  }

  Result<void> read_index(const std::string& repository, const std::string& part) {
    const std::string folder = repository + "/" + kArchitecture;
    auto fetched = fetch(folder + "/APKINDEX.tar.gz", kLargestIndex);
    if (!fetched.ok()) {
      if (part == "main" || fetched.error().code != ENOENT) return std::move(fetched).error();
      context_.progress.note("there is no " + repository);
      return {};
    }
    repositories_ += repository + "\n";
    const vmm::Mapping file = TRY(vmm::map_file(*fetched));
    const std::span<const char> bytes(reinterpret_cast<const char*>(file.data()), file.size_bytes());
    const std::string what = folder + "/APKINDEX.tar.gz";
    const auto parts = TRY(apk::split_gzip(bytes, 1).context(what));
    used_keys_.insert(TRY(keys_.verify(parts[0], parts[1], context_.spool).context(what)));
    Tree content;
    TRY(unpack(bytes_of(parts[1]), content, context_.spool).context(what));
    const InodePointer index = content.find("APKINDEX");
    if (!index || !index->is_regular()) return Error{what + ": it holds no APKINDEX"};
    const std::string text = TRY(read_text(index->content, kLargestIndex));
    auto packages = TRY(apk::parse_index(text, folder));
    std::move(packages.begin(), packages.end(), std::back_inserter(packages_));
    return {};
  }

  Result<void> install(const apk::Package& package) {
    const std::string path =
        TRY(fetch(package.repository + "/" + package.name + "-" + package.version + ".apk", kLargestPackage));
    const vmm::Mapping file = TRY(vmm::map_file(path));
    const auto parts = TRY(apk::open_package({reinterpret_cast<const char*>(file.data()), file.size_bytes()}, package,
                                             keys_, context_.spool));
    Installed installed;
    ArchiveOptions options;
    options.filter = [&](Entry& entry) { return take(entry, installed); };
    TRY(unpack(bytes_of(parts.data), context_.tree, context_.spool, options));
    installed_ += package.record + installed.text() + "\n";
    return take_scripts(package, parts.control);
  }

  Result<bool> take(Entry& entry, Installed& installed) {
    const auto parts = components(entry.name);
    if (parts.empty()) return false;
    if (parts.size() == 1 && parts[0].starts_with('.')) return false;
    Inode& inode = *entry.inode;
    inode.uid = id_of("etc/passwd", entry.user, inode.uid);
    inode.gid = id_of("etc/group", entry.group, inode.gid);
    std::string folder, path;
    for (size_t i = 0; i < parts.size(); ++i) {
      path += (i == 0 ? "" : "/") + std::string(parts[i]);
      if (i + 2 == parts.size()) folder = path;
    }
    // The data base has a line for each: nothing may end one early.
    if (path.find('\n') != path.npos) return Error{"entry with a line break in its name"};
    if (inode.is_directory()) {
      auto& listed = installed.folders[path];
      listed.mode = inode.mode & 07777, listed.uid = inode.uid, listed.gid = inode.gid;
      return true;
    }
    InodePointer target =
        entry.hard_link.empty() ? entry.inode : context_.tree.find(entry.hard_link, Tree::LastLink::keep);
    if (!target) return Error{"'" + entry.name + "': a hard link to nothing"};
    installed.folders[folder].files[std::string(parts.back())] = {target->mode, target->uid, target->gid,
                                                                  TRY(checksum(*target))};
    return true;
  }

  // The name counts, where the image knows it; else the number.
  unsigned id_of(const char* file, const std::string& name, unsigned number) {
    if (name.empty() || name == "root") return name.empty() ? number : 0;
    const InodePointer inode = context_.tree.find(file);
    if (!inode || !inode->is_regular()) return number;
    const auto text = read_text(inode->content, 1 << 20);
    if (!text.ok()) return number;
    const std::string lines = "\n" + *text;
    const size_t at = lines.find("\n" + name + ":");
    const size_t colon = at == lines.npos ? at : lines.find(':', at + name.size() + 2);
    if (colon == lines.npos) return number;
    return static_cast<unsigned>(std::strtoul(lines.c_str() + colon + 1, nullptr, 10));
  }

  static Result<std::string> checksum(const Inode& inode) {
    if (inode.is_symlink()) return "Q1" + apk::base64(apk::digest("SHA1", inode.target));
    const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(EVP_MD_CTX_new(), EVP_MD_CTX_free);
    EVP_DigestInit_ex(context.get(), EVP_sha1(), nullptr);
    constexpr uint64_t piece_bytes = 1 << 20;
    for (uint64_t at = 0; at < inode.content.size_bytes; at += piece_bytes) {
      Content piece = inode.content;
      piece.offset += at;
      piece.size_bytes = std::min(piece_bytes, inode.content.size_bytes - at);
      const std::string text = TRY(read_text(piece, piece_bytes));
      EVP_DigestUpdate(context.get(), text.data(), text.size());
    }
    unsigned char result[EVP_MAX_MD_SIZE];
    unsigned size_bytes = 0;
    EVP_DigestFinal_ex(context.get(), result, &size_bytes);
    return "Q1" + apk::base64({reinterpret_cast<const char*>(result), size_bytes});
  }

  Result<void> take_scripts(const apk::Package& package, const Tree& control) {
    for (const char* kind : {"pre-install", "post-install", "trigger"}) {
      const InodePointer script = control.find("." + std::string(kind));
      if (!script || !script->is_regular()) continue;
      const std::string name = package.name + "-" + package.version + "." + package.checksum + "." + kind;
      scripts_[name] = TRY(read_text(script->content, 1 << 20));
      if (kind != std::string_view("trigger")) {
        (kind == std::string_view("pre-install") ? before_ : after_) += name + " " + package.version + "\n";
        continue;
      }
      const InodePointer info = control.find(".PKGINFO");
      const auto fields = apk::parse_pkginfo(TRY(read_text(info->content, 1 << 20)));
      const auto paths = fields.find("triggers");
      if (paths == fields.end()) continue;
      triggers_ += package.checksum + " " + paths->second + "\n";
      last_ += name + " " + paths->second + "\n";
    }
    return {};
  }

  Result<void> put_text(const std::string& path, const std::string& text, mode_t permissions = 0644) {
    return context_.tree.put(path, TRY(context_.spool.file(text, permissions)));
  }

  Result<void> write_data_base(const std::vector<std::string>& wanted) {
    std::set<std::string> world(wanted.begin(), wanted.end());
    std::string text;
    for (const std::string& name : world) text += name + "\n";
    TRY(put_text("etc/apk/world", text));
    TRY(put_text("etc/apk/arch", std::string(kArchitecture) + "\n"));
    TRY(put_text("etc/apk/repositories", repositories_));
    for (const std::string& name : used_keys_) TRY(put_text("etc/apk/keys/" + name, keys_.text(name)));
    TRY(put_text("lib/apk/db/installed", installed_));
    TRY(put_text("lib/apk/db/triggers", triggers_));
    const std::string scripts = TRY(scripts_archive());
    TRY(put_text(kScripts, scripts));
    if (!scripts_.empty()) TRY(put_text(kFirstBootList, before_ + after_ + last_));
    return {};
  }

  // apk keeps the scripts of what is installed in a tar.
  Result<std::string> scripts_archive() const {
    size_t capacity = 65536, used = 0;
    for (const auto& [name, text] : scripts_) capacity += text.size() + 4096;
    std::string result(capacity, '\0');
    archive* handle = archive_write_new();
    archive_write_set_format_ustar(handle);
    archive_write_set_bytes_in_last_block(handle, 1);
    bool sound = archive_write_open_memory(handle, result.data(), result.size(), &used) == ARCHIVE_OK;
    for (const auto& [name, text] : scripts_) {
      archive_entry* entry = archive_entry_new();
      archive_entry_set_pathname(entry, name.c_str());
      archive_entry_set_filetype(entry, AE_IFREG);
      archive_entry_set_perm(entry, 0755);
      archive_entry_set_size(entry, static_cast<la_int64_t>(text.size()));
      sound = sound && archive_write_header(handle, entry) == ARCHIVE_OK &&
              archive_write_data(handle, text.data(), text.size()) == static_cast<la_ssize_t>(text.size());
      archive_entry_free(entry);
    }
    sound = archive_write_close(handle) == ARCHIVE_OK && sound;
    archive_write_free(handle);
    if (!sound) return Error{"the archive of scripts could not be written"};
    result.resize(used);
    return result;
  }

  const Context& context_;
  const DistributionRequest& request_;
  apk::Keys keys_;
  std::set<std::string> used_keys_;
  std::vector<apk::Package> packages_;
  std::string repositories_, installed_, triggers_;
  std::map<std::string, std::string> scripts_;
  std::string before_, after_, last_;  // lines of the list for the first boot
};

}  // namespace

Result<void> take_alpine(const Context& context, const DistributionRequest& request) {
  return Alpine(context, request).run();
}

Result<void> prepare_alpine_first_boot(const Context& context) {
  Tree& tree = context.tree;
  const InodePointer init = tree.find("sbin/init", Tree::LastLink::keep);
  const InodePointer list = tree.find(kFirstBootList);
  if (init && tree.find("bin/ls") && !list) return {};
  if (!tree.find("bin/busybox")) {
    if (list) context.progress.note("there is no busybox: the packages' scripts are not run");
    return {};
  }
  if (init) TRY(tree.put("sbin/init.packaged", init));
  return tree.put("sbin/init", TRY(context.spool.file(kFirstBoot, 0755)));
}

}  // namespace rootfs
