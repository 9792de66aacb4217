// SPDX-License-Identifier: Apache-2.0
// Reads profiles with yaml-cpp, keeping line and column for messages.
#include "plan/profile.hpp"

#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <filesystem>
#include <set>

#include "util/mapping.hpp"

namespace vmm {
namespace {

class ProfileReader {
 public:
  ProfileReader(std::string path, std::string base_folder, const std::vector<Setting>& settings)
      : path_(std::move(path)), settings_(settings), base_folder_(std::move(base_folder)) {}

  void read(const YAML::Node& root) {
    if (!root.IsMap()) return mistake(root.Mark(), "a profile is a list of `key: value` lines");
    std::set<std::string> seen;
    for (const auto& entry : root) {
      const YAML::Mark mark = entry.first.Mark();
      if (!entry.first.IsScalar()) {
        mistake(mark, "a key must be a word");
        continue;
      }
      const std::string key = entry.first.Scalar();
      if (!seen.insert(key).second) mistake(mark, "key '" + key + "' is given twice");
      const auto setting = std::find_if(settings_.begin(), settings_.end(),
                                        [&](const Setting& candidate) { return candidate.name == key; });
      if (setting == settings_.end()) {
        mistake(mark, "unknown key '" + key + "'; allowed are " + known_keys());
      } else {
        read_setting(*setting, entry.second);
      }
    }
  }

  std::vector<GivenSetting> given;
  std::string mistakes;

 private:
  void mistake(const YAML::Mark& mark, const std::string& text) {
    mistakes += (mistakes.empty() ? "" : "\n") + where(mark) + ": " + text;
  }
  std::string where(const YAML::Mark& mark) const {
    return path_ + ":" + std::to_string(mark.line + 1) + ":" + std::to_string(mark.column + 1);
  }
  std::string known_keys() const {
    std::string keys;
    for (const Setting& setting : settings_) keys += (keys.empty() ? "" : ", ") + setting.name;
    return keys;
  }
  void add(const Setting& setting, const YAML::Mark& mark, std::string value) {
    given.push_back({&setting, std::move(value), {base_folder_, where(mark)}, where(mark) + ": " + setting.name});
  }

  void read_setting(const Setting& setting, const YAML::Node& node) {
    if (setting.kind == SettingKind::list && node.IsSequence()) {
      for (const auto& item : node) read_item(setting, item);
    } else {
      read_item(setting, node);
    }
  }

  // A scalar, or for a device and the like the form `name: {key: value}`.
  void read_item(const Setting& setting, const YAML::Node& node) {
    const bool named = setting.name == "device" || setting.name == "transport" || setting.name == "balloon-policy";
    if (node.IsScalar()) return add(setting, node.Mark(), node.Scalar());
    if (node.IsNull() && setting.kind == SettingKind::optional_value) return add(setting, node.Mark(), "");
    if (!named || !node.IsMap() || node.size() != 1)
      return mistake(
          node.Mark(),
          setting.name + ": " + (named ? "`NAME: {key: value, …}` or a text" : "a single value") + " is expected here");
    const auto entry = *node.begin();
    std::string value = quote_commas(entry.first.Scalar());
    if (!entry.second.IsMap() && !entry.second.IsNull())
      return mistake(entry.second.Mark(), "options of '" + entry.first.Scalar() + "' are a list of `key: value`");
    for (const auto& option : entry.second) {
      if (!option.first.IsScalar() || !option.second.IsScalar()) {
        mistake(option.first.Mark(), "an option is `key: value`, the value a single word or text");
        continue;
      }
      value += "," + quote_commas(option.first.Scalar()) + "=" + quote_commas(option.second.Scalar());
    }
    add(setting, node.Mark(), value);
  }

