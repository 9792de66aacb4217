// SPDX-License-Identifier: Apache-2.0
// Bare guests run by `clone run` with the plugins of the build tree. A guest prints "FAILED …" for what it finds wrong.
#include <doctest/doctest.h>

#include <linux/kvm.h>
#include <signal.h>
#include <sys/stat.h>
#include <time.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <span>
#include <sstream>
#include <thread>

#include "killed.hpp"
#include "scratch_dir.hpp"
#include "tests/fuzz/snapshot_seal.hpp"
#include "vmm_process.hpp"

using namespace std::chrono_literals;

namespace {

constexpr uint64_t kDiskBytes = 1 << 20;

// Without an error, and with exactly this said after the '>' with which every program starts.
void check_success(const VmmResult& result, const std::string& output) {
  CHECK(result.output == output);
  CHECK(result.errors == "");
  CHECK(result.status == 0);
  CHECK(!result.timed_out);
}

std::string read_file(const std::string& path) {
  std::ostringstream content;
  content << std::ifstream(path, std::ios::binary).rdbuf();
  return content.str();
}

uint64_t allocated_bytes(const std::string& path) {
  struct stat status {};
  REQUIRE(::stat(path.c_str(), &status) == 0);
  return static_cast<uint64_t>(status.st_blocks) * 512;
}

}  // namespace

TEST_CASE("power-off, resets and crashes end with their statuses") {
  const std::vector<std::string> machine{"--mem", "64M", "--no-reboot"};
  const auto end_with = [&](const std::string& how) {
    auto arguments = machine;
    arguments.insert(arguments.end(), {"--cmdline", "end=" + how});
    return run_guest("hello", arguments);
  };
  check_success(end_with("power-off"), ">hello\n");
  for (const std::string how : {"reset", "keyboard"}) {
    CAPTURE(how);
    const VmmResult result = end_with(how);
    CHECK(result.output == ">hello\n");
    CHECK(result.errors == "");
    CHECK(result.status == 3);
  }
  const VmmResult crash = end_with("triple-fault");
  CHECK(crash.output == ">hello\n");
  CHECK(crash.errors.find("triple fault") != std::string::npos);
  CHECK(crash.status == 4);
  // What KVM cannot run: its instruction is named.
  const VmmResult failure = end_with("emulation");
  CHECK(failure.output == ">hello\n");
  CHECK(failure.errors.find("cannot be emulated: dd 0") != std::string::npos);
  CHECK(failure.status == 5);
}

TEST_CASE("a reboot starts again with the same disk") {
  const ScratchDir dir;
  const std::string disk = dir.write("disk", std::string(4096, '\0'));
  const VmmResult result = run_guest("boots", {"--mem", "64M", "--block", disk, "--cmdline", "boots=3"});
  check_success(result, ">boot 1\n>boot 2\n>boot 3\n");
  CHECK(read_file(disk) == '\3' + std::string(4095, '\0'));
}

TEST_CASE("virtio-rng over MMIO, with its interrupt") {
  const VmmResult one = run_guest("random", {"--mem", "64M"});
  const VmmResult two = run_guest("random", {"--mem", "64M"});
  for (const VmmResult& result : {one, two}) {
    CHECK(result.output.starts_with(">random 0x"));
    CHECK(result.errors == "");
    CHECK(result.status == 0);
  }
  CHECK(one.output != two.output);  // one time in 2^32
}

TEST_CASE("virtio-blk over MMIO: two disks, one of them read-only") {
  for (const std::string aio : {"io_uring", "threads"}) {
    CAPTURE(aio);
    const ScratchDir dir;
    const std::string first = dir.write("first", std::string(kDiskBytes, '\xaa'));
    const std::string second = dir.write("second", std::string(kDiskBytes, '\xbb'));
    const VmmResult result = run_guest("disks", {"--mem", "64M", "--block", first + ",serial=Eins,aio=" + aio,
                                                 "--block", second + ",readonly=on,aio=" + aio});
    check_success(result, ">first 2048 sectors, id Eins\nsecond 2048 sectors, id disk-1\n");

    std::string expected(kDiskBytes, '\xaa');
    for (size_t i = 0; i < 8 * 512; ++i) expected[8 * 512 + i] = static_cast<char>(i * 7 + i / 512);
    std::fill_n(expected.begin() + 64 * 512, 16 * 512, '\0');
    std::fill_n(expected.begin() + 129 * 512, 2 * 512, '\0');
    CHECK((read_file(first) == expected));
    CHECK((read_file(second) == std::string(kDiskBytes, '\xbb')));
    // The discarded sectors hold no space any more, where the file system knows holes.
    if (allocated_bytes(second) >= kDiskBytes) CHECK(allocated_bytes(first) < allocated_bytes(second));
  }
}

