// SPDX-License-Identifier: Apache-2.0
// Reads /etc/passwd and /etc/group line by line.
#include "user.hpp"

#include "files.hpp"

namespace {

constexpr size_t longest_line = 65536;  // a group may have many members
char line[longest_line];

// Calls `visit(fields, count)` for each line until it returns true. Longer lines are passed over.
template <typename Visit>
void any_line(const char* path, Visit visit) {
  const int fd = sys::open(path, open_read);
  if (fd < 0) return;
  char chunk[4096];
  size_t used = 0;
  const auto split = [&] {
    const char* fields[8] = {};
    int count = 0;
    line[used < longest_line ? used : 0] = 0;
    for (char* c = line; count < 8; ++c) {
      fields[count++] = c;
      while (*c != 0 && *c != ':') ++c;
      if (*c == 0) break;
      *c = 0;
    }
    used = 0;
    return visit(fields, count);
  };
  bool found = false;
  for (long size; !found && (size = sys::read(fd, chunk, sizeof chunk)) > 0;) {
    for (long i = 0; i < size && !found; ++i) {
      if (chunk[i] == '\n') {
        found = split();
      } else if (used < longest_line) {
        line[used++] = chunk[i];
      }
    }
  }
  if (!found && used > 0) split();
  sys::close(fd);
}

constexpr unsigned long most_id = 0xffff'fffe;  // ~0 means "none" to the kernel

bool has_member(const char* members, const char* name) {
  while (*members != 0) {
    const char* rest = after(members, name);
    if (rest && (*rest == 0 || *rest == ',')) return true;
    while (*members != 0 && *members != ',') ++members;
    if (*members == ',') ++members;
  }
  return false;
}

void add_group(User& user, unsigned gid) {
  for (int i = 0; i < user.group_count; ++i)
    if (user.groups[i] == gid) return;
  if (user.group_count < User::kMostGroups) user.groups[user.group_count++] = gid;
}

bool find_group(const char* wanted, unsigned& gid) {
  bool found = false;
  any_line("/etc/group", [&](const char* const* fields, int count) {
    unsigned long number;
    if (count < 3 || !equal(fields[0], wanted) || !parse_decimal(fields[2], most_id, number)) return false;
    gid = static_cast<unsigned>(number);
    return found = true;
  });
  unsigned long number;
  if (found || !parse_decimal(wanted, most_id, number)) return found;
  gid = static_cast<unsigned>(number);
  return true;
}

}  // namespace

long find_user(const char* wanted, User& user, Message& message) {
  Text<256> name;
  const char* group = wanted;
  for (; *group != 0 && *group != ':'; ++group) {
    const char letter[2] = {*group, 0};
    name << letter;
  }
  const bool has_group = *group == ':';
  if (has_group) ++group;

  unsigned long number = 0;
  const bool by_number = name.empty() || parse_decimal(name.c_str(), most_id, number);
  bool found = false;
  const auto take = [&](const char* const* fields, int count, bool match_name) {
    unsigned long uid, gid;
    if (count < 6 || !parse_decimal(fields[2], most_id, uid) || !parse_decimal(fields[3], most_id, gid)) return false;
    if (match_name ? !equal(fields[0], name.c_str()) : uid != number) return false;
    user.uid = static_cast<unsigned>(uid);
    user.gid = static_cast<unsigned>(gid);
    user.name << fields[0];
    user.home << fields[5];
    user.shell << (count > 6 ? fields[6] : "");
    return found = true;
  };
  if (!name.empty())
    any_line("/etc/passwd", [&](const char* const* fields, int count) { return take(fields, count, true); });
  if (!found && by_number)
    any_line("/etc/passwd", [&](const char* const* fields, int count) { return take(fields, count, false); });
  if (!found) {
    if (!by_number) {
      message << "no user '" << name.c_str() << "' in the guest's /etc/passwd";
      return -EINVAL;
    }
    user.uid = user.gid = static_cast<unsigned>(number);
    user.name << (number == 0 ? "root" : name.c_str());
    user.home << (number == 0 ? "/root" : "/");
  }
  if (user.home.empty()) user.home << "/";
  if (user.shell.empty()) user.shell << "/bin/sh";

  if (has_group) {
    if (!find_group(group, user.gid)) {
      message << "no group '" << group << "' in the guest's /etc/group";
      return -EINVAL;
    }
    add_group(user, user.gid);
    return 0;
  }
  add_group(user, user.gid);
  any_line("/etc/group", [&](const char* const* fields, int count) {
    unsigned long gid;
    if (count >= 4 && has_member(fields[3], user.name.c_str()) && parse_decimal(fields[2], most_id, gid))
      add_group(user, static_cast<unsigned>(gid));
    return false;
  });
  return 0;
}
