// SPDX-License-Identifier: Apache-2.0
// Debian and Ubuntu: mmdebstrap writes a tar, from which the tree is taken; owners are right without root that way.
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>

#include "archive.hpp"
#include "process.hpp"
#include "sources.hpp"

namespace rootfs {
namespace {

constexpr const char* kUbuntuMirror = "http://archive.ubuntu.com/ubuntu";
constexpr const char* kUbuntuKeyring = "/usr/share/keyrings/ubuntu-archive-keyring.gpg";

// What a machine has that a container lacks: an init, devices, addresses, names.
std::vector<std::string> packages_of(const DistributionRequest& request, const std::string& release) {
  std::vector<std::string> packages = {"systemd-sysv", "udev",   "dbus",           "iproute2",
                                       "iputils-ping", "procps", "ca-certificates"};
  // Older releases have it inside of systemd.
  constexpr std::array within_systemd = {"buster", "bullseye", "oldoldstable", "bionic", "focal", "jammy"};
  if (std::find(within_systemd.begin(), within_systemd.end(), release) == within_systemd.end())
    packages.push_back("systemd-resolved");
  if (request.ssh_server) packages.push_back("openssh-server");
  packages.insert(packages.end(), request.packages.begin(), request.packages.end());
  return packages;
}

std::string joined(const std::vector<std::string>& words) {
  std::string result;
  for (const std::string& word : words) result += (result.empty() ? "" : ",") + word;
  return result;
}

}  // namespace

Result<void> take_debian(const Context& context, const DistributionRequest& request) {
  const bool ubuntu = request.name == "ubuntu";
  const std::string release = !request.release.empty() ? request.release : ubuntu ? "noble" : "bookworm";
  std::string keyring = request.keys;
  if (ubuntu && keyring.empty()) {
    if (::access(kUbuntuKeyring, R_OK) != 0)
      return Error{"Ubuntu's archive keys are not installed (" + std::string(kUbuntuKeyring) +
                   "); name a keyring with --keys"};
    keyring = kUbuntuKeyring;
  }
  const std::string mirror = !request.mirror.empty() || !ubuntu ? request.mirror : kUbuntuMirror;
  const std::string components = ubuntu ? "main,universe" : "main";
  const std::string include = joined(packages_of(request, release));
  // The sandbox user of apt has to be able to pass through.
  if (::chmod(context.work.c_str(), 0711) != 0) return errno_error(context.work);
  Process::Options options{{"TMPDIR=" + context.work, "DEBIAN_FRONTEND=noninteractive"},
                           [&context](std::string_view line) { context.progress.detail(line); }};

  if (find_program("mmdebstrap").empty()) {
    if (find_program("debootstrap").empty())
      return Error{"neither mmdebstrap nor debootstrap is installed (apt install mmdebstrap)"};
    if (::geteuid() != 0) return Error{"debootstrap needs root; with mmdebstrap installed, no root is needed"};
    const std::string folder = context.work + "/debootstrap";
    std::vector<std::string> command = {"debootstrap", "--variant=minbase", "--components=" + components,
                                        "--include=" + include};
    if (!keyring.empty()) command.push_back("--keyring=" + keyring);
    command.insert(command.end(), {release, folder});
    if (!mirror.empty()) command.push_back(mirror);
    context.progress.stage("debootstrap " + release);
    TRY(Process::run(command, options));
    TRY(Process::run({"chroot", folder, "apt-get", "clean"}));
    struct stat nothing {};
    return take_folder(context, folder, nothing);
  }

  std::vector<std::string> command = {"mmdebstrap", "--variant=minbase", "--format=tar", "--components=" + components,
                                      "--include=" + include};
  if (!keyring.empty()) command.push_back("--keyring=" + keyring);
  command.insert(command.end(), {release, "-"});
  if (!mirror.empty()) command.push_back(mirror);
  context.progress.stage("mmdebstrap " + release);
  Process process = TRY(Process::start(command, options));
  ArchiveOptions archive;
  archive.on_bytes = [&context](uint64_t bytes) { context.progress.bytes(bytes, 0); };
  // When it fails it is its own words that tell why, not those of the archive that ends early.
  const Result<void> unpacked = unpack(bytes_of(process), context.tree, context.spool, archive);
  if (!unpacked.ok() && unpacked.error().code != 0) return unpacked;
  TRY(process.finish());
  TRY(unpacked);
  if (context.tree.root().children.empty()) return Error{"mmdebstrap wrote nothing"};
  return {};
}

}  // namespace rootfs