TEST_CASE("a hostile guest harms nobody") {
  const ScratchDir dir;
  const std::string disk = dir.write("disk", std::string(kDiskBytes, '\xaa'));
  const VmmResult result = run_guest("hostile", {"--mem", "64M", "--block", disk + ",readonly=on"});
  CHECK(result.output == ">random survived\ndisk survived\n");
  // Told of once, not each time.
  CHECK(result.errors ==
        "clone: warning: virtio-rng.0: the driver cannot use this device: the driver did not enable the "
        "request queue\n");
  CHECK(result.status == 0);
  CHECK((read_file(disk) == std::string(kDiskBytes, '\xaa')));
}

TEST_CASE("memory on both sides of the hole") {
  check_success(run_guest("memory", {"--mem", "5G"}), ">high memory ends at 6144 MiB\n");
}

TEST_CASE("processors are woken by INIT and SIPI") {
  for (const std::string count : {"1", "4", "32"}) {
    CAPTURE(count);
    const VmmResult result =
        run_guest("processors", {"--mem", "64M", "--vcpus", count, "--cmdline", "processors=" + count});
    check_success(result, ">" + count + " processors counted to " + count + "00\n");
  }
}

TEST_CASE("ACPI tables are found and describe the machine") {
  const ScratchDir dir;
  const std::string one = dir.write("one", std::string(4096, '\0'));
  const std::string two = dir.write("two", std::string(4096, '\0'));
  check_success(run_guest("acpi", {"--mem", "64M"}), ">1 processors, 3 virtio devices\n");
  check_success(run_guest("acpi", {"--mem", "64M", "--vcpus", "3", "--block", one, "--block", two}),
                ">3 processors, 5 virtio devices\n");
}

TEST_CASE("the RTC tells the host's time") {
  const auto now = [] {
    return std::chrono::system_clock::to_time_t(
        std::chrono::floor<std::chrono::seconds>(std::chrono::system_clock::now()));
  };
  const time_t before = now();
  const VmmResult result = run_guest("clock", {"--mem", "64M"});
  const time_t after = now();
  CHECK(result.status == 0);
  tm told{};
  int century = 0;
  REQUIRE(std::sscanf(result.output.c_str(), ">time %d %d %d %d %d %d %d", &century, &told.tm_year, &told.tm_mon,
                      &told.tm_mday, &told.tm_hour, &told.tm_min, &told.tm_sec) == 7);
  told.tm_year += century * 100 - 1900;
  told.tm_mon -= 1;
  const time_t guest = ::timegm(&told);
  CHECK(guest >= before);
  CHECK(guest <= after);
}

TEST_CASE("the serial port by interrupts both ways") {
  // What is there before the guest listens is not lost.
  check_success(run_guest("echo", {"--mem", "64M"}, "hello, world."), ">ready\nHELLO, WORLD.\ndone\n");
  // And what comes later, and more at once than the chip holds.
  VmmProcess process("echo", {"--mem", "64M"});
  REQUIRE(process.wait_for("ready\n"));
  process.type("abc");
  REQUIRE(process.wait_for("ABC"));
  std::string much, capitals;
  for (unsigned i = 0; i < 200; ++i) {
    much += static_cast<char>('a' + i % 26);
    capitals += static_cast<char>('A' + i % 26);
  }
  process.type(much);
  REQUIRE(process.wait_for(capitals));
  process.type(".");
  check_success(process.finish(), ">ready\nABC" + capitals + ".\ndone\n");
}

TEST_CASE("SIGTERM presses the power button") {
  for (const std::string how : {"poll", "interrupt"}) {
    CAPTURE(how);
    VmmProcess process("button", {"--mem", "64M", "--cmdline", "button=" + how});
    REQUIRE(process.wait_for("ready\n"));
    process.signal(how == "poll" ? SIGTERM : SIGINT);
    check_success(process.finish(), ">ready\npressed\n");
  }
}

TEST_CASE("a guest that does not obey is stopped") {
  const auto start = [](VmmProcess& process) {
    REQUIRE(process.wait_for("ready\n"));
    return std::chrono::steady_clock::now();
  };
  const auto since = [](auto then) { return std::chrono::steady_clock::now() - then; };
  // Whether it knows of the button or may yet learn of it: it gets its time.
  for (const std::string how : {"enable", "ignore"}) {
    CAPTURE(how);
    VmmProcess process("button", {"--mem", "64M", "--cmdline", "button=" + how, "--grace", "1"});
    const auto ready = start(process);
    process.signal(SIGTERM);
    const VmmResult result = process.finish();
    CHECK(since(ready) >= 1s);
    CHECK(since(ready) < 8s);
    CHECK(result.errors == "clone: error: the guest did not power off in time; stopping it\n");
    CHECK(result.status == 6);
  }
  {
    VmmProcess process("button", {"--mem", "64M", "--cmdline", "button=enable", "--grace", "15"});
    const auto ready = start(process);
    process.signal(SIGTERM);
    std::this_thread::sleep_for(100ms);
    process.signal(SIGTERM);
    const VmmResult result = process.finish();
    CHECK(since(ready) < 8s);
    CHECK(result.errors == "");
    CHECK(result.status == 6);
  }
  {
    VmmProcess process("button", {"--mem", "64M", "--cmdline", "button=enable", "--grace", "15"});
    start(process);
    process.type("\x01x");
    CHECK(process.finish().status == 6);
  }
}

