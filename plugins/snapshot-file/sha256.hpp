// SPDX-License-Identifier: Apache-2.0
// SHA-256 in steps. Not OpenSSL's EVP interface: through that, all of libcrypto would come into the plugin.
#pragma once

#define OPENSSL_SUPPRESS_DEPRECATED
#include <openssl/sha.h>

#include <array>
#include <cstddef>
#include <span>

namespace snapshot_file {

using Digest = std::array<std::byte, SHA256_DIGEST_LENGTH>;

class Sha256 {
 public:
  Sha256() { SHA256_Init(&context_); }
  Sha256& update(std::span<const std::byte> bytes) {
    SHA256_Update(&context_, bytes.data(), bytes.size());
    return *this;
  }
  Digest finish() {
    Digest digest;
    SHA256_Final(reinterpret_cast<unsigned char*>(digest.data()), &context_);
    return digest;
  }

 private:
  SHA256_CTX context_;
};

inline Digest sha256(std::span<const std::byte> bytes) { return Sha256().update(bytes).finish(); }

}  // namespace snapshot_file
