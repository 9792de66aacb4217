// SPDX-License-Identifier: Apache-2.0
// Reads and verifies Alpine's indexes and packages.
#include "apk.hpp"

#include <openssl/bio.h>
#include <openssl/pem.h>
#include <zlib.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>

#include "archive.hpp"

namespace rootfs::apk {
namespace {

constexpr size_t kMostPackages = 1'000'000;
constexpr size_t kLongestLine = 1 << 20;
constexpr size_t kLargestKey = 16384;
constexpr size_t kLargestSignature = 4096;
constexpr int kSmallestKeyBits = 2048;

std::vector<std::string_view> words(std::string_view text) {
  std::vector<std::string_view> result;
  while (!text.empty()) {
    const size_t end = text.find(' ');
    if (end != 0) result.push_back(text.substr(0, end));
    text.remove_prefix(end == text.npos ? text.size() : end + 1);
  }
  return result;
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// Names become parts of URLs and of file names.
bool plain_name(std::string_view text) {
  constexpr std::string_view allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-._~";
  return !text.empty() && text.size() <= 200 && text.front() != '.' && text.find_first_not_of(allowed) == text.npos;
}

// A version is NUMBER{.NUMBER}[LETTER]{_SUFFIX[NUMBER]}[~HASH][-rNUMBER]. Each token as a comparable pair: what kind it
// is, higher kinds being newer where the other version has ended or goes on otherwise, and its value.
struct Token {
  int kind;
  std::string value;  // digits, or what compares as text

  // An end is newer than _pre, older than any number.
  enum Kind : int { alpha, beta, pre, rc, end, revision, hash, cvs, svn, git, hg, p, letter, number, fraction };
};

std::vector<Token> tokens(std::string_view version) {
  std::vector<Token> result;
  size_t at = 0;
  const auto take_digits = [&] {
    const size_t begin = at;
    while (at < version.size() && is_digit(version[at])) ++at;
    return std::string(version.substr(begin, at - begin));
  };
  while (at < version.size()) {
    const char c = version[at];
    if (is_digit(c) && result.empty()) {
      result.push_back({Token::number, take_digits()});
    } else if (c == '.') {
      ++at;
      std::string digits = take_digits();
      // With a leading zero it compares like the digits behind a decimal point.
      const bool fraction = digits.size() > 1 && digits[0] == '0';
      result.push_back({fraction ? Token::fraction : Token::number, std::move(digits)});
    } else if (c >= 'a' && c <= 'z') {
      result.push_back({Token::letter, std::string(1, c)});
      ++at;
    } else if (c == '_') {
      static constexpr std::pair<std::string_view, Token::Kind> suffixes[] = {
          {"alpha", Token::alpha}, {"beta", Token::beta}, {"pre", Token::pre}, {"rc", Token::rc}, {"cvs", Token::cvs},
          {"svn", Token::svn},     {"git", Token::git},   {"hg", Token::hg},   {"p", Token::p}};
      const std::string_view rest = version.substr(at + 1);
      const auto* suffix = std::find_if(std::begin(suffixes), std::end(suffixes),
                                        [rest](const auto& pair) { return rest.starts_with(pair.first); });
      if (suffix == std::end(suffixes)) break;
      at += 1 + suffix->first.size();
      result.push_back({suffix->second, take_digits()});
    } else if (c == '~') {
      result.push_back({Token::hash, std::string(version.substr(at))});
      at = std::min(version.find('-', at), version.size());
    } else if (version.substr(at).starts_with("-r")) {
      at += 2;
      result.push_back({Token::revision, take_digits()});
    } else {
      break;
    }
  }
  return result;
}

int sign(int value) { return (value > 0) - (value < 0); }

int compare_tokens(const Token& a, const Token& b) {
  const bool numbers =
      (a.kind == Token::number || a.kind == Token::fraction) && (b.kind == Token::number || b.kind == Token::fraction);
  if (!numbers && a.kind != b.kind) return a.kind < b.kind ? -1 : 1;
  if (a.kind == Token::letter || a.kind == Token::hash || a.kind == Token::fraction || b.kind == Token::fraction)
    return sign(a.value.compare(b.value));
  std::string_view left = a.value, right = b.value;
  left.remove_prefix(std::min(left.find_first_not_of('0'), left.size()));
  right.remove_prefix(std::min(right.find_first_not_of('0'), right.size()));
  if (left.size() != right.size()) return left.size() < right.size() ? -1 : 1;
  return sign(left.compare(right));
}

const char* digest_of_signature(std::string_view kind) {
  if (kind == "RSA") return "SHA1";
  if (kind == "RSA256") return "SHA256";
  if (kind == "RSA512") return "SHA512";
  return nullptr;
}

class Resolver {
 public:
  explicit Resolver(const std::vector<Package>& packages) {
    for (const Package& package : packages) {
      by_name_.emplace(package.name, Offer{&package, package.version, true});
      for (const Dependency& provided : package.provides)
        by_name_.emplace(provided.name, Offer{&package, provided.version, false});
    }
  }

  Result<void> need(const Dependency& wanted, const std::string& by) {
    if (wanted.conflict) {
      conflicts_.emplace_back(wanted, by);
      return {};
    }
    const auto [begin, end] = by_name_.equal_range(wanted.name);
    const Offer* best = nullptr;
    for (auto offer = begin; offer != end; ++offer) {
      if (!satisfies(offer->second.version, wanted)) continue;
      if (chosen(*offer->second.package)) return {};
      const auto taken = names_.find(offer->second.package->name);
      if (taken == names_.end() && (!best || better(offer->second, *best))) best = &offer->second;
    }
    if (!best) {
      const bool known = begin != end;
      return Error{by + " needs " + wanted.name + wanted.relation + wanted.version + ", which " +
                   (known ? "no package that can be chosen satisfies" : "is in none of the repositories")};
    }
    const Package& package = *best->package;
    names_[package.name] = &package;
    for (const Dependency& dependency : package.depends) TRY(need(dependency, package.name));
    order_.push_back(&package);
    return {};
  }

  Result<void> check_conflicts() const {
    for (const auto& [conflict, by] : conflicts_) {
      const auto [begin, end] = by_name_.equal_range(conflict.name);
      for (auto offer = begin; offer != end; ++offer)
        if (chosen(*offer->second.package) && offer->second.package->name != by &&
            satisfies(offer->second.version, conflict))
          return Error{by + " and " + offer->second.package->name + " exclude each other"};
    }
    return {};
  }

  std::vector<const Package*> order() { return std::move(order_); }

 private:
  struct Offer {
    const Package* package;
    std::string version;
    bool own_name;
  };

  bool chosen(const Package& package) const {
    const auto found = names_.find(package.name);
    return found != names_.end() && found->second == &package;
  }
  static bool better(const Offer& a, const Offer& b) {
    if (a.own_name != b.own_name) return a.own_name;
    if (!a.own_name && a.package->provider_priority != b.package->provider_priority)
      return a.package->provider_priority > b.package->provider_priority;
    return a.package->name == b.package->name ? compare_versions(a.package->version, b.package->version) > 0
                                              : a.package->name < b.package->name;
  }

  std::multimap<std::string, Offer> by_name_;
  std::map<std::string, const Package*> names_;
  std::vector<std::pair<Dependency, std::string>> conflicts_;
  std::vector<const Package*> order_;
};

}  // namespace

Dependency parse_dependency(std::string_view text) {
  Dependency result;
  if (text.starts_with('!')) {
    result.conflict = true;
    text.remove_prefix(1);
  }
  const size_t relation = std::min(text.find_first_of("<>=~"), text.size());
  // "name@tag" chooses a tagged repository, of which we have none.
  result.name = text.substr(0, std::min(relation, text.find('@')));
  const size_t version = std::min(text.find_first_not_of("<>=~", relation), text.size());
  result.relation = text.substr(relation, version - relation);
  result.version = text.substr(version);
  return result;
}

int compare_versions(std::string_view a, std::string_view b) {
  const std::vector<Token> left = tokens(a), right = tokens(b);
  const Token end{Token::end, ""};
  for (size_t i = 0; i < std::max(left.size(), right.size()); ++i) {
    const int result = compare_tokens(i < left.size() ? left[i] : end, i < right.size() ? right[i] : end);
    if (result != 0) return result;
  }
  return 0;
}

bool satisfies(std::string_view version, const Dependency& wanted) {
  if (wanted.relation.empty()) return true;
  if (version.empty()) return false;
  if (wanted.relation.find('~') != std::string::npos)
    return version.starts_with(wanted.version) &&
           (version.size() == wanted.version.size() || !is_digit(version[wanted.version.size()]));
  const int order = compare_versions(version, wanted.version);
  return (order < 0 && wanted.relation.find('<') != std::string::npos) ||
         (order > 0 && wanted.relation.find('>') != std::string::npos) ||
         (order == 0 && wanted.relation.find('=') != std::string::npos);
}

Result<std::vector<Package>> parse_index(std::string_view text, const std::string& repository) {
  std::vector<Package> packages;
  Package package;
  size_t line_number = 0;
  const auto finish = [&]() -> Result<void> {
    if (package.record.empty()) return {};
    const std::string where = "index of " + repository + ", line " + std::to_string(line_number);
    if (!plain_name(package.name) || !plain_name(package.version))
      return Error{where + ": a package without a sound name and version"};
    if (!package.checksum.starts_with("Q1") && !package.checksum.starts_with("Q2"))
      return Error{where + ": " + package.name + " has no checksum that is known (Q1, Q2)"};
    if (packages.size() >= kMostPackages) return Error{where + ": too many packages"};
    package.repository = repository;
    packages.push_back(std::exchange(package, {}));
    return {};
  };
  while (!text.empty()) {
    const size_t end = text.find('\n');
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(end == text.npos ? text.size() : end + 1);
    ++line_number;
    if (line.empty()) {
      TRY(finish());
      continue;
    }
    if (line.size() < 2 || line[1] != ':' || line.size() > kLongestLine)
      return Error{"index of " + repository + ", line " + std::to_string(line_number) + ": not a field"};
    const std::string_view value = line.substr(2);
    package.record += std::string(line) + "\n";
    switch (line[0]) {
      case 'C':
        package.checksum = value;
        break;
      case 'P':
        package.name = value;
        break;
      case 'V':
        package.version = value;
        break;
      case 'D':
        for (std::string_view word : words(value)) package.depends.push_back(parse_dependency(word));
        break;
      case 'p':
        for (std::string_view word : words(value)) package.provides.push_back(parse_dependency(word));
        break;
      case 'S':
        std::from_chars(value.data(), value.data() + value.size(), package.size_bytes);
        break;
      case 'k':
        std::from_chars(value.data(), value.data() + value.size(), package.provider_priority);
        break;
      default:
        break;
    }
  }
  TRY(finish());
  return packages;
}

Result<std::vector<const Package*>> resolve(const std::vector<Package>& packages,
                                            const std::vector<std::string>& wanted) {
  Resolver resolver(packages);
  for (const std::string& name : wanted) TRY(resolver.need(parse_dependency(name), "the image"));
  TRY(resolver.check_conflicts());
  return resolver.order();
}

Result<std::vector<std::span<const char>>> split_gzip(std::span<const char> data, size_t count) {
  std::vector<std::span<const char>> parts;
  std::vector<unsigned char> scrap(1 << 16);
  for (size_t number = 0; number < count; ++number) {
    z_stream stream{};
    if (inflateInit2(&stream, 16 + MAX_WBITS) != Z_OK) return Error{"zlib: out of memory"};
    stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(data.data()));
    stream.avail_in = static_cast<uInt>(std::min<size_t>(data.size(), UINT32_MAX));
    int status = Z_OK;
    // Signatures, controls and indexes are small; what inflates without end is none of them.
    constexpr uint64_t limit_bytes = 256 << 20;
    while (status == Z_OK && stream.total_out <= limit_bytes) {
      stream.next_out = scrap.data();
      stream.avail_out = static_cast<uInt>(scrap.size());
      status = inflate(&stream, Z_NO_FLUSH);
    }
    const size_t used = stream.total_in;
    inflateEnd(&stream);
    if (status != Z_STREAM_END) return Error{"part " + std::to_string(number + 1) + " is not a sound gzip stream"};
    parts.push_back(data.first(used));
    data = data.subspan(used);
  }
  parts.push_back(data);
  return parts;
}

Result<Keys> Keys::load(const std::string& folder) {
  Keys keys;
  keys.folder_ = folder;
  std::error_code error;
  for (std::filesystem::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    if (!name.ends_with(".pub") || entry->is_directory() || entry->file_size() > kLargestKey) continue;
    std::ifstream file(entry->path(), std::ios::binary);
    std::stringstream text;
    text << file.rdbuf();
    const std::string content = text.str();
    const std::unique_ptr<BIO, decltype(&BIO_free)> input(
        BIO_new_mem_buf(content.data(), static_cast<int>(content.size())), BIO_free);
    std::unique_ptr<EVP_PKEY, Free> key(PEM_read_bio_PUBKEY(input.get(), nullptr, nullptr, nullptr));
    if (!key || EVP_PKEY_get_base_id(key.get()) != EVP_PKEY_RSA)
      return Error{entry->path().string() + ": not a public RSA key in PEM form"};
    if (EVP_PKEY_get_bits(key.get()) < kSmallestKeyBits)
      return Error{entry->path().string() + ": a key of fewer than " + std::to_string(kSmallestKeyBits) + " bits"};
    keys.texts_[name] = content;
    keys.keys_[name] = std::move(key);
  }
  if (error) return errno_error("the folder of keys " + folder, error.value());
  if (keys.keys_.empty()) return Error{"the folder of keys " + folder + " holds no *.pub"};
  return keys;
}

Result<std::string> Keys::verify(std::span<const char> signatures, std::span<const char> signed_bytes,
                                 Spool& spool) const {
  Tree tree;
  TRY(unpack(bytes_of(signatures), tree, spool));
  std::string by;
  for (const auto& [name, inode] : tree.root().children) {
    constexpr std::string_view prefix = ".SIGN.";
    if (!name.starts_with(prefix) || !inode->is_regular()) return Error{"not signed"};
    const size_t dot = name.find('.', prefix.size());
    if (dot == name.npos) continue;
    const char* algorithm = digest_of_signature(std::string_view(name).substr(prefix.size(), dot - prefix.size()));
    const std::string key_name = name.substr(dot + 1);
    by += (by.empty() ? "" : ", ") + key_name;
    const auto key = keys_.find(key_name);
    if (!algorithm || key == keys_.end()) continue;
    const std::string signature = TRY(read_text(inode->content, kLargestSignature));
    const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(EVP_MD_CTX_new(), EVP_MD_CTX_free);
    if (EVP_DigestVerifyInit(context.get(), nullptr, EVP_get_digestbyname(algorithm), nullptr, key->second.get()) ==
            1 &&
        EVP_DigestVerify(context.get(), reinterpret_cast<const unsigned char*>(signature.data()), signature.size(),
                         reinterpret_cast<const unsigned char*>(signed_bytes.data()), signed_bytes.size()) == 1)
      return key_name;
    return Error{"its signature by " + key_name + " is wrong"};
  }
  if (by.empty()) return Error{"not signed"};
  return Error{"signed by " + by + ", which is not among the keys in " + folder_};
}

Result<PackageParts> open_package(std::span<const char> file, const Package& expected, const Keys& keys, Spool& spool) {
  const auto parts = TRY(split_gzip(file, 2));
  const std::span<const char> control = parts[1];
  TRY(keys.verify(parts[0], control, spool));
  const bool sha256 = expected.checksum.starts_with("Q2");
  if (expected.checksum.substr(2) != base64(digest(sha256 ? "SHA256" : "SHA1", control)))
    return Error{"it is not the package that the index lists"};
  PackageParts result;
  TRY(unpack(bytes_of(control), result.control, spool));
  const InodePointer info = result.control.find(".PKGINFO");
  if (!info || !info->is_regular()) return Error{"it has no .PKGINFO"};
  const auto fields = parse_pkginfo(TRY(read_text(info->content, kLongestLine)));
  const auto hash = fields.find("datahash");
  if (hash == fields.end()) return Error{"its .PKGINFO has no datahash"};
  if (hash->second != hex(digest("SHA256", parts[2]))) return Error{"its data is not what its signed part says"};
  result.data = parts[2];
  return result;
}

std::multimap<std::string, std::string> parse_pkginfo(std::string_view text) {
  std::multimap<std::string, std::string> fields;
  while (!text.empty()) {
    const size_t end = text.find('\n');
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(end == text.npos ? text.size() : end + 1);
    const size_t equals = line.find(" = ");
    if (!line.starts_with('#') && equals != line.npos) fields.emplace(line.substr(0, equals), line.substr(equals + 3));
  }
  return fields;
}

std::string digest(const char* algorithm, std::span<const char> data) {
  unsigned char result[EVP_MAX_MD_SIZE];
  unsigned size_bytes = 0;
  EVP_Digest(data.data(), data.size(), result, &size_bytes, EVP_get_digestbyname(algorithm), nullptr);
  return {reinterpret_cast<const char*>(result), size_bytes};
}

std::string base64(std::string_view bytes) {
  std::string result((bytes.size() + 2) / 3 * 4, '\0');
  EVP_EncodeBlock(reinterpret_cast<unsigned char*>(result.data()), reinterpret_cast<const unsigned char*>(bytes.data()),
                  static_cast<int>(bytes.size()));
  return result;
}

std::string hex(std::string_view bytes) {
  constexpr char digits[] = "0123456789abcdef";
  std::string result;
  for (const char c : bytes) {
    result += digits[static_cast<unsigned char>(c) >> 4];
    result += digits[c & 15];
  }
  return result;
}

}  // namespace rootfs::apk