namespace {

std::vector<std::string> entries(const std::string& folder) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) names.push_back(entry.path().filename());
  std::sort(names.begin(), names.end());
  return names;
}

// The guest `continued` and its forks, in a runtime directory and a store of their own.
struct ForkStage {
  struct Answer {
    unsigned ticks, damaged, random_bytes;
    unsigned long long random;
  };

  ScratchDir dir;
  ForkStage() { ::setenv("CLONE_RUNTIME_DIR", (dir.path() + "/run").c_str(), 1); }
  ~ForkStage() { ::unsetenv("CLONE_RUNTIME_DIR"); }

  std::vector<std::string> with_store(std::vector<std::string> arguments) const {
    arguments.insert(arguments.end(), {"--store", dir.path() + "/store"});
    return arguments;
  }
  VmmResult command(const std::vector<std::string>& arguments) const { return run_command(with_store(arguments)); }

  // That have a directory; what is hidden there is for all.
  size_t machines() const {
    auto names = entries(dir.path() + "/run");
    std::erase_if(names, [](const std::string& name) { return name.starts_with('.'); });
    return names.size();
  }

  // Timer, serial line, virtio device and memory of a guest, asked of itself.
  static Answer ask(VmmProcess& vm) {
    vm.type("?");
    std::string line;
    REQUIRE(vm.wait_for_line("ticks ", line));
    Answer answer{};
    REQUIRE(std::sscanf(line.c_str(), "ticks %u damaged %u random %u 0x%llx", &answer.ticks, &answer.damaged,
                        &answer.random_bytes, &answer.random) == 4);
    CHECK(answer.damaged == 0);
    CHECK(answer.random_bytes == 8);
    return answer;
  }
  static void ends_well(VmmProcess& vm) {
    (void)ask(vm);
    ::ends_well(vm);
  }
};

}  // namespace

TEST_CASE("forks go on where the template stood, each on its own") {
  const ForkStage stage;
  VmmProcess source("continued", {"--mem", "64M", "--name", "source", "--cmdline", "mib=32"});
  REQUIRE(source.wait_for("ready\n"));
  const auto before = stage.ask(source);
  const VmmResult snapshot = stage.command({"snapshot", "--name", "base", "source"});
  CHECK(snapshot.errors == "");
  CHECK(snapshot.output.starts_with("base: 64M of memory; the VM stood still for "));
  REQUIRE(snapshot.status == 0);
  CHECK(stage.ask(source).ticks > before.ticks);
  CHECK(stage.command({"template", "verify", "base"}).output == "base: whole\n");
  CHECK(stage.command({"snapshot", "--name", "base", "source"}).status == 1);  // there is one already

  VmmProcess one(stage.with_store({"fork", "--template", "base", "--name", "one"}));
  VmmProcess two(stage.with_store({"fork", "--template", "base", "--name", "two"}));
  const auto first = stage.ask(one), second = stage.ask(two);
  CHECK(first.ticks > before.ticks);
  CHECK(first.random != second.random);
  CHECK(stage.ask(one).ticks > first.ticks);
  // A fork of a fork; the template may go while its forks run.
  CHECK(stage.command({"snapshot", "--name", "again", "one"}).status == 0);
  CHECK(stage.command({"template", "rm", "base"}).status == 0);
  VmmProcess third(stage.with_store({"fork", "--template", "again"}));
  CHECK(stage.ask(third).ticks > first.ticks);
  CHECK(stage.command({"fork", "--template", "base"}).status == 1);
  for (VmmProcess* vm : {&source, &one, &two, &third}) stage.ends_well(*vm);
}

TEST_CASE("a machine that runs is forked, and so is its fork") {
  for (const std::string backing : {"anonymous", "memfd"}) {
    CAPTURE(backing);
    const ForkStage stage;
    VmmProcess source("continued",
                      {"--mem", "64M", "--mem-backing", backing, "--name", "source", "--cmdline", "mib=32"});
    REQUIRE(source.wait_for("ready\n"));
    const auto before = stage.ask(source);
    VmmProcess one({"fork", "--from", "source", "--name", "one"});
    const auto first = stage.ask(one);
    CHECK(first.ticks > before.ticks);
    VmmProcess two({"fork", "--from", "one", "--name", "two"});
    VmmProcess sister({"fork", "--from", "source", "--name", "sister"});
    CHECK(stage.ask(two).ticks > first.ticks);
    CHECK(stage.ask(sister).random != first.random);
    for (VmmProcess* vm : {&source, &one, &two, &sister}) stage.ends_well(*vm);
  }
}

