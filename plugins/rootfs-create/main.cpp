// SPDX-License-Identifier: Apache-2.0
// clone-rootfs: the command `clone rootfs`. Makes disk images that `clone run --rootfs` boots.
#include <fcntl.h>
#include <locale.h>
#include <sys/stat.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cstdio>

#include "ext4_image.hpp"
#include "output_file.hpp"
#include "process.hpp"
#include "qcow2_writer.hpp"
#include "setup.hpp"
#include "sources.hpp"
#include "util/log.hpp"

namespace rootfs {
namespace {

constexpr int kFailed = 1;
constexpr int kUsage = 2;
constexpr uint64_t kLargestImageBytes = uint64_t{16} << 40;

struct Options {
  DistributionRequest distribution;
  std::string folder;
  std::string container;
  std::string size;
  std::string output;
  std::string format = "raw";
  std::string hostname;
  std::string ssh_key_file;
  std::string agent;
  bool insecure_registry = false;
  bool force = false;
  bool quiet = false;
};

int fail(const Error& error, int status) {
  std::string_view rest = error.message;
  while (!rest.empty()) {
    const size_t end = rest.find('\n');
    vmm::log_error(rest.substr(0, end));
    rest.remove_prefix(end == rest.npos ? rest.size() : end + 1);
  }
  return status;
}

Result<uint64_t> parse_size(const std::string& text) {
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const std::string_view unit(end, static_cast<size_t>(text.data() + text.size() - end));
  const unsigned shift = unit == "G" ? 30 : unit == "T" ? 40 : unit == "M" || unit.empty() ? 20 : 64;
  if (error != std::errc() || shift == 64 || value > (kLargestImageBytes >> shift) ||
      (value << shift) < kSmallestImageBytes)
    return Error{"--size: '" + text +
                 "' given; allowed is a size from 16M to 16T (M, G, T; a bare number counts in MiB)"};
  return value << shift;
}

// Names of packages and releases become words of other programs' command lines and parts of URLs.
Result<void> check_word(const std::string& option, const std::string& word) {
  constexpr std::string_view allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-.:=~<>_";
  if (word.empty() || word.find_first_not_of(allowed) != word.npos || !isalnum(static_cast<unsigned char>(word[0])))
    return Error{option + ": '" + word + "' given; allowed are letters, digits and +-.:=~<>_, a letter or digit first"};
  return {};
}

// Everything about the command line that can be told before anything is done.
Result<void> check(const Options& options) {
  const DistributionRequest& distribution = options.distribution;
  const int sources = !distribution.name.empty() + !options.folder.empty() + !options.container.empty();
  if (sources != 1) return Error{"give one of --distro, --from-dir and --from-docker"};
  if (distribution.name.empty()) {
    for (const auto& [given, name] : {std::pair(!distribution.release.empty(), "--release"),
                                      {!distribution.mirror.empty(), "--mirror"},
                                      {!distribution.packages.empty(), "--package"},
                                      {!distribution.keys.empty(), "--keys"}})
      if (given) return Error{std::string(name) + " goes with --distro only"};
  }
  if (options.insecure_registry && options.container.empty())
    return Error{"--insecure-registry goes with --from-docker only"};
  if (!distribution.release.empty()) TRY(check_word("--release", distribution.release));
  for (const std::string& package : distribution.packages) TRY(check_word("--package", package));
  if (!distribution.mirror.empty()) {
    bool known = false;
    for (const char* scheme : {"http://", "https://", "file://"}) known |= distribution.mirror.starts_with(scheme);
    if (!known || distribution.mirror.find_first_of(" \t\n") != std::string::npos)
      return Error{"--mirror: '" + distribution.mirror + "' given; allowed is a URL of http, https or file"};
  }
  if (!options.hostname.empty()) TRY(check_hostname(options.hostname));
  if (!options.size.empty()) TRY(parse_size(options.size));
  return {};
}

Result<std::string> read_ssh_keys(const std::string& path) {
  const auto fd = std::make_shared<const Fd>(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  struct stat status {};
  if (!*fd || ::fstat(fd->get(), &status) != 0) return errno_error("--ssh-key " + path);
  if (!S_ISREG(status.st_mode)) return Error{"--ssh-key " + path + ": not a regular file"};
  std::string text =
      TRY(read_text({fd, {}, 0, static_cast<uint64_t>(status.st_size)}, 1 << 20).context("--ssh-key " + path));
  if (text.find("PRIVATE KEY") != text.npos)
    return Error{"--ssh-key " + path + ": that is a private key; give the public one (.pub)"};
  if (text.find("ssh-") == text.npos && text.find("ecdsa-") == text.npos)
    return Error{"--ssh-key " + path + ": no public key in it"};
  if (!text.ends_with('\n')) text += '\n';
  return text;
}

// The agent that is asked for, or the one that is installed, or none.
Result<std::string> choose_agent(const std::string& given, Progress& progress) {
  if (!given.empty()) {
    struct stat status {};
    if (::stat(given.c_str(), &status) != 0 || ::access(given.c_str(), R_OK) != 0)
      return errno_error("--agent " + given);
    if (!S_ISREG(status.st_mode) || (status.st_mode & 0111) == 0)
      return Error{"--agent " + given + ": not a program; allowed is a regular file that is executable"};
    return given;
  }
  const std::string installed = program_folder() + "/clone-agent";
  if (::access(installed.c_str(), R_OK) == 0) return installed;
  progress.note("no guest agent is installed with clone: the image gets none");
  return std::string();
}

Result<void> create(const Options& options, Progress& progress) {
  progress.stage("preparing");
  OutputFile output = TRY(OutputFile::make(options.output, options.force ? Existing::replace : Existing::refuse));
  Setup setup;
  if (!options.ssh_key_file.empty()) setup.ssh_keys = TRY(read_ssh_keys(options.ssh_key_file));
  setup.agent_path = TRY(choose_agent(options.agent, progress));
  setup.plain_init_path = program_folder() + "/clone-plain-init";
  setup.hostname = options.hostname;
  const WorkFolder work = TRY(WorkFolder::make());
  Tree tree;
  Spool spool = TRY(Spool::make(work.path()));
  const Context context{tree, spool, work.path(), progress};
  DistributionRequest distribution = options.distribution;
  distribution.ssh_server = !setup.ssh_keys.empty();

  if (!options.folder.empty()) {
    setup.origin = Origin::folder;
    progress.stage("reading " + options.folder);
    struct stat status {};
    if (::fstat(output.fd().get(), &status) != 0) return errno_error(options.output);
    TRY(take_folder(context, options.folder, status));
  } else if (!options.container.empty()) {
    setup.origin = Origin::container;
    setup.container = TRY(take_container(context, options.container,
                                         options.insecure_registry ? RegistryTls::insecure : RegistryTls::verify));
  } else {
    setup.origin = Origin::distribution;
    TRY(distribution.name == "alpine" ? take_alpine(context, distribution) : take_debian(context, distribution));
  }
  progress.stage("setting up");
  TRY(make_bootable(context, setup));
  if (distribution.name == "alpine") TRY(prepare_alpine_first_boot(context));

  const TreeSize measured = measure(tree);
  const uint64_t size_bytes = options.size.empty() ? default_image_size(measured) : TRY(parse_size(options.size));
  progress.stage("writing " + human_size(measured.content_bytes) + " in " + std::to_string(measured.inodes) +
                 " files into an ext4 of " + human_size(size_bytes));
  if (options.format == "raw") {
    TRY(write_ext4(output.temporary_path(), size_bytes, tree, progress));
  } else {
    OutputFile raw = TRY(OutputFile::make_temporary(options.output + ".raw"));
    TRY(write_ext4(raw.temporary_path(), size_bytes, tree, progress));
    progress.stage("converting to qcow2");
    TRY(write_qcow2(raw.fd(), size_bytes, output.fd(), [&](uint64_t done) { progress.bytes(done, size_bytes); }));
  }
  progress.stage("syncing");
  TRY(interrupted());
  TRY(output.commit());
  struct stat status {};
  if (::stat(options.output.c_str(), &status) != 0) return errno_error(options.output);
  progress.note(options.output + ": " + human_size(size_bytes) + " " + options.format + ", " +
                human_size(static_cast<uint64_t>(status.st_blocks) * 512) + " on disk");
  return {};
}

int main(int argc, char** argv) {
  ::setlocale(LC_CTYPE, "C.UTF-8");  // libarchive's names are UTF-8 then
  Options options;
  CLI::App app{"Make disk images that `clone run --rootfs` boots.", "clone rootfs"};
  app.require_subcommand(1);
  CLI::App* command = app.add_subcommand("create", "Make a disk image with a root file system.");
  command->option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  DistributionRequest& distribution = options.distribution;
  command->add_option("-o,--output", options.output, "The image.")->type_name("FILE")->required();
  command->add_option("--distro", distribution.name, "A distribution: debian, ubuntu or alpine.")
      ->type_name("NAME")
      ->check(CLI::IsMember({"debian", "ubuntu", "alpine"}))
      ->group("Source");
  command->add_option("--from-dir", options.folder, "The files below a folder.")->type_name("PATH")->group("Source");
  command
      ->add_option(
          "--from-docker", options.container,
          "A container image: a name, or docker://NAME, oci:PATH, oci-archive:PATH, docker-archive:PATH, dir:PATH.")
      ->type_name("REF")
      ->group("Source");
  command
      ->add_option("--release", distribution.release, "Of the distribution; bookworm, noble, latest-stable otherwise.")
      ->type_name("R")
      ->group("Distribution");
  command->add_option("--mirror", distribution.mirror, "Where packages come from.")
      ->type_name("URL")
      ->group("Distribution");
  command->add_option("--package", distribution.packages, "One more package; any number of times.")
      ->type_name("P")
      ->expected(1)
      ->allow_extra_args(false)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->group("Distribution");
  command
      ->add_option("--keys", distribution.keys, "Whose signatures count: a keyring, for Alpine a folder of *.rsa.pub.")
      ->type_name("PATH")
      ->group("Distribution");
  command
      ->add_flag("--insecure-registry", options.insecure_registry,
                 "Ask the registry, past a local engine; it may speak plain HTTP.")
      ->group("Source");
  command
      ->add_option("--size", options.size,
                   "Of the file system; the file is sparse. Otherwise as much as is sensible, at least 4G.")
      ->type_name("SIZE");
  command->add_option("--format", options.format, "raw, or qcow2, which needs room for a raw one beside it meanwhile.")
      ->type_name("FORMAT")
      ->check(CLI::IsMember({"raw", "qcow2"}))
      ->default_str("raw");
  command->add_option("--hostname", options.hostname, "The guest's name; otherwise clone, or what a folder has.")
      ->type_name("NAME");
  command
      ->add_option("--ssh-key", options.ssh_key_file,
                   "Public keys that may log in as root; brings an SSH server to a distribution.")
      ->type_name("FILE");
  command
      ->add_option("--agent", options.agent,
                   "A program to start as the guest agent; otherwise the one installed with clone, if any.")
      ->type_name("FILE");
  command->add_flag("--force", options.force, "Replace an image that exists.");
  command->add_flag("-q,--quiet", options.quiet, "Errors only.");
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    std::fputs(app.help().c_str(), stdout);
    return 0;
  } catch (const CLI::ParseError& error) {
    std::string message = error.what();
    while (!message.empty() && message.back() == '\n') message.pop_back();
    return fail(Error{message + " (see clone rootfs create --help)"}, kUsage);
  }
  if (const Result<void> checked = check(options); !checked.ok()) return fail(checked.error(), kUsage);

  catch_signals();
  Progress progress(options.quiet ? Loudness::quiet : Loudness::normal);
  Result<void> created = create(options, progress);
  progress.clear();
  if (created.ok()) return 0;
  const int status = signal_caught() ? 128 + signal_caught() : kFailed;
  return fail(std::move(created).error().context("rootfs: " + progress.stage_name()), status);
}

}  // namespace
}  // namespace rootfs

int main(int argc, char** argv) { return rootfs::main(argc, argv); }
