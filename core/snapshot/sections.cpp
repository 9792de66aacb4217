// SPDX-License-Identifier: Apache-2.0
// Keeps sections, and lends them to plugins through the C interface.
#include "snapshot/sections.hpp"

#include "clone/sdk/error.hpp"

namespace vmm {
namespace {

std::string name_of(std::string_view owner, std::string_view tag) {
  return "section " + std::string(owner) + "/" + std::string(tag);
}

}  // namespace

Result<void> Sections::put(std::string_view owner, std::string_view tag, uint32_t version,
                           std::span<const std::byte> bytes) {
  const auto [place, added] = all_.try_emplace({std::string(owner), std::string(tag)},
                                               Section{version, {bytes.begin(), bytes.end()}});
  if (!added) return Error{name_of(owner, tag) + " is written twice", 0, CLONE_ERR_INTERNAL};
  return {};
}

Result<std::span<const std::byte>> Sections::get(std::string_view owner, std::string_view tag,
                                                 uint32_t newest_known) const {
  const auto found = all_.find({std::string(owner), std::string(tag)});
  if (found == all_.end()) return Error{name_of(owner, tag) + " is missing", 0, CLONE_ERR_CORRUPT};
  const uint32_t version = found->second.version;
  if (version == 0 || version > newest_known)
    return Error{name_of(owner, tag) + " has version " + std::to_string(version) + ", known are 1 to " +
                     std::to_string(newest_known),
                 0, CLONE_ERR_CORRUPT};
  return std::span<const std::byte>(found->second.bytes);
}

bool Sections::has(std::string_view owner) const {
  const auto first = all_.lower_bound({std::string(owner), std::string()});
  return first != all_.end() && first->first.first == owner;
}

Error Sections::wrong_size(std::string_view owner, std::string_view tag, size_t size_bytes, size_t unit_bytes) {
  return Error{name_of(owner, tag) + " has " + std::to_string(size_bytes) + " bytes, not (a multiple of) " +
                   std::to_string(unit_bytes),
               0, CLONE_ERR_CORRUPT};
}

SectionWriter::SectionWriter(Sections& sections, std::string owner)
    : sections_(sections),
      owner_(std::move(owner)),
      raw_{sizeof raw_, 0, this,
           [](void* context, const char* tag, uint32_t version, const void* data, uint64_t size_bytes,
              clone_err* err) noexcept {
             auto& self = *static_cast<SectionWriter*>(context);
             return clone_sdk::guarded(err, [&] {
               return self.sections_.put(self.owner_, tag, version, {static_cast<const std::byte*>(data), size_bytes});
             });
           }} {}

SectionReader::SectionReader(const Sections& sections, std::string owner)
    : sections_(sections),
      owner_(std::move(owner)),
      raw_{sizeof raw_, 0, this,
           [](void* context, const char* tag, uint32_t* version, const void** data, uint64_t* size_bytes,
              clone_err* err) noexcept -> clone_status {
             auto& self = *static_cast<SectionReader*>(context);
             return clone_sdk::guarded(err, [&]() -> Result<void> {
               const auto found = self.sections_.all().find({self.owner_, tag});
               if (found == self.sections_.all().end())
                 return Error{name_of(self.owner_, tag) + " is missing", 0, CLONE_ERR_NOT_FOUND};
               self.read_.insert(tag);
               *version = found->second.version;
               *data = found->second.bytes.data();
               *size_bytes = found->second.bytes.size();
               return {};
             });
           }} {}

Result<void> check_known(const Sections& sections, std::string_view owner,
                         const std::set<std::string, std::less<>>& known) {
  for (const auto& [key, section] : sections.all())
    if (key.first == owner && !known.contains(key.second))
      return Error{name_of(key.first, key.second) + " is unknown here", 0, CLONE_ERR_CORRUPT};
  return {};
}

Result<void> SectionReader::check_all_read() const { return check_known(sections_, owner_, read_); }

}  // namespace vmm
