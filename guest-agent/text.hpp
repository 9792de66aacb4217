// SPDX-License-Identifier: Apache-2.0
// Text that ends in NUL, without a C library.
#pragma once

using size_t = unsigned long;

static inline size_t length(const char* text) {
  size_t count = 0;
  while (text[count] != 0) ++count;
  return count;
}

// What follows `prefix` in `text`, or null.
static inline const char* after(const char* text, const char* prefix) {
  for (; *prefix != 0; ++text, ++prefix)
    if (*text != *prefix) return nullptr;
  return text;
}

static inline bool equal(const char* a, const char* b) {
  const char* rest = after(a, b);
  return rest && *rest == 0;
}

// One line of text of bounded length, cut where it would be longer.
template <size_t capacity>
class Text {
 public:
  Text& operator<<(const char* text) {
    while (*text != 0 && used_ < capacity - 1) text_[used_++] = *text++;
    text_[used_] = 0;
    return *this;
  }
  Text& operator<<(unsigned long number) {
    char digits[21] = {};
    char* first = digits + 20;
    do *--first = static_cast<char>('0' + number % 10);
    while ((number /= 10) != 0);
    return *this << first;
  }
  const char* c_str() const { return text_; }
  size_t size() const { return used_; }
  bool empty() const { return used_ == 0; }
  bool full() const { return used_ == capacity - 1; }  // and so cut, or about to be

 private:
  char text_[capacity] = {};
  size_t used_ = 0;
};

// A decimal number up to `most`; false for anything else.
static inline bool parse_decimal(const char* text, unsigned long most, unsigned long& number) {
  number = 0;
  const char* const start = text;
  for (; *text >= '0' && *text <= '9'; ++text) {
    const unsigned long digit = static_cast<unsigned long>(*text - '0');
    if (number > (most - digit) / 10) return false;
    number = number * 10 + digit;
  }
  return text != start && *text == 0;
}
