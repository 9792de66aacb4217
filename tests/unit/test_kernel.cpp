// SPDX-License-Identifier: Apache-2.0
// Kernel files, sound and hostile, and what a kernel finds at its entry.
#include <asm/bootparam.h>
#include <doctest/doctest.h>
#include <elf.h>
#include <stdlib.h>
#include <unistd.h>

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <random>

#include "boot/e820.hpp"
#include "boot/entry.hpp"
#include "boot/kernel.hpp"
#include "boot/layout.hpp"

using namespace vmm;

namespace {
constexpr uint64_t kMiB = 1ull << 20;

class TemporaryFile {
 public:
  explicit TemporaryFile(const std::vector<std::byte>& content) {
    char path[] = "/tmp/clone-test-kernel-XXXXXX";
    const int fd = ::mkstemp(path);
    REQUIRE(fd >= 0);
    ::close(fd);
    path_ = path;
    std::ofstream(path_, std::ios::binary)
        .write(reinterpret_cast<const char*>(content.data()), static_cast<std::streamsize>(content.size()));
  }
  TemporaryFile(const TemporaryFile&) = delete;
  ~TemporaryFile() { ::unlink(path_.c_str()); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

template <typename T>
void put(std::vector<std::byte>& file, uint64_t offset, const T& value) {
  if (file.size() < offset + sizeof value) file.resize(offset + sizeof value);
  std::memcpy(file.data() + offset, &value, sizeof value);
}

GuestMemory make_memory(uint64_t size_bytes) {
  auto memory = GuestMemory::create({.size_bytes = size_bytes});
  REQUIRE(memory.ok());
  return std::move(*memory);
}

// What opening this file, and loading it into 64 MiB, says; empty when both work. Always one line with the path in it.
std::string complaint(const std::vector<std::byte>& content, BootProtocol wanted = BootProtocol::automatic) {
  const TemporaryFile file(content);
  auto kernel = KernelFile::open(file.path(), wanted);
  std::string message;
  if (kernel) {
    GuestMemory memory = make_memory(64 * kMiB);
    auto loaded = kernel->load_into(memory);
    if (loaded) return {};
    message = loaded.error().message;
  } else {
    message = kernel.error().message;
  }
  CHECK(message.find("kernel " + file.path() + ": ") == 0);
  CHECK(message.find('\n') == message.npos);
  return message.substr(std::min(message.size(), file.path().size() + 9));
}

// A bzImage of protocol 2.15 whose kernel is `content_bytes` long and wants to be at 16 MiB.
constexpr uint64_t kSetupBytes = 4 * 512;
constexpr char kVersion[] = "6.1.0-test-amd64 (someone@somewhere) #1 SMP";
std::vector<std::byte> bzimage(uint32_t content_bytes = 8192) {
  std::vector<std::byte> file(kSetupBytes + content_bytes);
  for (uint32_t index = 0; index < content_bytes; ++index)
    file[kSetupBytes + index] = static_cast<std::byte>(index % 251);
  setup_header header{};
  header.setup_sects = kSetupBytes / 512 - 1;
  header.syssize = content_bytes / 16;
  header.boot_flag = 0xaa55;
  header.jump = 0x6aeb;
  header.header = 0x53726448;
  header.version = 0x020f;
  header.kernel_version = 0x300;
  header.loadflags = LOADED_HIGH;
  header.initrd_addr_max = 0x7fffffff;
  header.kernel_alignment = 0x200000;
  header.relocatable_kernel = 1;
  header.xloadflags = XLF_KERNEL_64;
  header.cmdline_size = 2047;
  header.pref_address = 16 * kMiB;
  header.init_size = 4 * kMiB;
  put(file, 0x1f1, header);
  put(file, 0x500, kVersion);
  return file;
}

template <typename Change>
std::vector<std::byte> bzimage_with(Change change) {
  auto file = bzimage();
  setup_header header;
  std::memcpy(&header, file.data() + 0x1f1, sizeof header);
  change(header);
  put(file, 0x1f1, header);
  return file;
}

struct ElfFile {
  Elf64_Ehdr header{};
  std::vector<Elf64_Phdr> segments;
  std::vector<std::byte> rest;  // from offset 0x1000

  // Two segments, the second with bss.
  ElfFile() {
    std::memcpy(header.e_ident, ELFMAG, SELFMAG);
    header.e_ident[EI_CLASS] = ELFCLASS64;
    header.e_ident[EI_DATA] = ELFDATA2LSB;
    header.e_type = ET_EXEC;
    header.e_machine = EM_X86_64;
    header.e_phoff = sizeof header;
    header.e_phentsize = sizeof(Elf64_Phdr);
    header.e_entry = kMiB + 0x10;
    rest.resize(0x3000, std::byte{0xcc});
    segments.push_back({PT_LOAD, PF_R | PF_X, 0x1000, 0xffffffff80000000, kMiB, 0x1000, 0x1000, 0x1000});
    segments.push_back({PT_LOAD, PF_R | PF_W, 0x2000, 0, 2 * kMiB, 0x800, 0x3000, 0x1000});
  }

  void add_pvh_note(uint64_t entry, uint32_t alignment = 4) {
    const uint64_t offset = 0x1000 + rest.size();
    std::vector<std::byte> notes;
    put(notes, 0, Elf64_Nhdr{4, 3, 6});  // another of Xen's, with padding after it
    put(notes, 12, "Xen");
    put(notes, 16, uint32_t{0});
    const uint64_t second = alignment == 8 ? 24 : 20;
    put(notes, second, Elf64_Nhdr{4, 8, 18});
    put(notes, second + 12, "Xen");
    put(notes, second + 16, entry);
    rest.insert(rest.end(), notes.begin(), notes.end());
    segments.push_back({PT_NOTE, PF_R, offset, 0, 0, notes.size(), notes.size(), alignment});
  }

  std::vector<std::byte> bytes() const {
    std::vector<std::byte> file(0x1000);
    Elf64_Ehdr copy = header;
    if (copy.e_phnum == 0) copy.e_phnum = static_cast<uint16_t>(segments.size());
    put(file, 0, copy);
    for (size_t index = 0; index < segments.size(); ++index) put(file, sizeof copy + index * 56, segments[index]);
    file.insert(file.end(), rest.begin(), rest.end());
    return file;
  }
};

bool has(const std::string& text, const std::string& part) {
  if (text.find(part) != text.npos) return true;
  MESSAGE("\"" << text << "\" does not contain \"" << part << "\"");
  return false;
}
}  // namespace

TEST_CASE("kernel: a bzImage is loaded where it wants to be") {
  const auto content = bzimage();
  const TemporaryFile file(content);
  auto kernel = KernelFile::open(file.path());
  REQUIRE(kernel.ok());
  const KernelImage& image = kernel->image();
  CHECK(image.protocol == BootProtocol::linux64);
  CHECK(image.version == "6.1.0-test-amd64");
  CHECK(image.start.value == 16 * kMiB);
  CHECK(image.end.value == 20 * kMiB);
  CHECK(image.entry.value == 16 * kMiB + 0x200);
  CHECK(image.header.cmdline_size == 2047);

  GuestMemory memory = make_memory(20 * kMiB);
  REQUIRE(kernel->load_into(memory).ok());
  CHECK(std::memcmp(memory.slice({16 * kMiB}, 8192), content.data() + kSetupBytes, 8192) == 0);

  GuestMemory small = make_memory(20 * kMiB - kPageSize);
  auto refused = kernel->load_into(small);
  REQUIRE_FALSE(refused.ok());
  CHECK(has(refused.error().message, "needs memory up to 20 MiB, the guest has 19 MiB"));
}

TEST_CASE("kernel: Debian's kernels") {
  for (const auto& entry : std::filesystem::directory_iterator("/boot")) {
    const std::string name = entry.path().filename();
    if (name.rfind("vmlinuz-", 0) != 0) continue;
    CAPTURE(name);
    auto kernel = KernelFile::open(entry.path());
    REQUIRE(kernel.ok());
    CHECK("vmlinuz-" + kernel->image().version == name);
    CHECK(kernel->image().protocol == BootProtocol::linux64);
    GuestMemory memory = make_memory(128 * kMiB);
    CHECK(kernel->load_into(memory).ok());
    CHECK(kernel->image().end <= memory.low_end());
    GuestMemory tiny = make_memory(kMiB);
    CHECK_FALSE(kernel->load_into(tiny).ok());
  }
}

TEST_CASE("kernel: files that are no kernels") {
  CHECK(has(complaint({}), "the file is empty"));
  CHECK(has(complaint({std::byte{0x7f}}), "neither a bzImage nor an ELF file"));
  auto missing = KernelFile::open("/nonexistent/kernel");
  REQUIRE_FALSE(missing.ok());
  CHECK(missing.error().message == "kernel /nonexistent/kernel: No such file or directory");
  auto directory = KernelFile::open("/tmp");
  REQUIRE_FALSE(directory.ok());
  CHECK(directory.error().message == "kernel /tmp: Is a directory");
}

TEST_CASE("kernel: a bzImage cut anywhere is refused") {
  const auto whole = bzimage();
  for (uint64_t size : {1, 2, 0x1f0, 0x1f1, 0x1ff, 0x200, 0x201, 0x205}) {
    CAPTURE(size);
    CHECK(has(complaint({whole.begin(), whole.begin() + static_cast<long>(size)}), "neither a bzImage"));
  }
  for (uint64_t size : {0x206, 0x208, 0x237, 0x260, 0x26b}) {
    CAPTURE(size);
    CHECK(has(complaint({whole.begin(), whole.begin() + static_cast<long>(size)}),
              "truncated in the middle of its header"));
  }
  for (uint64_t size : {uint64_t{0x26c}, kSetupBytes - 1, kSetupBytes, kSetupBytes + 0x200, whole.size() - 1}) {
    CAPTURE(size);
    CHECK(has(complaint({whole.begin(), whole.begin() + static_cast<long>(size)}), "truncated: "));
  }
  CHECK(complaint(whole) == "");
}

TEST_CASE("kernel: fields of a bzImage that cannot be") {
  CHECK(has(complaint(bzimage(), BootProtocol::pvh), "a bzImage has no PVH entry"));
  CHECK(has(complaint(bzimage_with([](auto& h) { h.version = 0x0206; })), "boot protocol 2.06: at least 2.12"));
  CHECK(has(complaint(bzimage_with([](auto& h) { h.jump = 0x10eb; })), "header is too short"));
  CHECK(has(complaint(bzimage_with([](auto& h) { h.xloadflags = 0; })), "no 64-bit entry"));
  CHECK(has(complaint(bzimage_with([](auto& h) { h.loadflags = 0; })), "a zImage"));
  CHECK(has(complaint(bzimage_with([](auto& h) { h.setup_sects = 255; })), "truncated"));
  CHECK(has(complaint(bzimage_with([](auto& h) { h.syssize = 0xffffffff; })), "truncated"));
  CHECK(has(complaint(bzimage_with([](auto& h) { h.syssize = 0x20; })), "nothing in it"));
  CHECK(has(complaint(bzimage_with([](auto& h) { h.pref_address = 0x9000; })), "outside 1 MiB to 3 GiB"));
  CHECK(
      has(complaint(bzimage_with([](auto& h) { h.pref_address = kHoleStart - 0x200000; })), "outside 1 MiB to 3 GiB"));
  CHECK(has(complaint(bzimage_with([](auto& h) { h.pref_address = ~uint64_t{0} - 0x1fffff; })), "outside"));
  CHECK(has(complaint(bzimage_with([](auto& h) { h.pref_address = 16 * kMiB + 0x1000; })), "alignment 0x200000"));
  CHECK(has(complaint(bzimage_with([](auto& h) { h.kernel_alignment = 0; })), "alignment 0x0"));
  CHECK(has(complaint(bzimage_with([](auto& h) { h.kernel_alignment = 3; })), "alignment 0x3"));
  CHECK(has(complaint(bzimage_with([](auto& h) { h.init_size = 0xffffffff; })), "outside 1 MiB to 3 GiB"));
  CHECK(has(complaint(bzimage_with([](auto& h) { h.init_size = 0x80000000; })), "needs memory up to 2064 MiB"));
  // Never less than what is copied.
  const TemporaryFile file(bzimage_with([](auto& h) { h.init_size = 0; }));
  CHECK(KernelFile::open(file.path())->image().end.value == 16 * kMiB + 8192);
}

TEST_CASE("kernel: a version that could be no folder's name is none") {
  const auto version = [](std::vector<std::byte> content) {
    const TemporaryFile file(content);
    auto kernel = KernelFile::open(file.path());
    REQUIRE(kernel.ok());
    return kernel->image().version;
  };
  const auto with_text = [](const char* text) {
    auto file = bzimage();
    std::memcpy(file.data() + 0x500, text, std::strlen(text) + 1);
    return file;
  };
  CHECK(version(bzimage_with([](auto& h) { h.kernel_version = 0; })) == "");
  CHECK(version(bzimage_with([](auto& h) { h.kernel_version = 0xffff; })) == "");
  CHECK(version(with_text("6.1.0+x~1_y-2")) == "6.1.0+x~1_y-2");
  CHECK(version(with_text("../../etc")) == "");
  CHECK(version(with_text("6.1/..")) == "");
  CHECK(version(with_text("..")) == "");
  CHECK(version(with_text("")) == "");
  auto endless = bzimage();
  std::fill(endless.begin() + 0x500, endless.begin() + kSetupBytes, std::byte{'6'});
  CHECK(version(endless) == "");
}

TEST_CASE("kernel: an ELF file with and without a PVH note") {
  ElfFile elf;
  {
    const TemporaryFile file(elf.bytes());
    auto kernel = KernelFile::open(file.path());
    REQUIRE(kernel.ok());
    CHECK(kernel->image().protocol == BootProtocol::linux64);
    CHECK(kernel->image().entry.value == kMiB + 0x10);
    CHECK(kernel->image().start.value == kMiB);
    CHECK(kernel->image().end.value == 2 * kMiB + 0x3000);
    GuestMemory memory = make_memory(8 * kMiB);
    std::memset(memory.slice({2 * kMiB}, 0x4000), 0xff, 0x4000);
    REQUIRE(kernel->load_into(memory).ok());
    CHECK(memory.load<uint8_t>({kMiB + 0xfff}) == 0xcc);
    CHECK(memory.load<uint8_t>({2 * kMiB + 0x7ff}) == 0xcc);
    CHECK(memory.load<uint8_t>({2 * kMiB + 0x800}) == 0);
    CHECK(memory.load<uint8_t>({2 * kMiB + 0x2fff}) == 0);
    CHECK(memory.load<uint8_t>({2 * kMiB + 0x3000}) == 0xff);
  }
  const auto version_with = [](std::string_view first, std::string_view second) {
    ElfFile named;
    std::memcpy(named.rest.data() + 0x40, first.data(), first.size());
    std::memcpy(named.rest.data() + 0x1000, second.data(), second.size());
    const TemporaryFile file(named.bytes());
    return KernelFile::open(file.path()).value().image().version;
  };
  CHECK(version_with("", "") == "");
  CHECK(version_with("Linux version %s", "Linux version 6.1.0-57-amd64 (debian-kernel@") == "6.1.0-57-amd64");
  CHECK(version_with("Linux version 6.1", "Linux version 6.2 (") == "6.2");
  CHECK(version_with("Linux version ../x (Linux version ", "") == "");
  CHECK(has(complaint(elf.bytes(), BootProtocol::pvh), "without the note that gives a PVH entry"));
  for (uint32_t alignment : {4u, 8u}) {
    ElfFile noted;
    noted.add_pvh_note(kMiB + 0x20, alignment);
    const TemporaryFile file(noted.bytes());
    auto automatic = KernelFile::open(file.path());
    REQUIRE(automatic.ok());
    CHECK(automatic->image().protocol == BootProtocol::pvh);
    CHECK(automatic->image().entry.value == kMiB + 0x20);
    auto chosen = KernelFile::open(file.path(), BootProtocol::linux64);
    REQUIRE(chosen.ok());
    CHECK(chosen->image().protocol == BootProtocol::linux64);
    CHECK(chosen->image().entry.value == kMiB + 0x10);
  }
}

TEST_CASE("kernel: hostile ELF files") {
  const auto changed = [](auto change) {
    ElfFile elf;
    change(elf);
    return complaint(elf.bytes());
  };
  using E = ElfFile;
  CHECK(changed([](E&) {}) == "");
  CHECK(has(changed([](E& e) { e.header.e_machine = EM_AARCH64; }), "not for 64-bit x86"));
  CHECK(has(changed([](E& e) { e.header.e_ident[EI_CLASS] = ELFCLASS32; }), "not for 64-bit x86"));
  CHECK(has(changed([](E& e) { e.header.e_type = ET_REL; }), "cannot be run"));
  CHECK(has(changed([](E& e) { e.header.e_phnum = 65535; }), "65535 ELF program headers: 1 to 128"));
  CHECK(has(changed([](E& e) { e.header.e_phentsize = 1; }), "unknown size"));
  CHECK(has(changed([](E& e) { e.header.e_phoff = ~0ull; }), "truncated"));
  CHECK(has(changed([](E& e) { e.header.e_phoff = ~0ull - 55; }), "truncated"));
  CHECK(has(changed([](E& e) { e.segments.clear(); }), "0 ELF program headers"));
  CHECK(has(changed([](E& e) { e.segments.resize(1), e.segments[0].p_memsz = e.segments[0].p_filesz = 0; }),
            "nothing to load"));
  CHECK(has(changed([](E& e) { e.segments[1].p_filesz = 0x3001; }), "segment 1 is longer in the file than in memory"));
  CHECK(has(changed([](E& e) { e.segments[1].p_offset = ~0ull; }), "segment 1 is not all in the file"));
  CHECK(has(changed([](E& e) { e.segments[1].p_offset = ~0ull - 0x7ff; }), "segment 1 is not all in the file"));
  CHECK(has(changed([](E& e) { e.segments[1].p_filesz = e.segments[1].p_memsz = ~0ull; }), "not all in the file"));
  CHECK(has(changed([](E& e) { e.segments[1].p_memsz = ~0ull; }), "outside 1 MiB to 3 GiB"));
  CHECK(has(changed([](E& e) { e.segments[1].p_paddr = ~0ull - 0x7ff; }), "outside 1 MiB to 3 GiB"));
  CHECK(has(changed([](E& e) { e.segments[1].p_paddr = kHoleEnd; }), "outside 1 MiB to 3 GiB"));
  CHECK(has(changed([](E& e) { e.segments[1].p_paddr = layout::kBootInfo.value; }), "at 0x7000 + 0x3000, outside"));
  CHECK(has(changed([](E& e) { e.segments[1].p_paddr = kMiB - 1; }), "outside 1 MiB to 3 GiB"));
  CHECK(has(changed([](E& e) { e.segments[1].p_paddr = kMiB + 0xfff; }), "overlap at 0x100fff"));
  CHECK(has(changed([](E& e) { e.segments[1].p_paddr = kMiB - 0; }), "overlap at 0x100000"));
  CHECK(has(changed([](E& e) { e.segments[1].p_memsz = 0x80000000; }), "needs memory up to 2050 MiB"));
  CHECK(has(changed([](E& e) { e.header.e_entry = 0; }), "its entry 0x0 lies in no segment"));
  CHECK(has(changed([](E& e) { e.header.e_entry = 2 * kMiB + 0x800; }), "lies in no segment"));
  CHECK(has(changed([](E& e) { e.add_pvh_note(0xffffffff00100000); }), "lies in no segment"));
  CHECK(has(changed([](E& e) { e.add_pvh_note(kMiB), e.segments[2].p_offset = ~0ull; }), "not all in the file"));
  CHECK(has(changed([](E& e) { e.add_pvh_note(kMiB), e.rest.resize(0x20000), e.segments[2].p_filesz = 0x10001; }),
            "64 KiB"));
  // Notes that lie about their lengths are no notes.
  for (size_t field = 0; field < 8; field += 4) {
    CHECK(changed([&](E& e) { e.add_pvh_note(kMiB), put(e.rest, 0x3000 + field, ~uint32_t{0}); }) == "");
    CHECK(changed([&](E& e) { e.add_pvh_note(kMiB), put(e.rest, 0x3014 + field, ~uint32_t{0}); }) == "");
  }
  ElfFile elf;
  elf.add_pvh_note(kMiB + 0x20);
  const auto whole = elf.bytes();
  for (size_t size = 4; size < whole.size(); size += size < 0x200 ? 1 : 97) {
    CAPTURE(size);
    CHECK(complaint({whole.begin(), whole.begin() + static_cast<long>(size)}) != "");
  }
}

TEST_CASE("kernel: random bytes, and random changes to sound files, never crash") {
  std::mt19937 random(42);
  const auto byte = [&] { return static_cast<std::byte>(random()); };
  ElfFile elf;
  elf.add_pvh_note(kMiB + 0x20);
  for (int round = 0; round < 150; ++round) {
    std::vector<std::byte> noise(1 + random() % 5000);
    for (auto& each : noise) each = byte();
    CHECK(has(complaint(noise), "neither"));

    auto image = bzimage();
    for (int change = 0; change < 4; ++change) image[0x1f1 + random() % 0x7b] = byte();
    complaint(image);
    auto changed = elf.bytes();
    for (int change = 0; change < 4; ++change) changed[4 + random() % (64 + 3 * 56 - 4)] = byte();
    complaint(changed);
  }
}

TEST_CASE("initrd: the highest place below the kernel's limit and the hole") {
  const TemporaryFile file(bzimage());
  auto kernel = KernelFile::open(file.path());
  REQUIRE(kernel.ok());
  KernelImage image = kernel->image();
  GuestMemory memory = make_memory(64 * kMiB);
  const std::vector<std::byte> content(5000, std::byte{7});
  auto initrd = place_initrd(memory, image, content);
  REQUIRE(initrd.ok());
  CHECK(initrd->start.value == 64 * kMiB - 2 * kPageSize);
  CHECK(initrd->size_bytes == 5000);
  CHECK(std::memcmp(memory.slice(initrd->start, 5000), content.data(), 5000) == 0);

  image.header.initrd_addr_max = 40 * kMiB - 1;
  CHECK(find_initrd_place(memory, image, 4096)->start.value == 40 * kMiB - 4096);
  CHECK(find_initrd_place(memory, image, 20 * kMiB)->start.value == image.end.value);
  CHECK(find_initrd_place(memory, image, 0).ok());
  for (uint64_t size : {20 * kMiB + 1, 64 * kMiB, ~uint64_t{0}}) {
    auto refused = find_initrd_place(memory, image, size);
    REQUIRE_FALSE(refused.ok());
    CHECK(has(refused.error().message, "initrd: " + std::to_string(size) + " bytes do not fit between"));
  }
  image.header.initrd_addr_max = 0;
  CHECK_FALSE(find_initrd_place(memory, image, 1).ok());
  image.header.initrd_addr_max = ~0u;
  CHECK(find_initrd_place(make_memory(6144 * kMiB), image, 4096)->start.value == kHoleStart - 4096);
}

TEST_CASE("memory map: what is not the guest's is cut out") {
  const GuestMemory memory = make_memory(4096 * kMiB);
  const MemoryRange reserved[] = {{layout::kPciConfig, layout::kPciConfigBytes, MemoryKind::reserved},
                                  {{64 * kMiB}, kMiB, MemoryKind::acpi},
                                  {{64 * kMiB + kMiB / 2}, kMiB, MemoryKind::reserved}};
  const auto map = memory_map(memory, reserved);
  struct {
    uint64_t start, end;
    MemoryKind kind;
  } const expected[] = {
      {0, 0x6000, MemoryKind::usable},
      {0x6000, 0x7000, MemoryKind::reserved},
      {0x7000, 0x9fc00, MemoryKind::usable},
      {0x9fc00, 0xa0000, MemoryKind::reserved},
      {0xe0000, 0x100000, MemoryKind::reserved},
      {0x100000, 64 * kMiB, MemoryKind::usable},
      {64 * kMiB, 65 * kMiB, MemoryKind::acpi},
      {65 * kMiB, 65 * kMiB + kMiB / 2, MemoryKind::reserved},
      {65 * kMiB + kMiB / 2, kHoleStart, MemoryKind::usable},
      {0xe0000000, 0xf0000000, MemoryKind::reserved},
      {kHoleEnd, kHoleEnd + 1024 * kMiB, MemoryKind::usable},
  };
  REQUIRE(map.size() == std::size(expected));
  for (size_t index = 0; index < map.size(); ++index) {
    CAPTURE(index);
    CHECK(map[index].start.value == expected[index].start);
    CHECK(map[index].start.value + map[index].size_bytes == expected[index].end);
    CHECK(map[index].kind == expected[index].kind);
  }
}

TEST_CASE("entry: boot_params, GDT and page tables of a 64-bit kernel") {
  const TemporaryFile file(bzimage());
  auto kernel = KernelFile::open(file.path());
  REQUIRE(kernel.ok());
  GuestMemory memory = make_memory(64 * kMiB);
  auto state =
      prepare_entry(memory, kernel->image(),
                    {.command_line = "console=ttyS0", .initrd = InitrdPlace{{48 * kMiB}, 12345}, .rsdp = {0xe0000}});
  REQUIRE(state.ok());
  CHECK(state->rip == 16 * kMiB + 0x200);
  CHECK(state->rsi == 0x7000);
  CHECK(state->rflags == 2);
  CHECK(state->cr0 == 0x80000011);
  CHECK(state->cr3 == 0x9000);
  CHECK(state->cr4 == 0x20);
  CHECK(state->efer == 0x500);
  CHECK(state->code.selector == 0x10);
  CHECK(state->data.selector == 0x18);
  CHECK(state->code.l == 1);
  CHECK(state->code.db == 0);

  const auto params = memory.load<boot_params>({state->rsi});
  REQUIRE(params.has_value());
  CHECK(params->hdr.header == 0x53726448);
  CHECK(params->hdr.boot_flag == 0xaa55);
  CHECK(params->hdr.type_of_loader == 0xff);
  CHECK(params->hdr.init_size == 4 * kMiB);
  CHECK(params->hdr.cmd_line_ptr == 0x20000);
  CHECK(params->hdr.ramdisk_image == 48 * kMiB);
  CHECK(params->hdr.ramdisk_size == 12345);
  CHECK(params->ext_ramdisk_image == 0);
  CHECK(params->acpi_rsdp_addr == 0xe0000);
  CHECK(params->sentinel == 0);
  CHECK(params->e820_entries == 6);
  CHECK(params->e820_table[5].addr == kMiB);
  CHECK(params->e820_table[5].size == 63 * kMiB);
  CHECK(params->e820_table[5].type == 1);
  CHECK(std::string(reinterpret_cast<const char*>(memory.slice({0x20000}, 64))) == "console=ttyS0");
  struct {
    uint64_t next;
    uint32_t type, length;
    uint64_t seed[4];
  } seed;
  REQUIRE(memory.read({params->hdr.setup_data}, &seed, sizeof seed));
  CHECK(seed.next == 0);
  CHECK(seed.type == 9);
  CHECK(seed.length == 32);
  CHECK(seed.seed[0] != seed.seed[1]);

  CHECK(memory.load<uint64_t>({state->gdt_base + 0x10}) == 0x00af9b000000ffff);
  CHECK(memory.load<uint64_t>({state->gdt_base + 0x18}) == 0x00cf93000000ffff);
  CHECK(memory.load<uint64_t>({state->gdt_base + 0x20}) == 0x00008b0000000067);
  CHECK(state->gdt_limit == 0x2f);

  // A walk as the CPU does it.
  const auto walk = [&](uint64_t address) {
    uint64_t table = state->cr3;
    for (int shift = 39; shift >= 21; shift -= 9) {
      const uint64_t entry = memory.load<uint64_t>({table + 8 * (address >> shift & 511)}).value_or(0);
      if (!(entry & 1)) return ~uint64_t{0};
      if (entry & 0x80) {
        const uint64_t page = 1ull << shift;
        return (entry & ~(page - 1)) | (address & (page - 1));
      }
      table = entry & ~0xfffull;
    }
    return ~uint64_t{0};
  };
  for (uint64_t address : {uint64_t{0}, uint64_t{0x7000}, 16 * kMiB, kHoleStart, kHoleEnd - 1}) {
    CHECK(walk(address) == address);
  }
  CHECK(walk(kHoleEnd) == ~uint64_t{0});
  REQUIRE(prepare_entry(memory, kernel->image(), {.page_tables = PageTables::half_terabyte}).ok());
  for (uint64_t address : {uint64_t{0}, kHoleStart, kHoleEnd, 512 * 1024 * kMiB - 1}) CHECK(walk(address) == address);
}

TEST_CASE("entry: start info of a PVH kernel") {
  ElfFile elf;
  elf.add_pvh_note(kMiB + 0x20);
  const TemporaryFile file(elf.bytes());
  auto kernel = KernelFile::open(file.path());
  REQUIRE(kernel.ok());
  GuestMemory memory = make_memory(16 * kMiB);
  auto state = prepare_entry(memory, kernel->image(),
                             {.command_line = "quiet", .initrd = InitrdPlace{{12 * kMiB}, 999}, .rsdp = {0xe0000}});
  REQUIRE(state.ok());
  CHECK(state->rip == kMiB + 0x20);
  CHECK(state->rbx == 0x7000);
  CHECK(state->cr0 == 0x11);
  CHECK(state->cr3 == 0);
  CHECK(state->cr4 == 0);
  CHECK(state->efer == 0);
  CHECK(state->code.l == 0);
  CHECK(state->code.db == 1);
  CHECK(state->task.limit == 0x67);
  CHECK(memory.load<uint64_t>({state->gdt_base + 0x10}) == 0x00cf9b000000ffff);
  const auto word = [&](uint64_t offset) { return memory.load<uint32_t>({0x7000 + offset}).value(); };
  const auto quad = [&](uint64_t address) { return memory.load<uint64_t>({address}).value(); };
  CHECK(word(0) == 0x336ec578);
  CHECK(word(4) == 1);
  CHECK(word(12) == 1);
  CHECK(quad(quad(0x7010)) == 12 * kMiB);
  CHECK(quad(quad(0x7010) + 8) == 999);
  CHECK(quad(0x7018) == 0x20000);
  CHECK(quad(0x7020) == 0xe0000);
  CHECK(word(48) == 6);
  const uint64_t last = quad(0x7028) + 5 * 24;
  CHECK(quad(last) == kMiB);
  CHECK(quad(last + 8) == 15 * kMiB);
  CHECK(memory.load<uint32_t>({last + 16}) == 1);
}

TEST_CASE("command line: at most what the kernel takes") {
  const TemporaryFile file(bzimage());
  auto kernel = KernelFile::open(file.path());
  REQUIRE(kernel.ok());
  KernelImage image = kernel->image();
  GuestMemory memory = make_memory(64 * kMiB);
  const auto refusal = [&](const std::string& text) {
    auto state = prepare_entry(memory, image, {.command_line = text});
    return state ? std::string() : state.error().message;
  };
  CHECK(refusal(std::string(2047, 'a')) == "");
  CHECK(refusal(std::string(2048, 'a')) == "command line: 2048 characters, the kernel takes at most 2047");
  CHECK(has(refusal(std::string("a\0b", 3)), "NUL"));
  image.header.cmdline_size = 0;
  CHECK(has(refusal(std::string(256, 'a')), "256 characters, the kernel takes at most 255"));
  image.header.cmdline_size = ~0u;
  CHECK(refusal(std::string(65535, 'a')) == "");
  CHECK(has(refusal(std::string(65536, 'a')), "at most 65535"));
}

TEST_CASE("entry: a machine too small for one, and a map too long") {
  ElfFile elf;
  const TemporaryFile file(elf.bytes());
  auto kernel = KernelFile::open(file.path());
  REQUIRE(kernel.ok());
  GuestMemory tiny = make_memory(kPageSize);
  auto state = prepare_entry(tiny, kernel->image(), {});
  REQUIRE_FALSE(state.ok());
  CHECK(has(state.error().message, "memory: 4 KiB: a guest needs at least 1024 KiB"));
  GuestMemory memory = make_memory(16 * kMiB);
  std::vector<MemoryRange> many;
  for (uint64_t index = 0; index < 128; ++index)
    many.push_back({{kHoleStart + index * kPageSize}, kPageSize, MemoryKind::reserved});
  auto refused = prepare_entry(memory, kernel->image(), {.reserved = many});
  REQUIRE_FALSE(refused.ok());
  CHECK(has(refused.error().message, "a kernel takes at most 128"));
}
