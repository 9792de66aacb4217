// SPDX-License-Identifier: Apache-2.0
// Finds the ACPI tables as a kernel without boot_params' help does, and checks what stands in them (ACPI 6.5 §5.2).
#include "guest.hpp"

namespace {

bool same(uint64_t address, const char* text) {
  for (; *text; ++text, ++address)
    if (at<uint8_t>(address) != static_cast<uint8_t>(*text)) return false;
  return true;
}

uint8_t sum(uint64_t start, uint32_t size_bytes) {
  uint8_t total = 0;
  for (uint32_t i = 0; i < size_bytes; ++i) total = static_cast<uint8_t>(total + at<uint8_t>(start + i));
  return total;
}

uint32_t length_of(uint64_t table) { return at<uint32_t>(table + 4); }

uint64_t find_rsdp() {
  for (uint64_t address = 0xe'0000; address < 0x10'0000; address += 16)
    if (same(address, "RSD PTR ")) return address;
  return 0;
}

uint64_t find_table(uint64_t xsdt, const char* signature) {
  for (uint32_t offset = 36; offset + 8 <= length_of(xsdt); offset += 8) {
    const uint64_t table = at<uint64_t>(xsdt + offset);
    if (same(table, signature)) {
      CHECK_EQUAL(sum(table, length_of(table)), 0);
      return table;
    }
  }
  print("FAILED no table ", signature, "\n");
  power_off();
}

unsigned count_in_dsdt(uint64_t dsdt, const char* text) {
  unsigned count = 0;
  for (uint32_t i = 36; i < length_of(dsdt); ++i) count += same(dsdt + i, text);
  return count;
}

}  // namespace

void program() {
  const uint64_t rsdp = find_rsdp();
  if (!CHECK(rsdp != 0)) return;
  CHECK_EQUAL(rsdp, at<uint64_t>(kBootInfo + 0x70));
  CHECK_EQUAL(sum(rsdp, 20), 0);
  CHECK_EQUAL(sum(rsdp, 36), 0);
  const uint64_t xsdt = at<uint64_t>(rsdp + 24);
  CHECK(same(xsdt, "XSDT"));
  CHECK_EQUAL(sum(xsdt, length_of(xsdt)), 0);

  const uint64_t madt = find_table(xsdt, "APIC");
  CHECK_EQUAL(at<uint32_t>(madt + 36), kLocalApic);
  unsigned processors = 0, io_apics = 0;
  for (uint32_t offset = 44; offset < length_of(madt); offset += at<uint8_t>(madt + offset + 1)) {
    if (!CHECK(at<uint8_t>(madt + offset + 1) >= 2)) return;
    const uint8_t type = at<uint8_t>(madt + offset);
    if (type == 0) {
      CHECK_EQUAL(at<uint8_t>(madt + offset + 3), processors);
      CHECK_EQUAL(at<uint32_t>(madt + offset + 4), 1);
      ++processors;
    }
    if (type == 1) {
      CHECK_EQUAL(at<uint32_t>(madt + offset + 4), 0xfec0'0000);
      ++io_apics;
    }
  }
  CHECK_EQUAL(io_apics, 1);

  const uint64_t fadt = find_table(xsdt, "FACP");
  CHECK_EQUAL(at<uint16_t>(fadt + 46), 9);  // SCI_INT
  CHECK_EQUAL(at<uint32_t>(fadt + 56), kPmStatus);
  CHECK_EQUAL(at<uint32_t>(fadt + 64), kPmControl);
  CHECK_EQUAL(at<uint64_t>(fadt + 120), kPmReset);  // RESET_REG's address
  CHECK_EQUAL(at<uint8_t>(fadt + 128), 0x06);
  CHECK_EQUAL(in16(kPmControl) & 1, 1);  // SCI_EN: with SMI_CMD 0 there is no way to set it
  CHECK_EQUAL(at<uint32_t>(fadt + 48), 0);
  // The timer runs.
  const auto timer = static_cast<uint16_t>(at<uint32_t>(fadt + 76));
  const uint32_t before = in32(timer);
  uint32_t now = before;
  for (unsigned i = 0; i < 1000 && now == before; ++i) now = in32(timer);
  CHECK(now != before);

  const uint64_t dsdt = at<uint64_t>(fadt + 140);
  CHECK(same(dsdt, "DSDT"));
  CHECK_EQUAL(dsdt, at<uint32_t>(fadt + 40));
  CHECK_EQUAL(sum(dsdt, length_of(dsdt)), 0);
  print(processors, " processors, ", count_in_dsdt(dsdt, "LNRO0005"));
  print(" virtio devices\n");
}
