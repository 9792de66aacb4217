// SPDX-License-Identifier: Apache-2.0
// A transport as a class: a Device that virtio devices are attached to.
#pragma once

#include "clone/abi/transport.h"
#include "clone/sdk/device.hpp"

namespace clone_sdk {

class Transport : public Device {
 public:
  using Device::Device;
  // See clone_transport_type.attach. The attachment's pointers last as long as the transport.
  virtual Result<void> attach(const clone_virtio_attachment& attachment) = 0;
};

namespace detail {

template <typename T>
inline constexpr clone_transport_type transport_type = {
    sizeof(clone_transport_type), 0, &T::descriptor, &DeviceThunks<T>::ops,
    [](void* transport, const clone_virtio_attachment* attachment, clone_err* err) noexcept {
      return guarded(err,
                     [&] { return static_cast<Transport*>(static_cast<Device*>(transport))->attach(*attachment); });
    }};

}  // namespace detail

template <typename... Transports>
const clone_transport_factory* transport_factory() {
  static constexpr const clone_transport_type* types[] = {&detail::transport_type<Transports>...};
  static constexpr clone_transport_factory factory = {sizeof(clone_transport_factory), sizeof...(Transports),
                                                      [](uint32_t index) noexcept -> const clone_transport_type* {
                                                        return index < sizeof...(Transports) ? types[index] : nullptr;
                                                      }};
  return &factory;
}

}  // namespace clone_sdk