TEST_CASE("a disk that was written to gets a layer of its own in each fork, and must be as it was") {
  const ForkStage stage;
  const std::string disk = stage.dir.write("disk", std::string(kDiskBytes, '\xaa'));
  const auto run = [&](const std::string& options) {
    auto vm = std::make_unique<VmmProcess>(
        "continued", std::vector<std::string>{"--mem", "64M", "--name", "source", "--block", disk + options});
    REQUIRE(vm->wait_for("ready\n"));
    return vm;
  };
  {
    const auto source = run("");
    REQUIRE(stage.command({"snapshot", "--name", "held", "source"}).status == 0);
    const VmmResult held = stage.command({"fork", "--template", "held"});
    CHECK(held.errors.find("in use by another process (opened for writing)") != std::string::npos);
    CHECK(held.status == 1);
    REQUIRE(stage.command({"snapshot", "--name", "base", "--stop", "source"}).status == 0);
    CHECK(source->finish().status == 6);
  }
  {
    ::setenv("HOME", stage.dir.path().c_str(), 1);  // of temporary layers
    VmmProcess one(stage.with_store({"fork", "--template", "base"}));
    VmmProcess two(stage.with_store({"fork", "--template", "base"}));
    for (VmmProcess* vm : {&one, &two}) (void)stage.ask(*vm);
    const VmmResult kept = stage.command({"snapshot", "--name", "again", "--vm-id", "source"});
    CHECK(kept.status == 1);  // there is none of that name any more
    for (VmmProcess* vm : {&one, &two}) stage.ends_well(*vm);
  }
  CHECK((read_file(disk) == std::string(kDiskBytes, '\xaa')));
  std::ofstream(disk, std::ios::in | std::ios::out).put('x');
  const VmmResult changed = stage.command({"fork", "--template", "base"});
  CHECK(changed.errors.find("plugin virtio-blk.0: path=" + disk + ": is not as it was when the snapshot was taken") !=
        std::string::npos);
  CHECK(changed.status == 1);
}

