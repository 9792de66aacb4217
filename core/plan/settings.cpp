// SPDX-License-Identifier: Apache-2.0
// The table of settings.
#include "plan/settings.hpp"

#include <algorithm>
#include <filesystem>

namespace vmm {
namespace {

using Apply = decltype(Setting::apply);

Apply text(std::string Plan::*member) {
  return [member](Plan& plan, const std::string& value, const SettingSource&) -> Result<void> {
    plan.*member = value;
    return {};
  };
}

std::string resolve(const std::string& value, const SettingSource& source) {
  if (source.base_folder.empty()) return value;
  return (std::filesystem::path(source.base_folder) / value).lexically_normal().string();
}

Apply path(std::string Plan::*member) {
  return [member](Plan& plan, const std::string& value, const SettingSource& source) -> Result<void> {
    if (value.empty()) return Error{"'' is not a path"};
    plan.*member = resolve(value, source);
    return {};
  };
}

template <typename T>
Apply choice(std::vector<std::pair<std::string, T>> choices, std::function<void(Plan&, T)> set) {
  return [choices = std::move(choices), set = std::move(set)](Plan& plan, const std::string& value,
                                                              const SettingSource&) -> Result<void> {
    std::string allowed;
    for (const auto& [name, meaning] : choices) {
      if (name == value) {
        set(plan, meaning);
        return {};
      }
      allowed += (allowed.empty() ? "" : ", ") + name;
    }
    return Error{"'" + value + "' given; allowed are " + allowed};
  };
}

Apply on_off(std::function<void(Plan&, bool)> set) {
  return choice<bool>({{"on", true}, {"off", false}, {"true", true}, {"false", false}, {"yes", true}, {"no", false}},
                      std::move(set));
}

// A size in bytes, where a bare number counts in `unit_bytes`.
Result<uint64_t> size_in(const std::string& value, uint64_t unit_bytes) {
  uint64_t bytes = TRY(parse_number(value, NumberKind::bytes));
  const bool bare = !value.empty() && value.back() >= '0' && value.back() <= '9';
  if (bare && __builtin_mul_overflow(bytes, unit_bytes, &bytes)) return Error{"'" + value + "' is too large"};
  return bytes;
}

Result<void> set_memory(Plan& plan, const std::string& value, const SettingSource&) {
  constexpr uint64_t least = 16ull << 20, most = 1ull << 40;
  auto bytes = size_in(value, 1ull << 20);
  if (!bytes.ok() || *bytes < least || *bytes > most || *bytes % kPageSize != 0)
    return Error{"'" + value +
                 "' given; allowed is a size from 16M to 1T in steps of 4K (a bare number counts in MiB)"};
  plan.memory.size_bytes = *bytes;
  return {};
}

Apply number(uint64_t least, uint64_t most, std::function<void(Plan&, uint64_t)> set) {
  return [=](Plan& plan, const std::string& value, const SettingSource&) -> Result<void> {
    auto parsed = parse_number(value, NumberKind::plain);
    if (!parsed.ok() || *parsed < least || *parsed > most)
      return Error{"'" + value + "' given; allowed is a number from " + std::to_string(least) + " to " +
                   std::to_string(most)};
    set(plan, *parsed);
    return {};
  };
}

Result<void> add_device(Plan& plan, const std::string& value, const SettingSource& source) {
  NamedOptions named = TRY(parse_named_options(value));
  plan.devices.push_back({std::move(named.name), std::move(named.options), source.base_folder, source.position});
  return {};
}

// One thing of its kind, with options.
Apply named(PlannedDevice Plan::*member) {
  return [member](Plan& plan, const std::string& value, const SettingSource& source) -> Result<void> {
    NamedOptions named = TRY(parse_named_options(value));
    plan.*member = {std::move(named.name), std::move(named.options), source.base_folder, source.position};
    return {};
  };
}

std::vector<Setting> core_settings() {
  using enum SettingKind;
  return {
      {"kernel", "FILE", "Boot", "Kernel to boot: a bzImage (as distributions ship it) or an ELF vmlinux.", value,
       path(&Plan::kernel)},
      {"initrd", "FILE", "Boot", "Your own initial RAM disk; none is generated then.", value, path(&Plan::initrd)},
      {"cmdline", "TEXT", "Boot", "Added to the end of the kernel's command line.", value, text(&Plan::command_line)},
      {"modules", "DIR", "Boot", "Where the kernel's modules are (default: /lib/modules).", value,
       path(&Plan::modules)},
      {"init", "PATH", "Boot", "Program of the guest that the generated initrd starts (default: /sbin/init).", value,
       text(&Plan::init)},
      {"boot-protocol", "NAME", "Boot", "auto, linux64 or pvh (default: auto, by what the kernel offers).", value,
       choice<BootProtocol>(
           {{"auto", BootProtocol::automatic}, {"linux64", BootProtocol::linux64}, {"pvh", BootProtocol::pvh}},
           [](Plan& plan, BootProtocol protocol) { plan.protocol = protocol; })},
      {"mem", "SIZE", "Machine", "Memory, e.g. 512M or 2G; a bare number counts in MiB (default: 512M).", value,
       set_memory},
      {"mem-backing", "KIND", "Machine", "anonymous or memfd (default: anonymous).", value,
       choice<MemoryBacking>({{"anonymous", MemoryBacking::anonymous}, {"memfd", MemoryBacking::memfd}},
                             [](Plan& plan, MemoryBacking backing) { plan.memory.backing = backing; })},
      {"huge-pages", "KIND", "Machine",
       "off, kernel (where the kernel is loaded), transparent (everywhere), or 2M from the host's reserved pool "
       "(default: kernel).",
       value,
       choice<HugePages>({{"off", HugePages::off},
                          {"kernel", HugePages::kernel},
                          {"transparent", HugePages::transparent},
                          {"2M", HugePages::reserved_2m}},
                         [](Plan& plan, HugePages pages) { plan.memory.huge_pages = pages; })},
      {"ksm", "on|off", "Machine", "Let the host merge identical pages of this VM (default: on).", value,
       on_off([](Plan& plan, bool on) { plan.memory.mergeable = on; })},
      {"vcpus", "N", "Machine", "Virtual processors, 1 to 32 (default: 1).", value,
       number(1, 32, [](Plan& plan, uint64_t count) { plan.vcpus = static_cast<uint32_t>(count); })},
      {"no-reboot", "", "Machine", "Exit (status 3) instead of starting again when the guest reboots or panics.",
       toggle, on_off([](Plan& plan, bool on) { plan.on_reboot = on ? OnReboot::exit : OnReboot::again; })},
      {"grace", "SECONDS", "Machine", "How long a guest may take to power off after SIGTERM or SIGINT (default: 10).",
       value, number(0, 3600, [](Plan& plan, uint64_t seconds) { plan.grace_ms = seconds * 1000; })},
      {"name", "NAME", "Machine", "What `clone list` and --vm-id call this VM (default: its id).", value,
       text(&Plan::name)},
      {"no-control", "", "Machine", "No control socket: list, exec, attach and the like do not find this VM.", toggle,
       on_off([](Plan& plan, bool on) { plan.control = !on; })},
      {"transport", "NAME[,KEY=VALUE...]", "Devices", "How virtio devices appear to the guest (default: mmio).", value,
       named(&Plan::transport)},
      {"balloon-policy", "NAME[,KEY=VALUE...]", "Devices",
       "What decides how much memory an idle VM gives back; none for nothing, NAME,help prints options (default: "
       "hysteresis, where it is installed).",
       value, named(&Plan::balloon_policy)},
      {"device", "NAME[,KEY=VALUE...]", "Devices",
       "Add a device; NAME,help prints its options. `clone plugin list` shows what there is.", list, add_device, false,
       true},
      {"without", "NAME", "Devices", "Leave out a device that every machine has by default.", list,
       [](Plan& plan, const std::string& value, const SettingSource&) -> Result<void> {
         plan.without.push_back(value);
         return {};
       }},
  };
}

bool is_default_device(const std::string& name, const Catalogue& catalogue) {
  for (const PluginFile& file : catalogue.files())
    for (const Provided& provided : file.manifest.provides)
      if (provided.kind == "device" && provided.name == name && provided.by_default) return true;
  return false;
}

// `--rootfs FILE[,key=value…]`: the '%' of the expansion is FILE, the rest follows as it is.
Setting short_form(const ShortFlag& flag, const Catalogue& catalogue) {
  Setting setting;
  setting.sets_default_device = is_default_device(flag.device, catalogue);
  setting.adds_device = !setting.sets_default_device;
  setting.name = flag.flag.substr(2);
  setting.value_name = flag.value_name + (flag.value_is_optional ? "" : "[,KEY=VALUE...]");
  setting.group = "Devices";
  setting.help = flag.help;
  // A second --block is a second disk; whether a second --rootfs makes sense is the device's to say.
  setting.kind = flag.value_is_optional ? SettingKind::optional_value : SettingKind::list;
  setting.apply = [flag](Plan& plan, const std::string& value, const SettingSource& source) -> Result<void> {
    // A value that was left out leaves its option at the device's default.
    const bool left_out = flag.value_is_optional && value.empty();
    const NamedOptions given = left_out ? NamedOptions() : TRY(parse_named_options(value));
    NamedOptions device = TRY(parse_named_options(flag.device + (flag.expansion.empty() ? "" : "," + flag.expansion)));
    if (left_out) std::erase_if(device.options, [](const auto& option) { return option.second == "%"; });
    for (auto& [key, expanded] : device.options)
      if (expanded == "%") expanded = given.name;
    for (auto& [key, extra] : given.options) {
      std::erase_if(device.options, [&](const auto& option) { return option.first == key; });
      device.options.emplace_back(key, extra);
    }
    plan.devices.push_back({std::move(device.name), std::move(device.options), source.base_folder, source.position});
    return {};
  };
  return setting;
}

// As they stand on the command line: "on" may be written in other ways.
bool same_value(std::string_view a, std::string_view b) {
  auto is_on = [](std::string_view value) {
    return value == "on" || value == "yes" || value == "true" || value == "1";
  };
  return a == b || (is_on(a) && is_on(b));
}

bool has_all(const KeyValues& options, const KeyValues& wanted) {
  return std::all_of(wanted.begin(), wanted.end(), [&](const auto& one) {
    return std::any_of(options.begin(), options.end(), [&](const auto& option) {
      return option.first == one.first && same_value(option.second, one.second);
    });
  });
}

// How a user gets the device that a flag is about: "--rootfs FILE or --device NAME,root=on".
std::string ways_to_get(const FlagOption& flag, const Manifest& manifest) {
  std::string ways;
  for (const ShortFlag& maker : manifest.flags) {
    const auto made = parse_named_options(maker.device + (maker.expansion.empty() ? "" : "," + maker.expansion));
    if (made.ok() && made->name == flag.device && has_all(made->options, flag.which))
      ways += maker.flag + " " + maker.value_name + " or ";
  }
  ways += "--device " + flag.device;
  for (const auto& [key, value] : flag.which) ways += "," + key + "=" + value;
  return ways;
}

// A flag for an option of a device that another flag makes, on whichever side of that one it stands.
Setting option_form(const FlagOption& flag, const Manifest& manifest) {
  Setting setting;
  setting.name = flag.flag.substr(2);
  setting.value_name = flag.value_name;
  setting.group = "Devices";
  setting.help = flag.help;
  setting.kind = flag.value_is_optional ? SettingKind::optional_value : SettingKind::value;
  setting.changes_devices = true;
  setting.apply = [flag, ways = ways_to_get(flag, manifest)](Plan& plan, const std::string& value,
                                                             const SettingSource& source) -> Result<void> {
    bool found = false;
    for (PlannedDevice& device : plan.devices) {
      if (device.type != flag.device || !has_all(device.options, flag.which)) continue;
      found = true;
      const auto is_it = [&](const auto& option) { return option.first == flag.option; };
      // The command line wins over a profile, whichever way it says it.
      const bool from_profile = !source.position.empty(), device_from_profile = !device.where.empty();
      if (from_profile && !device_from_profile && std::any_of(device.options.begin(), device.options.end(), is_it))
        continue;
      std::erase_if(device.options, is_it);
      device.options.emplace_back(flag.option, value.empty() && flag.value_is_optional ? flag.left_out : value);
      device.option_folders[flag.option] = source.base_folder;
    }
    if (!found) return Error{"needs " + ways};
    return {};
  };
  return setting;
}

}  // namespace

std::vector<Setting> all_settings(const Catalogue& catalogue) {
  std::vector<Setting> settings = core_settings();
  auto add = [&](Setting setting) {
    const bool taken =
        std::any_of(settings.begin(), settings.end(), [&](const Setting& other) { return other.name == setting.name; });
    if (!taken) settings.push_back(std::move(setting));
  };
  for (const PluginFile& file : catalogue.files()) {
    for (const ShortFlag& flag : file.manifest.flags) add(short_form(flag, catalogue));
    for (const FlagOption& flag : file.manifest.flag_options) add(option_form(flag, file.manifest));
  }
  return settings;
}

Result<Plan> make_plan(const std::vector<GivenSetting>& profile, const std::vector<GivenSetting>& command_line) {
  Plan plan;
  std::string mistakes;
  auto apply = [&](const GivenSetting& given) {
    auto result = given.setting->apply(plan, given.value, given.source);
    if (!result.ok()) mistakes += (mistakes.empty() ? "" : "\n") + given.where + ": " + result.error().message;
  };
  // Of a list, `device` adds up; a short form on the command line replaces the profile's of that name.
  auto overridden = [&](const GivenSetting& given) {
    if (given.setting->name == "device" || given.setting->name == "without") return false;
    return std::any_of(command_line.begin(), command_line.end(),
                       [&](const GivenSetting& other) { return other.setting == given.setting; });
  };
  for (const bool changes_devices : {false, true}) {
    for (const GivenSetting& given : profile)
      if (given.setting->changes_devices == changes_devices && !overridden(given)) apply(given);
    for (const GivenSetting& given : command_line)
      if (given.setting->changes_devices == changes_devices) apply(given);
  }
  if (!mistakes.empty()) return Error{mistakes};
  return plan;
}

}  // namespace vmm
