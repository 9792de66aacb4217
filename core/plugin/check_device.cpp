// SPDX-License-Identifier: Apache-2.0
// The rules for every device and transport: its tables, its life, its options, its state, what it gives back.
#include <dirent.h>
#include <unistd.h>

#include <algorithm>
#include <set>
#include <thread>

#include "clone/abi/boot_arguments.h"
#include "clone/abi/boot_root.h"
#include "plugin/check_subject.hpp"

namespace vmm {
namespace {

constexpr unsigned kAccesses = 4000;

Verdict verdict_of(const Outcome& outcome) { return Verdict::when(outcome.ok(), outcome.text()); }

// An instance that is configured, or else the phase has nothing to check: what is wrong then, the life phase tells.
bool set_up(CheckRecorder& recorder, const std::string& what, const CheckSubject& subject, CheckStage& stage) {
  bool there = false;
  recorder.rule(what, [&] {
    const Outcome outcome = CheckStage::set_up(subject, stage);
    there = outcome.ok();
    if (!there && outcome.is_the_hosts()) return Verdict::skipped(outcome.text());
    return verdict_of(outcome);
  });
  return there;
}

// --- descriptions

bool is_name(std::string_view name) {
  return !name.empty() && name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789-_") == std::string_view::npos;
}

Verdict check_help(const char* help) {
  if (!help || !*help) return Verdict::failed("there is no help");
  const std::string_view text = help;
  if (text.find_first_of("\n\r\t") != std::string_view::npos) return Verdict::failed("it is not one line");
  if (text.back() != '.') return Verdict::failed("it does not end in a full stop: " + std::string(text));
  for (size_t i = 0; i + 2 < text.size(); ++i)
    if (text.substr(i, 2) == ". " && text[i + 2] >= 'A' && text[i + 2] <= 'Z')
      return Verdict::failed("it is more than one sentence: " + std::string(text));
  return {};
}

std::string choices_mistake(const clone_option& option) {
  std::set<std::string> seen;
  std::string rest = option.choices ? option.choices : "";
  for (size_t end = 0; end != std::string::npos; rest.erase(0, end == std::string::npos ? end : end + 1)) {
    end = rest.find('|');
    const std::string choice = rest.substr(0, end);
    if (choice.empty()) return "a choice is empty";
    if (!seen.insert(choice).second) return "choice '" + choice + "' is there twice";
  }
  return {};
}

std::string option_mistake(const clone_option& option) {
  if (option.type < CLONE_OPTION_TEXT || option.type > CLONE_OPTION_CHOICE)
    return "type " + std::to_string(option.type) + " is unknown";
  if (option.flags & ~(CLONE_OPTION_REQUIRED | CLONE_OPTION_SECRET)) return "its flags are unknown";
  if (const Verdict help = check_help(option.help); help.kind == CheckVerdict::failed) return "help: " + help.detail;
  if (option.maximum != 0 && option.minimum > option.maximum) return "its range is empty";
  if ((option.flags & CLONE_OPTION_REQUIRED) && option.default_value) return "it is required and has a default";
  if (option.type == CLONE_OPTION_CHOICE || (option.type == CLONE_OPTION_PATH && option.choices))
    return choices_mistake(option);
  return {};
}

Verdict check_option_table(const clone_descriptor& descriptor) {
  std::set<std::string> names;
  for (const clone_option* const* row = descriptor.options; *row; ++row) {
    const clone_option option = copy_table(*row);
    if (!option.name || !is_name(option.name)) return Verdict::failed("an option has no proper name");
    if (std::string(option.name) == "help") return Verdict::failed("an option is called help, which is the host's");
    if (!names.insert(option.name).second) return Verdict::failed(std::string(option.name) + " is there twice");
    if (const std::string mistake = option_mistake(option); !mistake.empty())
      return Verdict::failed(std::string(option.name) + ": " + mistake);
  }
  return {};
}

Verdict check_flags(const CheckSubject& subject) {
  for (const ShortFlag& flag : subject.file.manifest.flags) {
    if (flag.device != subject.provided.name) continue;
    auto named = parse_named_options(flag.device + (flag.expansion.empty() ? "" : "," + flag.expansion));
    if (!named.ok()) return Verdict::failed(flag.flag + ": " + named.error().message);
    KeyValues values = sample_options(subject, SamplePath::file);
    for (auto& [key, value] : named->options) {
      // A sample of what the user would write for it.
      if (value == "%")
        for (const clone_option* const* row = subject.type.descriptor.options; *row; ++row)
          if (key == (*row)->name) {
            CheckSubject sample = subject;
            clone_option asked = **row;
            asked.flags |= CLONE_OPTION_REQUIRED;
            asked.default_value = nullptr;
            const clone_option* const table[] = {&asked, nullptr};
            sample.type.descriptor.options = table;
            sample.chosen.clear();
            value = sample_options(sample, SamplePath::file).front().second;
          }
      std::erase_if(values, [&](const auto& other) { return other.first == key; });
      values.emplace_back(key, value);
    }
    if (auto checked = OptionValues::check(subject.type.descriptor, values); !checked.ok())
      return Verdict::failed(flag.flag + ": " + checked.error().message);
  }
  for (const FlagOption& flag : subject.file.manifest.flag_options) {
    if (flag.device != subject.provided.name) continue;
    KeyValues values = sample_options(subject, SamplePath::file);
    KeyValues set = flag.which;
    set.emplace_back(flag.option, flag.left_out);
    const bool known = std::all_of(set.begin(), set.end(), [&](const auto& option) {
      for (const clone_option* const* row = subject.type.descriptor.options; *row; ++row)
        if (option.first == (*row)->name) return true;
      return false;
    });
    if (!known) return Verdict::failed(flag.flag + ": its option, or that which it asks for, is not in the table");
    if (!flag.value_is_optional) set.pop_back();
    for (const auto& [key, value] : set) {
      std::erase_if(values, [&key = key](const auto& other) { return other.first == key; });
      values.emplace_back(key, value);
    }
    if (auto checked = OptionValues::check(subject.type.descriptor, values); !checked.ok())
      return Verdict::failed(flag.flag + ": " + checked.error().message);
  }
  return {};
}

}  // namespace

void check_description(CheckRecorder& recorder, const CheckSubject& subject) {
  const clone_descriptor& descriptor = subject.type.descriptor;
  recorder.rule("its help is one sentence", [&] { return check_help(descriptor.help); });
  recorder.rule("its capabilities are known", [&] {
    constexpr uint32_t known = CLONE_CAN_SAVE | CLONE_CAN_MIGRATE | CLONE_NEEDS_PCI | CLONE_NEEDS_VHOST;
    if ((descriptor.capabilities & CLONE_CAN_MIGRATE) && !(descriptor.capabilities & CLONE_CAN_SAVE))
      return Verdict::failed("it can migrate but not save");
    return Verdict::when(!(descriptor.capabilities & ~known) || subject.file.manifest.abi_minor > CLONE_ABI_MINOR,
                         "unknown bits are set");
  });
  recorder.rule("its guest modules are names, separated by blanks", [&] {
    if (!descriptor.guest_modules) return Verdict::failed("the pointer is NULL: \"\" is none");
    const std::string_view modules = descriptor.guest_modules;
    return Verdict::when(
        modules.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_ ") ==
            std::string_view::npos,
        descriptor.guest_modules);
  });
  if (!recorder.rule("its options are well described", [&] { return check_option_table(descriptor); })) return;
  recorder.rule("its defaults pass its own check", [&] {
    auto values = OptionValues::check(descriptor, sample_options(subject, SamplePath::file));
    return Verdict::when(values.ok(), values.ok() ? "" : values.error().message);
  });
  recorder.rule("its short flags stand for options that it has", [&] { return check_flags(subject); });
}

// --- life

void check_life(CheckRecorder& recorder, const CheckSubject& subject) {
  recorder.rule("is created and destroyed without being configured", [&] {
    const auto bench = make_bench();
    CheckInstance instance(subject, *bench, "unconfigured.0");
    return verdict_of(instance.create());
  });
  recorder.rule("create calls nothing of the host but its log", [&] {
    const auto bench = make_bench();
    CheckInstance instance(subject, *bench, "unconfigured.0");
    instance.create();
    return Verdict::when(bench->service_calls() == 0, std::to_string(bench->service_calls()) + " calls");
  });
  recorder.rule("an extension that it cannot know is answered with NULL", [&] {
    const auto bench = make_bench();
    CheckInstance instance(subject, *bench, "unconfigured.0");
    if (const Outcome created = instance.create(); !created.ok()) return verdict_of(created);
    for (const char* id : {"", "clone.unheard-of/1", "clone.virtio-device/4294967295"})
      if (instance.raw_extension(id)) return Verdict::failed("'" + std::string(id) + "' is answered with a table");
    return Verdict();
  });
  const auto wants_path = [&] {
    for (const clone_option* const* row = subject.type.descriptor.options; *row; ++row)
      if ((*row)->type == CLONE_OPTION_PATH && ((*row)->flags & CLONE_OPTION_REQUIRED)) return true;
    return false;
  };
  if (wants_path() && subject.chosen.empty())
    recorder.rule("a path that does not exist is refused with a message", [&] {
      const auto bench = make_bench();
      CheckInstance instance(subject, *bench, subject.provided.name + ".0");
      const auto values = OptionValues::check(subject.type.descriptor, sample_options(subject, SamplePath::missing));
      if (!values.ok()) return Verdict::failed(values.error().message);
      if (const Outcome created = instance.create(); !created.ok()) return verdict_of(created);
      const Outcome outcome = instance.configure(values->raw());
      if (outcome.ok()) return Verdict::failed("configure succeeded");
      return Verdict::when(!outcome.message.empty() && outcome.message.find('\n') == std::string::npos,
                           "the message is not one line: '" + outcome.message + "'");
    });

  CheckStage stage;
  if (!set_up(recorder,
              subject.is_transport() ? "is configured with its defaults, and a device attached"
                                     : "is configured with its defaults",
              subject, stage))
    return;
  CheckInstance& instance = *stage.instance;
  if (subject.is_transport())
    recorder.rule("attach makes the device known to the guest", [&] {
      return Verdict::when(stage.bench->claim_count() + stage.bench->acpi_nodes.size() != 0,
                           "nothing was claimed or described");
    });
  if (const auto table = instance.extension<clone_boot_root>(CLONE_BOOT_ROOT))
    recorder.rule("clone.boot-root/1 describes a root, or says that it is none", [&] {
      if (!table->describe) return Verdict::failed("it has no describe function");
      clone_boot_root_info info{sizeof info, 0, nullptr, nullptr, nullptr, ""};
      clone_err err{sizeof err, 0, {}};
      const clone_status status = table->describe(instance.device(), &info, &err);
      if (status == CLONE_EMPTY) return Verdict();
      if (status != CLONE_OK) return Verdict::failed(err.message);
      if (!info.source || !info.file_system || !info.guest_modules) return Verdict::failed("a string is NULL");
      if (!info.overlay || (*info.overlay && std::string_view(info.overlay) != "tmpfs"))
        return Verdict::failed("overlay is neither \"\" nor \"tmpfs\"");
      const std::string_view source = info.source;
      return Verdict::when(source.starts_with("serial:") || source.starts_with("/dev/") || source.starts_with("tag:"),
                           "source '" + std::string(source) + "' is none of serial:…, /dev/…, tag:…");
    });
  if (const auto table = instance.extension<clone_boot_arguments>(CLONE_BOOT_ARGUMENTS))
    recorder.rule("clone.boot-arguments/1 gives a line of arguments", [&] {
      const char* arguments = table->arguments ? table->arguments(instance.device()) : nullptr;
      if (!arguments) return Verdict::failed("it is NULL: \"\" is none");
      return Verdict::when(!std::strpbrk(arguments, "\n\r\t") && std::strlen(arguments) < 1024, arguments);
    });
  if (!recorder.rule("starts", [&] { return verdict_of(instance.start()); })) return;
  if (!recorder.rule("is quiesced, resumed and quiesced again", [&] {
        for (const Outcome& outcome : {instance.quiesce(), instance.resume(), instance.quiesce()})
          if (!outcome.ok()) return verdict_of(outcome);
        return Verdict();
      }))
    return;
  if (!subject.can_save())
    recorder.rule("save without CLONE_CAN_SAVE answers CLONE_ERR_UNSUPPORTED", [&] {
      CheckState state;
      const Outcome outcome = instance.save(state);
      return Verdict::when(outcome.status == CLONE_ERR_UNSUPPORTED, "status " + std::to_string(outcome.status));
    });
  recorder.rule("is reset, and works again", [&] {
    CheckRandom random(1);
    for (const Outcome& outcome : {instance.reset(), instance.resume()})
      if (!outcome.ok()) return verdict_of(outcome);
    exercise_claims(*stage.bench, stage.dummy.get(), random, 100);
    for (const Outcome& outcome : {instance.quiesce(), instance.reset(), instance.reset(), instance.resume()})
      if (!outcome.ok()) return verdict_of(outcome);
    return Verdict();
  });
  recorder.rule("asks the host for nothing that the interface forbids", [&] {
    instance.destroy();
    const auto misuses = stage.bench->misuses();
    return Verdict::when(misuses.empty(), misuses.empty() ? "" : "it " + misuses.front());
  });
}

// --- options

void check_options(CheckRecorder& recorder, const CheckSubject& subject) {
  recorder.rule("hostile option values are survived", [&] {
    CheckRandom random(2);
    unsigned accepted = 0;
    for (int round = 0; round < 150; ++round) {
      KeyValues values = sample_options(subject, round % 2 ? SamplePath::file : SamplePath::folder);
      for (const clone_option* const* row = subject.type.descriptor.options; *row; ++row) {
        const clone_option& option = **row;
        if (random.one_in(2)) continue;
        std::string text;
        switch (option.type) {
          case CLONE_OPTION_BOOL:
            text = random.one_in(2) ? "on" : "off";
            break;
          case CLONE_OPTION_NUMBER:
          case CLONE_OPTION_SIZE: {
            const uint64_t most = option.maximum ? option.maximum : ~uint64_t{0};
            const uint64_t range = most - option.minimum;
            // Large sizes would be honest requests for memory.
            const uint64_t number =
                option.minimum + (random.one_in(3)   ? 0
                                  : random.one_in(2) ? std::min<uint64_t>(range, 1 << 20)
                                                     : random.next() % (std::min<uint64_t>(range, 1 << 20) + 1));
            text = std::to_string(number);
            break;
          }
          case CLONE_OPTION_CHOICE: {
            std::vector<std::string> choices(1);
            for (const char* at = option.choices; *at; ++at)
              if (*at == '|')
                choices.emplace_back();
              else
                choices.back() += *at;
            text = choices[random.below(choices.size())];
            break;
          }
          case CLONE_OPTION_PATH: {
            // Inside of the check's own folder, whatever the plugin does with it.
            const std::string names[] = {subject.folder.file(), subject.folder.folder(), subject.folder.missing(),
                                         subject.folder.path + "/" + std::string(random.below(300), 'x'), ""};
            text = names[random.below(std::size(names))];
            break;
          }
          default: {
            const uint64_t most = std::min<uint64_t>(option.maximum ? option.maximum : 4096, 4096);
            text.resize(random.one_in(4) ? most : random.below(std::min<uint64_t>(most, 40) + 1));
            for (char& c : text)
              c = static_cast<char>(random.one_in(3) ? 1 + random.below(255) : ' ' + random.below(95));
            // Not a path out of the folder.
            std::replace(text.begin(), text.end(), '/', random.one_in(2) ? ':' : '%');
            break;
          }
        }
        std::erase_if(values, [&](const auto& value) { return value.first == option.name; });
        values.emplace_back(option.name, text);
      }
      const auto checked = OptionValues::check(subject.type.descriptor, values);
      if (!checked.ok()) continue;
      const auto bench = make_bench();
      CheckInstance instance(subject, *bench, subject.provided.name + ".0");
      if (const Outcome created = instance.create(); !created.ok()) return verdict_of(created);
      const Outcome outcome = instance.configure(checked->raw());
      if (!outcome.ok() && outcome.message.empty())
        return Verdict::failed("configure refused something without a message");
      if (!outcome.ok()) continue;
      ++accepted;
      instance.start();
      exercise_claims(*bench, nullptr, random, 50);
    }
    return Verdict();
  });
}

// --- the guest's accesses

void check_accesses(CheckRecorder& recorder, const CheckSubject& subject) {
  CheckStage stage;
  if (!set_up(recorder, "is configured for the guest's accesses", subject, stage)) return;
  if (!stage.instance->start().ok() || stage.bench->claim_count() == 0) return;
  recorder.rule("random reads and writes of its registers are survived", [&] {
    CheckRandom random(3);
    exercise_claims(*stage.bench, stage.dummy.get(), random, kAccesses * 5);
    return Verdict();
  });
  recorder.rule("accesses of several vCPUs at once are survived", [&] {
    auto vcpu = [&](uint64_t seed) {
      CheckRandom random(seed);
      const auto ranges = stage.bench->claimed_ranges();
      for (unsigned i = 0; i < kAccesses && !ranges.empty(); ++i) {
        const auto& range = ranges[random.below(ranges.size())];
        const uint32_t size_bytes = static_cast<uint32_t>(std::min<uint64_t>(range.size_bytes, 1u << random.below(3)));
        const uint64_t offset = random.below(range.size_bytes / size_bytes) * size_bytes;
        uint64_t value = random.next() & (random.one_in(2) ? 0xf : ~uint64_t{0});
        if (random.one_in(2))
          stage.bench->bus_read(range.space, range.start + offset, &value, size_bytes == 3 ? 2 : size_bytes);
        else
          stage.bench->bus_write(range.space, range.start + offset, &value, size_bytes == 3 ? 2 : size_bytes);
      }
    };
    std::thread other(vcpu, 4);
    vcpu(5);
    other.join();
    stage.bench->run_main_loop();
    return Verdict();
  });
  recorder.rule("is reset and destroyed after that", [&] {
    for (const Outcome& outcome : {stage.instance->quiesce(), stage.instance->reset(), stage.instance->resume()})
      if (!outcome.ok()) return verdict_of(outcome);
    if (stage.dummy && stage.dummy->active())
      return Verdict::failed("the attached device is still active after the reset");
    stage.instance->destroy();
    return Verdict();
  });
}

// --- state

void check_state(CheckRecorder& recorder, const CheckSubject& subject) {
  if (!subject.can_save()) return;
  CheckState first;
  {
    CheckStage stage;
    if (!set_up(recorder, "is configured to be saved", subject, stage)) return;
    CheckRandom random(6);
    if (!recorder.rule("saves its state", [&] {
          if (const Outcome started = stage.instance->start(); !started.ok()) return verdict_of(started);
          exercise_claims(*stage.bench, stage.dummy.get(), random, 500);
          if (const Outcome quiesced = stage.instance->quiesce(); !quiesced.ok()) return verdict_of(quiesced);
          return verdict_of(stage.instance->save(first));
        }))
      return;
    recorder.rule("saves the same bytes the second time", [&] {
      CheckState second;
      if (const Outcome saved = stage.instance->save(second); !saved.ok()) return verdict_of(saved);
      const std::string difference = first.difference(second);
      return Verdict::when(difference.empty(), difference);
    });
    recorder.rule("resumes after it was saved", [&] { return verdict_of(stage.instance->resume()); });
  }
  CheckStage stage;
  if (!set_up(recorder, "a second instance is configured to be loaded", subject, stage)) return;
  if (!recorder.rule("loads what the first saved", [&] { return verdict_of(stage.instance->load(first)); })) return;
  recorder.rule("saves the same bytes that it loaded", [&] {
    CheckState again;
    if (const Outcome saved = stage.instance->save(again); !saved.ok()) return verdict_of(saved);
    const std::string difference = first.difference(again);
    return Verdict::when(difference.empty(), difference);
  });
  recorder.rule("starts after it was loaded, and is saved again", [&] {
    for (const Outcome& outcome : {stage.instance->start(), stage.instance->quiesce()})
      if (!outcome.ok()) return verdict_of(outcome);
    CheckState later;
    return verdict_of(stage.instance->save(later));
  });
}

void check_hostile_state(CheckRecorder& recorder, const CheckSubject& subject) {
  if (!subject.can_save()) return;
  CheckState good;
  CheckStage stage;
  if (!set_up(recorder, "is configured to load what is damaged", subject, stage)) return;
  CheckRandom random(7);
  if (!stage.instance->start().ok()) return;
  exercise_claims(*stage.bench, stage.dummy.get(), random, 200);
  if (!stage.instance->quiesce().ok() || !stage.instance->save(good).ok()) return;
  if (good.sections.empty()) return;
  recorder.rule("sections that are missing are an error", [&] {
    CheckState empty;
    const Outcome outcome = stage.instance->load(empty);
    if (outcome.ok()) return Verdict::failed("load succeeded without any section");
    return Verdict::when(!outcome.message.empty(), "there is no message");
  });
  recorder.rule("damaged sections are survived", [&] {
    for (int round = 0; round < 400; ++round) {
      CheckState damaged = good;
      auto at = damaged.sections.begin();
      std::advance(at, random.below(damaged.sections.size()));
      auto& [version, bytes] = at->second;
      switch (random.below(6)) {
        case 0:
          bytes.resize(random.below(bytes.size() + 1));
          break;
        case 1:
          bytes.resize(bytes.size() + 1 + random.below(5000), std::byte{0xff});
          break;
        case 2:
          random.fill(bytes.data(), bytes.size());
          break;
        case 3:
          version = static_cast<uint32_t>(random.next());
          break;
        case 4:
          std::fill(bytes.begin(), bytes.end(), std::byte{0xff});
          break;
        default:
          for (uint64_t flips = 1 + random.below(8); flips != 0 && !bytes.empty(); --flips)
            bytes[random.below(bytes.size())] ^= static_cast<std::byte>(1u << random.below(8));
          break;
      }
      const Outcome loaded = stage.instance->load(damaged);
      if (!loaded.ok() && loaded.message.empty()) return Verdict::failed("a section is refused without a message");
      if (!loaded.ok() || round % 4) continue;
      // What was accepted must be harmless.
      if (!stage.instance->resume().ok()) continue;
      exercise_claims(*stage.bench, stage.dummy.get(), random, 30);
      stage.instance->quiesce();
      CheckState again;
      stage.instance->save(again);
    }
    return Verdict();
  });
  recorder.rule("loads what is good after that", [&] { return verdict_of(stage.instance->load(good)); });
}

// --- leaks

namespace {

size_t entries_of(const char* folder) {
  size_t count = 0;
  if (DIR* open = ::opendir(folder)) {
    while (::readdir(open)) ++count;
    ::closedir(open);
  }
  return count;
}

struct Held {
  size_t descriptors = entries_of("/proc/self/fd");
  size_t threads = entries_of("/proc/self/task");
};

// What stays on the bench after the instance went.
std::string left_behind(BenchHost& bench) {
  std::string left;
  auto add = [&](size_t count, const char* what) {
    if (count != 0) left += (left.empty() ? "" : ", ") + std::to_string(count) + " " + what;
  };
  add(bench.claim_count(), "bus claims");
  add(bench.ioeventfd_count(), "ioeventfds");
  add(bench.irqfd_count(), "irqfds");
  add(bench.msi_vector_count(), "MSI vectors");
  add(bench.main_loop_watch_count(), "callbacks on the main loop");
  add(bench.thread_count(), "threads or loops");
  return left;
}

}  // namespace

void check_leaks(CheckRecorder& recorder, const CheckSubject& subject) {
  {
    CheckStage stage;
    if (!set_up(recorder, "is configured to be destroyed", subject, stage)) return;
  }
  recorder.rule("destroy gives back all that was claimed", [&] {
    CheckStage stage;
    CheckRandom random(8);
    if (const Outcome outcome = CheckStage::set_up(subject, stage); !outcome.ok()) return verdict_of(outcome);
    if (const Outcome started = stage.instance->start(); !started.ok()) return verdict_of(started);
    exercise_claims(*stage.bench, stage.dummy.get(), random, 200);
    stage.instance->destroy();
    const std::string left = left_behind(*stage.bench);
    return Verdict::when(left.empty(), left + " stay behind");
  });
  recorder.rule("no descriptor and no thread stays open after destroy", [&] {
    // The first life may open what the plugin keeps for all of its devices.
    auto live = [&] {
      CheckStage stage;
      CheckRandom random(9);
      if (!CheckStage::set_up(subject, stage).ok() || !stage.instance->start().ok()) return;
      exercise_claims(*stage.bench, stage.dummy.get(), random, 100);
      stage.instance->quiesce();
    };
    live();
    const Held before;
    for (int i = 0; i < 3; ++i) live();
    Held after;
    // A joined thread's entry in /proc may last a moment longer.
    for (int waited_ms = 0; after.threads > before.threads && waited_ms < 200; waited_ms += 10) {
      ::usleep(10'000);
      after = {};
    }
    if (after.descriptors > before.descriptors)
      return Verdict::failed(std::to_string(after.descriptors - before.descriptors) +
                             " descriptors more after 3 lives");
    return Verdict::when(after.threads <= before.threads,
                         std::to_string(after.threads - before.threads) + " threads more after 3 lives");
  });
}

}  // namespace vmm
