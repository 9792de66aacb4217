// SPDX-License-Identifier: Apache-2.0
// Container images: from a local engine, or through skopeo as an OCI layout, whose layers are applied here (OCI image
// specification 1.0, "Image Layer Filesystem Changeset"). No root is needed for owners to be right.
#include <fcntl.h>
#include <unistd.h>

#include <boost/json.hpp>

#include "archive.hpp"
#include "process.hpp"
#include "sources.hpp"

namespace rootfs {
namespace {

namespace json = boost::json;

constexpr size_t kLargestDocument = 8 << 20;

Result<json::value> parse(const std::string& text, const std::string& what) {
  boost::system::error_code error;
  json::value value = json::parse(text, error);
  if (error) return Error{what + ": not JSON: " + error.message()};
  return value;
}

// The value at a path of keys, or null.
const json::value* at(const json::value& value, std::initializer_list<const char*> keys) {
  const json::value* here = &value;
  for (const char* key : keys) {
    const json::object* object = here->if_object();
    here = object ? object->if_contains(key) : nullptr;
    if (!here) return nullptr;
  }
  return here;
}

std::string text_at(const json::value& value, std::initializer_list<const char*> keys) {
  const json::value* found = at(value, keys);
  return found && found->is_string() ? std::string(found->get_string()) : std::string();
}

std::vector<std::string> texts_at(const json::value& value, std::initializer_list<const char*> keys) {
  std::vector<std::string> result;
  const json::value* found = at(value, keys);
  if (found && found->is_array())
    for (const json::value& item : found->get_array())
      if (item.is_string()) result.emplace_back(item.get_string());
  return result;
}

ContainerConfig config_of(const json::value& config) {
  ContainerConfig result;
  result.environment = texts_at(config, {"Env"});
  result.command = texts_at(config, {"Entrypoint"});
  for (std::string& word : texts_at(config, {"Cmd"})) result.command.push_back(std::move(word));
  result.directory = text_at(config, {"WorkingDir"});
  return result;
}

class Layout {
 public:
  explicit Layout(std::string folder) : folder_(std::move(folder)) {}

  Result<Fd> open(const std::string& file) const {
    Fd fd(::open((folder_ + "/" + file).c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC));
    if (!fd) return errno_error("image: " + file);
    return fd;
  }
  Result<json::value> document(const std::string& file) const {
    const auto fd = std::make_shared<const Fd>(TRY(open(file)));
    struct stat status {};
    if (::fstat(fd->get(), &status) != 0) return errno_error("image: " + file);
    const std::string text = TRY(read_text({fd, {}, 0, static_cast<uint64_t>(status.st_size)}, kLargestDocument));
    return parse(text, "image: " + file);
  }
  // skopeo has checked the contents against these digests.
  Result<std::string> blob(const json::value& descriptor) const {
    const std::string digest = text_at(descriptor, {"digest"});
    constexpr std::string_view prefix = "sha256:";
    if (!digest.starts_with(prefix) || digest.size() != prefix.size() + 64 ||
        digest.find_first_not_of("0123456789abcdef", prefix.size()) != digest.npos)
      return Error{"image: '" + digest.substr(0, 100) + "' is not a digest"};
    return "blobs/sha256/" + digest.substr(prefix.size());
  }

