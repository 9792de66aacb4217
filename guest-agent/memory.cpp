// SPDX-License-Identifier: Apache-2.0
// What the compiler calls by itself where there is no C library.
using size_t = unsigned long;

extern "C" void* memcpy(void* to, const void* from, size_t size_bytes) {
  void* const start = to;
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size_bytes) : : "memory");
  return start;
}
extern "C" void* memset(void* to, int value, size_t size_bytes) {
  void* const start = to;
  asm volatile("rep stosb" : "+D"(to), "+c"(size_bytes) : "a"(value) : "memory");
  return start;
}
extern "C" void* memmove(void* to, const void* from, size_t size_bytes) {
  if (to <= from) return memcpy(to, from, size_bytes);
  auto* last_to = static_cast<char*>(to) + size_bytes - 1;
  auto* last_from = static_cast<const char*>(from) + size_bytes - 1;
  asm volatile("std\nrep movsb\ncld" : "+D"(last_to), "+S"(last_from), "+c"(size_bytes) : : "memory");
  return to;
}
