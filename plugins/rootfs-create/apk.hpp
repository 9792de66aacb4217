// SPDX-License-Identifier: Apache-2.0
// Alpine's packages: index, versions, dependencies, signatures (apk-tools 2 formats; apk-package(5),
// apk-repositories(5)). All of it is hostile until its signature has been verified.
#pragma once

#include <openssl/evp.h>

#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tree.hpp"

namespace rootfs::apk {

// "name", "name>=1.2", "!name": what a D: or p: field lists.
struct Dependency {
  std::string name;
  std::string relation;  // empty, or one of = < <= > >= ~
  std::string version;
  bool conflict = false;
};
Dependency parse_dependency(std::string_view text);

struct Package {
  std::string record;    // its lines in the index, which the data base of installed packages takes over
  std::string checksum;  // C: of the control segment, "Q1" and base64
  std::string name, version;
  std::vector<Dependency> depends, provides;
  unsigned provider_priority = 0;
  uint64_t size_bytes = 0;
  std::string repository;  // the URL of the folder it is in
};

// -1, 0, 1 as a version is older than, the same as or newer than another.
int compare_versions(std::string_view a, std::string_view b);
bool satisfies(std::string_view version, const Dependency& wanted);

Result<std::vector<Package>> parse_index(std::string_view text, const std::string& repository);

// The packages that `wanted` needs, those that others need first. Each name once; no backtracking: the newest package
// of the name that satisfies a dependency is taken, or the provider of the highest priority.
Result<std::vector<const Package*>> resolve(const std::vector<Package>& packages,
                                            const std::vector<std::string>& wanted);

// The first `count` gzip members, then the rest, as they are in `data`.
Result<std::vector<std::span<const char>>> split_gzip(std::span<const char> data, size_t count);

// Public keys by the names of their files.
class Keys {
 public:
  static Result<Keys> load(const std::string& folder);
  // Whether one of the signatures is by one of the keys: `signatures` is a tar.gz of .SIGN.RSA….KEY entries. Gives its
  // name.
  Result<std::string> verify(std::span<const char> signatures, std::span<const char> signed_bytes, Spool& spool) const;
  const std::string& text(const std::string& name) const { return texts_.at(name); }
  const std::string& folder() const { return folder_; }

 private:
  struct Free {
    void operator()(EVP_PKEY* key) const { EVP_PKEY_free(key); }
  };
  std::string folder_;
  std::map<std::string, std::unique_ptr<EVP_PKEY, Free>> keys_;
  std::map<std::string, std::string> texts_;
};

struct PackageParts {
  Tree control;                // .PKGINFO and scripts
  std::span<const char> data;  // a tar.gz
};
// Takes a package file apart, after checking it against the keys, the index's record and its own data hash.
Result<PackageParts> open_package(std::span<const char> file, const Package& expected, const Keys& keys, Spool& spool);

// `key = value` lines.
std::multimap<std::string, std::string> parse_pkginfo(std::string_view text);

std::string digest(const char* algorithm, std::span<const char> data);  // raw bytes
std::string base64(std::string_view bytes);
std::string hex(std::string_view bytes);

}  // namespace rootfs::apk