TEST_CASE("a fork is given devices that the template had slots for, and tells its guest") {
  const ForkStage stage;
  ::setenv("HOME", stage.dir.path().c_str(), 1);  // of temporary layers
  const auto make_disk = [&](const std::string& name) {
    std::string content(kDiskBytes, '\0');
    content.replace(0, 20, std::string(20, name[0]));
    return stage.dir.write(name, content);
  };
  const auto second_sector = [](const std::string& disk) { return read_file(disk).substr(512, 20); };
  const auto ask = [](VmmProcess& vm) {
    vm.type("?");
    std::string line;
    REQUIRE(vm.wait_for_line("slots ", line));
    return line.substr(0, line.find('.'));
  };
  const std::string a = make_disk("a"), b = make_disk("b"), c = make_disk("c");
  const auto machine = [](const std::string& transport) {
    return std::vector<std::string>{"--mem",       "64M",          "--name",    "source",
                                    "--transport", transport,      "--without", "virtio-balloon",
                                    "--without",   "virtio-vsock", "--without", "guest-agent"};
  };
  {
    VmmProcess source("slots", machine("mmio,slots=3"));
    REQUIRE(source.wait_for("ready\n"));
    CHECK(ask(source) == "slots 0x1 events 0");
    REQUIRE(stage.command({"snapshot", "--name", "base", "source"}).status == 0);
    const auto fork = [&](const std::string& name, std::vector<std::string> devices, const std::string& from = "base") {
      std::vector<std::string> words{"fork", "--template", from, "--name", name};
      words.insert(words.end(), devices.begin(), devices.end());
      return stage.with_store(words);
    };
    VmmProcess plain(fork("plain", {}));
    CHECK(ask(plain) == "slots 0x1 events 0");
    VmmProcess one(fork("one", {"--block", a}));
    CHECK(ask(one) == "slots 0x3 events 1 disk 1 " + std::string(20, 'a'));
    VmmProcess two(fork("two", {"--block", b, "--device", "virtio-blk,path=" + c}));
    CHECK(ask(two) == "slots 0x7 events 1 disk 1 " + std::string(20, 'b') + " disk 2 " + std::string(20, 'c'));
    // It is the fork's own: written to as a machine's disks are.
    CHECK(second_sector(a) == std::string(20, 'a'));
    CHECK(second_sector(b) == std::string(20, 'b'));

    // Its forks have it from the beginning, and a layer over it.
    REQUIRE(stage.command({"snapshot", "--name", "again", "--stop", "one"}).status == 0);
    CHECK(one.finish().status == 6);
    VmmProcess third(fork("third", {"--block", make_disk("d")}, "again"));
    CHECK(ask(third) == "slots 0x7 events 2 disk 1 " + std::string(20, 'a') + " disk 2 " + std::string(20, 'd'));
    // Without a disk in between, too.
    VmmProcess live({"fork", "--from", "source", "--name", "live", "--block", make_disk("e")});
    CHECK(ask(live) == "slots 0x3 events 1 disk 1 " + std::string(20, 'e'));

    const auto refused = [&](const std::vector<std::string>& words, const std::string& why) {
      const VmmResult result = run_command(words);
      CHECK_MESSAGE(result.errors.find(why) != std::string::npos, result.errors);
      CHECK(std::count(result.errors.begin(), result.errors.end(), '\n') == 1);
      CHECK(result.status == 1);
    };
    const std::string f = make_disk("f"), g = make_disk("g");
    refused(fork("four", {"--block", f, "--block", g}, "again"),
            "virtio-blk.2: slots=3: no slot is left, allowed are up to 15");
    refused(fork("four", {"--device", "serial,port=0x2f8,irq=3,console=off"}),
            "serial.1: a fork may be given virtio devices only");
    for (VmmProcess* vm : {&source, &plain, &two, &third, &live}) ends_well(*vm);
  }
  {
    // As many as there can be.
    VmmProcess source("slots", machine("mmio,slots=15"));
    REQUIRE(source.wait_for("ready\n"));
    CHECK(ask(source) == "slots 0x1 events 0");
    REQUIRE(stage.command({"snapshot", "--name", "most", "source"}).status == 0);
    std::vector<std::string> words{"fork", "--template", "most", "--name", "full"};
    std::string expected = "slots 0x7fff events 1";
    for (unsigned slot = 1; slot < 15; ++slot) {
      const std::string letter(1, static_cast<char>('A' + slot));
      words.insert(words.end(), {"--block", make_disk(letter)});
      expected += " disk " + std::to_string(slot) + " ";
      for (unsigned i = 0; i < 20; ++i) expected += letter;
    }
    VmmProcess full(stage.with_store(words));
    CHECK(ask(full) == expected);
    for (VmmProcess* vm : {&source, &full}) ends_well(*vm);
    const VmmResult result = run_command({"run", "--kernel", "/dev/null", "--transport", "mmio,slots=16", "--dry-run"});
    CHECK_MESSAGE(result.errors.find("slots=16: allowed is a number, 0 to 15") != std::string::npos, result.errors);
  }
  {
    VmmProcess source("continued", machine("mmio"));
    REQUIRE(source.wait_for("ready\n"));
    REQUIRE(stage.command({"snapshot", "--name", "none", "source"}).status == 0);
    const VmmResult result = stage.command({"fork", "--template", "none", "--block", a});
    CHECK_MESSAGE(result.errors.find("virtio-blk.0: no slot was prepared for it: start the machine to be saved with "
                                     "--transport mmio,slots=N") != std::string::npos,
                  result.errors);
    CHECK(std::count(result.errors.begin(), result.errors.end(), '\n') == 1);
    CHECK(result.status == 1);
    ends_well(source);
  }
}

TEST_CASE("a snapshot that is damaged, or is not there, is refused in one line") {
  const ForkStage stage;
  VmmProcess source("continued", {"--mem", "64M", "--name", "source"});
  REQUIRE(source.wait_for("ready\n"));
  REQUIRE(stage.command({"snapshot", "--name", "base", "source"}).status == 0);
  stage.ends_well(source);
  const std::string state = stage.dir.path() + "/store/base/state";
  const std::string whole = read_file(state);
  const auto refused = [&](const std::string& content) {
    std::ofstream(state, std::ios::binary | std::ios::trunc) << content;
    const VmmResult result = stage.command({"fork", "--template", "base"});
    CHECK(result.status == 1);
    CHECK(result.errors.starts_with("clone: error: "));
    CHECK(std::count(result.errors.begin(), result.errors.end(), '\n') == 1);
  };
  for (const size_t size : {size_t{0}, size_t{1}, size_t{64}, whole.size() / 2, whole.size() - 1}) {
    CAPTURE(size);
    refused(whole.substr(0, size));
  }
  for (size_t place = 0; place < whole.size(); place += whole.size() / 16) {
    CAPTURE(place);
    std::string flipped = whole;
    flipped[place] = static_cast<char>(flipped[place] ^ 0x10);
    refused(flipped);
  }
  CHECK(stage.command({"fork", "--template", "nothing"}).errors.find("nothing") != std::string::npos);
  std::ofstream(state, std::ios::binary | std::ios::trunc) << whole;
  // What others could have written is not trusted.
  std::filesystem::permissions(state, std::filesystem::perms::others_write, std::filesystem::perm_options::add);
  CHECK(stage.command({"fork", "--template", "base"}).status == 1);
}

