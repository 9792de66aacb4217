// SPDX-License-Identifier: Apache-2.0
// A user of the guest, from its /etc/passwd and /etc/group.
#pragma once

#include "errors.hpp"

struct User {
  static constexpr int kMostGroups = 128;

  unsigned uid = 0, gid = 0;
  unsigned groups[kMostGroups];
  int group_count = 0;
  Text<256> name;
  Text<1024> home, shell;
};

// "" is root; otherwise NAME or NUMBER, with :GROUP or :NUMBER behind it for that group alone. -EINVAL and a message
// if there is no such user or group.
long find_user(const char* wanted, User& user, Message& message);
