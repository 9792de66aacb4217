// SPDX-License-Identifier: Apache-2.0
// A minimal device on the plain C interface, and with -DBREAK_… one that breaks one rule of it. PLUGIN_NAME names it.
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "clone/abi/bus.h"
#include "clone/abi/device.h"
#include "clone/abi/machine.h"
#include "clone/abi/plugin.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

#ifdef BREAK_UNRESOLVED
extern "C" int a_function_that_is_nowhere(void);
#endif

namespace {

constexpr uint32_t kVersion = 1;

struct Device {
  const clone_host* host;
  uint32_t value;
};

clone_status refuse(clone_err* err, clone_status status, const char* message) {
  if (err) std::snprintf(err->message, sizeof err->message, "%s", message);
  return status;
}

clone_status create(const clone_host* host, void** device, clone_err*) {
#ifdef BREAK_CREATE_THROWS
  throw std::runtime_error("out of patience");
#endif
#ifdef BREAK_CREATE_CALLS
  static_cast<const clone_host_machine*>(host->get_extension(host, CLONE_HOST_MACHINE))->vcpu_count(host);
#endif
  *device = new Device{host, 0};
  return CLONE_OK;
}

void destroy(void* device) { delete static_cast<Device*>(device); }

clone_status configure(void* device, const clone_options* options, clone_err*) {
  static_cast<Device*>(device)->value = static_cast<uint32_t>(options->values[0]->number);
#ifdef BREAK_CONFIGURE_CRASHES
  *reinterpret_cast<volatile int*>(options->values[0]->number - 7) = 1;
#endif
#ifdef BREAK_CONFIGURE_HANGS
  for (;;) ::pause();
#endif
#ifdef BREAK_CONFIGURE_EXITS
  std::exit(0);
#endif
#ifdef BREAK_CLAIM
  static constexpr clone_bus_handler handler = {sizeof(clone_bus_handler), 0, [](void*, uint64_t, void*, uint32_t) {},
                                                [](void*, uint64_t, const void*, uint32_t) {}};
  const clone_host* host = static_cast<Device*>(device)->host;
  uint64_t claim = 0;
  static_cast<const clone_host_bus*>(host->get_extension(host, CLONE_HOST_BUS))
      ->claim(host, CLONE_BUS_PIO, 0x5e0, 4, &handler, device, &claim, nullptr);
#endif
#ifdef BREAK_LEAK
  return ::open("/dev/null", O_RDONLY) >= 0 ? CLONE_OK : CLONE_ERR_SYSTEM;
#endif
  return CLONE_OK;
}

clone_status nothing(void*, clone_err*) { return CLONE_OK; }

clone_status save(void* device, const clone_writer* writer, clone_err* err) {
#ifdef BREAK_SAVE
  static uint32_t saved_before;
  const uint32_t value = ++saved_before;
#else
  const uint32_t value = static_cast<Device*>(device)->value;
#endif
  (void)device;
#ifdef BREAK_SILENT_SAVE
  return CLONE_OK;
#endif
  return writer->put(writer->context, "value", kVersion, &value, sizeof value, err);
}

clone_status load(void* device, const clone_reader* reader, clone_err* err) {
  uint32_t version = 0;
  const void* data = nullptr;
  uint64_t size_bytes = 0;
  const clone_status status = reader->get(reader->context, "value", &version, &data, &size_bytes, err);
  if (status != CLONE_OK) return status;
#ifdef BREAK_LOAD
  if (size_bytes != sizeof(uint32_t)) std::abort();
#endif
  if (version != kVersion || size_bytes != sizeof(uint32_t))
    return refuse(err, CLONE_ERR_CORRUPT, "section value is damaged");
  std::memcpy(&static_cast<Device*>(device)->value, data, sizeof(uint32_t));
  return CLONE_OK;
}

#ifdef BREAK_EXTENSION
const void* get_extension(void* device, const char*) { return device; }
#else
const void* get_extension(void*, const char*) { return nullptr; }
#endif

#ifdef BREAK_DEFAULT
#define DEFAULT "1001"
#else
#define DEFAULT "7"
#endif
constexpr clone_option kValue = {
    sizeof(clone_option), CLONE_OPTION_NUMBER, 0, 0, "value", DEFAULT, "A number to keep.", 0, 1000, nullptr};
constexpr const clone_option* kOptions[] = {&kValue, nullptr};
constexpr clone_descriptor kDescriptor = {sizeof(clone_descriptor),
#ifdef BREAK_SILENT_SAVE
                                          0,
#else
                                          CLONE_CAN_SAVE,
#endif
#ifdef BREAK_MISMATCH
                                          "something-else",
#else
                                          PLUGIN_NAME,
#endif
                                          "A device that keeps a number.",
                                          kOptions,
                                          ""};
constexpr clone_device_ops kOps = {sizeof(clone_device_ops),
                                   0,
                                   create,
                                   destroy,
                                   configure,
                                   nullptr,
                                   nothing,
                                   nothing,
                                   nothing,
                                   save,
                                   load,
                                   get_extension};
constexpr clone_device_type kType = {sizeof(clone_device_type), 0, &kDescriptor, &kOps};
constexpr clone_device_factory kFactory = {sizeof(clone_device_factory), 1,
                                           [](uint32_t index) { return index == 0 ? &kType : nullptr; }};

const void* get_factory(const char* id) { return std::strcmp(id, CLONE_DEVICE_FACTORY) == 0 ? &kFactory : nullptr; }

clone_status init(const clone_host*, clone_err* err) {
#ifdef BREAK_INIT_THROWS
  throw std::runtime_error("out of patience");
#endif
#ifdef BREAK_INIT_CRASHES
  *reinterpret_cast<volatile int*>(err->code) = 1;
#endif
  (void)err;
  return CLONE_OK;
}

#ifdef BREAK_ABI_MAJOR
constexpr uint32_t kMajor = CLONE_ABI_MAJOR + 1;
#else
constexpr uint32_t kMajor = CLONE_ABI_MAJOR;
#endif
#ifdef BREAK_HOST_MINOR
constexpr uint32_t kLeastHostMinor = CLONE_ABI_MINOR + 9;
#else
constexpr uint32_t kLeastHostMinor = 0;
#endif

#ifndef BREAK_NO_MANIFEST
CLONE_PLUGIN_SECTION
#endif
const clone_manifest kManifest = {{'C', 'L', 'O', 'N', 'E', 'P', 'L', 'G'},
                                  sizeof(clone_manifest),
                                  kMajor,
                                  CLONE_ABI_MINOR,
                                  kLeastHostMinor,
                                  PLUGIN_NAME,
                                  "1.0.0",
                                  "clone",
                                  "Apache-2.0",
                                  "Keeps a number",
                                  CLONE_PROVIDES("device", PLUGIN_NAME, "")};
constexpr clone_plugin kPlugin = {sizeof(clone_plugin), 0, &kManifest, init, nullptr, get_factory};

}  // namespace

#ifndef BREAK_NO_ENTRY
EXPORT const clone_plugin* clone_plugin_entry() {
#ifdef BREAK_ENTRY_NULL
  return nullptr;
#endif
#ifdef BREAK_UNRESOLVED
  if (a_function_that_is_nowhere()) return nullptr;
#endif
  return &kPlugin;
}
#else
EXPORT const void* some_other_entry() { return &kPlugin; }
#endif

#ifdef BREAK_TWO_SYMBOLS
EXPORT int another_symbol() { return 1; }
#endif
