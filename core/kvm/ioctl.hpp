// SPDX-License-Identifier: Apache-2.0
// The two shapes that every call to KVM takes: an ioctl that names itself when it fails, and structs with an array at
// their end.
#pragma once

#include <sys/ioctl.h>

#include <cstdint>
#include <span>
#include <vector>

#include "util/result.hpp"

namespace vmm {

template <typename Argument>
Result<int> kvm_ioctl(int fd, unsigned long request, const char* name, Argument argument) {
  for (;;) {
    const int value = ::ioctl(fd, request, argument);
    if (value >= 0) return value;
    if (errno != EINTR) return errno_error(name);
  }
}

#define KVM_CALL(fd, request, argument) ::vmm::kvm_ioctl(fd, request, #request, argument)

// A struct of the KVM interface that ends in an array of `count` entries, zeroed.
template <typename Header, typename Entry>
class FlexibleStruct {
 public:
  explicit FlexibleStruct(size_t count)
      : words_((sizeof(Header) + count * sizeof(Entry) + sizeof(uint64_t) - 1) / sizeof(uint64_t)), count_(count) {}

  Header* get() { return reinterpret_cast<Header*>(words_.data()); }
  Header* operator->() { return get(); }
  std::span<Entry> entries() {
    return {reinterpret_cast<Entry*>(reinterpret_cast<std::byte*>(words_.data()) + sizeof(Header)), count_};
  }

 private:
  std::vector<uint64_t> words_;
  size_t count_;
};

}  // namespace vmm
