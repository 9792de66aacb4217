// SPDX-License-Identifier: Apache-2.0
// Folders of plugins: what is found, what is refused, who is trusted.
#include <doctest/doctest.h>

#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>

#include "plugin/catalogue.hpp"
#include "scratch_dir.hpp"

using namespace vmm;
namespace fs = std::filesystem;

namespace {

void copy_plugin(const std::string& id, const std::string& into) {
  fs::create_directories(fs::path(into).parent_path());
  fs::copy_file(fs::path(CLONE_TEST_PLUGIN_DIR) / (id + ".so"), into);
  fs::permissions(into, fs::perms(0755));
}

std::string trust_error(const std::string& path) {
  const auto trusted = check_trust(path);
  return trusted.ok() ? "" : trusted.error().message;
}

}  // namespace

TEST_CASE("catalogue: plugins are found by kind and name, other files are refused with a reason") {
  const ScratchDir folder;
  copy_plugin("virtio-rng", folder.path() + "/virtio-rng.so");
  copy_plugin("transport-mmio", folder.path() + "/transport-mmio.so");
  folder.write("broken-thing.so", "not an ELF file at all");
  folder.write("readme.txt", "nobody looks at this");
  const auto catalogue = Catalogue::scan({folder.path()}, PluginTrust::any);
  REQUIRE(catalogue.ok());
  CHECK(catalogue->files().size() == 2);
  REQUIRE(catalogue->refused().size() == 1);
  CHECK(catalogue->refused()[0].path == folder.path() + "/broken-thing.so");
  CHECK(catalogue->refused()[0].error.message == "not a plugin: not an ELF file");

  CHECK((*catalogue->find("device", "virtio-rng"))->manifest.id == "virtio-rng");
  CHECK((*catalogue->find("transport", "mmio"))->manifest.id == "transport-mmio");
  CHECK(catalogue->find("device", "mmio").error().message == "unknown device 'mmio'; there are: virtio-rng");
  CHECK(catalogue->find("balloon-policy", "x").error().message == "unknown balloon-policy 'x': no plugin offers any");
  // A file that bears the name is the better answer.
  CHECK(catalogue->find("device", "broken-thing").error().message ==
        "device 'broken-thing': " + folder.path() + "/broken-thing.so: not a plugin: not an ELF file");
}

TEST_CASE("catalogue: of two files with one id the earlier folder's counts") {
  const ScratchDir first, second;
  copy_plugin("virtio-rng", first.path() + "/virtio-rng.so");
  copy_plugin("virtio-rng", second.path() + "/another-name.so");
  for (const auto& order : {std::vector{first.path(), second.path()}, std::vector{second.path(), first.path()}}) {
    const auto catalogue = Catalogue::scan(order, PluginTrust::any);
    REQUIRE(catalogue.ok());
    REQUIRE(catalogue->files().size() == 1);
    CHECK(fs::path(catalogue->files()[0].path).parent_path() == order[0]);
  }
}

TEST_CASE("catalogue: a missing folder is an error unless it is the built-in one") {
  const ScratchDir folder;
  const std::string missing = folder.path() + "/missing";
  CHECK(Catalogue::scan({missing}, PluginTrust::any).ok());
  const auto named = Catalogue::scan({missing, folder.path()}, PluginTrust::any);
  REQUIRE(!named.ok());
  CHECK(named.error().message == "plugin folder " + missing + ": No such file or directory");
}

TEST_CASE("catalogue: folders come from the command line, the environment, the installation") {
  ::setenv("CLONE_PLUGIN_PATH", "/one::/two:", 1);
  const auto folders = plugin_folders({"/given"});
  ::unsetenv("CLONE_PLUGIN_PATH");
  REQUIRE(folders.size() == 4);
  CHECK(folders[0] == "/given");
  CHECK(folders[1] == "/one");
  CHECK(folders[2] == "/two");
  CHECK(folders[3] == installation_prefix() + "/lib/clone/plugins");
}

TEST_CASE("catalogue: root trusts only what nobody else can change") {
  if (::geteuid() != 0) {
    // Users may load what they like.
    CHECK(trust_error("/tmp").empty());
    return;
  }
  const ScratchDir scratch;
  ::chmod(scratch.path().c_str(), 0755);
  const std::string folder = scratch.path() + "/plugins";
  const std::string file = folder + "/virtio-rng.so";
  copy_plugin("virtio-rng", file);
  fs::permissions(folder, fs::perms(0755));
  REQUIRE(trust_error(file).empty());

  struct Case {
    mode_t file_mode, folder_mode;
    uid_t file_owner, folder_owner;
    gid_t group;
    const char* complaint;
  };
  for (const Case& c : {Case{0644, 0755, 0, 0, 0, ""},
                        {0666, 0755, 0, 0, 0, "others can write to "},
                        {0602, 0755, 0, 0, 0, "mode 0602"},
                        {0664, 0755, 0, 0, 0, ""},  // root's own group
                        {0664, 0755, 0, 0, 1, "mode 0664"},
                        {0644, 0755, 1, 0, 0, "user 1 owns "},
                        {0644, 0777, 0, 0, 0, "mode 0777"},
                        {0644, 01777, 0, 0, 0, "mode 1777"},  // others could add files beside it
                        {0644, 0775, 0, 0, 1, "mode 0775"},
                        {0644, 0755, 0, 1, 0, "user 1 owns "}}) {
    CAPTURE(c.file_mode);
    CAPTURE(c.folder_mode);
    CAPTURE(c.complaint);
    REQUIRE(::chown(file.c_str(), c.file_owner, c.group) == 0);
    REQUIRE(::chown(folder.c_str(), c.folder_owner, c.group) == 0);
    REQUIRE(::chmod(file.c_str(), c.file_mode) == 0);
    REQUIRE(::chmod(folder.c_str(), c.folder_mode) == 0);
    const std::string error = trust_error(file);
    CHECK(error.empty() == !*c.complaint);
    CHECK(error.find(c.complaint) != std::string::npos);
    if (!error.empty()) CHECK(error.find("--allow-insecure-plugins") != std::string::npos);
    // The same judgement through a link in a safe place.
    fs::remove(scratch.path() + "/link.so");
    fs::create_symlink(file, scratch.path() + "/link.so");
    CHECK(trust_error(scratch.path() + "/link.so").empty() == error.empty());

    const auto catalogue = Catalogue::scan({folder}, PluginTrust::checked);
    REQUIRE(catalogue.ok());
    CHECK(catalogue->files().size() == (error.empty() ? 1 : 0));
    CHECK(Catalogue::scan({folder}, PluginTrust::any)->files().size() == 1);
  }
}

TEST_CASE("catalogue: the folders above count, unless they are sticky") {
  if (::geteuid() != 0) return;
  const ScratchDir scratch;
  const std::string upper = scratch.path() + "/upper";
  const std::string file = upper + "/plugins/virtio-rng.so";
  copy_plugin("virtio-rng", file);
  ::chmod(scratch.path().c_str(), 0755);
  ::chmod((upper + "/plugins").c_str(), 0755);
  ::chmod(upper.c_str(), 0777);
  CHECK(trust_error(file).find("others can write to " + upper + " (mode 0777") != std::string::npos);
  ::chmod(upper.c_str(), 01777);
  CHECK(trust_error(file).empty());
}