// The state of a template, with sections changed behind its checksums' back.
class Forgery {
 public:
  explicit Forgery(const ForkStage& stage) : path_(stage.dir.path() + "/store/base/state") {
    VmmProcess source("continued", {"--mem", "64M", "--name", "source"});
    REQUIRE(source.wait_for("ready\n"));
    REQUIRE(stage.command({"snapshot", "--name", "base", "--stop", "source"}).status == 0);
    CHECK(source.finish().status == 6);
    whole_ = read_file(path_);
  }

  using Section = std::pair<snapshot_file::SectionRecord&, std::span<std::byte>>;
  // Calls it with each section of the template as it was, and puts what becomes of them into its place.
  void change(const std::function<void(Section)>& change) const {
    using namespace snapshot_file;
    std::vector<std::byte> state(whole_.size());
    std::memcpy(state.data(), whole_.data(), whole_.size());
    HeaderRecord header;
    std::memcpy(&header, state.data(), sizeof header);
    size_t place = sizeof header + header.section_count * sizeof(SectionRecord) + header.extent_count * sizeof(Extent);
    for (uint32_t number = 0; number < header.section_count; ++number) {
      std::byte* const at = state.data() + sizeof header + number * sizeof(SectionRecord);
      SectionRecord record;
      std::memcpy(&record, at, sizeof record);
      change({record, std::span(state).subspan(place, record.size_bytes)});
      std::memcpy(at, &record, sizeof record);
      place += record.size_bytes;
    }
    seal(state);
    std::ofstream(path_, std::ios::binary)
        .write(reinterpret_cast<const char*>(state.data()), static_cast<std::streamsize>(state.size()));
  }

 private:
  std::string path_, whole_;
};

void is_refused(const ForkStage& stage, const std::vector<std::string>& why) {
  CHECK(stage.command({"template", "verify", "base"}).output == "base: whole\n");
  const VmmResult result = stage.command({"fork", "--template", "base"});
  CHECK(result.status == 1);
  CHECK(result.output == "");
  const auto says = [&](const std::string& text) { return result.errors.find(text) != std::string::npos; };
  CHECK_MESSAGE(std::ranges::any_of(why, says), result.errors);
  CHECK(std::count(result.errors.begin(), result.errors.end(), '\n') == 1);
}