 private:
  std::string folder_;
};

Result<ContainerConfig> take_layout(const Context& context, const Layout& layout) {
  const json::value index = TRY(layout.document("index.json"));
  const json::value* manifests = at(index, {"manifests"});
  if (!manifests || !manifests->is_array() || manifests->get_array().size() != 1)
    return Error{"image: its index does not list exactly one manifest"};
  const std::string manifest_file = TRY(layout.blob(manifests->get_array()[0]));
  const json::value manifest = TRY(layout.document(manifest_file));
  const json::value* layers = at(manifest, {"layers"});
  if (!layers || !layers->is_array()) return Error{"image: its manifest lists no layers"};
  const size_t count = layers->get_array().size();
  if (count > 4096) return Error{"image: more than 4096 layers"};
  for (size_t number = 0; number < count; ++number) {
    const std::string what = "layer " + std::to_string(number + 1) + " of " + std::to_string(count);
    context.progress.stage("unpacking " + what);
    const std::string layer_file = TRY(layout.blob(layers->get_array()[number]));
    const Fd layer = TRY(layout.open(layer_file));
    context.tree.set_layer(static_cast<unsigned>(number + 1));
    ArchiveOptions options;
    options.whiteouts = Whiteouts::remove;
    options.on_bytes = [&context](uint64_t bytes) { context.progress.bytes(bytes, 0); };
    TRY(unpack(bytes_of(layer), context.tree, context.spool, options).context(what));
  }
  const json::value* descriptor = at(manifest, {"config"});
  if (!descriptor) return Error{"image: its manifest names no configuration"};
  const std::string config_file = TRY(layout.blob(*descriptor));
  const json::value config = TRY(layout.document(config_file));
  const json::value* inner = at(config, {"config"});
  return inner ? config_of(*inner) : ContainerConfig();
}

// The engine whose daemon answers, or an empty text.
std::string engine() {
  for (const char* name : {"docker", "podman"})
    if (!find_program(name).empty() && Process::output({name, "version", "--format", "{{.Server.Version}}"}).ok())
      return name;
  return {};
}

// A container that is never started, gone with the object.
class Container {
 public:
  Container(std::string program, std::string id) : engine_(std::move(program)), id_(std::move(id)) {}
  Container(const Container&) = delete;
  Container& operator=(const Container&) = delete;
  ~Container() {
    Process::Options options;
    options.ending = Ending::when_it_is_done;
    (void)Process::run({engine_, "rm", id_}, std::move(options)).ok();
  }
  const std::string& id() const { return id_; }

 private:
  std::string engine_;
  std::string id_;
};

Result<ContainerConfig> take_from_engine(const Context& context, const std::string& name,
                                         const std::string& reference) {
  context.progress.stage(name + ": " + reference);
  // An image without a command is not created without one; it is never run.
  std::string id = TRY(Process::output({name, "create", reference, "/"}));
  while (!id.empty() && (id.back() == '\n' || id.back() == '\r')) id.pop_back();
  id.erase(0, id.rfind('\n') + 1);
  const Container container(name, id);
  const std::string inspected =
      TRY(Process::output({name, "inspect", "--type", "image", "--format", "{{json .Config}}", reference}));
  Process process = TRY(Process::start({name, "export", container.id()}));
  ArchiveOptions options;
  options.on_bytes = [&context](uint64_t bytes) { context.progress.bytes(bytes, 0); };
  const Result<void> unpacked = unpack(bytes_of(process), context.tree, context.spool, options);
  if (!unpacked.ok() && unpacked.error().code != 0) return unpacked.error();
  TRY(process.finish());
  TRY(unpacked);
  TRY(context.tree.remove(".dockerenv"));  // by which programs tell that they are in a container
  return config_of(TRY(parse(inspected, name + " inspect")));
}

}  // namespace

Result<ContainerConfig> take_container(const Context& context, const std::string& reference, RegistryTls tls) {
  if (reference.empty() || reference.front() == '-') return Error{"'" + reference + "' is not an image"};
  bool has_transport = false;
  for (const char* transport : {"docker://", "oci:", "oci-archive:", "docker-archive:", "dir:"})
    has_transport |= reference.starts_with(transport);
  if (!has_transport && tls == RegistryTls::verify)
    if (const std::string name = engine(); !name.empty()) return take_from_engine(context, name, reference);

  const std::string source = has_transport ? reference : "docker://" + reference;
  context.progress.stage("skopeo: " + source);
  const std::string layout = context.work + "/layout";
  std::vector<std::string> command = {"skopeo"};
  // Without a policy file skopeo would refuse all images.
  const char* home = ::getenv("HOME");
  if (::access("/etc/containers/policy.json", R_OK) != 0 &&
      ::access((std::string(home ? home : "") + "/.config/containers/policy.json").c_str(), R_OK) != 0)
    command.push_back("--insecure-policy");
  command.insert(command.end(), {"--override-os", "linux", "--override-arch", "amd64", "copy"});
  if (tls == RegistryTls::insecure) command.push_back("--src-tls-verify=false");
  command.insert(command.end(), {source, "oci:" + layout + ":image"});
  Process::Options options{{"TMPDIR=" + context.work},
                           [&context](std::string_view line) { context.progress.detail(line); }};
  TRY(Process::run(command, options));
  return take_layout(context, Layout(layout));
}

}  // namespace rootfs