  std::string path_;
  const std::vector<Setting>& settings_;
  std::string base_folder_;
};

void write_named(YAML::Emitter& out, const std::string& name, const KeyValues& options) {
  out << YAML::BeginMap << YAML::Key << name << YAML::Value << YAML::Flow << YAML::BeginMap;
  for (const auto& [key, value] : options) out << YAML::Key << key << YAML::Value << value;
  out << YAML::EndMap << YAML::EndMap;
}

// The options that were given, paths resolved as they were checked.
KeyValues given_options(const PlannedDevice& planned, const OptionValues& checked) {
  KeyValues options;
  for (const auto& [key, value] : planned.options)
    for (uint32_t i = 0; i < checked.raw().count; ++i)
      if (key == checked.raw().values[i]->name) options.emplace_back(key, checked.raw().values[i]->text);
  return options;
}

}  // namespace

Result<std::vector<GivenSetting>> read_profile(const std::string& path, const std::vector<Setting>& settings) {
  const Mapping file = TRY(map_file(path).context("profile"));
  return parse_profile({reinterpret_cast<const char*>(file.data()), file.size_bytes()}, path,
                       std::filesystem::absolute(path).parent_path().string(), settings);
}

Result<std::vector<GivenSetting>> parse_profile(const std::string& text, const std::string& name,
                                                const std::string& folder, const std::vector<Setting>& settings) {
  constexpr size_t largest_bytes = 1 << 20;
  if (text.size() > largest_bytes) return Error{"profile: " + name + ": larger than 1 MiB"};
  ProfileReader reader(name, folder, settings);
  try {
    const YAML::Node root = YAML::Load(text);
    if (!root.IsNull()) reader.read(root);
  } catch (const YAML::Exception& exception) {
    return Error{name + ":" + std::to_string(exception.mark.line + 1) + ":" +
                 std::to_string(exception.mark.column + 1) + ": " + exception.msg};
  }
  if (!reader.mistakes.empty()) return Error{reader.mistakes};
  return std::move(reader.given);
}

std::string write_profile(const CheckedPlan& checked) {
  const Plan& plan = checked.plan;
  YAML::Emitter out;
  auto put = [&](const char* key, const std::string& value) {
    if (!value.empty()) out << YAML::Key << key << YAML::Value << value;
  };
  out << YAML::BeginMap;
  put("kernel", plan.kernel);
  put("initrd", plan.initrd);
  put("cmdline", plan.command_line);
  put("modules", plan.modules);
  put("init", plan.init);
  put("boot-protocol", plan.protocol == BootProtocol::automatic ? "auto"
                       : plan.protocol == BootProtocol::linux64 ? "linux64"
                                                                : "pvh");
  put("mem", plan.memory.size_bytes % (1 << 20) == 0 ? format_size(plan.memory.size_bytes)
                                                     : std::to_string(plan.memory.size_bytes >> 10) + "K");
  put("mem-backing", plan.memory.backing == MemoryBacking::memfd ? "memfd" : "anonymous");
  static constexpr const char* huge_pages[] = {"off", "kernel", "transparent", "2M"};
  put("huge-pages", huge_pages[static_cast<size_t>(plan.memory.huge_pages)]);
  put("ksm", plan.memory.mergeable ? "on" : "off");
  put("vcpus", std::to_string(plan.vcpus));
  put("no-reboot", plan.on_reboot == OnReboot::exit ? "on" : "off");
  put("grace", std::to_string(plan.grace_ms / 1000));
  if (!plan.name.empty()) put("name", plan.name);
  if (!plan.control) put("no-control", "on");
  out << YAML::Key << "transport" << YAML::Value;
  write_named(out, plan.transport.type, given_options(plan.transport, checked.transport_options));
  out << YAML::Key << "balloon-policy" << YAML::Value;
  if (checked.balloon_policy)
    write_named(out, plan.balloon_policy.type, given_options(plan.balloon_policy, checked.balloon_policy_options));
  else
    out << kNoBalloonPolicy;
  if (!plan.devices.empty()) {
    out << YAML::Key << "device" << YAML::Value << YAML::BeginSeq;
    for (size_t i = 0; i < plan.devices.size(); ++i)
      write_named(out, plan.devices[i].type, given_options(plan.devices[i], checked.devices[i].options));
    out << YAML::EndSeq;
  }
  if (!plan.without.empty()) out << YAML::Key << "without" << YAML::Value << plan.without;
  out << YAML::EndMap;
  return std::string(out.c_str()) + "\n";
}

}  // namespace vmm
