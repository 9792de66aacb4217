// SPDX-License-Identifier: Apache-2.0
// The one exported function and the manifest of a plugin written in C++. Everything of the SDK in one include.
//
//   CLONE_SDK_PLUGIN("fortune", "1.0.0", "Example Ltd", "MIT", "A device that tells fortunes.",
//                    CLONE_PROVIDES("device", "fortune", ""))
//   CLONE_SDK_DEVICES(Fortune)
#pragma once

#include <cstring>

#include "clone/abi/plugin.h"
#include "clone/sdk/balloon_policy.hpp"
#include "clone/sdk/device.hpp"
#include "clone/sdk/snapshot_backend.hpp"
#include "clone/sdk/transport.hpp"
#include "clone/sdk/virtio.hpp"

#define CLONE_SDK_EXPORT extern "C" __attribute__((visibility("default")))

// The manifest. Every argument is a string literal; too long a one is a compile error.
#define CLONE_SDK_PLUGIN(id, version, vendor, licence, description, provides)                               \
  namespace {                                                                                               \
  CLONE_PLUGIN_SECTION const clone_manifest clone_sdk_manifest = {{'C', 'L', 'O', 'N', 'E', 'P', 'L', 'G'}, \
                                                                  sizeof(clone_manifest),                   \
                                                                  CLONE_ABI_MAJOR,                          \
                                                                  CLONE_ABI_MINOR,                          \
                                                                  0,                                        \
                                                                  id,                                       \
                                                                  version,                                  \
                                                                  vendor,                                   \
                                                                  licence,                                  \
                                                                  description,                              \
                                                                  provides};                                \
  }

// The entry point, with a body that finds a factory by `id`.
#define CLONE_SDK_ENTRY(find_factory)                                                                                \
  CLONE_SDK_EXPORT const clone_plugin* clone_plugin_entry() {                                                        \
    static constexpr clone_plugin plugin = {                                                                         \
        sizeof(clone_plugin), 0, &clone_sdk_manifest, nullptr, nullptr, [](const char* id) noexcept -> const void* { \
          return find_factory(std::string_view(id));                                                                 \
        }};                                                                                                          \
    return &plugin;                                                                                                  \
  }

#define CLONE_SDK_DEVICES(...)                                                              \
  namespace {                                                                               \
  const void* clone_sdk_find_factory(std::string_view id) {                                 \
    return id == CLONE_DEVICE_FACTORY ? clone_sdk::device_factory<__VA_ARGS__>() : nullptr; \
  }                                                                                         \
  }                                                                                         \
  CLONE_SDK_ENTRY(clone_sdk_find_factory)

#define CLONE_SDK_TRANSPORTS(...)                                                                 \
  namespace {                                                                                     \
  const void* clone_sdk_find_factory(std::string_view id) {                                       \
    return id == CLONE_TRANSPORT_FACTORY ? clone_sdk::transport_factory<__VA_ARGS__>() : nullptr; \
  }                                                                                               \
  }                                                                                               \
  CLONE_SDK_ENTRY(clone_sdk_find_factory)

#define CLONE_SDK_BALLOON_POLICIES(...)                                                                     \
  namespace {                                                                                               \
  const void* clone_sdk_find_factory(std::string_view id) {                                                 \
    return id == CLONE_BALLOON_POLICY_FACTORY ? clone_sdk::balloon_policy_factory<__VA_ARGS__>() : nullptr; \
  }                                                                                                         \
  }                                                                                                         \
  CLONE_SDK_ENTRY(clone_sdk_find_factory)

#define CLONE_SDK_SNAPSHOT_BACKENDS(...)                                                                        \
  namespace {                                                                                                   \
  const void* clone_sdk_find_factory(std::string_view id) {                                                     \
    return id == CLONE_SNAPSHOT_BACKEND_FACTORY ? clone_sdk::snapshot_backend_factory<__VA_ARGS__>() : nullptr; \
  }                                                                                                             \
  }                                                                                                             \
  CLONE_SDK_ENTRY(clone_sdk_find_factory)