TEST_CASE("a snapshot of another machine's processor is refused by what this one lacks") {
  const ForkStage stage;
  const Forgery forgery(stage);
  const auto change_leaves = [&](const std::function<void(kvm_cpuid_entry2&)>& change) {
    forgery.change([&](Forgery::Section section) {
      if (section.first.owner != std::string("kvm") || section.first.tag != std::string("vcpu.0.cpuid")) return;
      for (size_t at = 0; at < section.second.size(); at += sizeof(kvm_cpuid_entry2)) {
        kvm_cpuid_entry2 leaf;
        std::memcpy(&leaf, section.second.data() + at, sizeof leaf);
        change(leaf);
        std::memcpy(section.second.data() + at, &leaf, sizeof leaf);
      }
    });
  };
  change_leaves([](kvm_cpuid_entry2& leaf) {  // either maker's processors lack the other's
    if (leaf.function == 7 && leaf.index == 0) leaf.edx |= 1u << 24;
    if (leaf.function == 0x8000'0001) leaf.ecx |= 1u << 6;
  });
  is_refused(stage, {"what this host lacks: AMX-TILE", "what this host lacks: SSE4A"});
  change_leaves([](kvm_cpuid_entry2& leaf) {
    if (leaf.function == 0) std::memcpy(&leaf.ebx, "Cent", 4), std::memcpy(&leaf.edx, "aurH", 4), std::memcpy(&leaf.ecx, "auls", 4);
  });
  is_refused(stage, {"what this host lacks: the maker CentaurHauls"});
}

TEST_CASE("a snapshot with state that is unknown here is refused by its name") {
  const ForkStage stage;
  const Forgery forgery(stage);
  const auto rename = [&](const std::string& owner, const std::string& tag, const char* to) {
    forgery.change([&](Forgery::Section section) {
      if (section.first.owner == owner && section.first.tag == tag)
        std::snprintf(section.first.tag, sizeof section.first.tag, "%s", to);
    });
  };
  rename("core", "snapshot-id", "snapshot-new");
  is_refused(stage, {"section core/snapshot-new is unknown here"});
  rename("kvm", "pit", "pit.new");
  is_refused(stage, {"section kvm/pit"});
  forgery.change([](Forgery::Section section) {
    if (section.first.owner == std::string("kvm") && section.first.tag == std::string("pit")) section.first.version = 2;
  });
  is_refused(stage, {"section kvm/pit"});
  bool is_done = false;
  forgery.change([&](Forgery::Section section) {  // the next after KVM's: they stand in order
    if (section.first.owner <= std::string("kvm") || std::exchange(is_done, true)) return;
    std::snprintf(section.first.owner, sizeof section.first.owner, "kvm");
    std::snprintf(section.first.tag, sizeof section.first.tag, "vcpu.1.new");
  });
  is_refused(stage, {"section kvm/vcpu.1.new is unknown here"});
  forgery.change([](Forgery::Section) {});
  VmmProcess whole(stage.with_store({"fork", "--template", "base"}));
  stage.ends_well(whole);
}

// What a device makes of state that makes no sense: an error, or a guest that goes nowhere, and never a crash.
TEST_CASE("a snapshot whose state makes no sense crashes nothing") {
  const ForkStage stage;
  const Forgery forgery(stage);
  size_t count = 0;
  forgery.change([&](Forgery::Section) { ++count; });
  for (const uint8_t flip : {0x01, 0x80, 0xff}) {
    for (size_t target = 0; target < count; ++target) {
      std::string name;
      size_t number = 0;
      forgery.change([&](Forgery::Section section) {
        if (number++ != target) return;
        name = section.first.owner + std::string("/") + section.first.tag;
        for (size_t at = flip % 7; at < section.second.size(); at += 1 + section.second.size() / 4)
          section.second[at] ^= std::byte{flip};
      });
      CAPTURE(name);
      CAPTURE(flip);
      VmmProcess fork(stage.with_store({"fork", "--template", "base"}));
      std::this_thread::sleep_for(40ms);
      fork.signal(SIGKILL);
      const VmmResult result = fork.finish();
      CHECK((result.status < 128 || result.status == 128 + SIGKILL));
      CHECK(result.errors.find("crash") == std::string::npos);
    }
  }
}

TEST_CASE("a fork that is killed at any step leaves nothing behind") {
  const ForkStage stage;
  const std::string disk = stage.dir.write("disk", std::string(kDiskBytes, '\xaa'));
  {
    VmmProcess source("continued", {"--mem", "64M", "--name", "source", "--block", disk});
    REQUIRE(source.wait_for("ready\n"));
    REQUIRE(stage.command({"snapshot", "--name", "base", "--stop", "source"}).status == 0);
  }
  ::setenv("HOME", (stage.dir.path() + "/home").c_str(), 1);
  std::filesystem::create_directory(stage.dir.path() + "/home");
  const auto templates = entries(stage.dir.path() + "/store");
  const auto fork = stage.with_store({"fork", "--template", "base"});
  const size_t steps = steps_of(fork, "?.");
  MESSAGE(steps << " steps");
  for (size_t killed = 1; killed < steps; killed += steps / 100) (void)killed_after(killed, fork, "?.");
  VmmProcess last(stage.with_store({"fork", "--template", "base", "--name", "last"}));
  (void)stage.ask(last);
  // What the dead left is cleared when another starts.
  CHECK(stage.machines() == 1);
  CHECK(entries(stage.dir.path() + "/store") == templates);
  CHECK(entries(stage.dir.path() + "/home/.clone/overlays").empty());
  stage.ends_well(last);
  CHECK((read_file(disk) == std::string(kDiskBytes, '\xaa')));
}

TEST_CASE("a fork that is killed at any step leaves nothing in the machine that it was made of") {
  const ForkStage stage;
  const std::vector<std::string> fork{"fork", "--from", "source"};
  VmmProcess source("continued", {"--mem", "64M", "--name", "source", "--cmdline", "mib=32"});
  REQUIRE(source.wait_for("ready\n"));
  const std::string process = "/proc/" + std::to_string(source.pid());
  const auto held = [&] {
    const std::string children = process + "/task/" + std::to_string(source.pid()) + "/children";
    return std::pair(entries(process + "/fd").size(), read_file(children));
  };
  const auto first = stage.ask(source);
  {
    VmmProcess whole(fork);
    stage.ends_well(whole);
  }
  const auto before = held();
  // The memory may still be copied for the one before, which nobody waits for any more: the next would be refused.
  const auto is_as_before = [&] {
    const auto end = std::chrono::steady_clock::now() + 10s;
    while (held() != before && std::chrono::steady_clock::now() < end) std::this_thread::sleep_for(1ms);
    return held() == before;
  };
  const size_t steps = steps_of(fork, "?.");
  for (size_t killed = 1; killed < steps; killed += steps / 25) {
    CAPTURE(killed);
    (void)killed_after(killed, fork, "?.");
    REQUIRE(is_as_before());
  }
  CHECK(stage.ask(source).ticks > first.ticks);
  VmmProcess last({"fork", "--from", "source", "--name", "last"});
  (void)stage.ask(last);
  CHECK(stage.machines() == 2);
  for (VmmProcess* vm : {&source, &last}) stage.ends_well(*vm);
}

// The memory of a machine is handed on once, so that each fork has one of its own to be made of.
TEST_CASE("a fork that is killed while memory is handed to it leaves the machine that it was made of whole") {
  const ForkStage stage;
  const std::vector<std::string> fork{"fork", "--from", "source"};
  const auto machine = {"--mem", "64M", "--mem-backing", "memfd", "--name", "source", "--cmdline", "mib=32"};
  size_t steps = 0;
  {
    VmmProcess source("continued", {machine.begin(), machine.end()});
    REQUIRE(source.wait_for("ready\n"));
    steps = steps_of(fork, "?.");
    stage.ends_well(source);
  }
  for (size_t killed = 1; killed < steps; killed += steps / 15) {
    CAPTURE(killed);
    VmmProcess source("continued", {machine.begin(), machine.end()});
    REQUIRE(source.wait_for("ready\n"));
    const auto first = stage.ask(source);
    (void)killed_after(killed, fork, "?.");
    CHECK(stage.ask(source).ticks > first.ticks);
    VmmProcess other({"fork", "--from", "source", "--name", "other"});
    (void)stage.ask(other);
    CHECK(stage.machines() == 2);
    for (VmmProcess* vm : {&source, &other}) stage.ends_well(*vm);
  }
}

TEST_CASE("forks of machines with several processors and much memory") {
  const ForkStage stage;
  VmmProcess source("continued", {"--mem", "4G", "--vcpus", "4", "--name", "source", "--cmdline", "mib=256"});
  REQUIRE(source.wait_for("ready\n"));
  REQUIRE(stage.command({"snapshot", "--name", "base", "source"}).status == 0);
  VmmProcess one(stage.with_store({"fork", "--template", "base"}));
  VmmProcess two({"fork", "--from", "source"});
  for (VmmProcess* vm : {&source, &one, &two}) stage.ends_well(*vm);
}

TEST_CASE("a hundred forks from one command, alive at once") {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  constexpr int kForks = 20;  // each takes several times the memory
#else
  constexpr int kForks = 100;
#endif
  const std::string count = std::to_string(kForks);
  const ForkStage stage;
  {
    VmmProcess source("continued", {"--mem", "64M", "--name", "source"});
    REQUIRE(source.wait_for("ready\n"));
    REQUIRE(stage.command({"snapshot", "--name", "base", "--stop", "source"}).status == 0);
  }
  VmmProcess many(stage.with_store({"fork", "--template", "base", "--name", "web", "--count", count, "--grace", "1"}));
  for (int number = 1; number <= kForks; ++number)
    REQUIRE(many.wait_for("web-" + std::to_string(number) + ": process "));
  const auto rows = [&] {
    const std::string listed = run_command({"list"}).output;
    return std::count(listed.begin(), listed.end(), '\n') - 1;
  };
  const auto end = std::chrono::steady_clock::now() + 15s;
  while (rows() < kForks && std::chrono::steady_clock::now() < end) std::this_thread::sleep_for(100ms);
  const std::string listed = run_command({"list"}).output;
  CHECK(std::count(listed.begin(), listed.end(), '\n') == kForks + 1);
  for (const std::string& name : {std::string("web-1"), "web-" + count})
    CHECK(listed.find("  " + name + " ") != std::string::npos);
  CHECK(run_command({"stop", "--force", "web-7"}).status == 0);
  many.signal(SIGTERM);
  const VmmResult result = many.finish();
  CHECK(result.status == 6);  // the guest knows of no button
  CHECK(!result.timed_out);
  CHECK(rows() <= 0);
}

TEST_CASE("a template that is kept in memory outlives its machine, and touches no disk") {
  const ForkStage stage;
  const std::vector<std::string> memory{"--backend", "memory"};
  const auto in_memory = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.end(), memory.begin(), memory.end());
    return arguments;
  };
  {
    VmmProcess source("continued", {"--mem", "64M", "--name", "source", "--cmdline", "mib=32"});
    REQUIRE(source.wait_for("ready\n"));
    const VmmResult kept = run_command(in_memory({"snapshot", "--name", "base", "source"}));
    CHECK(kept.errors == "");
    REQUIRE(kept.status == 0);
    stage.ends_well(source);
  }
  CHECK(run_command(in_memory({"template", "list"})).output.find("\nbase ") != std::string::npos);
  CHECK(stage.command({"template", "list"}).output.find("base") == std::string::npos);
  VmmProcess one(in_memory({"fork", "--template", "base", "--name", "one"}));
  VmmProcess two(in_memory({"fork", "--template", "base", "--name", "two"}));
  for (VmmProcess* vm : {&one, &two}) (void)stage.ask(*vm);
  CHECK(run_command(in_memory({"template", "rm", "base"})).status == 0);
  CHECK(run_command(in_memory({"fork", "--template", "base"})).status == 1);
  for (VmmProcess* vm : {&one, &two}) stage.ends_well(*vm);
  CHECK(run_command({"template", "list", "--backend", "nothing"}).errors.find("unknown snapshot-backend 'nothing'") !=
        std::string::npos);
}
