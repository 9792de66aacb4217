// SPDX-License-Identifier: Apache-2.0
// A device as a class: derive from Device, give it a `static const clone_descriptor descriptor`, list it in
// CLONE_SDK_DEVICES. The thunks below turn exceptions and Results into what crosses the border.
#pragma once

#include <memory>
#include <string_view>

#include "clone/abi/device.h"
#include "clone/sdk/host.hpp"
#include "clone/sdk/options.hpp"
#include "clone/sdk/state.hpp"

namespace clone_sdk {

// The functions and their threads are those of clone_device_ops (clone/abi/device.h).
class Device {
 public:
  explicit Device(const clone_host* host) : host_(host) {}
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  virtual ~Device() = default;

  virtual Result<void> configure(const Options& options) = 0;
  virtual Result<void> start() { return {}; }
  virtual Result<void> quiesce() = 0;
  virtual Result<void> resume() = 0;
  virtual Result<void> reset_device() = 0;
  virtual Result<void> save(const Writer&) { return Error{"this device cannot be saved", 0, CLONE_ERR_UNSUPPORTED}; }
  virtual Result<void> load(const Reader&) { return Error{"this device cannot be loaded", 0, CLONE_ERR_UNSUPPORTED}; }
  virtual const void* extension(std::string_view) { return nullptr; }

  const Host& host() const { return host_; }

 private:
  Host host_;
};

namespace detail {

template <typename T>
struct DeviceThunks {
  static Device& self(void* device) { return *static_cast<Device*>(device); }

  static clone_status create(const clone_host* host, void** device, clone_err* err) noexcept {
    return guarded(err, [&]() -> Result<void> {
      *device = static_cast<Device*>(new T(host));
      return {};
    });
  }
  static void destroy(void* device) noexcept { delete &self(device); }
  static clone_status configure(void* device, const clone_options* options, clone_err* err) noexcept {
    return guarded(err, [&] { return self(device).configure(Options(*options)); });
  }
  template <Result<void> (Device::*member)()>
  static clone_status call(void* device, clone_err* err) noexcept {
    return guarded(err, [&] { return (self(device).*member)(); });
  }
  static clone_status save(void* device, const clone_writer* writer, clone_err* err) noexcept {
    return guarded(err, [&] { return self(device).save(Writer(*writer)); });
  }
  static clone_status load(void* device, const clone_reader* reader, clone_err* err) noexcept {
    return guarded(err, [&] { return self(device).load(Reader(*reader)); });
  }
  static const void* get_extension(void* device, const char* id) noexcept { return self(device).extension(id); }

  static constexpr clone_device_ops ops = {sizeof(clone_device_ops),
                                           0,
                                           create,
                                           destroy,
                                           configure,
                                           call<&Device::start>,
                                           call<&Device::quiesce>,
                                           call<&Device::resume>,
                                           call<&Device::reset_device>,
                                           save,
                                           load,
                                           get_extension};
};

template <typename T>
inline constexpr clone_device_type device_type = {sizeof(clone_device_type), 0, &T::descriptor, &DeviceThunks<T>::ops};

}  // namespace detail

// The factory of a plugin's devices, for get_factory().
template <typename... Devices>
const clone_device_factory* device_factory() {
  static constexpr const clone_device_type* types[] = {&detail::device_type<Devices>...};
  static constexpr clone_device_factory factory = {sizeof(clone_device_factory), sizeof...(Devices),
                                                   [](uint32_t index) noexcept -> const clone_device_type* {
                                                     return index < sizeof...(Devices) ? types[index] : nullptr;
                                                   }};
  return &factory;
}

}  // namespace clone_sdk
