// SPDX-License-Identifier: Apache-2.0
// Overlays in files: made, used again, refused over another base, temporary ones gone.
#include <doctest/doctest.h>
#include <endian.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "clone/abi/boot_root.h"
#include "clone/sdk/fd.hpp"
#include "fake_host.hpp"
#include "fake_plugin.hpp"
#include "scratch_dir.hpp"

using namespace vmm;
using namespace vmm::test;
namespace fs = std::filesystem;

namespace {

using Options = std::map<std::string, std::string>;
constexpr size_t kBaseBytes = 1 << 20;

const PluginFile& plugin() {
  static const PluginFile file("virtio-blk");
  return file;
}

std::string content(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// A folder with two bases of the same content, and HOME in it.
struct Folder {
  ScratchDir scratch;
  std::string base = scratch.write("base.img", std::string(kBaseBytes, 'b'));
  std::string other = scratch.write("other.img", std::string(kBaseBytes, 'b'));
  std::string home = scratch.path() + "/home";
  std::string kept = home + "/.clone/overlays";
  std::string old_home;

  Folder() {
    fs::create_directory(home);
    old_home = ::getenv("HOME") ? ::getenv("HOME") : "";
    ::setenv("HOME", home.c_str(), 1);
  }
  ~Folder() { ::setenv("HOME", old_home.c_str(), 1); }

  std::string file(const char* name) const { return scratch.path() + "/" + name; }
  std::vector<std::string> names(const std::string& folder) const {
    std::vector<std::string> found;
    for (const auto& entry : fs::directory_iterator(folder)) found.push_back(entry.path().filename().string());
    std::sort(found.begin(), found.end());
    return found;
  }
};

// A disk that is configured and nothing more.
struct Disk {
  FakeHost host;
  DeviceUnderTest device{plugin().device("virtio-blk"), host.handle("virtio-blk.0")};
  clone_status status;

  explicit Disk(Options options) {
    options.emplace("root", "on");
    status = device.configure(options);
  }
  ~Disk() { device.destroy(); }
};

std::string refusal(const Options& options) {
  Disk disk(options);
  CHECK(disk.status != CLONE_OK);
  return disk.device.error;
}

// What a header says of the backing file (docs/interop/qcow2.txt): offset at 8, length at 16, big endian.
std::string backing_name(const std::string& overlay) {
  const std::string bytes = content(overlay);
  REQUIRE(bytes.size() > 104);
  REQUIRE(bytes.starts_with("QFI\xfb"));
  uint64_t offset;
  uint32_t length;
  std::memcpy(&offset, bytes.data() + 8, sizeof offset);
  std::memcpy(&length, bytes.data() + 16, sizeof length);
  return bytes.substr(be64toh(offset), be32toh(length));
}

}  // namespace

TEST_CASE("overlay: made when it is missing, over the base by its absolute name, and used again") {
  const Folder folder;
  fs::create_symlink(folder.base, folder.file("link"));
  const std::string overlay = folder.file("o.qcow2");
  {
    Disk disk({{"path", folder.file("link")}, {"overlay", overlay}});
    REQUIRE_MESSAGE(disk.status == CLONE_OK, disk.device.error);
    struct stat status {};
    REQUIRE(::stat(overlay.c_str(), &status) == 0);
    CHECK((status.st_mode & 07777) == 0600);
    CHECK(backing_name(overlay) == fs::canonical(folder.base).string());
    // The guest has an ordinary disk of the base's size.
    const auto* boot_root = disk.device.extension<clone_boot_root>(CLONE_BOOT_ROOT);
    clone_boot_root_info info{};
    info.size = sizeof info;
    CHECK(boot_root->describe(disk.device.raw(), &info, nullptr) == CLONE_OK);
    CHECK(info.read_only == 0);
    CHECK(std::string(info.overlay).empty());
    uint64_t sectors = 0;
    const auto* table = disk.device.extension<clone_virtio_device>(CLONE_VIRTIO_DEVICE);
    table->read_config(disk.device.raw(), 0, &sectors, sizeof sectors);
    CHECK(le64toh(sectors) == kBaseBytes / 512);

    // The overlay is one machine's; the base is everybody's to read and nobody's to write.
    CHECK(refusal({{"path", folder.base}, {"overlay", overlay}}) ==
          "overlay=" + overlay + ": in use by another process (opened for writing)");
    CHECK(refusal({{"path", folder.base}}) ==
          "path=" + folder.base + ": in use by another process (opened for reading); readonly=on shares it");
    Disk second({{"path", folder.base}, {"overlay", folder.file("second.qcow2")}});
    CHECK_MESSAGE(second.status == CLONE_OK, second.device.error);
    Disk third({{"path", folder.base}, {"overlay", "tmpfs"}});
    CHECK_MESSAGE(third.status == CLONE_OK, third.device.error);
  }
  struct stat before {
  }, after{};
  REQUIRE(::stat(overlay.c_str(), &before) == 0);
  {
    // By the base's other names too: it is the same file.
    fs::create_hard_link(folder.base, folder.file("hard"));
    Disk disk({{"path", folder.file("hard")}, {"overlay", overlay}});
    CHECK_MESSAGE(disk.status == CLONE_OK, disk.device.error);
  }
  REQUIRE(::stat(overlay.c_str(), &after) == 0);
  CHECK(before.st_ino == after.st_ino);
  CHECK(content(folder.base) == std::string(kBaseBytes, 'b'));
  // Nothing but what was asked for.
  CHECK(folder.names(folder.scratch.path()) ==
        std::vector<std::string>{"base.img", "hard", "home", "link", "o.qcow2", "other.img", "second.qcow2"});
}

TEST_CASE("overlay: a base that is qcow2 is recorded as that") {
  const Folder folder;
  // An overlay of the raw base serves as one.
  const std::string middle = folder.file("middle.qcow2"), top = folder.file("top.qcow2");
  { CHECK(Disk({{"path", folder.base}, {"overlay", middle}}).status == CLONE_OK); }
  // The file that it names by itself is opened only where the user allows it.
  CHECK(refusal({{"path", middle}, {"overlay", top}}).starts_with("path=" + middle + ": "));
  CHECK(!fs::exists(top));
  {
    Disk disk({{"path", middle}, {"backing", "on"}, {"overlay", top}});
    CHECK_MESSAGE(disk.status == CLONE_OK, disk.device.error);
  }
  CHECK(backing_name(top) == fs::canonical(middle).string());
  CHECK(content(top).find("qcow2") < 512);
  CHECK(refusal({{"path", middle}, {"format", "raw"}, {"overlay", top}}) ==
        "overlay=" + top + ": was made over " + fs::canonical(middle).string() +
            " as a qcow2 image, not as a raw one; format=qcow2 says so");
}

TEST_CASE("overlay: files that are none of this base") {
  const Folder folder;
  const std::string overlay = folder.file("o.qcow2");
  { const Disk disk({{"path", folder.base}, {"overlay", overlay}}); }
  REQUIRE(fs::exists(overlay));
  const std::string before = content(overlay);
  const std::string start = "overlay=" + overlay + ": ", real_base = fs::canonical(folder.base).string();
  CHECK(refusal({{"path", folder.other}, {"overlay", overlay}}) ==
        start + "is an overlay of " + real_base + ", not of " + folder.other + "; allowed is its own base");
  // Another file in the base's place is another base.
  fs::rename(folder.base, folder.file("moved"));
  CHECK(refusal({{"path", folder.file("moved")}, {"overlay", overlay}}) ==
        start + "is an overlay of " + real_base + " (No such file or directory), not of " + folder.file("moved") +
            "; allowed is its own base");
  fs::rename(folder.file("moved"), folder.base);
  CHECK(content(overlay) == before);

  CHECK(refusal({{"path", folder.base}, {"overlay", folder.base}}) ==
        "overlay=" + folder.base + ": is the base itself; allowed is another file, or a name that is not there yet");
  CHECK(refusal({{"path", folder.base}, {"overlay", folder.other}}).find("is not a qcow2 file") != std::string::npos);
  const std::string folder_name = folder.scratch.path();
  CHECK(refusal({{"path", folder.base}, {"overlay", folder_name}}) == "overlay=" + folder_name + ": Is a directory");
  CHECK(refusal({{"path", folder.base}, {"overlay", folder_name + "/"}}) ==
        "overlay=" + folder_name + "/: allowed are off, on, tmpfs, auto and the path of a file");
  CHECK(refusal({{"path", folder.base}, {"overlay", ""}}) ==
        "overlay=: allowed are off, on, tmpfs, auto and the path of a file");
  CHECK(refusal({{"path", folder.base}, {"overlay", folder.file("none/x")}}) ==
        "overlay=" + folder.file("none/x") + ": its folder " + folder.file("none") + ": No such file or directory");
  REQUIRE(::mkfifo(folder.file("fifo").c_str(), 0600) == 0);
  CHECK(refusal({{"path", folder.base}, {"overlay", folder.file("fifo")}}) ==
        "overlay=" + folder.file("fifo") + ": is neither a regular file nor a block device");
  CHECK(refusal({{"path", folder.file("nothing")}, {"overlay", folder.file("new")}}) ==
        "path=" + folder.file("nothing") + ": No such file or directory");
  CHECK(!fs::exists(folder.file("new")));
  CHECK(content(folder.base) == std::string(kBaseBytes, 'b'));
}

TEST_CASE("overlay: a temporary one has no name, and its folder is the user's alone") {
  const Folder folder;
  const Options options = {{"path", folder.base}, {"overlay", "auto"}};
  {
    Disk first(options), second(options);
    CHECK_MESSAGE(first.status == CLONE_OK, first.device.error);
    CHECK_MESSAGE(second.status == CLONE_OK, second.device.error);
    CHECK(folder.names(folder.kept).empty());
  }
  for (const std::string& made : {folder.home + "/.clone", folder.kept}) {
    struct stat status {};
    REQUIRE(::stat(made.c_str(), &status) == 0);
    CHECK((status.st_mode & 07777) == 0700);
    ::chmod(made.c_str(), 0720);
    CHECK(refusal(options) == "overlay=auto: " + made + ": others can write to it; chmod go-w it");
    ::chmod(made.c_str(), 0700);
  }
  if (::geteuid() == 0) {
    REQUIRE(::chown(folder.kept.c_str(), 12345, 0) == 0);
    CHECK(refusal(options) == "overlay=auto: " + folder.kept + ": belongs to user 12345, not to 0 who runs this");
    REQUIRE(::chown(folder.kept.c_str(), 0, 0) == 0);
  }
  const std::string no_home =
      "overlay=auto: HOME is not set to an absolute path; temporary overlays are kept in ~/.clone/overlays";
  ::unsetenv("HOME");
  CHECK(refusal(options) == no_home);
  ::setenv("HOME", "relative", 1);
  CHECK(refusal(options) == no_home);
  ::setenv("HOME", folder.file("missing").c_str(), 1);
  CHECK(refusal(options) == "overlay=auto: " + folder.file("missing") + ": No such file or directory");
}

TEST_CASE("overlay: a start removes temporary ones that a killed start left, and nothing else") {
  const Folder folder;
  const auto put = [&](const std::string& name) { return folder.scratch.write("home/.clone/overlays/" + name, "x"); };
  const std::string left = put("overlay-0123456789abcdef.qcow2");
  const std::string held = put("overlay-fedcba9876543210.qcow2");
  for (const char* name : {"overlay-0123456789abcdeF.qcow2", "overlay-0123456789abcdef0.qcow2",
                           "overlay-0123456789abcde.qcow2", "overlay-0123456789abcdef.qcow", "mine.qcow2"})
    put(name);
  fs::create_symlink(folder.base, folder.kept + "/overlay-00000000000000ff.qcow2");
  fs::permissions(folder.home + "/.clone", fs::perms::owner_all);
  fs::permissions(folder.kept, fs::perms::owner_all);
  const clone_sdk::Fd holder(::open(held.c_str(), O_RDWR | O_CLOEXEC));
  struct flock lock {};
  lock.l_type = F_RDLCK;
  lock.l_start = 201;
  lock.l_len = 1;
  REQUIRE(::fcntl(holder.get(), F_OFD_SETLK, &lock) == 0);
  auto names = folder.names(folder.kept);
  { const Disk disk({{"path", folder.base}, {"overlay", "auto"}}); }
  std::erase(names, fs::path(left).filename().string());
  CHECK(folder.names(folder.kept) == names);
  CHECK(fs::exists(folder.base));
}
